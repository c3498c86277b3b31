"""Activation functions: from pre-activations to codes.

Selecting ones (topk, batchtopk) name the active entries of each group; dense ones (relu, jumprelu) map the matrix
entry by entry. All codes are non-negative.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.schema import Activation, Scope
from nndecomp.decompositions.codes import Codes
from nndecomp.decompositions.kernels import (
    Support,
    batchtopk_support,
    split_support,
    threshold_support,
    topk_support,
)
from nndecomp.decompositions.spec import ActivationSpec


class ActivationFunction(nn.Module):
    """Shared by all. Thresholds stay in fp32 when the module is cast to another dtype, since bf16 would freeze them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ActivationFunction":
        own = [*self.parameters(recurse=recurse), *self.buffers(recurse=recurse)]
        before = [tensor.data for tensor in own]
        super()._apply(fn, recurse)
        after = [*self.parameters(recurse=recurse), *self.buffers(recurse=recurse)]
        for tensor, exact in zip(after, before, strict=True):
            tensor.data = exact.to(tensor.device)
        return self

    def live_obstacle(self) -> str | None:
        """Why groups cannot be encoded one after the other, or None."""
        return None

    def after_step(self, codes: Codes) -> None:
        """Learn from the codes of a training step."""


class Selecting(ActivationFunction, ABC):
    k: list[int]  # active features of each group, on average; annealing rewrites it

    @abstractmethod
    def supports(self, pres: Sequence[Float[Tensor, "token _"]], groups: Sequence[int]) -> list[Support]:
        """The active entries of the given groups."""


class Pointwise(ActivationFunction, ABC):
    @abstractmethod
    def forward(self, pre: Float[Tensor, "token feature"], group: int) -> Float[Tensor, "token feature"]: ...


class Relu(Pointwise):
    """max(0, z)."""

    def forward(self, pre: Float[Tensor, "token feature"], group: int) -> Float[Tensor, "token feature"]:
        return pre.relu()


class TopK(Selecting):
    """The k largest of each token and group, clipped at 0 (Gao et al. 2024, arXiv 2406.04093, eq. 5).

    With scope `all` the groups of a token share the sum of their k.
    """

    def __init__(self, k: Sequence[int], scope: Scope) -> None:
        super().__init__()
        self.k, self.scope = list(k), scope

    def supports(self, pres: Sequence[Float[Tensor, "token _"]], groups: Sequence[int]) -> list[Support]:
        match self.scope:
            case Scope.group:
                return [topk_support(pre, self.k[group]) for pre, group in zip(pres, groups, strict=True)]
            case Scope.all:
                assert len(groups) == len(self.k), f"groups {groups} compete with all {len(self.k)}"
                support = topk_support(torch.cat(list(pres), 1), sum(self.k))
                return split_support(support, [pre.shape[1] for pre in pres])

    def live_obstacle(self) -> str | None:
        shared = self.scope is Scope.all and len(self.k) > 1
        return (
            "features of all groups compete for the same k, so none is known before the last is read"
            if shared
            else None
        )


class BatchTopK(Selecting):
    """The k * tokens largest of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    In training each group keeps its k * tokens largest positive entries; with scope `all` the groups share the sum.
    In evaluation an entry is active if it exceeds a threshold, one a group (or one for all), so that tokens do not
    depend on their batch: the moving average over training steps of the smallest positive value kept. The average
    starts at its first value, so it needs no bias correction.
    """

    def __init__(self, k: Sequence[int], scope: Scope, threshold_rate: float) -> None:
        super().__init__()
        self.k, self.scope, self.threshold_rate = list(k), scope, threshold_rate
        n_thresholds = len(self.k) if scope is Scope.group else 1
        self.threshold: Tensor
        self.register_buffer("threshold", torch.full((n_thresholds,), torch.nan))

    def supports(self, pres: Sequence[Float[Tensor, "token _"]], groups: Sequence[int]) -> list[Support]:
        if not self.training:
            return self._above_threshold(pres, groups)
        n_tokens = pres[0].shape[0]
        match self.scope:
            case Scope.group:
                return [
                    batchtopk_support(pre, self.k[group] * n_tokens) for pre, group in zip(pres, groups, strict=True)
                ]
            case Scope.all:
                assert len(groups) == len(self.k), f"groups {groups} compete with all {len(self.k)}"
                support = batchtopk_support(torch.cat(list(pres), 1), sum(self.k) * n_tokens)
                return split_support(support, [pre.shape[1] for pre in pres])

    def _above_threshold(self, pres: Sequence[Tensor], groups: Sequence[int]) -> list[Support]:
        if bool(self.threshold.isnan().any()):
            raise ValueError(
                "batchtopk has no inference threshold yet: it is learned in training steps (after_step), "
                "and evaluating without one would silently be another activation function"
            )
        threshold = self.threshold.expand(len(self.k))
        return [threshold_support(pre, threshold[group]) for pre, group in zip(pres, groups, strict=True)]

    @torch.no_grad()
    def after_step(self, codes: Codes) -> None:
        values = [group.values.flatten() for group in codes]
        competing = values if self.scope is Scope.group else [torch.cat(values)]
        smallest = torch.stack([_smallest_positive(v) for v in competing]).to(self.threshold)
        moved = self.threshold.lerp(smallest, self.threshold_rate)
        moved = torch.where(self.threshold.isnan(), smallest, moved)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))


def _smallest_positive(values: Float[Tensor, "slot"]) -> Float[Tensor, ""]:
    """Infinite if there is none."""
    positive = torch.where(values > 0, values, torch.inf)
    return torch.cat([positive, positive.new_full((1,), torch.inf)]).amin()


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
        self.bandwidth = bandwidth
        self.threshold = nn.ParameterList([torch.full((n,), initial_threshold) for n in n_features])

    def forward(self, pre: Float[Tensor, "token feature"], group: int) -> Float[Tensor, "token feature"]:
        theta = self.threshold[group]
        return _JumpRelu.apply(pre.to(torch.promote_types(pre.dtype, theta.dtype)), theta, self.bandwidth)

    def active(self, pre: Float[Tensor, "token feature"], group: int) -> Float[Tensor, "token feature"]:
        """1[z > theta], its gradient with respect to theta estimated as above."""
        theta = self.threshold[group]
        return _Active.apply(pre.to(torch.promote_types(pre.dtype, theta.dtype)), theta, self.bandwidth)

    @torch.no_grad()
    def after_step(self, codes: Codes) -> None:
        for theta in self.threshold:
            theta.clamp_(min=0)


def make_activation(spec: ActivationSpec, n_features: Sequence[int]) -> Selecting | Pointwise:
    match spec.kind:
        case Activation.relu:
            return Relu()
        case Activation.topk:
            return TopK(spec.k, spec.scope)
        case Activation.batchtopk:
            return BatchTopK(spec.k, spec.scope, spec.threshold_rate)
        case Activation.jumprelu:
            return JumpRelu(n_features, spec.initial_threshold, spec.bandwidth)
        case other:
            raise NotImplementedError(f"activation {other.value}")
