"""Activation functions that map the matrix of pre-activations entry by entry."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.config.schema import JumpReluGradient
from nndecomp.decompositions.activation_base import Pointwise
from nndecomp.decompositions.codes import Codes, Scales


class Relu(Pointwise):
    """max(0, z)."""

    def __init__(self, n_features: Sequence[int]) -> None:
        super().__init__()
        self.n_features = list(n_features)

    def floor(self, group: int, learns: bool) -> Float[Tensor, "feature"] | None:
        return torch.zeros(self.n_features[group])

    def forward(
        self,
        pre: Float[Tensor, "*entry"],
        group: int,
        c: Float[Tensor, "feature"] | None,
        b_enc: Float[Tensor, "feature"],
        at: Int[Tensor, "slot"] | None = None,
    ) -> Float[Tensor, "*entry"]:
        return pre.relu()


class Gated(Pointwise):
    """1[pi_gate > 0] * max(0, exp(r) (pi_gate - b_enc) + b_mag)   (Rajamanoharan et al. 2024, arXiv 2404.16014, eqs. 3-7).

    pi_gate are the pre-activations, so b_enc is the gate's bias, and pi_gate - b_enc what both branches share. The step
    passes no gradient: the gate learns from losses of max(0, pi_gate).
    """

    exact = False

    def __init__(self, n_features: Sequence[int]) -> None:
        super().__init__()
        self.r = nn.ParameterList([torch.zeros(n) for n in n_features])
        self.b_mag = nn.ParameterList([torch.zeros(n) for n in n_features])

    def forward(
        self,
        pre: Float[Tensor, "*entry"],
        group: int,
        c: Float[Tensor, "feature"] | None,
        b_enc: Float[Tensor, "feature"],
        at: Int[Tensor, "slot"] | None = None,
    ) -> Float[Tensor, "*entry"]:
        return self.when_active(pre, group, b_enc, at).relu() * (pre > 0)

    def floor(self, group: int, learns: bool) -> Float[Tensor, "feature"] | None:
        return torch.zeros_like(self.r[group])

    def when_active(
        self,
        pre: Float[Tensor, "*entry"],
        group: int,
        b_enc: Float[Tensor, "feature"],
        at: Int[Tensor, "slot"] | None = None,
    ) -> Float[Tensor, "*entry"]:
        return self.at(self.r[group].exp(), at) * (pre - self.at(b_enc, at)) + self.at(self.b_mag[group], at)

    def gate(self, pre: Float[Tensor, "*entry"]) -> Float[Tensor, "*entry"]:
        """What the gate's losses see."""
        return pre.relu()

    def starts(self, group: int) -> list[tuple[nn.Parameter, float]]:
        return [(self.r[group], 0.0), (self.b_mag[group], 0.0)]

    @torch.no_grad()
    def fold_bias(self, group: int, fell: Float[Tensor, "feature"]) -> None:
        self.b_mag[group] -= self.r[group].exp() * fell


def _scaled(z: Tensor, c: Tensor | None) -> Tensor:
    return z if c is None else z * c


def _in_window(z: Tensor, threshold: Tensor, c: Tensor | None, bandwidth: float) -> Tensor:
    """Rectangle kernel K((z c - theta) / eps): 1 within half a bandwidth of the threshold."""
    return ((_scaled(z, c) - threshold).abs() < bandwidth / 2).to(z.dtype)


class _JumpRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, threshold: Tensor, c: Tensor | None, bandwidth: float, kind: JumpReluGradient
    ) -> Tensor:
        ctx.save_for_backward(z, threshold, c)
        ctx.bandwidth, ctx.kind = bandwidth, kind
        return z * (_scaled(z, c) > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, threshold, c = ctx.saved_tensors
        at_jump = _in_window(z, threshold, c, ctx.bandwidth)
        kind: JumpReluGradient = ctx.kind
        match kind:
            case JumpReluGradient.exact:
                through = (_scaled(z, c) > threshold).to(z.dtype)
            case JumpReluGradient.rectangle:
                through = (_scaled(z, c) > threshold) + at_jump * (threshold / ctx.bandwidth)
            case JumpReluGradient.positive:
                through = (z > 0).to(z.dtype)
        # The height of the jump is z where z c = theta; a feature without decoder (c = 0) has none.
        height = threshold if c is None else torch.where(c > 0, threshold / c, 0)
        of_theta = (-(height / ctx.bandwidth) * at_jump * grad).sum_to_size(threshold.shape)
        return grad * through, of_theta, None, None, None


class _Active(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, c: Tensor | None, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold, c)
        ctx.bandwidth = bandwidth
        return (_scaled(z, c) > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, threshold, c = ctx.saved_tensors
        at_jump = _in_window(z, threshold, c, ctx.bandwidth)
        return None, (-at_jump * grad).sum_to_size(threshold.shape) / ctx.bandwidth, None, None


class JumpRelu(Pointwise):
    """z * 1[z c > theta] with a learned theta >= 0 per feature (Rajamanoharan et al. 2024, arXiv 2407.14435, eqs. 8-12).

    The function jumps at theta, so its own derivative with respect to theta is 0 almost everywhere. What is estimated
    instead is the derivative of the loss's expectation over the data: for c = 1 and a density p of z,
        d/dtheta E[z 1[z > theta]] = -theta p(theta),    d/dtheta E[1[z > theta]] = -p(theta),
    with p(theta) estimated by a rectangle kernel of width eps (`bandwidth`, in units of z c, as theta is): the share of
    tokens within eps/2 of theta, divided by eps. Each token's own term is weighted by the gradient that arrives at it.
    Both are functions of the pre-activation, never of the code: a code is 0 below theta, which would hide half the
    window, and take every inactive entry into it where theta < eps/2. What reaches z: see `JumpReluGradient`.
    """

    scaled = True

    def __init__(
        self,
        n_features: Sequence[int],
        initial_threshold: float,
        bandwidth: float,
        gradient: JumpReluGradient = JumpReluGradient.exact,
        log_threshold: bool = False,
    ) -> None:
        super().__init__()
        self.bandwidth, self.gradient, self.log = bandwidth, gradient, log_threshold
        self.start = math.log(initial_threshold) if log_threshold else initial_threshold
        learned = [torch.full((n,), self.start) for n in n_features]
        self.log_threshold = nn.ParameterList(learned) if log_threshold else None
        self.threshold = None if log_threshold else nn.ParameterList(learned)

    @property
    def learned(self) -> nn.ParameterList:
        """Thresholds, or their logarithms."""
        learned = self.threshold if self.log_threshold is None else self.log_threshold
        assert learned is not None, "thresholds are learned as they are, or as their logarithms"
        return learned

    def theta(self, group: int) -> Float[Tensor, "feature"]:
        """Thresholds of a group, in units of z c; gradients flow into what is learned."""
        learned = self.learned[group]
        return learned.exp() if self.log else learned

    @torch.no_grad()
    def set_theta(self, group: int, theta: Float[Tensor, "feature"]) -> None:
        self.learned[group].copy_(theta.log() if self.log else theta)

    def starts(self, group: int) -> list[tuple[nn.Parameter, float]]:
        return [(self.learned[group], self.start)]

    def forward(
        self,
        pre: Float[Tensor, "*entry"],
        group: int,
        c: Float[Tensor, "feature"] | None,
        b_enc: Float[Tensor, "feature"],
        at: Int[Tensor, "slot"] | None = None,
    ) -> Float[Tensor, "*entry"]:
        return _JumpRelu.apply(*self._compared(pre, group, c, at), self.bandwidth, self.gradient)

    def active(
        self,
        pre: Float[Tensor, "*entry"],
        group: int,
        c: Float[Tensor, "feature"] | None,
        at: Int[Tensor, "slot"] | None = None,
    ) -> Float[Tensor, "*entry"]:
        """1[z c > theta], its gradient with respect to theta estimated as above."""
        return _Active.apply(*self._compared(pre, group, c, at), self.bandwidth)

    def _compared(
        self, pre: Tensor, group: int, c: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        theta = self.at(self.theta(group), at)
        return pre.to(torch.promote_types(pre.dtype, theta.dtype)), theta, None if c is None else self.at(c, at)

    def floor(self, group: int, learns: bool) -> Float[Tensor, "feature"] | None:
        """The lower end of the window in which thresholds learn. The straight-through kind teaches all that is positive."""
        if self.gradient is JumpReluGradient.positive:
            return None
        return self.theta(group) - (self.bandwidth / 2 if learns else 0.0)

    @torch.no_grad()
    def after_step(self, codes: Codes, scales: Scales) -> None:
        if self.threshold is not None:
            for theta in self.threshold:
                theta.clamp_(min=0)
