"""Training steps of this library and of others, timed in turn: a process each, a step each a round."""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch

from nndecomp.build.settings import device
from nndecomp.build.throughput_floor import amounts_on
from nndecomp.build.throughput_systems import HOW, OURS, answering, check_systems, systems
from nndecomp.build.throughput_worker import FLOOR, LAYERS, STEP, Worker, size_of
from nndecomp.config.schema import Activation, DType, RunConfig, SizeConfig, ThroughputConfig, require
from nndecomp.config.throughput import OWN
from nndecomp.evaluation.timing import Floor, Times
from nndecomp.training.progress import Progress

logger = logging.getLogger(__name__)
GROWING = ("n_features", "k", "batch_tokens")


def asked(cfg: RunConfig) -> ThroughputConfig:
    require(cfg.throughput is not None, "throughput=null does not say what is measured; write question=step")
    assert cfg.throughput is not None
    return cfg.throughput


def chosen(cfg: ThroughputConfig, device: torch.device) -> list[str]:
    """The systems to measure; a sentence on those that merely could be."""
    if cfg.systems is not None:
        check_systems(cfg, device)
        return cfg.systems
    could = {name: systems()[name] for name in answering(cfg.question) if systems()[name].runs_on(device)}
    missing = sorted({system.library for system in could.values() if not system.installed})
    if missing:
        logger.warning("%s cannot be imported and are left out; %s", " and ".join(missing), HOW)
    return [name for name, system in could.items() if system.installed]


def timed_steps(cfg: RunConfig, out: Path) -> tuple[list[Times], list[Floor]]:
    """Of every size and system, each in a process of its own that reads <out>/config.yaml. Traces, if they are asked for, go
    to <out>/traces, which is there."""
    throughput = asked(cfg)
    where = device(cfg)
    names = chosen(throughput, where)
    times, floors = [], []
    for size in throughput.at:
        same = [[name for name in names if systems()[name].activation is each] for each in Activation]
        # What is compared is timed together, and no more: every system keeps its memory while it waits.
        for number, group in enumerate(each for each in same if each):
            found = rounds(out, [(size, name) for name in (*group, FLOOR)], throughput)
            floor = _floor(found.pop((size, FLOOR)), size_of(cfg, size), size, cfg, where)
            floors += [floor] if number == 0 else []
            times += [_times(name, each, size, floor, where) for (_, name), each in found.items()]
    return times, floors


def grown_steps(cfg: RunConfig, out: Path) -> tuple[dict[str, dict[str, int]], list[Times], list[Floor]]:
    """Names of sizes and their value on each axis, and the times of all of them: those of an axis in turn, as systems are."""
    throughput = asked(cfg)
    own, where = size_of(cfg, OWN), device(cfg)
    _require_room(own, throughput.factors)
    values = {axis: [max(1, round(factor * getattr(own, axis))) for factor in throughput.factors] for axis in GROWING}
    values[LAYERS] = throughput.layers
    axes = {axis: {f"{axis}={value}": value for value in along} for axis, along in values.items()}
    times, floors = [], []
    for sizes in axes.values():
        found = rounds(
            out, [(size, name) for size in sizes for name in (*chosen(throughput, where), FLOOR)], throughput
        )
        own = {size: _floor(found.pop((size, FLOOR)), size_of(cfg, size), size, cfg, where) for size in sizes}
        times += [_times(name, each, size, own[size], where) for (size, name), each in found.items()]
        floors += own.values()
    return axes, times, floors


def _require_room(own: SizeConfig, factors: Sequence[float]) -> None:
    """k times the largest factor, and k beside the smallest share of the features, are features that there are."""
    at_most = math.floor(own.n_features * min([1.0, *factors, *(1 / factor for factor in factors)]))
    require(
        own.k <= at_most,
        f"decomposition.k={own.k} leaves no room for throughput.factors={list(factors)} with {own.n_features} features; "
        f"write decomposition.k={max(1, at_most)}, or less",
    )


@dataclass(frozen=True)
class Found:
    answers: list[dict[str, dict[str, float]]]  # of each round
    peak_bytes: int
    threads: int

    def wall(self, part: str) -> list[float]:
        return [each["wall"][part] for each in self.answers]


Pair = tuple[str, str]  # names of a size and of a system


def rounds(out: Path, pairs: Sequence[Pair], cfg: ThroughputConfig) -> dict[Pair, Found]:
    """The same number of steps of each."""
    answers: dict[Pair, list[dict[str, dict[str, float]]]] = {pair: [] for pair in pairs}
    with ExitStack() as stack:
        workers: dict[Pair, Worker] = {}
        threads: dict[Pair, int] = {}
        for size, name in pairs:  # one after the other: what is made is memory, too
            logger.info("%s: making %s", size, name)
            worker = stack.enter_context(closing(Worker(out / "config.yaml", size, name)))
            workers[size, name], threads[size, name] = worker, worker.read()["threads"]
            for _ in range(cfg.warm_up):
                worker.ask("step")
        with Progress(", ".join(dict.fromkeys(size for size, _ in pairs)), cfg.rounds, 0, unit="rounds") as progress:
            for number in range(cfg.rounds):
                for pair in list(pairs)[:: 1 if number % 2 == 0 else -1]:
                    answers[pair].append(workers[pair].ask("step"))
                progress.advance(1)
        peaks = {pair: worker.ask("peak")["bytes"] for pair, worker in workers.items()}
        for (size, name), worker in workers.items():
            if cfg.trace and name.startswith(OURS):
                worker.ask(f"trace {out / 'traces' / f'{size}_{name}.json'}")
    return {pair: Found(each, peaks[pair], threads[pair]) for pair, each in answers.items()}


def _times(name: str, found: Found, size: str, floor: Floor, device: torch.device) -> Times:
    cpu = [each["cpu"][STEP] for each in found.answers]
    roofline = floor.roofline if device.type == "cuda" else None
    return Times(systems()[name].subject, size, found.wall(STEP), cpu, found.peak_bytes, floor.wall, roofline)


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


def _floor(found: Found, size: SizeConfig, name: str, cfg: RunConfig, device: torch.device) -> Floor:
    parts = {part: found.wall(part) for part in ("encoder", "optimiser", "copy", "cache", "product")}
    amounts = amounts_on(device)
    bits = 16 if cfg.training.autocast is DType.bfloat16 else 32
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else _threads(found.threads)
    return Floor(
        name, size, **parts, copied=4 * amounts.copied, cached=4 * amounts.cached, side=amounts.side, bits=bits, on=on
    )
