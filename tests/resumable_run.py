"""A training run that tests kill and start again, in processes of its own.

As a program, it forks one process for each line "<directory> <seconds a batch>" it reads, says its process id and, once
it has ended, its exit status: importing torch once makes a start cost milliseconds.
"""

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from training_parts import QUIET, Regression, Rows, training

from nndecomp.training.log import Log
from nndecomp.training.loop import train

N_STEPS = 120
SETTINGS: dict[str, Any] = {"log_every": 7, "checkpoint_every": 10, "evaluate_every": 25, "lr_warmup": 0.1}


class Heavy(Regression):
    """Some ballast beside the regression, so that writing a checkpoint takes a while."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.register_buffer("ballast", torch.randn(2**14))


class Drawing(Rows):
    """Also draws from the global generators, which a restart has to restore."""

    def next_batch(self) -> Tensor:
        return super().next_batch() + 0.01 * torch.rand(()) + 0.01 * random.random() + 0.01 * float(np.random.rand())


def attempt(out: Path, seconds: float, seed: int = 0) -> None:
    """One start of the run: what a job does, from its beginning."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    objectives = {"a": Heavy(dropout=0.5), "b": Heavy(dropout=0.1)}
    with Log(out, QUIET) as log:
        train(
            objectives,
            Drawing(seconds=seconds),
            training(N_STEPS, **SETTINGS),
            out,
            log=log,
            evaluate=lambda step: {"draw": random.random()},
            description="resumable",
        )


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        directory, seconds = line.rsplit(maxsplit=1)
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            attempt(Path(directory), float(seconds))
            os._exit(0)


if __name__ == "__main__":
    serve()
