"""One loop for anything with a loss: several objectives on one stream, each with its own optimiser.

    batch -> for each objective: loss, backward, before_step, clipped_apart, clip, optimiser, after_step, take_resets

Between two log points nothing is asked of the device. A run that is killed, at whatever instant, and started again with
the same output directory ends with the same weights and metrics, bit for bit, as one that never was.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nndecomp.config.schema import DType, TrainingConfig
from nndecomp.decompositions.row_gradients import collected
from nndecomp.training.log import Log
from nndecomp.training.objective import Objective, Stream
from nndecomp.training.optimisers import build_optimiser, clip_gradients, forget, gradient_norms, set_learning_rate
from nndecomp.training.preemption import preemption
from nndecomp.training.progress import Clock, Progress, Waits
from nndecomp.training.randomness import Lanes, random_state, random_state_kept, set_random_state
from nndecomp.training.row_adam import RowAdam, by_rows
from nndecomp.training.schedules import learning_rate
from nndecomp.training.state import check_facts, read_facts, read_state, save_state, saved_steps, shapes, tidy
from nndecomp.training.utilisation import Utilisation
from nndecomp.training.window import Window, check_parameters

logger = logging.getLogger(__name__)
STREAM = "(stream)"  # the stream's lane of random numbers; no objective is called so
# Settings that say when something is written or looked at, or what trains beside. They may change between two starts of a run.
OCCASIONS = ("checkpoint_every", "evaluate_every", "log_every", "share_stream")


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
        with collected(by_rows(self.optimiser, self.parameters)) as rows:
            loss.backward()
            rows.settle()
            self.objective.before_step()

        norms = gradient_norms(parameters, rows)
        self.window.add(loss, terms, norms)
        for own, limit in self.objective.clipped_apart():
            clip_gradients(own, gradient_norms(own).norm(), limit)
            norms = gradient_norms(parameters, rows)
        clip = torch.ones((), device=self.device)
        if self.cfg.clip_norm is not None:
            clip = clip_gradients(parameters, norms.norm(), self.cfg.clip_norm)

        set_learning_rate(self.optimiser, learning_rate(step, self.cfg))
        if isinstance(self.optimiser, RowAdam):
            self.optimiser.step_rows(rows, clip)
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


class Run:
    """Objectives that are trained on one stream and saved in one directory, step by step; goes on from <out>/checkpoint if
    there is one.

    evaluate: number of steps made -> held-out metrics by name. It sees the objectives in eval mode and without gradients,
    and leaves no trace in training: random numbers and modes are put back after it. utilisation: logged beside the speed.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        stream: Stream,
        cfg: TrainingConfig,
        out: Path,
        *,
        log: Log,
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
        utilisation: Utilisation | None = None,
    ) -> None:
        assert objectives, "there is nothing to train"
        assert STREAM not in objectives, f"{STREAM} is the name of the stream's random numbers, not of an objective"
        self.objectives, self.stream, self.cfg, self.out, self.log = objectives, stream, cfg, out, log
        self.evaluate, self.utilisation = evaluate, utilisation
        self.trainees = [Trainee(name, objective, cfg) for name, objective in objectives.items()]
        self.lanes = Lanes([STREAM, *objectives])
        self.directory = out / "checkpoint"
        self.facts = {
            "training": settled(cfg),
            "objectives": {name: shapes(objective.state_dict()) for name, objective in objectives.items()},
            "own": {each.name: {**settled(each.cfg), "lr_shares": each.lr_shares} for each in self.trainees},
        }
        self.loss = self.waiting = math.nan  # as logged last: mean over objectives and steps; share of the time
        tidy(self.directory)
        self.made = self.saved = next(reversed(saved_steps(self.directory)), 0)  # steps
        self._restore() if self.made else log.rewind(0)
        for objective in objectives.values():
            objective.train()

    @property
    def done(self) -> bool:
        return self.made == self.cfg.n_steps

    def step(self, clock: Clock) -> bool:
        """The next step, and what is written after it. Returns whether it was a log point."""
        with clock.waiting(), self.lanes.lane(STREAM):
            batch = self.stream.next_batch()
        for trainee in self.trainees:
            with self.lanes.lane(trainee.name):
                trainee.step(batch, self.made)
        self.made += 1
        cfg = self.cfg
        clock.count(cfg.batch_tokens)
        logs = self.made % cfg.log_every == 0 or self.done
        if logs:
            rows = [metrics(trainee, self.made, cfg.batch_tokens) for trainee in self.trainees]
            timing = clock.lap()
            if self.utilisation is not None:
                timing |= self.utilisation.row(timing["tokens_per_s"], cfg.batch_tokens)
            for row in rows:
                self.log.write(self.made, {**row, "timing": timing})
            self.loss, self.waiting = sum(row["loss"] for row in rows) / len(rows), timing["waiting_share"]
        if self.evaluate is not None and (self.done or (cfg.evaluate_every and self.made % cfg.evaluate_every == 0)):
            heldout = look(self.evaluate, self.objectives, self.made)
            self.log.write(self.made, {"tokens": self.made * cfg.batch_tokens, "name": "heldout", **heldout})
        if self.made % cfg.checkpoint_every == 0 or self.done:
            self.keep()
        return logs

    def keep(self) -> None:
        """Saves the state after the steps made, unless it is saved already."""
        if self.saved == self.made:
            return
        for trainee in self.trainees:
            check_finite(trainee, self.made)
        state = {
            "trainees": {trainee.name: trainee.state_dict() for trainee in self.trainees},
            "stream": self.stream.state_dict(),
            "random": random_state(),
            "lanes": self.lanes.states,
        }
        save_state(self.directory, self.made, state, {"log_bytes": self.log.position(), **self.facts})
        self.saved = self.made

    def _restore(self) -> None:
        saved = read_facts(self.directory, self.made)
        log_bytes = saved.pop("log_bytes")
        saved.pop("step")
        check_facts(self.directory, saved, self.facts)
        state = read_state(self.directory, self.made)
        for trainee in self.trainees:
            trainee.load_state_dict(state["trainees"][trainee.name])
        self.stream.load_state_dict(state["stream"])
        set_random_state(state["random"])
        self.lanes.states = state["lanes"]
        self.log.rewind(log_bytes)
        logger.info("going on from step %d of %d", self.made, self.cfg.n_steps)


def train(
    objectives: Mapping[str, Objective],
    stream: Stream,
    cfg: TrainingConfig,
    out: Path,
    *,
    log: Log,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    utilisation: Utilisation | None = None,
    description: str,
) -> None:
    """Trains `objectives`, in place, for cfg.n_steps steps of `stream`; goes on from <out>/checkpoint if there is one.

    Raises NonFiniteError (naming decomposition, step and tensor; nothing that is not finite is ever saved), SettingError
    (a checkpoint made under other settings), and Preempted (a signal said stop; the state is saved).
    """
    train_all([Run(objectives, stream, cfg, out, log=log, evaluate=evaluate, utilisation=utilisation)], description)


def train_all(runs: Sequence[Run], description: str) -> None:
    """Trains every run to its end, all at the same step: streams may be views of one. Raises what `train` raises."""
    waits = Waits()
    clocks = [Clock(waits) for _ in runs]
    total, made = (
        sum(run.cfg.batch_tokens * steps for run, steps in zip(runs, each, strict=True))
        for each in ([run.cfg.n_steps for run in runs], [run.made for run in runs])
    )
    with preemption() as signals, Progress(description, total, made) as progress:
        while going := [(run, clock) for run, clock in zip(runs, clocks, strict=True) if not run.done]:
            for run, clock in going:
                if run.step(clock):
                    progress.show(f"loss {run.loss:.4g}, waiting {run.waiting:.0%}")
                progress.advance(run.cfg.batch_tokens)
            left = [run for run, _ in going if not run.done]
            if signals.received:
                for run in left:
                    run.keep()
            if signals.received and left:
                places = ", ".join(f"step {run.made} of {run.cfg.n_steps} in {run.out}" for run in left)
                signals.leave(f"{description} was told to stop and is saved at {places}")


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
