"""What a backend has: the primitives of the hot path, on tensors without gradient."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.decompositions.support import Selected, Support


@dataclass(frozen=True)
class Affine:
    """z = x @ W.T + b, compared as z c (c null: 1)."""

    x: Float[Tensor, "token d"]
    W: Float[Tensor, "feature d"]
    b: Float[Tensor, "feature"]
    c: Float[Tensor, "feature"] | None


@runtime_checkable
class Backend(Protocol):
    name: str

    def topk(self, of: Affine, k: int) -> Selected:
        """The k entries of every token with the largest z c; exactly k, also where fewer are positive."""
        ...

    def batchtopk(self, of: Sequence[Affine], n_slots: int) -> list[Selected]:
        """The n_slots entries with the largest strictly positive z c of all tokens and groups together; all positive ones where
        there are fewer."""
        ...

    def above(self, of: Affine, threshold: Float[Tensor, "feature"]) -> Selected:
        """Every entry with z c > threshold."""
        ...

    def by_feature(
        self, indices: Int[Tensor, "slot"], n_features: int
    ) -> tuple[Int[Tensor, "slot"], Int[Tensor, "feature_and_one"]]:
        """Slots sorted by feature, in their order where it is the same one, and where each feature's slots start."""
        ...

    def add_bags(
        self,
        out: Float[Tensor, "token d"],
        support: Support,
        weights: Float[Tensor, "slot"],
        table: Float[Tensor, "feature d"],
    ) -> None:
        """out[t] += sum over the slots s of token t of weights[s] * table[feature of s]. `out` may be a span of columns."""
        ...

    def dots(
        self, rows: Float[Tensor, "token d"], table: Float[Tensor, "feature d"], support: Support
    ) -> Float[Tensor, "slot"]:
        """rows[token] . table[feature] at every slot. `rows` may be a span of columns."""
        ...

    def project_out(self, grad: Float[Tensor, "feature d"], W: Float[Tensor, "feature d"]) -> None:
        """grad -= (grad . W) W of every row: what is left is tangent to the sphere, where rows of W have norm 1."""
        ...

    def normalise(self, W: Float[Tensor, "feature d"]) -> None:
        """Divides every row by its norm."""
        ...

    def feature_sums(
        self, support: Support, rows: Float[Tensor, "token d"], weights: Float[Tensor, "slot"]
    ) -> Float[Tensor, "feature d"]:
        """For each feature the sum over its slots s of weights[s] * rows[token of s]. `rows` may be a span of columns."""
        ...


@dataclass(frozen=True)
class RowGradient:
    """dL/dW[f] = sum over the slots s of feature f of weights[s] * rows[token of s]."""

    support: Support
    rows: Float[Tensor, "token d"]
    weights: Float[Tensor, "slot"]
    tangent: bool = False  # without what is along W's own rows, which have norm 1


@dataclass(frozen=True)
class AdamNumbers:
    keep: float  # 1 - lr * weight decay
    lr: float
    betas: tuple[float, float]
    epsilon: float


class RowUpdate(ABC):
    """What Adam does to W, float32, with a gradient that is made a row at a time and never written down."""

    # Rows are made twice, once for the norm by which they are clipped: with more slots a feature writing them down costs less.
    few: ClassVar[float]

    @abstractmethod
    def __init__(self, gradient: RowGradient, W: Float[Tensor, "feature d"]) -> None: ...

    @staticmethod
    @abstractmethod
    def rounded(rows: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        """As sums within the autocast that is on read them."""

    @abstractmethod
    def norm(self) -> Float[Tensor, ""]:
        """|dL/dW|."""

    @abstractmethod
    def adam(
        self,
        m: Float[Tensor, "feature d"],
        v: Float[Tensor, "feature d"],
        n: Float[Tensor, ""],
        clip: Float[Tensor, ""],
        numbers: AdamNumbers,
    ) -> None:
        """Step n:  m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  g = clip dL/dW,
        W <- keep W - lr m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + epsilon)."""
