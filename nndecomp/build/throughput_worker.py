"""A process that makes training steps of one system when it is told to, so that imports, threads and allocators do not mix.

Told by the lines of its standard input, and answering with one line of JSON each:

    step             makes a step of each part       {"wall": {part: seconds}, "cpu": {part: seconds}}
    trace <path>     writes a Chrome trace of a step {}
    peak             memory since it was ready       {"bytes": most at any time, beyond what it had before}
"""

import ctypes
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nndecomp.build.settings import device
from nndecomp.build.throughput_floor import floor
from nndecomp.build.throughput_steps import rows, trainer
from nndecomp.build.throughput_systems import OURS, systems
from nndecomp.config.compose import load
from nndecomp.config.schema import BackendKind, RunConfig, SizeConfig
from nndecomp.config.throughput import OWN
from nndecomp.decompositions import backends
from nndecomp.training.heap import retain_heap

Parts = Mapping[str, Callable[[], object]]
FLOOR = "floor"
STEP = "step"
LAYERS = "n_layers"
CPU = torch.device("cpu")


def size_of(cfg: RunConfig, name: str) -> SizeConfig:
    """By its name in `throughput`, or `<axis>=<value>`: the size of the other settings, but for one axis."""
    assert cfg.throughput is not None, "throughput says what is timed"
    throughput, base = cfg.throughput, cfg.decomposition
    if name in throughput.sizes:
        return throughput.sizes[name]
    own = SizeConfig(
        d_model=throughput.d_model,
        n_layers=throughput.n_layers,
        n_features=base.n_features,
        k=base.k,
        batch_tokens=cfg.training.batch_tokens,
    )
    if name == OWN:
        return own
    axis, value = name.split("=")
    # Layers write to all later ones: of as many features there would be a hundred times the parameters.
    fewer = {"n_features": max(own.k, own.n_features // 8)} if axis == LAYERS else {}
    return replace(own, **{axis: int(value)} | fewer)


def parts(cfg: RunConfig, size: SizeConfig, name: str, batches: list[torch.Tensor]) -> Parts:
    """What one step of a system consists of."""
    where = device(cfg)
    there = [batch.to(where) for batch in batches]
    if name == FLOOR:
        return floor(size, there[0], cfg.training.autocast)
    step = trainer(systems()[name], cfg.decomposition, cfg.training, size, batches[0], cfg.seed, where)
    made = 0

    def run() -> None:
        nonlocal made
        step(there[made % len(there)], made)
        made += 1

    return {STEP: run}


def serve(config: str, size_name: str, name: str) -> None:
    """The process. Its standard output belongs to the answers; whatever libraries say goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cfg = load(Path(config))
    assert cfg.throughput is not None
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    if name == FLOOR:
        retain_heap()
    else:
        system = systems()[name]
        importlib.import_module(system.module)
        if system.library == OURS or cfg.throughput.tuned:
            retain_heap()  # as a run of this library does
        if system.backend is not None:
            backends.use(BackendKind(system.backend))
    size = size_of(cfg, size_name)
    batches = rows(size, cfg.throughput.n_batches, cfg.seed)
    where = device(cfg)
    memory = Memory(where)
    made = parts(cfg, size, name, batches)

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer({"threads": torch.get_num_threads()})
    for line in sys.stdin:
        match line.split(maxsplit=1):
            case ["step"]:
                answer(timed(made, where, cfg.throughput.steps))
            case ["trace", path]:
                with torch.profiler.profile() as profile:
                    timed(made, where)
                profile.export_chrome_trace(path.strip())
                answer({})
            case ["peak"]:
                answer({"bytes": memory.peak()})
            case other:
                raise AssertionError(f"told {other}")


def timed(made: Parts, device: torch.device = CPU, steps: int = 1) -> dict[str, dict[str, float]]:
    """Seconds of one of `steps` steps, after one that is not counted: it finds caches as others left them. A GPU is waited for at
    both ends, and is given back what is kept for later between turns, because others have theirs there."""
    wall, cpu = {}, {}
    for part, run in made.items():
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started, spent = time.perf_counter(), time.process_time()
        for _ in range(steps):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall[part], cpu[part] = (time.perf_counter() - started) / steps, (time.process_time() - spent) / steps
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"wall": wall, "cpu": cpu}


class Memory:
    """From now on: of the process, or of a GPU what tensors take."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            forget_peak()
            self.before = memory("VmRSS")

    def peak(self) -> int:
        """Bytes at most, beyond what there was."""
        cuda = self.device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self.device) if cuda else memory("VmHWM")) - self.before


def memory(what: str) -> int:
    """Bytes this process has (VmRSS), or had at most (VmHWM); 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(what)]
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """From here on VmHWM counts anew (Linux, proc(5)), without what the heap keeps of memory that was freed."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if Path("/proc/self/clear_refs").exists():
        file = os.open("/proc/self/clear_refs", os.O_WRONLY)
        os.write(file, b"5")
        os.close(file)


class Worker:
    """The other end."""

    def __init__(self, config: Path, size: str, system: str) -> None:
        self.name = system
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        program = "import sys; from nndecomp.build.throughput_worker import serve; serve(*sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program, str(config), size, system],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            raise RuntimeError(f"the process of {self.name} ended:\n{self.said.read().decode()[-2000:]}")
        return json.loads(line)

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """Ends at the end of its input."""
        self.process.communicate()
        self.said.close()
