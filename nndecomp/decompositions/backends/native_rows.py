"""Adam on gradients made a row at a time, in C++ (cpp/rows.cpp)."""

import ctypes
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


class NativeRows(RowUpdate):
    few: ClassVar[float] = 2

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
        self._struct = _Struct(first, rows.stride(0), *others, gradient.tangent)

    @staticmethod
    def rounded(rows: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        return rows

    def norm(self) -> Float[Tensor, ""]:
        shape = map(LONG, self.W.shape)
        squares = library().row_squares(ctypes.byref(self._struct), pointer(self.W), *shape, threads())
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
        places = (pointer(each) for each in (clip, self.W, m, v))
        floats = (ctypes.c_float(each) for each in (numbers.keep, rate, beta1, beta2, by, numbers.epsilon))
        library().row_adam(ctypes.byref(self._struct), *places, *map(LONG, self.W.shape), *floats, threads())
