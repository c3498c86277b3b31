"""What every Triton kernel here shares: whether it is interpreted, how exact its matrix products are, and its tuning.

Without a GPU the kernels run through Triton's interpreter (TRITON_INTERPRET=1 before the first import) on tensors of the
CPU: same source, same numbers, a thousand times slower. Timing on a GPU picks the configuration of a launch; nothing that
may be picked changes in which order numbers are added, so that a run and its resumption stay the same to the bit.
"""

# pyright: reportMissingImports=false

from functools import cache

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret

# Of the encoder's product, by torch.get_float32_matmul_precision(). "highest" is three products of TF32 parts, which is
# float32 up to its rounding and uses the tensor cores; "medium" rounds the inputs to bfloat16. Sums are float32 always.
_PRECISION = {"highest": "tf32x3", "high": "tf32", "medium": "ieee"}


def operands(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor, str]:
    """x and W as the tensor cores take them, and Triton's name of the precision of their product."""
    assert x.dtype == W.dtype, f"x is {x.dtype} and W is {W.dtype}"
    assert x.dtype in (torch.float32, torch.bfloat16, torch.float16), f"Triton kernels here do not take {x.dtype}"
    wanted = torch.get_float32_matmul_precision()
    if x.dtype is torch.float32 and wanted == "medium":
        x, W = x.bfloat16(), W.bfloat16()
    # The interpreter multiplies bfloat16 wrongly; products of two of them are exact in float32.
    if INTERPRETED:
        return x.float().contiguous(), W.float().contiguous(), "ieee"
    return x.contiguous(), W.contiguous(), _PRECISION[wanted] if x.dtype is torch.float32 else "ieee"


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors that want programs; the interpreter has one."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return triton.next_power_of_2(n)
