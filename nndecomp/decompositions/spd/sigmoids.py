"""From the logit q of a causal importance to the importance itself; LEAK = 0.01.

    lower-leaky g = clamp(q, 0, 1)                  of masks, and of all that is reported
    upper-leaky h = clamp(q, 0, 1) + LEAK relu(q - 1)    of the minimality loss

Backward, with delta the gradient that arrives:

    lower-leaky    q <= 0: LEAK delta if delta < 0 (the loss wants g larger), else 0;   0 < q <= 1: delta;   q > 1: 0
    upper-leaky    q <= 0: 0;   0 < q <= 1: delta;   q > 1: LEAK delta

The one-sided leak revives a component that is off, and cannot push it further off. Bushnaq, Braun and Sharkey 2025 (arXiv
2506.20790, appendix) have g = LEAK q below 0; what is trained by their code, and here, is the clamp.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LEAK = 0.01


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        ctx.save_for_backward(q)
        return q.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Tensor:
        (q,), (delta,) = ctx.saved_tensors, deltas
        below = torch.where(delta < 0, LEAK * delta, torch.zeros_like(delta))
        return torch.where(q <= 0, below, torch.where(q <= 1, delta, torch.zeros_like(delta)))


def lower_leaky(q: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    value = _LowerLeaky.apply(q)
    assert isinstance(value, Tensor)
    return value


class _UpperLeaky(torch.autograd.Function):
    """Written out, so that what happens at exactly 0 and 1 does not depend on torch's convention for clamp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        ctx.save_for_backward(q)
        return torch.where(q > 1, 1 + LEAK * (q - 1), q.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Tensor:
        (q,), (delta,) = ctx.saved_tensors, deltas
        return torch.where(q <= 0, torch.zeros_like(delta), torch.where(q <= 1, delta, LEAK * delta))


def upper_leaky(q: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    value = _UpperLeaky.apply(q)
    assert isinstance(value, Tensor)
    return value
