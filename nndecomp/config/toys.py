"""Toys: models so small that what each part of their weights does is known, to see whether it is found again."""

from dataclasses import dataclass
from enum import Enum

from nndecomp.config.checks import require
from nndecomp.config.training import TrainingConfig


class ToyKind(Enum):
    tms = "tms"  # superposition: many features through few dimensions and back
    resid_mlp = "resid_mlp"  # compressed computation: more functions of features than neurons


@dataclass(kw_only=True)
class ToyConfig:
    kind: ToyKind
    n_features: int
    d_model: int  # dimensions between the two maps (tms), of the residual stream (resid_mlp)
    n_layers: int  # identity layers between the two maps (tms), MLPs (resid_mlp)
    d_mlp: int | None = None  # neurons of each MLP; null: there are none (tms)
    feature_probability: float  # of each feature to be active, by itself
    training: TrainingConfig  # of the toy; a token is a row of features
    # What is known, by patterns of module paths:
    per_feature: list[str]  # maps in which every feature has one component
    shared: dict[str, int]  # maps whose components serve all features, and how many are enough
    heldout_rows: int = 8192  # fresh rows on which errors are measured

    def __post_init__(self) -> None:
        for name in ("n_features", "d_model", "heldout_rows"):
            require(getattr(self, name) > 0, f"toy.{name}={getattr(self, name)} must be positive")
        match self.kind:
            case ToyKind.tms:
                require(self.n_layers >= 0, f"toy.n_layers={self.n_layers} must be 0 or more identity layers")
                require(self.d_mlp is None, f"toy.d_mlp={self.d_mlp}, but toy.kind=tms has no MLP; write null")
            case ToyKind.resid_mlp:
                require(self.n_layers > 0, f"toy.n_layers={self.n_layers} must be a positive number of MLPs")
                require(
                    self.d_mlp is not None and self.d_mlp > 0,
                    f"toy.d_mlp={self.d_mlp} must be a positive number of neurons where toy.kind=resid_mlp",
                )
        require(
            0 < self.feature_probability <= 1,
            f"toy.feature_probability={self.feature_probability} must be a probability above 0",
        )
        require(
            bool(self.per_feature or self.shared),
            "toy.per_feature=[] and toy.shared={} say of no map what is known; name at least one",
        )
        for pattern, enough in self.shared.items():
            require(enough > 0, f"toy.shared says {enough} components for {pattern}; write a positive number")
