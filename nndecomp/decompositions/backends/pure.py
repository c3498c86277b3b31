"""The hot path in PyTorch's own operations."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.selection import Above, BatchBest, Competition, TokenBest, blocks, split
from nndecomp.decompositions.support import Selected, Support

_CACHED = 1 << 16  # numbers of rows that are worked on together


class Pure:
    name = "torch"

    def topk(self, of: Affine, k: int) -> Selected:
        return _selected(of, TokenBest(len(of.W), k))

    def batchtopk(self, of: Sequence[Affine], n_slots: int) -> list[Selected]:
        widths = [len(each.W) for each in of]
        best = BatchBest(len(of[0].x), sum(widths), n_slots)
        for each, base in zip(of, accumulate(widths, initial=0), strict=False):
            _compete(each, best, base)
        return [Selected(own.support, own.values[0]) for own in split(best.found(), widths)]

    def above(self, of: Affine, threshold: Float[Tensor, "feature"]) -> Selected:
        return _selected(of, Above(len(of.x), threshold))

    def by_feature(
        self, indices: Int[Tensor, "slot"], n_features: int
    ) -> tuple[Int[Tensor, "slot"], Int[Tensor, "feature_and_one"]]:
        features, order = indices.sort(stable=True)
        bounds = torch.arange(n_features + 1, device=features.device)
        return order, torch.searchsorted(features, bounds)

    def add_bags(
        self,
        out: Float[Tensor, "token d"],
        support: Support,
        weights: Float[Tensor, "slot"],
        table: Float[Tensor, "feature d"],
    ) -> None:
        out += _bag(support.indices, table, support.offsets, weights)

    def dots(
        self, rows: Float[Tensor, "token d"], table: Float[Tensor, "feature d"], support: Support
    ) -> Float[Tensor, "slot"]:
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows.contiguous(), table, support.indices, support.offsets[:-1], support.tokens, 0
        )

    def project_out(self, grad: Float[Tensor, "feature d"], W: Float[Tensor, "feature d"]) -> None:
        """On the CPU some rows at a time, so that what is read twice is in the cache."""
        rows = max(1, _CACHED // W.shape[1]) if W.device.type == "cpu" else len(W)
        for g, w in zip(grad.split(rows), W.split(rows), strict=True):
            g.addcmul_((g * w).sum(1, keepdim=True), w, value=-1)

    def normalise(self, W: Float[Tensor, "feature d"]) -> None:
        W.div_(W.norm(dim=1, keepdim=True))

    def feature_sums(
        self, support: Support, rows: Float[Tensor, "token d"], weights: Float[Tensor, "slot"]
    ) -> Float[Tensor, "feature d"]:
        order, bounds = support.by_feature(self.by_feature)
        return _bag(support.tokens[order], rows, bounds, weights[order])


BACKEND = Pure()


def _selected(of: Affine, competition: Competition) -> Selected:
    _compete(of, competition)
    found = competition.found()
    return Selected(found.support, found.values[0])


def _compete(of: Affine, competition: Competition, base: int = 0) -> None:
    """Of a group whose first feature has the number `base`."""
    for own in blocks(len(of.x), len(of.W)):
        pre, score = pre_and_score(Affine(of.x, of.W[own], of.b[own], None if of.c is None else of.c[own]))
        competition.add(base + own.start, score, (pre,))


def pre_and_score(of: Affine) -> tuple[Float[Tensor, "token feature"], Float[Tensor, "token feature"]]:
    pre = _linear(of)
    return pre, pre if of.c is None else pre * of.c


def _linear(of: Affine) -> Float[Tensor, "token feature"]:
    """x @ W.T + b. In float32 on the CPU by oneDNN, which took 361 ms of an AMD EPYC where the library that torch asks took 400
    (2048 rows, 12,288 features, d 768)."""
    plain = of.x.device.type == "cpu" and of.x.dtype == of.W.dtype == torch.float32
    if plain and not torch.is_autocast_enabled("cpu") and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(of.x, of.W, of.b, "none", [], "")
    return F.linear(of.x, of.W, of.b)


def _bag(
    indices: Tensor, table: Float[Tensor, "row d"], offsets: Tensor, weights: Float[Tensor, "slot"]
) -> Float[Tensor, "bag d"]:
    """bag[b] = sum over slots s of bag b of weights[s] * table[indices[s]].

    The table must be contiguous: on a strided view the same call is eighty times slower.
    """
    return F.embedding_bag(
        indices, table.contiguous(), offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
