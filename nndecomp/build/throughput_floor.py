"""What no training step can do without, and what a device can do at most: each as torch does it best, in the same rounds as steps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import DType, SizeConfig


@dataclass(frozen=True)
class Amounts:
    """Numbers of 4 bytes: too many for a cache, and few enough for it twice; and the side of a square matrix."""

    copied: int
    cached: int
    side: int


def amounts_on(device: torch.device) -> Amounts:
    return Amounts(2**28, 2**22, 8192) if device.type == "cuda" else Amounts(2**24, 2**16, 1024)


def floor(size: SizeConfig, first: Float[Tensor, "token width"], precision: DType) -> dict[str, Callable[[], object]]:
    """By name:

    encoder     x @ W_enc.T into memory that is there, of every layer, in the precision of products
    optimiser   fused Adam over all parameters, in float32
    copy        of numbers from one place in memory to another
    cache       the same where both places are in the cache
    product     of two square matrices, in the precision of products
    """
    device, amounts = first.device, amounts_on(first.device)
    dtype = torch.bfloat16 if precision is DType.bfloat16 else torch.float32
    W = torch.randn(size.n_features, size.d_model, device=device, dtype=dtype)
    out = torch.empty(size.batch_tokens, size.n_features, device=device, dtype=dtype)
    x = first[:, : size.d_model].to(dtype).contiguous()

    def encoder() -> None:
        for _ in range(size.n_layers):
            torch.mm(x, W.T, out=out)

    parameter = torch.nn.Parameter(torch.randn(size.n_parameters, device=device))
    parameter.grad = torch.randn(size.n_parameters, device=device)
    adam = torch.optim.Adam([parameter], lr=1e-5, fused=True)
    here, there = torch.randn(2, amounts.copied, device=device).unbind()
    near, nearer = torch.randn(2, amounts.cached, device=device).unbind()
    a, b, product = torch.randn(3, amounts.side, amounts.side, device=device, dtype=dtype).unbind()
    return {
        "encoder": encoder,
        "optimiser": adam.step,
        "copy": partial(there.copy_, here),
        "cache": partial(nearer.copy_, near),
        "product": partial(torch.mm, a, b, out=product),
    }
