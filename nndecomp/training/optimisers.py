"""Optimisers of one objective, and clipping by the norm over all its parameters.

Adam and AdamW are torch's. With g the gradient, w the weight decay of matrices, b1 and b2 the betas:

    sign    m <- b1 m + (1 - b1) g                   p <- (1 - lr w) p - lr sign(m)
    muon    m <- b1 m + g;  o = orthogonal(g + b1 m)  p <- (1 - lr w) p - lr 0.2 sqrt(max(rows, columns)) o

`orthogonal` sets all singular values of a matrix to about 1; the factor gives entries the size that AdamW's updates have, so
that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982, section 2.2). What is no matrix goes by AdamW.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimiser

from nndecomp.config.schema import Optimizer, TrainingConfig
from nndecomp.decompositions.row_gradients import RowGradients
from nndecomp.training.row_adam import RowAdam

# pyright: reportPrivateImportUsage=false
# Jordan et al. 2024, Muon: the quintic whose five-fold iterate sends (0, 1] into about (0.7, 1.2).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-8


def build_optimiser(
    parameters: Mapping[str, nn.Parameter], cfg: TrainingConfig, lr_shares: Mapping[str, float] | None = None
) -> TorchOptimiser:
    """The optimiser of one objective; weight decay acts on parameters of two or more dimensions only.

    lr_shares: parameters, by name, whose learning rate is a share of cfg.lr.
    """
    shares = lr_shares or {}
    assert shares.keys() <= parameters.keys(), f"learning rates for {sorted(shares)}, but there is {list(parameters)}"
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((parameter.ndim >= 2, shares.get(name, 1.0)), []).append(parameter)
    made: list[dict[str, Any]] = [
        {"params": own, "weight_decay": cfg.weight_decay if decays else 0.0, "lr_share": share, "lr": share * cfg.lr}
        for (decays, share), own in groups.items()
    ]
    # torch takes two floats or two tensors: a 0 that YAML reads as a whole number would be refused.
    beta1, beta2 = map(float, cfg.betas)
    match cfg.optimizer:
        # One kernel for the whole update; on this code's devices (cpu, cuda, mps) all floating-point parameters support it.
        case Optimizer.adam:
            return RowAdam(made, cfg.lr, (beta1, beta2), decoupled=False)
        case Optimizer.adamw:
            return RowAdam(made, cfg.lr, (beta1, beta2), decoupled=True)
        case Optimizer.sign:
            return SignedMomentum(made, cfg.lr, beta1)
        case Optimizer.muon:
            return Muon(made, cfg.lr, (beta1, beta2))


class SignedMomentum(TorchOptimiser):
    """Signum (Bernstein et al. 2018, arXiv 1802.04434, algorithm 2)."""

    def __init__(self, parameters: Sequence[dict[str, Any]], lr: float, beta: float) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the loop computes its gradients itself"
        for group in self.param_groups:
            parameters, gradients = _reached(group["params"])
            if not parameters:
                continue
            momenta = [_state(self.state[p], "momentum", p) for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["beta"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, torch._foreach_sign(momenta), alpha=-group["lr"])


class Muon(TorchOptimiser):
    """Orthogonalised Nesterov momentum for matrices, AdamW for all else."""

    def __init__(self, parameters: Sequence[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the loop computes its gradients itself"
        for group in self.param_groups:
            parameters, gradients = _reached(group["params"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"]) if parameters else None
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter.ndim == 2:
                    self._matrix(parameter, gradient, group["lr"], group["betas"][0])
                else:
                    self._adam(parameter, gradient, group["lr"], *group["betas"])

    def _matrix(self, parameter: Tensor, gradient: Tensor, lr: float, beta: float) -> None:
        momentum = _state(self.state[parameter], "momentum", parameter)
        momentum.mul_(beta).add_(gradient)
        step = orthogonal(gradient + beta * momentum).to(parameter.dtype)
        parameter.add_(step, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)

    def _adam(self, parameter: Tensor, gradient: Tensor, lr: float, beta1: float, beta2: float) -> None:
        state = self.state[parameter]
        m, v = _state(state, "exp_avg", parameter), _state(state, "exp_avg_sq", parameter)
        # A plain number: bias corrections ask nothing of the device.
        state["n_steps"] = n_steps = state.get("n_steps", 0) + 1
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (v / (1 - beta2**n_steps)).sqrt_().add_(_EPSILON)
        parameter.addcdiv_(m, scale, value=-lr / (1 - beta1**n_steps))


def orthogonal(matrix: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """U S V^T -> U S' V^T with S' between about 0.7 and 1.2, by five steps of X <- a X + b X X^T X + c (X X^T)^2 X.

    In bf16 on GPUs, where it is faster by far and exact enough (Jordan et al. 2024).
    """
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.T if tall else matrix
    X = X.bfloat16() if X.device.type == "cuda" else X
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.T if tall else X


def _reached(parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that the loss came to, and their gradients."""
    reached: list[Tensor] = [p for p in parameters if p.grad is not None]
    return reached, [g for p in parameters if (g := p.grad) is not None]


def _state(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name]


def set_learning_rate(optimiser: TorchOptimiser, lr: float) -> None:
    """`lr` for all parameters, but for those that have a share of it."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_share"]


@torch.no_grad()
def forget(optimiser: TorchOptimiser, parameter: nn.Parameter, rows: Int[Tensor, " row"]) -> None:
    """Zeroes what is remembered of some rows of a parameter: momenta and second moments, whatever they are called."""
    for remembered in optimiser.state.get(parameter, {}).values():
        if isinstance(remembered, Tensor) and remembered.shape == parameter.shape:
            remembered[rows] = 0


def gradient_norms(parameters: Sequence[nn.Parameter], rows: RowGradients | None = None) -> Float[Tensor, " parameter"]:
    """|g| of each parameter, in fp32 and on the device; 0 where the loss did not reach a parameter. `rows`: gradients that were put
    aside."""
    gradients = [g for p in parameters if (g := p.grad) is not None]
    written = iter(torch._foreach_norm(gradients) if gradients else [])
    none = torch.zeros((), device=parameters[0].device)
    norms = [
        rows.norm(p) if rows is not None and p in rows else none if p.grad is None else next(written)
        for p in parameters
    ]
    return torch.stack([norm.float() for norm in norms])


def clip_gradients(parameters: Sequence[nn.Parameter], norm: Float[Tensor, ""], clip_norm: float) -> Float[Tensor, ""]:
    """g <- g * min(1, clip_norm / norm), without asking the host; `norm` is the norm of all gradients together. Returns the factor."""
    gradients = [g for p in parameters if (g := p.grad) is not None]
    factor = (clip_norm / norm).clamp(max=1.0)
    if gradients:
        torch._foreach_mul_(gradients, factor)
    return factor
