"""How long it takes until something happens: until --help is read, and until a job has made its first training step.

Both from outside, from the start of the process on: a job is over when the first line of its metrics is there.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nndecomp.build.throughput import asked
from nndecomp.config.registry import REPO
from nndecomp.config.schema import RunConfig
from nndecomp.evaluation.timing import Speed

JOB = "exp_001_train_transcoder_pile"
AT_MOST = 300.0  # seconds


def start_times(cfg: RunConfig, out: Path) -> list[Speed]:
    """Jobs write below `out`."""
    rounds = asked(cfg).rounds
    run = REPO / "experiments" / JOB / "run.py"
    given = [f"device={cfg.device}", *([f"threads={cfg.threads}"] if cfg.threads is not None else [])]
    settings = ["+scale=tiny", "training.log_every=1", "log.wandb=disabled", *given]
    helped, stepped = [], []
    for number in range(rounds + 1):  # the first one, which reads files from the disk, is not counted
        helped.append(_until_end([sys.executable, str(run), "--help"]))
        directory = out / "jobs" / str(number)
        command = [sys.executable, str(run), *settings, f"hydra.run.dir={directory}"]
        stepped.append(until_first_line(command, directory / "metrics.jsonl"))
    return [
        Speed(f"{JOB} +scale=tiny", name, 1, "starts", seconds[1:])
        for name, seconds in (("--help", helped), ("first training step", stepped))
    ]


def _until_end(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def until_first_line(command: Sequence[str], file: Path) -> float:
    """Seconds until a process has written a line to a file; it is ended then."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        while not (file.exists() and "\n" in file.read_text()):
            seconds = time.perf_counter() - began
            assert process.poll() is None, f"{' '.join(command)} ended with {process.returncode}, {file} has no line"
            assert seconds < AT_MOST, f"{' '.join(command)} has written no line to {file} in {seconds:.0f} s"
            time.sleep(0.005)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
