"""What every Triton kernel here shares: whether it is interpreted, and how exact its matrix products are.

Without a GPU the kernels run through Triton's interpreter (TRITON_INTERPRET=1 before the first import) on tensors of the
CPU: same source, a thousand times slower. Nothing is tuned while it runs: sizes of tiles are constants at the top of each
file, and none of them changes in which order numbers are added over slots, so that runs repeat each other to the bit.
"""

# pyright: reportMissingImports=false

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from nndecomp.decompositions.backends.interface import Affine

INTERPRETED: bool = knobs.runtime.interpret
TYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of a product of float32, by torch.get_float32_matmul_precision(). "highest" is three products of TF32 parts: float32 up to
# its rounding, on tensor cores. "medium" rounds to bfloat16. Under autocast inputs are rounded to its type. Sums are float32.
_PRECISION = {"highest": "tf32x3", "high": "tf32", "medium": "ieee"}


def rounded(tensor: Tensor) -> Tensor:
    """In the type of autocast where that is on. Anew each time: optimisers write to weights without counting it as a new version."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def operands(of: Affine) -> tuple[Tensor, Tensor, str]:
    """x and W as the tensor cores take them, rows side by side, and Triton's name of the precision of their product."""
    x, W = rounded(of.x), rounded(of.W)
    wanted = torch.get_float32_matmul_precision()
    if x.dtype is torch.float32 and wanted == "medium":
        x, W = x.bfloat16(), W.bfloat16()
    assert x.dtype == W.dtype and x.dtype in TYPES, (
        f"x is {x.dtype} and W is {W.dtype}; Triton kernels here take {TYPES}"
    )
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


def n_blocks(n: int, size: int) -> int:
    """Blocks of this size that n take."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()
