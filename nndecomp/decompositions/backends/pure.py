"""The hot path in PyTorch's own operations."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.support import Selected, Support, split_slots

# Batch-wise selection estimates its threshold from every 17th entry: a prime, so that all features are sampled.
_STRIDE = 17
_CACHED = 1 << 16  # numbers of rows that are worked on together


class Pure:
    name = "torch"

    def topk(self, of: Affine, k: int) -> Selected:
        pre, score = pre_and_score(of)
        return selected(pre, topk_support(score, k))

    def batchtopk(self, of: Sequence[Affine], n_slots: int) -> list[Selected]:
        pres, scores = zip(*map(pre_and_score, of), strict=True)
        if len(of) == 1:
            return [selected(pres[0], batchtopk_support(scores[0], n_slots))]
        together = batchtopk_support(torch.cat(scores, 1), n_slots)
        widths = [pre.shape[1] for pre in pres]
        parts = zip(pres, split_slots(together.indices, widths), strict=True)
        return [selected(pre, Support.of(together.tokens[own], indices, *pre.shape)) for pre, (own, indices) in parts]

    def above(self, of: Affine, threshold: Float[Tensor, "feature"]) -> Selected:
        pre, score = pre_and_score(of)
        return selected(pre, threshold_support(score, threshold))

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


def selected(pre: Float[Tensor, "token feature"], support: Support) -> Selected:
    places = support.tokens * support.n_features + support.indices
    return Selected(support, pre.flatten().index_select(0, places))


def pre_and_score(of: Affine) -> tuple[Float[Tensor, "token feature"], Float[Tensor, "token feature"]]:
    pre = F.linear(of.x, of.W, of.b)
    return pre, pre if of.c is None else pre * of.c


def _bag(
    indices: Tensor, table: Float[Tensor, "row d"], offsets: Tensor, weights: Float[Tensor, "slot"]
) -> Float[Tensor, "bag d"]:
    """bag[b] = sum over slots s of bag b of weights[s] * table[indices[s]].

    The table must be contiguous: on a strided view the same call is eighty times slower.
    """
    return F.embedding_bag(
        indices, table.contiguous(), offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _blocks(n_features: int, k: int) -> int:
    """Blocks of which the k best are searched: a divisor of n_features near sqrt(n_features * k), where both levels of
    selection cost the same; n_features itself where two levels save nothing."""
    size = 1
    while n_features % (2 * size) == 0 and 2 * size * k <= n_features // max(size, 2):
        size *= 2
    return n_features // size


def topk_support(pre: Float[Tensor, "token feature"], k: int) -> Support:
    """The k largest of every row; exactly k slots a token, also where fewer are positive.

    Exact in two levels: the k largest entries lie within the k blocks that have the largest maxima.
    """
    n_tokens, n_features = pre.shape
    assert 0 < k <= n_features, f"k={k} of {n_features} features"
    n_blocks = _blocks(n_features, k)
    if n_blocks < n_features:
        blocks = pre.view(n_tokens, -1, n_blocks)  # feature f is in block f mod n_blocks: maxima of whole vectors
        best = blocks.amax(1).topk(k, sorted=False).indices
        candidates = blocks.gather(2, best[:, None, :].expand(-1, blocks.shape[1], -1)).flatten(1)
        within = candidates.topk(k, sorted=False).indices
        indices = within // k * n_blocks + best.gather(1, within % k)
    else:
        indices = pre.topk(k, sorted=False).indices
    offsets = torch.arange(n_tokens + 1, device=pre.device) * k
    return Support(indices.flatten(), offsets, n_features)


def batchtopk_support(pre: Float[Tensor, "token feature"], n_slots: int) -> Support:
    """The n_slots largest strictly positive entries of the whole matrix; all positive ones where there are fewer.

    Exact: a threshold guessed from a sample narrows the candidates and is checked against their number.
    """
    flat = pre.flatten()
    n_slots = min(n_slots, flat.numel())
    sample = flat[::_STRIDE]
    rank = min(int(1.2 * n_slots / _STRIDE) + 16, len(sample))
    guess = sample.topk(rank, sorted=False).values.amin().clamp_min(0)
    candidates = (flat > guess).nonzero().squeeze(1)
    if len(candidates) < n_slots:
        candidates = (flat > 0).nonzero().squeeze(1)
    if len(candidates) > n_slots:
        best = flat[candidates].topk(n_slots, sorted=False).indices
        candidates = candidates[best].sort().values
    n_tokens, n_features = pre.shape
    return Support.of(candidates // n_features, candidates % n_features, n_tokens, n_features)


def threshold_support(pre: Float[Tensor, "token feature"], threshold: Float[Tensor, "..."]) -> Support:
    """Every entry strictly above the threshold (one, or one of each feature), compared in the wider of the two types."""
    tokens, indices = (pre > threshold.reshape(1, -1)).nonzero(as_tuple=True)
    return Support.of(tokens, indices, *pre.shape)
