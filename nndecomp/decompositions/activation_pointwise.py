"""Activation functions that map the matrix of pre-activations entry by entry."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.decompositions.activation_base import Pointwise
from nndecomp.decompositions.codes import Codes, Scales


class Relu(Pointwise):
    """max(0, z)."""

    def forward(self, pre: Float[Tensor, "token feature"], group: int) -> Float[Tensor, "token feature"]:
        return pre.relu()


def _in_window(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Rectangle kernel K((z - theta) / eps): 1 within half a bandwidth of the threshold."""
    return ((z - threshold).abs() < bandwidth / 2).to(z.dtype)


class _JumpRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, threshold = ctx.saved_tensors
        at_jump = _in_window(z, threshold, ctx.bandwidth)
        return grad * (z > threshold), -(threshold / ctx.bandwidth) * (at_jump * grad).sum(0), None


class _Active(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, threshold = ctx.saved_tensors
        at_jump = _in_window(z, threshold, ctx.bandwidth)
        return None, -(at_jump * grad).sum(0) / ctx.bandwidth, None


class JumpRelu(Pointwise):
    """z * 1[z > theta] with a learned theta >= 0 per feature (Rajamanoharan et al. 2024, arXiv 2407.14435, eqs. 8-12).

    The function jumps at theta, so its own derivative with respect to theta is 0 almost everywhere. What is estimated
    instead is the derivative of the loss's expectation over the data: for a density p of z,
        d/dtheta E[z 1[z > theta]] = -theta p(theta),    d/dtheta E[1[z > theta]] = -p(theta),
    with p(theta) estimated by a rectangle kernel of width eps (`bandwidth`): the share of tokens within eps/2 of theta,
    divided by eps. Each token's own term is weighted by the gradient that arrives at it. The derivative
    with respect to z is the exact one, 1[z > theta]; no gradient reaches z through the jump.
    """

    def __init__(self, n_features: Sequence[int], initial_threshold: float, bandwidth: float) -> None:
        super().__init__()
        self.bandwidth, self.initial_threshold = bandwidth, initial_threshold
        self.threshold = nn.ParameterList([torch.full((n,), initial_threshold) for n in n_features])

    def forward(self, pre: Float[Tensor, "token feature"], group: int) -> Float[Tensor, "token feature"]:
        theta = self.threshold[group]
        return _JumpRelu.apply(pre.to(torch.promote_types(pre.dtype, theta.dtype)), theta, self.bandwidth)

    def active(self, pre: Float[Tensor, "token feature"], group: int) -> Float[Tensor, "token feature"]:
        """1[z > theta], its gradient with respect to theta estimated as above."""
        theta = self.threshold[group]
        return _Active.apply(pre.to(torch.promote_types(pre.dtype, theta.dtype)), theta, self.bandwidth)

    def starts(self, group: int) -> list[tuple[nn.Parameter, float]]:
        return [(self.threshold[group], self.initial_threshold)]

    @torch.no_grad()
    def after_step(self, codes: Codes, scales: Scales) -> None:
        for theta in self.threshold:
            theta.clamp_(min=0)
