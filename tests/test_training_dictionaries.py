"""The loop with what it is for: dictionaries on activations of a language model, stopped and started again."""

import os
import signal
from pathlib import Path

import pytest
import torch
from experiment_parts import small_target
from training_parts import QUIET

from nndecomp import build
from nndecomp.config.compose import compose
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.training.log import Log
from nndecomp.training.loop import train
from nndecomp.training.preemption import Preempted


class Stopping:
    """A stream that has the process told to stop while it draws its n-th batch."""

    def __init__(self, stream, n: int) -> None:
        self.stream, self.left = stream, n
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def next_batch(self) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.stream.next_batch()


def attempt(out: Path, model: Path, stop_after: int = -1) -> dict[str, DictionaryObjective]:
    """Builds everything anew, as a job that starts does, and trains."""
    cfg = compose(
        "exp_000_quickstart", ["+scale=smoke", f"target.path={model}", "training.n_tokens=4096", "compare.k=[4]"]
    )
    cfg.training.batch_tokens, cfg.training.log_every, cfg.training.checkpoint_every = 128, 5, 10
    target = build.target(cfg)
    configs = {name: each for name, each in build.decompositions(cfg).items() if not each.architecture.is_baseline}
    dictionaries = {
        name: build_dictionary(each, target.shape, cfg.seed, target.device, target.name)
        for name, each in configs.items()
    }
    sites = sorted({site for each in dictionaries.values() for site in (*each.reads, *each.writes)})
    rows, scales = build.stream(cfg, target, sites), build.scales(cfg, target, sites)
    for each in configs.values():
        each.dead_after_tokens = 1000  # within the run, so that aux-k has work
    objectives = {
        name: DictionaryObjective(each, configs[name], rows.layout, scales) for name, each in dictionaries.items()
    }
    with Log(out, QUIET) as log:
        train(objectives, Stopping(rows, stop_after), cfg.training, out, log=log, description="dictionaries")
    return objectives


@pytest.mark.slow
def test_dictionaries_stopped_twice_end_as_if_never_stopped(tmp_path: Path):
    """Weights, liveness, thresholds, optimiser, shuffle buffer and position in the text, bit for bit."""
    model = small_target(tmp_path / "model")
    whole = attempt(tmp_path / "whole", model)
    for n in (13, 6):
        with pytest.raises(Preempted):
            attempt(tmp_path / "cut", model, stop_after=n)
    resumed = attempt(tmp_path / "cut", model)
    assert len(whole) >= 2
    for name, objective in whole.items():
        mine, theirs = objective.state_dict(), resumed[name].state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
        x = torch.randn(7, objective.dictionary.read_layout.width)
        assert torch.equal(objective.finished()(x)[0], resumed[name].finished()(x)[0])
