"""What every Triton kernel here shares: whether it is interpreted, how exact its matrix products are, and its tuning.

Without a GPU the kernels run through Triton's interpreter (TRITON_INTERPRET=1 before the first import) on tensors of the
CPU: same source, same numbers, a thousand times slower. Timing on a GPU picks the configuration of a launch; nothing that
may be picked changes in which order numbers are added, so that a run and its resumption stay the same to the bit.
"""

# pyright: reportMissingImports=false

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from nndecomp.decompositions.backends.interface import Affine

INTERPRETED: bool = triton.knobs.runtime.interpret
TYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of a product of float32, by torch.get_float32_matmul_precision(). "highest" is three products of TF32 parts: float32 up to
# its rounding, on tensor cores. "medium" rounds to bfloat16. Under autocast inputs are rounded to its type. Sums are float32.
_PRECISION = {"highest": "tf32x3", "high": "tf32", "medium": "ieee"}


def operands(of: Affine) -> tuple[Tensor, Tensor, str]:
    """x and W as the tensor cores take them, rows side by side, and Triton's name of the precision of their product."""
    x, W, device = of.x, of.W, of.x.device.type
    assert x.dtype == W.dtype, f"x is {x.dtype} and W is {W.dtype}"
    wanted = torch.get_float32_matmul_precision()
    if torch.is_autocast_enabled(device):
        x, W = (each.to(torch.get_autocast_dtype(device)) for each in (x, W))
    elif x.dtype is torch.float32 and wanted == "medium":
        x, W = x.bfloat16(), W.bfloat16()
    assert x.dtype in TYPES, f"Triton kernels here do not take {x.dtype}"
    # The interpreter multiplies bfloat16 wrongly; products of two of them are exact in float32.
    if INTERPRETED:
        return x.float().contiguous(), W.float().contiguous(), "ieee"
    return x.contiguous(), W.contiguous(), _PRECISION[wanted] if x.dtype is torch.float32 else "ieee"


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled by Triton, or interpreted. Kernels also say @no_type_check: annotations of theirs are Triton's."""
    return triton.jit(function)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors that want programs; the interpreter has one."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return triton.next_power_of_2(n)
