"""One loop for anything with a loss: several objectives on one stream, each with its own optimiser.

    batch -> for each objective: loss, backward, before_step, clipped_apart, clip, optimiser, after_step, take_resets

Between two log points nothing is asked of the device. A run that is killed, at whatever instant, and started again with
the same output directory ends with the same weights and metrics, bit for bit, as one that never was.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nndecomp.config.schema import DType, TrainingConfig
from nndecomp.training.log import Log
from nndecomp.training.objective import Objective, Stream
from nndecomp.training.optimisers import build_optimiser, clip_gradients, forget, gradient_norms, set_learning_rate
from nndecomp.training.preemption import preemption
from nndecomp.training.progress import Clock, Progress
from nndecomp.training.randomness import Lanes, random_state, random_state_kept, set_random_state
from nndecomp.training.schedules import learning_rate
from nndecomp.training.state import check_facts, read_facts, read_state, save_state, saved_steps, shapes, tidy
from nndecomp.training.window import Window, check_parameters

logger = logging.getLogger(__name__)
STREAM = "(stream)"  # the stream's lane of random numbers; no objective is called so
# Settings that say when something is written or looked at. They may change between two starts of a run.
OCCASIONS = ("checkpoint_every", "evaluate_every", "log_every")


class Trainee:
    """One objective with its optimiser and what was measured since the last log point."""

    def __init__(self, name: str, objective: Objective, cfg: TrainingConfig) -> None:
        self.name, self.objective, self.cfg = name, objective, objective.own_training(cfg)
        self.parameters = {key: p for key, p in objective.named_parameters() if p.requires_grad}
        assert self.parameters, f"{name} has no parameters to train"
        for key, parameter in self.parameters.items():
            assert parameter.dtype == torch.float32, f"{name}: parameter {key} is {parameter.dtype}, train in float32"
        self.device = next(iter(self.parameters.values())).device
        self.lr_shares = dict(objective.lr_shares())
        self.optimiser = build_optimiser(self.parameters, self.cfg, self.lr_shares)
        self.window = Window(name, list(self.parameters))

    def step(self, batch: Any, step: int) -> None:
        """Step `step` = 0 .. n_steps - 1, on the device and without waiting for it."""
        parameters: list[nn.Parameter] = list(self.parameters.values())
        bf16 = self.cfg.autocast is DType.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            loss, terms = self.objective.loss(batch, step / self.cfg.n_steps)
        self.optimiser.zero_grad()
        loss.backward()
        self.objective.before_step()

        norms = gradient_norms(parameters)
        self.window.add(loss, terms, norms)
        for own, limit in self.objective.clipped_apart():
            clip_gradients(own, gradient_norms(own).norm(), limit)
            norms = gradient_norms(parameters)
        if self.cfg.clip_norm is not None:
            clip_gradients(parameters, norms.norm(), self.cfg.clip_norm)

        set_learning_rate(self.optimiser, learning_rate(step, self.cfg))
        self.optimiser.step()
        self.objective.after_step()
        for parameter, rows in self.objective.take_resets():
            forget(self.optimiser, parameter, rows)

    def state_dict(self) -> dict[str, Any]:
        return {
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "window": self.window.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.window.load_state_dict(state["window"], self.device)


def train(
    objectives: Mapping[str, Objective],
    stream: Stream,
    cfg: TrainingConfig,
    out: Path,
    *,
    log: Log,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    description: str,
) -> None:
    """Trains `objectives`, in place, for cfg.n_steps steps of `stream`; goes on from <out>/checkpoint if there is one.

    evaluate: number of steps made -> held-out metrics by name. It sees the objectives in eval mode and without gradients,
    and leaves no trace in training: random numbers and modes are put back after it.

    Raises NonFiniteError (naming decomposition, step and tensor; nothing that is not finite is ever saved), SettingError
    (a checkpoint made under other settings), and Preempted (a signal said stop; the state is saved).
    """
    assert objectives, "there is nothing to train"
    assert STREAM not in objectives, f"{STREAM} is the name of the stream's random numbers, not of an objective"
    trainees = [Trainee(name, objective, cfg) for name, objective in objectives.items()]
    lanes = Lanes([STREAM, *objectives])
    directory = out / "checkpoint"
    facts = {
        "training": settled(cfg),
        "objectives": {name: shapes(objective.state_dict()) for name, objective in objectives.items()},
        "own": {trainee.name: {**settled(trainee.cfg), "lr_shares": trainee.lr_shares} for trainee in trainees},
    }

    def save(step: int) -> None:
        for trainee in trainees:
            check_finite(trainee, step)
        state = {
            "trainees": {trainee.name: trainee.state_dict() for trainee in trainees},
            "stream": stream.state_dict(),
            "random": random_state(),
            "lanes": lanes.states,
        }
        save_state(directory, step, state, {"log_bytes": log.position(), **facts})

    tidy(directory)
    first = next(reversed(saved_steps(directory)), 0)
    if first:
        saved = read_facts(directory, first)
        log_bytes = saved.pop("log_bytes")
        saved.pop("step")
        check_facts(directory, saved, facts)
        state = read_state(directory, first)
        for trainee in trainees:
            trainee.load_state_dict(state["trainees"][trainee.name])
        stream.load_state_dict(state["stream"])
        set_random_state(state["random"])
        lanes.states = state["lanes"]
        log.rewind(log_bytes)
        logger.info("going on from step %d of %d", first, cfg.n_steps)
    else:
        log.rewind(0)

    for objective in objectives.values():
        objective.train()
    tokens = cfg.batch_tokens
    clock = Clock()
    with preemption() as signals, Progress(description, cfg.n_steps * tokens, first * tokens) as progress:
        for step in range(first, cfg.n_steps):
            with clock.waiting(), lanes.lane(STREAM):
                batch = stream.next_batch()
            for trainee in trainees:
                with lanes.lane(trainee.name):
                    trainee.step(batch, step)
            clock.count(tokens)
            progress.advance(tokens)

            made = step + 1
            last = made == cfg.n_steps
            if made % cfg.log_every == 0 or last:
                rows = [metrics(trainee, made, tokens) for trainee in trainees]
                timing = clock.lap()
                for row in rows:
                    log.write(made, {**row, "timing": timing})
                progress.show(f"loss {sum(row['loss'] for row in rows) / len(rows):.4g}")
            if evaluate is not None and (last or (cfg.evaluate_every and made % cfg.evaluate_every == 0)):
                log.write(made, {"tokens": made * tokens, "name": "heldout", **look(evaluate, objectives, made)})
            if made % cfg.checkpoint_every == 0 or last or signals.received:
                save(made)
            if signals.received and not last:
                signals.leave(f"{description} was told to stop and is saved at step {made} of {cfg.n_steps} in {out}")


def settled(cfg: TrainingConfig) -> dict[str, Any]:
    """The settings that a run cannot change between two starts, as JSON."""
    plain = {key: value.value if isinstance(value, Enum) else value for key, value in asdict(cfg).items()}
    return {key: value for key, value in plain.items() if key not in OCCASIONS}


def check_finite(trainee: Trainee, made: int) -> None:
    """Raises NonFiniteError if anything seen since the last log point, or a parameter now, is not finite."""
    if trainee.window.rows:
        trainee.window.read(made)
    check_parameters(trainee.name, trainee.parameters, made)


def metrics(trainee: Trainee, made: int, batch_tokens: int) -> dict[str, Any]:
    """A row of the log after `made` steps: means over the steps since the last row."""
    check_finite(trainee, made)
    lr = learning_rate(made - 1, trainee.cfg)
    return {"tokens": made * batch_tokens, "name": trainee.name, **trainee.window.means(made), "lr": lr}


def look(
    evaluate: Callable[[int], Mapping[str, float]], objectives: Mapping[str, Objective], made: int
) -> dict[str, float]:
    """Held-out metrics. Whatever the callback draws, training goes on as if it had not been called."""
    with random_state_kept(), torch.no_grad():
        for objective in objectives.values():
            objective.train(False)
        values = {key: float(value) for key, value in evaluate(made).items()}
    for objective in objectives.values():
        objective.train()
    return values
