"""The pieces a model is taken into: wiring, sparsity, losses."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from nndecomp.config.checks import require


class Architecture(Enum):
    sae = "sae"  # one site, written back to itself
    per_layer_sae = "per_layer_sae"  # one sae a layer
    transcoder = "transcoder"  # mlp_in of one layer -> its mlp_out
    per_layer_transcoder = "per_layer_transcoder"  # one transcoder a layer
    cross_layer_transcoder = "cross_layer_transcoder"  # mlp_in of layer l -> mlp_out of layers l, l+1, ...
    neurons = "neurons"  # the MLPs' own neurons, the k largest kept: a baseline, never trained


class Activation(Enum):
    relu = "relu"
    topk = "topk"
    batchtopk = "batchtopk"
    jumprelu = "jumprelu"


class Scope(Enum):
    group = "group"  # features compete within their group (their layer)
    all = "all"  # features of all groups compete: k is still per group on average


class Reconstruction(Enum):
    sum_of_squares = "sum_of_squares"  # mean over tokens of |y - y_hat|^2
    mean_of_squares = "mean_of_squares"  # mean over tokens and coordinates
    normalised = "normalised"  # mean over written sites of |y - y_hat|^2 / variance of the site in the batch


class Penalty(Enum):
    none = "none"
    l1 = "l1"
    l1_decoder_norm = "l1_decoder_norm"  # l1 with each feature weighted by its decoder norm
    tanh = "tanh"  # tanh(c f |d|), c = penalty_scale
    l0 = "l0"  # straight-through count; needs jumprelu


@dataclass(kw_only=True)
class DecompositionConfig:
    architecture: Architecture
    # Points ("mlp_in"), taken at every layer of `layers`, or single sites ("L3.mlp_in", "blocks.3.hook_mlp_out").
    reads: list[str]
    writes: list[str]
    layers: list[int] | None = None  # null: all layers of the target
    n_features: int  # in each group
    activation: Activation
    k: Any  # active features per token and group: one number, or a list with one a group; null for relu, jumprelu
    scope: Scope = Scope.group
    skip: bool = False  # add a linear map from what a group reads to what it writes
    centre_input: bool = False  # sae: encode x - b_dec
    unit_norm_decoder: bool = False
    reconstruction: Reconstruction = Reconstruction.normalised
    penalty: Penalty = Penalty.none
    penalty_coefficient: float = 0.0
    penalty_scale: float = 4.0  # c in tanh(c f |d|)
    penalty_warmup: float = 0.1  # share of training over which the coefficient rises from 0
    k_start: int | None = None  # anneal k from here ...
    k_anneal: float = 0.0  # ... over this share of training
    aux_coefficient: float = 1 / 32  # aux-k: dead features reconstruct the residual; 0 switches it off
    aux_k: int = 64
    dead_after_tokens: int = 1_000_000  # a feature that has not fired for so long is dead
    threshold_rate: float = 0.1  # batchtopk: moving average of the smallest value kept; 0.01 lags 100 steps behind
    jumprelu_threshold: float = 0.1  # initial
    jumprelu_bandwidth: float = 0.1  # of the rectangle kernel, in units of the pre-activations

    @property
    def ks(self) -> list[int]:
        """k as a list: one entry for all groups, or one a group."""
        return [self.k] if isinstance(self.k, int) else list(self.k)

    def __post_init__(self) -> None:
        selects = self.activation in (Activation.topk, Activation.batchtopk)
        require(self.n_features > 0, f"decomposition.n_features={self.n_features} must be positive")
        whole = lambda k: isinstance(k, int) and not isinstance(k, bool)  # noqa: E731
        if selects:
            valid = whole(self.k) or (isinstance(self.k, list) and self.k and all(map(whole, self.k)))
            require(
                bool(valid),
                f"decomposition.k={self.k!r} is not a whole number or a list of them; "
                f"decomposition.activation={self.activation.value} keeps k features per token",
            )
            for k in [*self.ks, *([] if self.k_start is None else [self.k_start])]:
                require(
                    0 < k <= self.n_features,
                    f"decomposition.k={k} must lie between 1 and decomposition.n_features={self.n_features}",
                )
        else:
            require(
                self.k is None,
                f"decomposition.k={self.k} has no meaning for decomposition.activation={self.activation.value}; "
                "write decomposition.k=null",
            )
        require(
            self.penalty is not Penalty.l0 or self.activation is Activation.jumprelu,
            f"decomposition.penalty=l0 needs decomposition.activation=jumprelu, not {self.activation.value}",
        )
        require(
            self.penalty is not Penalty.none or self.penalty_coefficient == 0,
            f"decomposition.penalty_coefficient={self.penalty_coefficient} has no effect with decomposition.penalty=none",
        )
        require(
            (self.k_start is None) == (self.k_anneal == 0),
            f"decomposition.k_start={self.k_start} and decomposition.k_anneal={self.k_anneal} go together: "
            "where k starts, and the share of training over which it moves to k",
        )
        for name in ("k_anneal", "penalty_warmup", "threshold_rate"):
            require(
                0 <= getattr(self, name) <= 1,
                f"decomposition.{name}={getattr(self, name)} must lie between 0 and 1",
            )
        for name in ("penalty_coefficient", "aux_coefficient", "jumprelu_threshold"):
            require(getattr(self, name) >= 0, f"decomposition.{name}={getattr(self, name)} must not be negative")
        for name in ("aux_k", "dead_after_tokens", "jumprelu_bandwidth", "penalty_scale"):
            require(getattr(self, name) > 0, f"decomposition.{name}={getattr(self, name)} must be positive")
        require(
            not self.centre_input or self.reads == self.writes,
            f"decomposition.centre_input=true needs an SAE, but reads={self.reads} and writes={self.writes}",
        )
        if self.layers is not None:
            require(
                self.layers == sorted(set(self.layers)) and len(self.layers) > 0,
                f"decomposition.layers={self.layers} must be increasing, each layer once",
            )


@dataclass(kw_only=True)
class CompareConfig:
    """A grid of decompositions trained together on one stream, each otherwise as `decomposition` says."""

    architectures: list[Architecture]
    k: list[int]

    def __post_init__(self) -> None:
        for name, values in (("architectures", [each.value for each in self.architectures]), ("k", self.k)):
            require(
                len(values) == len(set(values)) > 0,
                f"compare.{name}={values} must name at least one, and each once",
            )
