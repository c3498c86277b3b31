"""Data whose true features are known, and models whose true computation is known."""

from dataclasses import dataclass
from enum import Enum

from nndecomp.config.checks import require


class Frequencies(Enum):
    """How firing frequencies differ between features; they add to `l0`."""

    constant = "constant"
    linear = "linear"  # of feature i in proportion to n - i
    zipf = "zipf"  # in proportion to (i + 1)^-zipf_exponent
    random = "random"  # in proportion to a uniform number


class Magnitudes(Enum):
    """How much a feature that fires is worth; the mean is 1."""

    constant = "constant"
    uniform = "uniform"  # between 0.5 and 1.5
    exponential = "exponential"
    folded_normal = "folded_normal"


class Correlation(Enum):
    """What makes features fire together: common normal factors below their thresholds, frequencies as before."""

    none = "none"
    low_rank = "low_rank"  # each feature hangs on all factors, by a random direction
    blocks = "blocks"  # each feature hangs on one factor, the same for all of its block


@dataclass(kw_only=True)
class SyntheticConfig:
    """activations.kind=synthetic: x_site = bias + sum over features of f_i s_i d_i + noise, at every site asked for.

    Codes f are the same at all sites, unit directions d are drawn for each site, s is a feature's strength there.
    """

    seed: int  # of directions and frequencies: what the features are
    n_features: int
    l0: float  # features active on a token, on average
    frequencies: Frequencies = Frequencies.constant
    zipf_exponent: float = 1.0
    magnitudes: Magnitudes = Magnitudes.uniform
    exclusive: list[int] | None = None  # of two models: features of A alone, of B alone, the rest in both
    # --- which fire together ---
    correlation: Correlation = Correlation.none
    correlation_rank: int = 8  # factors, or blocks
    correlation_strength: float = 0.5  # share of variance that common factors explain
    trees: int = 0  # features with children, which fire only when their parent does
    children: int = 3  # of each feature above the last level
    depth: int = 1  # levels below the roots
    child_share: float = 0.3  # how often each child fires when its parent does
    siblings_exclusive: bool = True  # at most one child of a feature fires at a time
    # --- directions ---
    coherence: float | None = None  # largest |cosine| of two features at a site, by pushing apart; null: as drawn
    persistence: float = 0.0  # cosine of a feature's directions at adjacent layers
    births: bool = False  # a feature begins at a layer of its own; false: at the first
    fade: float = 1.0  # strength at a layer, as a share of that at the layer before
    noise: float = 0.0  # standard deviation in each coordinate
    bias: float = 0.0  # norm of what is added at every site

    @property
    def n_in_trees(self) -> int:
        return self.trees * sum(self.children**level for level in range(self.depth + 1))

    def __post_init__(self) -> None:
        name = "activations.synthetic"
        for setting in ("n_features", "l0", "correlation_rank", "children", "depth", "fade"):
            require(getattr(self, setting) > 0, f"{name}.{setting}={getattr(self, setting)} must be positive")
        for setting in ("trees", "noise", "bias", "zipf_exponent"):
            require(getattr(self, setting) >= 0, f"{name}.{setting}={getattr(self, setting)} must not be negative")
        for setting in ("persistence", "child_share", "correlation_strength"):
            require(
                0 <= getattr(self, setting) <= 1,
                f"{name}.{setting}={getattr(self, setting)} must lie between 0 and 1",
            )
        require(
            self.l0 < self.n_features,
            f"{name}.l0={self.l0} must be fewer than the {self.n_features} features there are",
        )
        require(
            self.trees == 0 or not self.siblings_exclusive or self.children * self.child_share <= 1,
            f"{name}.child_share={self.child_share} of {self.children} children, of which one fires at a time, "
            f"adds to more than 1; write {1 / self.children:.2f} or less",
        )
        exclusive = self.exclusive or [0, 0]
        require(
            len(exclusive) == 2 and min(exclusive) >= 0,
            f"{name}.exclusive={self.exclusive} must be two whole numbers: features of A alone, of B alone",
        )
        require(
            self.n_in_trees + sum(exclusive) <= self.n_features,
            f"{name}.n_features={self.n_features} is fewer than the {self.n_in_trees} features of trees and the "
            f"{sum(exclusive)} of one model alone",
        )
        require(
            self.coherence is None or 0 <= self.coherence < 1,
            f"{name}.coherence={self.coherence} must lie between 0 and 1, or be null",
        )


@dataclass(kw_only=True)
class SyntheticShapeConfig:
    """target.kind=synthetic: sizes of a model that is not there, so that sites have widths."""

    n_layers: int
    d_model: int
    d_mlp: int

    def __post_init__(self) -> None:
        for setting in ("n_layers", "d_model", "d_mlp"):
            value = getattr(self, setting)
            require(value > 0, f"target.synthetic.{setting}={value} must be positive")


class Plan(Enum):
    key_value = "key_value"  # each layer has rules of its own, whose keys come with the token
    chain = "chain"  # rule i of a layer reads what rule i of the layer before wrote


@dataclass(kw_only=True)
class PlantedConfig:
    """target.kind=planted: a stack of MLPs that is known rule by rule. Where key r is present, the layer writes value r."""

    seed: int
    plan: Plan
    n_layers: int
    d_model: int
    n_rules: int  # in each layer
    d_mlp: int  # neurons; fewer than n_rules: rules share them
    neurons_per_rule: int = 1  # neurons that compute a rule
    n_vocab: int = 4096  # tokens: each is a random set of keys
    keys_per_token: float = 4.0  # on average
    threshold: float = (
        0.2  # what a neuron takes for absence; a chain loses of small keys, layer by layer, what it takes
    )

    def __post_init__(self) -> None:
        for setting in ("n_layers", "d_model", "n_rules", "d_mlp", "neurons_per_rule", "n_vocab", "keys_per_token"):
            require(getattr(self, setting) > 0, f"target.planted.{setting}={getattr(self, setting)} must be positive")
        require(
            self.neurons_per_rule <= self.d_mlp,
            f"target.planted.neurons_per_rule={self.neurons_per_rule} is more than the {self.d_mlp} neurons of a layer",
        )
        require(
            0 <= self.threshold < 0.75,
            f"target.planted.threshold={self.threshold} must lie between 0 and 0.75, the smallest key that is present",
        )
        n_keys = self.n_rules * (self.n_layers if self.plan is Plan.key_value else 1)
        require(
            self.keys_per_token < n_keys,
            f"target.planted.keys_per_token={self.keys_per_token} must be fewer than the {n_keys} keys there are",
        )
