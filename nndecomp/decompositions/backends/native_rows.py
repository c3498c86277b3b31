"""Adam on gradients made a row at a time, in C++ (cpp/rows.cpp)."""

import ctypes
from math import inf
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.decompositions.backends.compiled import INT, LONG, library, pointer, threads
from nndecomp.decompositions.backends.interface import AdamNumbers, RowGradient, RowUpdate
from nndecomp.decompositions.backends.native import PLAIN


class _Struct(ctypes.Structure):
    """RowGradient of cpp/rows.cpp."""

    _fields_ = (
        *(("rows", ctypes.c_void_p), ("stride", LONG), ("tokens", ctypes.c_void_p), ("order", ctypes.c_void_p)),
        *(("bounds", ctypes.c_void_p), ("weights", ctypes.c_void_p), ("tangent", INT)),
    )


# Rows are made twice, once for the norm by which they are clipped. With more slots a feature they are written down in between, which
# saves what else would pass over them: their norm, clipping, and what makes them tangent.
_FEW = 2


class NativeRows(RowUpdate):
    few: ClassVar[float] = inf

    def __init__(self, gradient: RowGradient, W: Float[Tensor, "feature d"]) -> None:
        order, bounds = gradient.support.by_feature(PLAIN.by_feature)
        rows = gradient.rows if gradient.rows.stride(1) == 1 else gradient.rows.contiguous()
        self.W = W
        self._read = (
            rows,
            gradient.support.tokens,
            order,
            bounds,
            gradient.weights.contiguous(),
        )  # kept while pointed at
        first, *others = (pointer(each).value for each in self._read)
        self._many = len(gradient.support.indices) >= _FEW * len(W)
        self._written: Tensor | None = None
        self._struct = _Struct(first, rows.stride(0), *others, gradient.tangent)

    @staticmethod
    def rounded(rows: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        return rows

    def norm(self) -> Float[Tensor, ""]:
        self._written = torch.empty_like(self.W) if self._many else None
        places = (ctypes.byref(self._struct), pointer(self.W), pointer(self._written))
        squares = library().row_squares(*places, *map(LONG, self.W.shape), threads())
        return torch.tensor(squares, dtype=torch.float64).sqrt().float()

    def adam(
        self,
        m: Float[Tensor, "feature d"],
        v: Float[Tensor, "feature d"],
        n: Float[Tensor, ""],
        clip: Float[Tensor, ""],
        numbers: AdamNumbers,
    ) -> None:
        (beta1, beta2), made = numbers.betas, float(n)
        rate, by = numbers.lr / (1 - beta1**made), (1 - beta2**made) ** -0.5
        places = (pointer(each) for each in (self._written, clip, self.W, m, v))
        kept, rest = (tuple(map(ctypes.c_float, each)) for each in ((numbers.keep, rate), (by, numbers.epsilon)))
        betas = tuple(map(ctypes.c_double, numbers.betas))  # 1 - beta, in float32, would be off by 5e-5 of itself
        library().row_adam(
            ctypes.byref(self._struct), *places, *map(LONG, self.W.shape), *kept, *betas, *rest, threads()
        )
