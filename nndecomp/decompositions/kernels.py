"""Encode, select and decode: the hot path, and the one place that faster kernels replace.

    pre     [token, feature]  = x @ W_enc.T + b_enc
    support which (token, feature) pairs are active, in CSR order: token by token
    y       [token, d_write]  = sum over a token's slots of value * W_dec[feature]

W_enc and W_dec are both feature-major, [feature, d]: an active feature is one contiguous row to gather. The dense
matrix of pre-activations is only ever read by selection; no gradient flows through it. Gradients reach the weights
of active features alone, as one segment sum over slots sorted by feature, which encoder and decoder share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

# Batch-wise selection estimates its threshold from every 17th entry: a prime, so that all features are sampled.
_STRIDE = 17


@dataclass(frozen=True)
class Support:
    """Active (token, feature) pairs of one group, token by token: token t owns slots offsets[t] to offsets[t+1]."""

    indices: Int[Tensor, "slot"]
    offsets: Int[Tensor, "token_and_one"]
    n_features: int

    @property
    def n_tokens(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def tokens(self) -> Int[Tensor, "slot"]:
        """The token of each slot."""
        ids = torch.arange(self.n_tokens, device=self.offsets.device)
        return torch.repeat_interleave(ids, self.offsets.diff(), output_size=len(self.indices))

    @cached_property
    def by_feature(self) -> tuple[Int[Tensor, "slot"], Int[Tensor, "feature_and_one"]]:
        """Slots sorted by feature, and where each feature's slots start: the same pairs in CSC order."""
        features, order = self.indices.sort()
        bounds = torch.arange(self.n_features + 1, device=features.device)
        return order, torch.searchsorted(features, bounds)

    @staticmethod
    def of(tokens: Int[Tensor, "slot"], indices: Int[Tensor, "slot"], n_tokens: int, n_features: int) -> "Support":
        """From pairs sorted by token."""
        bounds = torch.arange(n_tokens + 1, device=tokens.device)
        return Support(indices, torch.searchsorted(tokens, bounds), n_features)


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


def threshold_support(pre: Float[Tensor, "token feature"], threshold: Float[Tensor, ""]) -> Support:
    """Every entry strictly above the threshold, compared in the wider of the two types."""
    tokens, indices = (pre > threshold.reshape(1, 1)).nonzero(as_tuple=True)
    return Support.of(tokens, indices, *pre.shape)


def split_slots(
    indices: Int[Tensor, "slot"], widths: Sequence[int]
) -> list[tuple[Bool[Tensor, "slot"], Int[Tensor, "_"]]]:
    """For groups whose features stand side by side: which slots are a group's, and the features within it."""
    parts, start = [], 0
    for width in widths:
        own = (indices >= start) & (indices < start + width)
        parts.append((own, indices[own] - start))
        start += width
    return parts


def split_support(support: Support, widths: Sequence[int]) -> list[Support]:
    """One support per group, from one over all groups' features side by side."""
    parts = zip(split_slots(support.indices, widths), widths, strict=True)
    return [Support.of(support.tokens[own], indices, support.n_tokens, width) for (own, indices), width in parts]


def bag(
    indices: Tensor, table: Float[Tensor, "row d"], offsets: Tensor, weights: Float[Tensor, "slot"]
) -> Float[Tensor, "bag d"]:
    """bag[b] = sum over slots s of bag b of weights[s] * table[indices[s]].

    The table must be contiguous: on a strided view the same call is eighty times slower.
    """
    return F.embedding_bag(
        indices, table.contiguous(), offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def feature_sums(support: Support, rows: Float[Tensor, "token d"], weights: Float[Tensor, "slot"]) -> Tensor:
    """[feature, d]: for each feature the weighted sum of the rows of the tokens it is active on."""
    order, bounds = support.by_feature
    return bag(support.tokens[order], rows, bounds, weights[order])


def dots(rows: Float[Tensor, "token d"], table: Float[Tensor, "feature d"], support: Support) -> Float[Tensor, "slot"]:
    """rows[token] . table[feature] at every slot, without gathering rows. No gradient."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, table, support.indices, support.offsets[:-1], support.tokens, 0
    )


class _ActivePre(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor, support: Support
    ) -> Float[Tensor, "slot"]:
        ctx.save_for_backward(x, W_enc)
        ctx.support = support
        places = support.tokens * support.n_features + support.indices
        return pre.flatten().index_select(0, places).to(W_enc.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, W_enc = ctx.saved_tensors
        support: Support = ctx.support
        need_x, need_W, need_b, *_ = ctx.needs_input_grad
        grad_x = bag(support.indices, W_enc, support.offsets, grad) if need_x else None
        grad_W = feature_sums(support, x, grad) if need_W else None
        grad_b = grad.new_zeros(support.n_features).index_add_(0, support.indices, grad) if need_b else None
        return grad_x, grad_W, grad_b, None, None


def active_pre(
    x: Float[Tensor, "token d_read"],
    W_enc: Float[Tensor, "feature d_read"],
    b_enc: Float[Tensor, "feature"],
    pre: Float[Tensor, "token feature"],
    support: Support,
) -> Float[Tensor, "slot"]:
    """The pre-activations at the support, with the gradient of x @ W_enc.T + b_enc; `pre` itself carries none."""
    assert not pre.requires_grad, "pre-activations are differentiated through x, W_enc and b_enc, not through `pre`"
    return _ActivePre.apply(x, W_enc, b_enc, pre, support)  # pyright: ignore[reportReturnType]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support) -> Float[Tensor, "token d_write"]:
        ctx.save_for_backward(values, W_dec)
        ctx.support = support
        return bag(support.indices, W_dec, support.offsets, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        values, W_dec = ctx.saved_tensors
        support: Support = ctx.support
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:  # grad_values[s] = grad[token of s] . W_dec[feature of s], without gathering rows
            grad_values = dots(grad, W_dec, support)
        if ctx.needs_input_grad[1]:
            grad_W = feature_sums(support, grad, values)
        return grad_values, grad_W, None


def decode(
    values: Float[Tensor, "slot"], support: Support, W_dec: Float[Tensor, "feature d_write"]
) -> Float[Tensor, "token d_write"]:
    """Sum of the active features' decoder rows."""
    return _Decode.apply(values.to(W_dec.dtype), W_dec, support)  # pyright: ignore[reportReturnType]
