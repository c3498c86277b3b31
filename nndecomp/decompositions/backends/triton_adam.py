"""Adam on gradients that are made a row at a time, where they are used, and never written.

    g[f]  = sum over slots s of feature f of weights[s] * rows[token of s]
    share = g[f] . W[f] where what is along W's row is taken away, else 0;  g[f] <- g[f] - share W[f]

Memory moves by 24 bytes a parameter (W and both moments, read and written), and 4 more where W is read for its share, instead of
the 52 or more that writing, projecting, clipping and reading a gradient takes. Rows of tokens are gathered twice, out of the cache.
"""

# pyright: reportMissingImports=false

import math
from typing import ClassVar, no_type_check

import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nndecomp.decompositions.backends.interface import AdamNumbers, RowGradient, RowUpdate
from nndecomp.decompositions.backends.triton_gather import FeatureRows, feature_row
from nndecomp.decompositions.backends.triton_launch import kernel, rounded


@kernel
@no_type_check
def _norm_kernel(
    squares, shares, parameter, pieces, tokens, rows, bounds, weights, order, ends, d, stride,
    TANGENT: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """|g[f]|^2 as g is used, and the share."""
    feature = tl.program_id(0).to(tl.int64)
    of_g = tl.zeros([COLUMNS], tl.float32)
    of_W = tl.zeros([COLUMNS], tl.float32)
    along = tl.zeros([COLUMNS], tl.float32)
    for block in range(0, d, COLUMNS):
        column = block + tl.arange(0, COLUMNS)
        inside = column < d
        g = feature_row(
            pieces, tokens, rows, bounds, weights, order, ends, feature, column, inside, d, stride, PIECE, AHEAD
        )
        of_g += g * g
        if TANGENT:
            w = tl.load(parameter + feature * d + column, mask=inside, other=0)
            of_W += w * w
            along += g * w
    # |g - share w|^2 = |g|^2 - 2 share^2 + share^2 |w|^2
    share = tl.sum(along, 0)
    tl.store(squares + feature, tl.maximum(tl.sum(of_g, 0) + share * share * (tl.sum(of_W, 0) - 2), 0))
    tl.store(shares + feature, share)


@kernel
@no_type_check
def _adam_kernel(
    parameter, m, v, shares, clip, n, pieces, tokens, rows, bounds, weights, order, ends, d, stride,
    keep, lr, beta1, other1, log1, beta2, other2, log2, epsilon,
    TANGENT: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """other: 1 - beta; log: of beta, so that 1 - beta^n is known to float32's own precision also where it is small."""
    feature = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    at = feature * d + column
    g = feature_row(
        pieces, tokens, rows, bounds, weights, order, ends, feature, column, inside, d, stride, PIECE, AHEAD
    )
    w = tl.load(parameter + at, mask=inside, other=0)
    if TANGENT:
        g -= tl.load(shares + feature) * w
    g *= tl.load(clip)
    made = tl.load(n).to(tl.float64)
    rest1 = (1.0 - tl.exp(made * log1)).to(tl.float32)
    rest2 = (1.0 - tl.exp(made * log2)).to(tl.float32)
    first = beta1 * tl.load(m + at, mask=inside, other=0) + other1 * g
    second = beta2 * tl.load(v + at, mask=inside, other=0) + other2 * g * g
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    tl.store(parameter + at, keep * w - lr / rest1 * first / (tl.sqrt(second / rest2) + epsilon), mask=inside)


class TritonRows(RowUpdate):
    # Tuning. A second gather of float32 rows out of the cache, for 8 slots a feature, against 28 bytes of memory a parameter.
    few: ClassVar[float] = 8

    def __init__(self, gradient: RowGradient, W: Float[Tensor, "feature d"]) -> None:
        self.W, self.tangent = W, gradient.tangent
        self.made = FeatureRows.of(gradient.support, gradient.rows, gradient.weights)
        self._shares: Tensor | None = None

    @staticmethod
    def rounded(rows: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        return rounded(rows)

    def norm(self) -> Float[Tensor, ""]:
        squares, self._shares = self.W.new_empty(2, len(self.W)).unbind()
        if len(self.W):
            places = (squares, self._shares, self.W)
            _norm_kernel[(len(self.W),)](*places, *self.made.arguments, TANGENT=self.tangent, **self.made.tuning)
        return squares.sum().sqrt()

    def adam(
        self,
        m: Float[Tensor, "feature d"],
        v: Float[Tensor, "feature d"],
        n: Float[Tensor, ""],
        clip: Float[Tensor, ""],
        numbers: AdamNumbers,
    ) -> None:
        if self._shares is None:
            self.norm()
        constants = []
        for beta in numbers.betas:
            constants += [beta, 1 - beta, math.log(beta) if beta > 0 else -math.inf]
        places = (self.W, m, v, self._shares, clip, n, *self.made.arguments)
        floats = (numbers.keep, numbers.lr, *constants, numbers.epsilon)
        _adam_kernel[(self.made.n_features, self.made.n_blocks)](
            *places, *floats, TANGENT=self.tangent, **self.made.tuning
        )
