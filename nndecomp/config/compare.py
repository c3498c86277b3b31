"""Several decompositions trained together on one stream."""

from dataclasses import dataclass, field
from typing import Any

from nndecomp.config.checks import require
from nndecomp.config.kinds import Architecture


@dataclass(kw_only=True)
class CompareConfig:
    """A grid, each member otherwise as `decomposition` says: (architectures and variants) x k x seeds."""

    architectures: list[Architecture] = field(default_factory=list)  # wired so that each takes the place of the MLPs
    variants: dict[str, Any] = field(default_factory=dict)  # name: the settings of `decomposition` that differ
    k: list[int] = field(default_factory=list)  # of the architectures, and of each variant that does not set its own k
    seeds: list[int] | None = None  # of first weights, trained on the same rows; null: the run's seed alone

    def __post_init__(self) -> None:
        architectures = [each.value for each in self.architectures]
        for name, values in (("architectures", architectures), ("k", self.k), ("seeds", self.seeds or [])):
            require(len(values) == len(set(values)), f"compare.{name}={values} must name each once")
        require(
            bool(self.architectures or self.variants),
            "compare.architectures=[] and compare.variants={} must name at least one between them",
        )
        require(self.seeds is None or bool(self.seeds), "compare.seeds=[] must name at least one seed, or be null")
        require(all(seed >= 0 for seed in self.seeds or []), f"compare.seeds={self.seeds} must be 0 or more")
        lacking = [name for name, settings in self.variants.items() if "k" not in settings]
        needing = [*architectures, *lacking]
        require(
            bool(self.k) or not needing,
            f"compare.k=[] must name at least one, since {', '.join(needing)} set no k of their own",
        )
