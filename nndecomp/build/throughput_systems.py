"""Who makes training steps: this library with each of its backends, the others, and a dense reference."""

import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from nndecomp.config.schema import (
    Activation,
    BackendKind,
    CodeNormalisation,
    Dead,
    Decoder,
    Optimizer,
    Penalty,
    Question,
    Reconstruction,
    ThroughputConfig,
    require,
)
from nndecomp.decompositions.backends import compiled, without_triton
from nndecomp.evaluation.timing import Subject

OURS = "nndecomp"
PAIRS = "dense_pairs"
HOW = "see experiments/exp_020_throughput/README.md for their environment, the extra `bench`"
DENSE = "dense"  # as it is written with autograd alone: two products, a sort's k largest, every gradient written


@dataclass(frozen=True)
class System:
    library: str  # as the registry calls it
    activation: Activation
    backend: str | None = None  # of this library's kernels
    settings: tuple[tuple[str, Any], ...] = ()  # of `decomposition`
    clip_norm: float | None = 1.0
    variant: str = ""

    @property
    def name(self) -> str:
        parts = (self.library, self.backend, self.activation.value, self.variant)
        return "_".join(part for part in parts if part).replace("-", "_")

    @property
    def module(self) -> str:
        return {"eai-sparsify": "sparsify"}.get(self.library, self.library).replace("-", "_")

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def runs_on(self, device: torch.device) -> bool:
        """Of this library each device has backends of its own, and torch; the plain dense step is a measure for GPUs."""
        if self.library == OURS:
            native = str(self.backend).startswith("native")
            return device.type == "cuda" if self.backend == "triton" else device.type == "cpu" or not native
        return self.variant != DENSE or device.type == "cuda"

    @property
    def subject(self) -> Subject:
        return Subject(self.library, version(self.library), self.activation.value, self.backend, self.variant)


def backends() -> list[BackendKind]:
    """This library's, on this machine."""
    native = [BackendKind.native, BackendKind.native_int8] if compiled.available() else []
    return [BackendKind.torch, *native, *([BackendKind.triton] if without_triton() is None else [])]


def systems() -> dict[str, System]:
    """By name: this library's, then the others', installed or not, then dense references."""
    selecting = (Activation.topk, Activation.batchtopk)
    l0 = (("penalty", Penalty.l0), ("penalty_coefficient", 0.5))
    every = [System(OURS, each, backend.value) for backend in backends() for each in selecting]
    of_fvu = (("penalty", Penalty.l0), ("penalty_coefficient", 0.01))
    every += [System(OURS, Activation.jumprelu, backend.value, of_fvu) for backend in backends()]

    sums = ("reconstruction", Reconstruction.sum_of_squares)
    lens = (sums, ("decoder", Decoder.free), ("dead", Dead.none))
    every += [
        System("sae-lens", each, None, (*lens, ("code_normalisation", CodeNormalisation.sae))) for each in selecting
    ]
    every.append(System("sae-lens", Activation.jumprelu, None, (*lens, *l0)))

    every += [System("dictionary-learning", each, None, (sums,)) for each in selecting]
    target = (("penalty", Penalty.l0_target), ("penalty_coefficient", 1.0), ("penalty_target", 64.0))
    free = (sums, ("centre_input", False), ("dead", Dead.none), ("betas", [0.0, 0.999]))
    every.append(System("dictionary-learning", Activation.jumprelu, None, (*free, *target)))

    for variant, optimizer in (("", Optimizer.sign), ("adam", Optimizer.adam)):
        sparsify = (("dead", Dead.none), ("optimizer", optimizer))
        every.append(System("eai-sparsify", Activation.topk, None, sparsify, None, variant))
    every += [System("torch", Activation.topk, variant=variant) for variant in (DENSE, PAIRS)]
    return {each.name: each for each in every}


def answering(question: Question) -> list[str]:
    """The systems that a question is about."""
    own = [name for name, each in systems().items() if each.library == OURS]
    match question:
        case Question.clt:
            return [
                name
                for name, each in systems().items()
                if each.activation is Activation.topk and (name in own or each.variant == PAIRS)
            ]
        case Question.growth:
            return [name for name in own if systems()[name].activation is Activation.topk]
        case Question.quality | Question.harvest | Question.start:
            return own
        case Question.step:
            return [name for name, each in systems().items() if each.variant != PAIRS]


def check_systems(cfg: ThroughputConfig, device: torch.device) -> None:
    """SettingError for a system that is named but not there."""
    if cfg.systems is None:
        return
    known = {name: systems()[name] for name in answering(cfg.question)}
    unknown = [name for name in cfg.systems if name not in known]
    require(
        len(cfg.systems) > 0 and not unknown,
        f"throughput.systems={unknown} must be among {', '.join(known)}, or null",
    )
    native = [name for name in cfg.systems if str(known[name].backend).startswith("native") and device.type != "cpu"]
    require(not native, f"throughput.systems={native} work on the CPU; write device=cpu")
    absent = [name for name in cfg.systems if not known[name].installed]
    of = sorted({known[name].library for name in absent})
    require(not absent, f"throughput.systems={absent} need {' and '.join(of)}, which cannot be imported; {HOW}")
