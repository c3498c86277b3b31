"""Encode, select and decode: the hot path, and the mathematics that every backend serves.

    pre     [token, feature]  = x @ W_enc.T + b_enc
    support which (token, feature) pairs are active, in CSR order: token by token
    y       [token, d_write]  = sum over a token's slots of value * W_dec[feature]

W_enc and W_dec are both feature-major, [feature, d]: an active feature is one contiguous row to gather. Pre-activations are only ever
read by selection; no gradient flows through them. Gradients reach the weights of active features alone, as one segment sum over slots
sorted by feature, which encoder and decoder share.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.decompositions import backends, row_gradients
from nndecomp.decompositions.support import Selected, Support


def bag(
    support: Support, table: Float[Tensor, "feature d"], weights: Float[Tensor, "slot"]
) -> Float[Tensor, "token d"]:
    """Of each token the sum over its slots of weight * table[feature]. No gradient."""
    out = table.new_zeros(support.n_tokens, table.shape[1])
    backends.of(table).add_bags(out, support, weights, table)
    return out


def feature_sums(
    support: Support, rows: Float[Tensor, "token d"], weights: Float[Tensor, "slot"]
) -> Float[Tensor, "feature d"]:
    """For each feature the weighted sum of the rows of the tokens it is active on. No gradient."""
    return backends.of(rows).feature_sums(support, rows, weights)


def dots(rows: Float[Tensor, "token d"], table: Float[Tensor, "feature d"], support: Support) -> Float[Tensor, "slot"]:
    """rows[token] . table[feature] at every slot, without gathering rows. No gradient."""
    return backends.of(rows).dots(rows, table, support)


def _precision(of: Tensor) -> AbstractContextManager[Any]:
    """The autocast that is on, to enter again: gradients are rounded as values were."""
    device = of.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device))


class _ActivePre(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, support: Support, centre: Tensor | None
    ) -> Float[Tensor, "slot"]:
        ctx.save_for_backward(x, W_enc)
        ctx.support, ctx.precision = support, _precision(x)
        return values.to(W_enc.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, W_enc = ctx.saved_tensors
        support: Support = ctx.support
        need_x, need_W, _, _, _, need_centre = ctx.needs_input_grad
        with ctx.precision:
            grad_x = bag(support, W_enc, grad) if need_x else None
            grad_W = row_gradients.gradient(W_enc, support, x, grad) if need_W else None
        grad_b = grad.new_zeros(support.n_features).index_add_(0, support.indices, grad)
        # As a pre-activation falls by W_enc . centre: one product for all tokens.
        grad_centre = -(grad_b.to(W_enc.dtype) @ W_enc) if need_centre else None
        return grad_x, grad_W, grad_b, None, None, grad_centre


def active_pre(
    x: Float[Tensor, "token d_read"],
    W_enc: Float[Tensor, "feature d_read"],
    b_enc: Float[Tensor, "feature"],
    selected: Selected,
    centre: Float[Tensor, "d_read"] | None = None,
) -> Float[Tensor, "slot"]:
    """The pre-activations that were selected, with the gradient of x @ W_enc.T + b_enc; `selected` itself carries none. With a
    `centre`, x is something else minus that, and needs no gradient of its own."""
    values = selected.values
    assert not values.requires_grad, "pre-activations are differentiated through x, W_enc and b_enc, not through values"
    return _ActivePre.apply(x, W_enc, b_enc, values, selected.support, centre)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Written:
    """Where a group adds its decoder rows."""

    columns: slice
    support: Support


class _Decode(torch.autograd.Function):
    """Of groups side by side or over each other: columns of y += bag of each. Inputs: y, then values and W_dec of each group."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, written: Sequence[Written], *parts: Tensor) -> Float[Tensor, "token d_writes"]:
        ctx.save_for_backward(*parts)
        ctx.written, ctx.precision = written, _precision(start)
        y = start.expand(written[0].support.n_tokens, -1).clone(memory_format=torch.contiguous_format)
        for each, values, W_dec in zip(written, parts[::2], parts[1::2], strict=True):
            backends.of(W_dec).add_bags(y[:, each.columns], each.support, values, W_dec)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        parts, written = ctx.saved_tensors, ctx.written
        grad_start = grad.sum(0) if ctx.needs_input_grad[0] else None
        own: list[Tensor | None] = []
        with ctx.precision:
            for i, each in enumerate(written):
                values, W_dec = parts[2 * i : 2 * i + 2]
                arrived = grad[:, each.columns]
                # grad_values[s] = grad[token of s] . W_dec[feature of s], without gathering rows
                own.append(dots(arrived, W_dec, each.support) if ctx.needs_input_grad[2 + 2 * i] else None)
                needed = ctx.needs_input_grad[3 + 2 * i]
                own.append(row_gradients.gradient(W_dec, each.support, arrived, values) if needed else None)
        return grad_start, None, *own


def decode_groups(
    start: Float[Tensor, "d_writes"],
    written: Sequence[Written],
    values: Sequence[Float[Tensor, "_"]],
    W_decs: Sequence[Float[Tensor, "_ _"]],
) -> Float[Tensor, "token d_writes"]:
    """start, the same for all tokens, and to the columns of each group the sum of its active features' decoder rows."""
    parts = [part for v, W_dec in zip(values, W_decs, strict=True) for part in (v.to(W_dec.dtype), W_dec)]
    return _Decode.apply(start, tuple(written), *parts)  # pyright: ignore[reportReturnType]


def decode(
    values: Float[Tensor, "slot"], support: Support, W_dec: Float[Tensor, "feature d_write"]
) -> Float[Tensor, "token d_write"]:
    """Sum of the active features' decoder rows."""
    start = W_dec.new_zeros(W_dec.shape[1])
    return decode_groups(start, [Written(slice(None), support)], [values], [W_dec])
