"""Gradient pursuit: features taken one by one, each the one that best explains what the others left over.

    d_i = rows of D, scaled to norm 1;  w = 0,  S = {}
    k times:  r = x - w D;  S += argmax over i not in S of r . d_i
              g = r . d_i on S, else 0;  w = max(0, w + (g D . r / |g D|^2) g)          a step of steepest descent
Blumensath & Davies 2008, "Gradient Pursuits", IEEE TSP 56(6), with non-negative weights.

D is the decoder, of any norms: the code of feature i is w_i / |D_i|. Features are chosen without gradient; the weights
are a smooth function of x and D where the choice is, and are differentiated as that.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.decompositions.activation_base import Selecting
from nndecomp.decompositions.selection import blocks


class MatchingPursuit(Selecting):
    """k features of each group. Groups that write a common site pursue together, for the sum of their k.

    Distances are measured in training's units: `units` [d_writes] is 1 while training; folding makes it 1 / scale.
    """

    def __init__(self, k: Sequence[int], d_writes: int) -> None:
        super().__init__()
        self.k = list(k)
        self.units: Tensor
        self.register_buffer("units", torch.ones(d_writes))


def codes(
    x: Float[Tensor, "token d"], W_dec: Float[Tensor, "feature d"], k: int
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]:
    """Features of each token in the order in which they were taken, and their codes; x without bias.

    In the precision of the weights, also under autocast: a residual is a small difference of large numbers.
    """
    assert 0 < k <= len(W_dec), f"k={k} of {len(W_dec)} features"
    with torch.autocast(x.device.type, enabled=False):
        return _codes(x.to(W_dec.dtype), W_dec, k)


def _codes(
    x: Float[Tensor, "token d"], W_dec: Float[Tensor, "feature d"], k: int
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]:
    norms = W_dec.norm(dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)
    D = W_dec / norms[:, None]
    with torch.no_grad():
        taken = _take(x, D, k)
    rows = D[taken]
    weights = x.new_zeros(len(x), 0)
    gram, correlation = rows @ rows.mT, (rows @ x[:, :, None]).squeeze(2)
    for n in range(1, k + 1):
        weights = _step(weights, gram[:, :n, :n], correlation[:, :n])
    return taken, weights / norms[taken]


def _take(x: Float[Tensor, "token d"], D: Float[Tensor, "feature d"], k: int) -> Int[Tensor, "token k"]:
    """For each feature that is taken one dense product of all tokens and features, a block of features at a time."""
    taken = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    rows, gram = x.new_zeros(len(x), k, x.shape[1]), x.new_zeros(len(x), k, k)
    correlation, weights = x.new_zeros(len(x), k), x.new_zeros(len(x), 0)
    residual = x
    for n in range(k):
        taken[:, n] = _best(residual, D, taken[:, :n])
        rows[:, n] = D[taken[:, n]]
        correlation[:, n] = (rows[:, n] * x).sum(1)
        with_new = (rows[:, : n + 1] @ rows[:, n, :, None]).squeeze(2)
        gram[:, n, : n + 1] = gram[:, : n + 1, n] = with_new
        weights = _step(weights, gram[:, : n + 1, : n + 1], correlation[:, : n + 1])
        residual = x - (weights[:, None] @ rows[:, : n + 1]).squeeze(1)
    return taken


def _best(
    residual: Float[Tensor, "token d"], D: Float[Tensor, "feature d"], taken: Int[Tensor, "token before"]
) -> Int[Tensor, "token"]:
    """argmax of residual . d_i over features i that have not been taken."""
    best, largest = taken.new_zeros(len(residual)), residual.new_full((len(residual),), -torch.inf)
    for own in blocks(len(residual), len(D)):
        product = residual @ D[own].T
        tokens, order = ((taken >= own.start) & (taken < own.stop)).nonzero(as_tuple=True)
        product[tokens, taken[tokens, order] - own.start] = -torch.inf
        value, feature = product.max(1)
        better = ~(value <= largest)  # what is not a number is taken, and seen
        best, largest = torch.where(better, feature + own.start, best), torch.where(better, value, largest)
    return best


def _step(
    weights: Float[Tensor, "token before"], gram: Float[Tensor, "token n n"], correlation: Float[Tensor, "token n"]
) -> Float[Tensor, "token n"]:
    """One more feature, and a step along g = correlation - gram w, whose best length is |g|^2 / |g D|^2; no step where
    nothing is left to explain, and g is 0."""
    weights = torch.cat([weights, torch.zeros_like(correlation[:, :1])], 1)
    g = correlation - (gram @ weights[:, :, None]).squeeze(2)
    length = (g[:, None] @ gram @ g[:, :, None]).flatten(1)
    some = length > 0
    step = torch.where(some, g.square().sum(1, keepdim=True) / torch.where(some, length, 1), 0)
    return (weights + step * g).relu()
