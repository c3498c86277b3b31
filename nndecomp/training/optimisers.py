"""Adam and AdamW, and clipping by the norm over all parameters of one objective."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.schema import Optimizer, TrainingConfig


def build_optimiser(parameters: Sequence[nn.Parameter], cfg: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of one objective; weight decay acts on parameters of two or more dimensions only."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    beta1, beta2 = map(float, cfg.betas)
    # One kernel for the whole update; on this code's devices (cpu, cuda, mps) all floating-point parameters support it.
    match cfg.optimizer:
        case Optimizer.adam:
            return torch.optim.Adam(groups, lr=cfg.lr, betas=(beta1, beta2), fused=True)
        case Optimizer.adamw:
            return torch.optim.AdamW(groups, lr=cfg.lr, betas=(beta1, beta2), fused=True)
        case other:
            raise NotImplementedError(f"optimizer {other.value}")


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Float[Tensor, " parameter"]:
    """|g| of each parameter, in fp32 and on the device; 0 where the loss did not reach a parameter."""
    reached = [i for i, p in enumerate(parameters) if p.grad is not None]
    norms = torch.zeros(len(parameters), device=parameters[0].device)
    if reached:
        gradients = [g for p in parameters if (g := p.grad) is not None]
        values = torch.stack([n.float() for n in torch._foreach_norm(gradients)])  # pyright: ignore[reportPrivateImportUsage]
        if len(reached) == len(parameters):
            return values
        norms[reached] = values
    return norms


def clip_gradients(parameters: Sequence[nn.Parameter], norm: Float[Tensor, ""], clip_norm: float) -> None:
    """g <- g * min(1, clip_norm / norm), without asking the host; `norm` is the norm of all gradients together."""
    gradients = [g for p in parameters if (g := p.grad) is not None]
    torch._foreach_mul_(gradients, (clip_norm / norm).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]
