"""Sparse mixtures of low-rank linear maps: only those that are active on a token are computed.

    M_t = sum over the atoms a of transform t of  V_a (x) U_a           rank r_t, never formed
    y   = sum over active t of  f_t * sum over a of t of (x . V_a - b_a) U_a

A transform's atoms stand side by side, so an active transform is as many active atoms, and what works for active features
works for atoms: rows are gathered by the same kernels, gradients reach the atoms of active transforms alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.decompositions import kernels
from nndecomp.decompositions.support import Support


def atoms_of(
    support: Support, rank: Int[Tensor, "transform"], first: Int[Tensor, "transform"], n_atoms: int
) -> tuple[Support, Int[Tensor, "atom_slot"]]:
    """The atoms of active transforms, token by token, and the slot that each belongs to."""
    ranks = rank.index_select(0, support.indices)
    ends = ranks.cumsum(0)
    slots = torch.repeat_interleave(torch.arange(len(ranks), device=ranks.device), ranks)
    within = torch.arange(len(slots), device=ranks.device) - (ends - ranks).index_select(0, slots)
    atoms = first.index_select(0, support.indices).index_select(0, slots) + within
    starts = torch.cat([ends.new_zeros(1), ends]).index_select(0, support.offsets)
    return Support(atoms, starts, n_atoms), slots


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, V: Tensor, support: Support) -> Float[Tensor, "atom_slot"]:
        ctx.save_for_backward(x, V)
        ctx.support = support
        return kernels.dots(x, V, support)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, V = ctx.saved_tensors
        support: Support = ctx.support
        grad_x = kernels.bag(support, V, grad) if ctx.needs_input_grad[0] else None
        grad_V = kernels.feature_sums(support, x, grad) if ctx.needs_input_grad[1] else None
        return grad_x, grad_V, None


def transformed(
    x: Float[Tensor, "token d_read"],
    codes: Float[Tensor, "slot"],
    support: Support,
    V: Float[Tensor, "atom d_read"],
    b_V: Float[Tensor, "atom"],
    U: Float[Tensor, "atom d_write"],
    rank: Int[Tensor, "transform"],
    first: Int[Tensor, "transform"],
) -> Float[Tensor, "token d_write"]:
    """The sum of active transforms of x, each times its code."""
    atoms, slots = atoms_of(support, rank, first, len(V))
    h: Tensor = _Dots.apply(x.contiguous(), V, atoms)  # pyright: ignore[reportAssignmentType]
    return kernels.decode(codes.index_select(0, slots) * (h - b_V.index_select(0, atoms.indices)), atoms, U)


def frobenius_norms(
    V: Float[Tensor, "atom d_read"], U: Float[Tensor, "atom d_write"], ranks: Sequence[tuple[int, int]]
) -> Float[Tensor, "transform"]:
    """|M_t|_F of every transform; `ranks` are (rank, how many transforms), in the order of the atoms.

    |V^T U|_F^2 = tr((V V^T) (U U^T)) = sum over pairs of atoms of (V_a . V_b)(U_a . U_b): r x r products alone.
    """
    norms = []
    start = 0
    for rank, count in ranks:
        own = slice(start, start + rank * count)
        of_V, of_U = (W[own].unflatten(0, (count, rank)) for W in (V, U))
        squares = (of_V @ of_V.mT * (of_U @ of_U.mT)).sum((1, 2))
        norms.append(squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt())
        start = own.stop
    return torch.cat(norms)
