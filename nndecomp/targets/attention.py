"""The weights of attention, head by head, from the modules of a model."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.targets.base import Heads


@torch.no_grad()
def heads(
    queries_keys_values: tuple[Callable[[Tensor], Tensor], ...],
    out: nn.Module,
    *,
    n_heads: int,
    d_model: int,
    d_head: int,
    scale: float,
    like: Tensor,
) -> Heads:
    """From the three maps of x [row, d_model] to queries, keys and values [row, head, d_head], and the map from z.

    Maps are asked what they do to unit vectors, so that it does not matter how they store their weights. Keys and values
    may have fewer heads, each shared by as many adjacent query heads.
    """
    zero, unit = like.new_zeros(1, d_model), torch.eye(d_model, device=like.device, dtype=like.dtype)
    weights, biases = [], []
    for linear in queries_keys_values:
        bias = linear(zero)
        shared = n_heads // bias.shape[1]
        weights.append((linear(unit) - bias).transpose(0, 1).repeat_interleave(shared, 0).float())
        biases.append(bias[0].repeat_interleave(shared, 0).float())
    d_z = n_heads * d_head
    moved = out.forward(torch.eye(d_z, device=like.device, dtype=like.dtype)) - out.forward(like.new_zeros(1, d_z))
    (W_Q, W_K, W_V), (b_Q, b_K, _) = weights, biases
    return Heads(W_Q, b_Q, W_K, b_K, W_V, moved.view(n_heads, d_head, d_model).float(), scale)


def by_head(linear: nn.Module, d_head: int) -> Callable[[Tensor], Float[Tensor, "row head d_head"]]:
    """A map whose outputs are heads side by side."""
    return lambda x: linear.forward(x).unflatten(-1, (-1, d_head))
