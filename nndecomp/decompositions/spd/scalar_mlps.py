"""C functions of one number each, side by side, by MLPs with one hidden layer: q_c = v_c . gelu(w_c a_c + b_c) + k_c.

    z = w_c a + b_c,   q = v_c . gelu(z) + k_c                              z [hidden] for each component and row
    dq/da = (v_c * w_c) . gelu'(z)                                          * : entry by entry
    dL/dv_c = sum_rows d gelu(z),   dL/dk_c = sum_rows d                    d = dL/dq
    dL/dw_c = v_c * sum_rows d a gelu'(z),   dL/db_c = v_c * sum_rows d gelu'(z)

Hidden values are `hidden` times as many as inputs: what is done with each of them is what a step of a toy costs. Here gelu and
gelu' are taken once each, of some components at a time so that they stay in the processor's cache, and all sums are products of
matrices.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_VALUES = 1 << 18  # hidden values at a time: half a MiB in float32


class _ScalarMLPs(torch.autograd.Function):
    """Of a [C, rows], component by component in memory. Hidden values are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, b: Tensor, v: Tensor, k: Tensor) -> Float[Tensor, "C rows"]:
        q = torch.empty_like(a)
        for part, z, hidden in _parts(a, w, b):
            torch.ops.aten.gelu.out(z, out=hidden)
            torch.bmm(v[part].unsqueeze(1), hidden, out=q[part].unsqueeze(1))
        ctx.save_for_backward(a, w, b, v)
        return q.add_(k)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor, ...]:
        a, w, b, v = ctx.saved_tensors
        delta = deltas[0].contiguous()
        both, vw = torch.stack([delta * a, delta], 1), (v * w).unsqueeze(1)
        da, dv, dwb = torch.empty_like(a), torch.empty_like(v), torch.stack([w, b], 1)
        one = torch.ones((), dtype=a.dtype, device=a.device)
        for part, z, values in _parts(a, w, b):
            torch.ops.aten.gelu.out(z, out=values)
            torch.bmm(delta[part].unsqueeze(1), values.mT, out=dv[part].unsqueeze(1))
            torch.ops.aten.gelu_backward.grad_input(one.expand_as(z), z, grad_input=values)
            torch.bmm(vw[part], values, out=da[part].unsqueeze(1))
            torch.bmm(both[part], values.mT, out=dwb[part])
        dw, db = dwb.unbind(1)
        return da.mul_(delta), dw * v, db * v, dv, delta.sum(1, keepdim=True)


def _parts(a: Tensor, w: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some components at a time: which, z [c, hidden, rows], and room for as many values, both in the same memory every time."""
    (C, hidden), n_rows = w.shape, a.shape[1]
    size = min(C, max(1, CHUNK_VALUES // max(1, hidden * n_rows)))
    z, room = a.new_empty(2, size, hidden, n_rows)
    for start in range(0, C, size):
        part = slice(start, min(start + size, C))
        n = part.stop - part.start
        torch.mul(a[part].unsqueeze(1), w[part].unsqueeze(2), out=z[:n]).add_(b[part].unsqueeze(2))
        yield part, z[:n], room[:n]


def scalar_mlps(
    a: Float[Tensor, "*rows C"],
    w: Float[Tensor, "C hidden"],
    b: Float[Tensor, "C hidden"],
    v: Float[Tensor, "C hidden"],
    k: Float[Tensor, "C 1"],
) -> Float[Tensor, "*rows C"]:
    """q; in float32 under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        q = _ScalarMLPs.apply(a.flatten(0, -2).T.contiguous(), w, b, v, k)
    assert isinstance(q, Tensor)
    return q.T.reshape(a.shape)
