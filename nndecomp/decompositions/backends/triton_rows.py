"""What is done to every row of a matrix of weights, in one pass over memory.

    project_out   grad[f] <- grad[f] - (grad[f] . W[f]) W[f]
    normalise     W[f]    <- W[f] / |W[f]|

A program owns a row and reads it twice, the second time from the cache of its multiprocessor.
"""

# pyright: reportMissingImports=false

from typing import no_type_check

import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nndecomp.decompositions.backends.triton_launch import kernel, power_of_two

# Tuning. Columns of a row that a program holds at most; its warps.
COLUMNS, WARPS = 1024, 4


@kernel
@no_type_check
def _project_kernel(grad, W, d, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * d
    along = tl.zeros([COLUMNS], tl.float32)
    for block in range(0, d, COLUMNS):
        column = block + tl.arange(0, COLUMNS)
        g = tl.load(grad + row + column, mask=column < d, other=0).to(tl.float32)
        along += g * tl.load(W + row + column, mask=column < d, other=0).to(tl.float32)
    share = tl.sum(along, 0)
    for block in range(0, d, COLUMNS):
        column = block + tl.arange(0, COLUMNS)
        g = tl.load(grad + row + column, mask=column < d, other=0).to(tl.float32)
        w = tl.load(W + row + column, mask=column < d, other=0).to(tl.float32)
        tl.store(grad + row + column, g - share * w, mask=column < d)


@kernel
@no_type_check
def _normalise_kernel(W, d, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * d
    squares = tl.zeros([COLUMNS], tl.float32)
    for block in range(0, d, COLUMNS):
        column = block + tl.arange(0, COLUMNS)
        w = tl.load(W + row + column, mask=column < d, other=0).to(tl.float32)
        squares += w * w
    norm = tl.sqrt(tl.sum(squares, 0))
    for block in range(0, d, COLUMNS):
        column = block + tl.arange(0, COLUMNS)
        w = tl.load(W + row + column, mask=column < d, other=0).to(tl.float32)
        tl.store(W + row + column, w / norm, mask=column < d)


def project_out(grad: Float[Tensor, "feature d"], W: Float[Tensor, "feature d"]) -> None:
    assert grad.is_contiguous() and W.is_contiguous(), f"rows one after the other, not {grad.stride()} and {W.stride()}"
    _project_kernel[(len(W),)](grad, W, W.shape[1], COLUMNS=_columns(W), num_warps=WARPS)


def normalise(W: Float[Tensor, "feature d"]) -> None:
    assert W.is_contiguous(), f"rows one after the other, not {W.stride()}"
    _normalise_kernel[(len(W),)](W, W.shape[1], COLUMNS=_columns(W), num_warps=WARPS)


def _columns(W: Float[Tensor, "feature d"]) -> int:
    return min(COLUMNS, power_of_two(W.shape[1]))
