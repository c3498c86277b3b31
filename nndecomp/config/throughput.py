"""exp_020: what is timed, at which sizes."""

from dataclasses import dataclass, field
from enum import Enum

from nndecomp.config.checks import require

OWN = "own"  # the size that the other settings say


class Question(Enum):
    step = "step"  # one training step of this library and of others
    clt = "clt"  # of a cross-layer transcoder, beside dense products of every pair of layers
    growth = "growth"  # with features, k, batch and layers
    quality = "quality"  # whether the fast step learns as plain dense autograd does
    start = "start"  # until a job makes its first training step
    harvest = "harvest"  # activations out of the target, and out of a store


@dataclass(kw_only=True)
class SizeConfig:
    d_model: int
    n_features: int
    batch_tokens: int
    k: int
    n_layers: int = 1  # above 1: of a cross-layer transcoder, with n_features in each

    def __post_init__(self) -> None:
        for name in ("d_model", "n_features", "batch_tokens", "k", "n_layers"):
            require(getattr(self, name) > 0, f"throughput.sizes: {name}={getattr(self, name)} must be positive")
        require(
            self.k <= self.n_features,
            f"throughput.sizes: k={self.k} is more than n_features={self.n_features}",
        )

    @property
    def l0(self) -> int:
        """Features active on a token where a threshold decides: twice k, and at most a quarter of all."""
        return max(1, min(2 * self.k, self.n_features // 4))

    @property
    def n_parameters(self) -> int:
        """Of encoders, decoders and biases."""
        d, n, L = self.d_model, self.n_features, self.n_layers
        return L * n * (d + 1) + L * (L + 1) // 2 * n * d + L * d

    def __str__(self) -> str:
        layers = f"{self.n_layers} layers, " if self.n_layers > 1 else ""
        return f"{layers}d {self.d_model}, {self.n_features:,} features, batch {self.batch_tokens:,}, k {self.k}"


@dataclass(kw_only=True)
class ThroughputConfig:
    question: Question
    d_model: int  # with decomposition.n_features, decomposition.k and training.batch_tokens: the size called `own`
    n_layers: int = 1
    sizes: dict[str, SizeConfig] = field(default_factory=dict)  # others, by name
    at: list[str]  # names of the sizes that are measured
    systems: list[str] | None = None  # null: all that are installed
    rounds: int  # in each, every system has its turn
    steps: int = 1  # of a turn, timed together: more where one is too short for a clock
    warm_up: int = 2  # steps of each before the first round
    n_batches: int = 4  # different ones, in turn
    factors: list[float] = field(default_factory=list)  # question=growth: of features, k and batch, each by itself
    layers: list[int] = field(default_factory=list)  # question=growth: of a cross-layer transcoder
    tuned: bool = False  # the others' processes keep freed memory, too, as this library's do; false: as they are found
    trace: bool = False  # write a Chrome trace of a step of each of this library's systems

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "n_batches", "d_model", "n_layers"):
            require(getattr(self, name) > 0, f"throughput.{name}={getattr(self, name)} must be positive")
        require(self.warm_up > 0, f"throughput.warm_up={self.warm_up} must be positive: first steps allocate")
        require(OWN not in self.sizes, f"throughput.sizes has {OWN}, which is the name of what the other settings say")
        require(all(each > 0 for each in self.factors), f"throughput.factors={self.factors} must be positive")
        require(all(each > 1 for each in self.layers), f"throughput.layers={self.layers} must be 2 or more")
        known = [OWN, *self.sizes]
        require(
            len(self.at) > 0 and set(self.at) <= set(known),
            f"throughput.at={self.at} must name sizes among {', '.join(known)}",
        )
