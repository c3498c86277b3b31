"""A run that is killed, at any instant, and started again ends as one that never was: same weights, same metrics."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resumable_run import N_STEPS, SETTINGS, attempt

from nndecomp.training.preemption import EXIT_STATUS

EVERY = SETTINGS["checkpoint_every"]


class Start:
    """One process that trains in `out`, with `seconds` spent on each batch."""

    def __init__(self, server: "subprocess.Popen[str]", out: Path, seconds: float) -> None:
        assert server.stdin is not None and server.stdout is not None
        self.out, self.answers = out, server.stdout
        print(out, seconds, file=server.stdin, flush=True)
        self.pid = int(self.answers.readline())

    def status(self) -> int:
        """Waits for the end; minus the signal's number for a process that was killed."""
        return int(self.answers.readline())

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Looks without pause. Nothing here takes a minute unless it never comes."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "waited for a minute"

    def wait_until_it_trains(self) -> None:
        before = metrics(self.out)
        self.wait_for(lambda: metrics(self.out) != before)

    def tell(self, number: signal.Signals) -> int:
        os.kill(self.pid, number)
        return self.status()


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[Path, float], Start]]:
    program = Path(__file__).with_name("resumable_run.py")
    server = subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with server:
        yield lambda out, seconds=0.0: Start(server, out, seconds)


@pytest.fixture(scope="module")
def undisturbed(start: Callable[..., Start], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("undisturbed")
    assert start(out).status() == 0
    return outcome(out)


def metrics(out: Path) -> bytes:
    path = out / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def outcome(out: Path) -> list[Any]:
    """Every number of the final state, and the metrics without what depends on the machine's speed."""
    assert [entry.name for entry in (out / "checkpoint").iterdir()] == [f"step_{N_STEPS}"]
    rows = [json.loads(line) for line in metrics(out).splitlines()]
    state = torch.load(out / f"checkpoint/step_{N_STEPS}/state.pt", weights_only=True)
    return [values(state), [{key: value for key, value in row.items() if key != "timing"} for row in rows]]


def values(tree: Any) -> Any:
    """Nested plain values, so that == compares every bit of every tensor (none of them is NaN)."""
    match tree:
        case torch.Tensor():
            return str(tree.dtype), tree.tolist()
        case dict():
            return {key: values(value) for key, value in tree.items()}
        case list() | tuple():
            return [values(value) for value in tree]
        case _:
            return tree


def test_killed_at_random_instants(start: Callable[..., Start], undisturbed: Any, tmp_path: Path):
    draw = random.Random(0)
    for _ in range(3):
        process = start(tmp_path, 0.01)  # too slow to finish between two kills
        process.wait_until_it_trains()
        time.sleep(draw.uniform(0.0, 0.15))
        assert process.tell(signal.SIGKILL) == -signal.SIGKILL
    assert start(tmp_path).status() == 0
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize("name", ["state.pt", "state.json"])
def test_killed_while_a_checkpoint_is_written(start: Callable[..., Start], undisturbed: Any, tmp_path: Path, name: str):
    """Each kill comes as soon as a file of a half-written checkpoint is there."""
    half_written = 0
    for nth in range(1, 4):
        process = start(tmp_path, 0.001)
        directory = tmp_path / "checkpoint"
        later = [directory / f"step_{step}.partial" for step in range(nth * EVERY, N_STEPS, EVERY)]
        process.wait_for(lambda later=later: any((partial / name).exists() for partial in later))
        assert process.tell(signal.SIGKILL) == -signal.SIGKILL
        half_written += any(partial.exists() for partial in later)
    assert half_written >= 1, f"only {half_written} of 3 kills met a checkpoint being written"
    assert start(tmp_path).status() == 0
    assert outcome(tmp_path) == undisturbed


def test_told_to_stop_and_started_again(start: Callable[..., Start], undisturbed: Any, tmp_path: Path):
    """SIGTERM, as before preemption: the process saves, and leaves with a status of its own."""
    for _ in range(2):
        process = start(tmp_path, 0.01)
        process.wait_until_it_trains()
        assert process.tell(signal.SIGTERM) == EXIT_STATUS
    assert start(tmp_path).status() == 0
    assert outcome(tmp_path) == undisturbed


def test_the_newest_whole_checkpoint_counts(start: Callable[..., Start], undisturbed: Any, tmp_path: Path):
    """As after a kill between the rename of a checkpoint and the removal of the one before, half of which is gone."""
    process = start(tmp_path, 0.01)
    process.wait_for((tmp_path / f"checkpoint/step_{5 * EVERY}").exists)
    assert process.tell(signal.SIGKILL) == -signal.SIGKILL
    (tmp_path / f"checkpoint/step_{2 * EVERY}").mkdir()
    assert start(tmp_path).status() == 0
    assert outcome(tmp_path) == undisturbed


def test_the_comparison_can_fail(undisturbed: Any, tmp_path: Path):
    attempt(tmp_path, 0.0, seed=1)
    assert all(ours != theirs for ours, theirs in zip(outcome(tmp_path), undisturbed, strict=True))
