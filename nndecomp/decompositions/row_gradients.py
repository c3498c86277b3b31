"""Gradients of rows that are never written down.

    dL/dW[f] = sum over the slots s of feature f of  weights[s] * rows[token of s]

An optimiser that makes it a row at a time, as it moves the row, saves writing, reading and keeping what is as large as W. Within
`collected`, such gradients of some parameters are put aside for it; where anything else adds to the gradient, they are added up.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.decompositions import backends
from nndecomp.decompositions.backends import native
from nndecomp.decompositions.backends.compiled import INT, LONG, library, pointer, threads
from nndecomp.decompositions.support import Support

# Rows are made twice, once for the norm by which they are clipped. With more slots a feature than these, writing them down costs less.
_FEW = 2


@dataclass(frozen=True)
class RowGradient:
    support: Support
    rows: Float[Tensor, "token d"]
    weights: Float[Tensor, "slot"]
    tangent: bool = False  # without what is along W's own rows

    def dense(self) -> Float[Tensor, "feature d"]:
        assert not self.tangent, "made tangent only where nothing adds to it"
        return backends.of(self.rows).feature_sums(self.support, self.rows, self.weights)


class _Struct(ctypes.Structure):
    """RowGradient of native.cpp."""

    _fields_ = (
        *(("rows", ctypes.c_void_p), ("stride", LONG), ("tokens", ctypes.c_void_p), ("order", ctypes.c_void_p)),
        *(("bounds", ctypes.c_void_p), ("weights", ctypes.c_void_p), ("tangent", INT)),
    )


class RowGradients:
    """Of some parameters, by where they are in memory."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = {p.data_ptr(): p for p in parameters}
        self._found: dict[int, list[RowGradient]] = {}

    def put(self, W: Tensor, gradient: RowGradient) -> bool:
        """Puts a gradient aside; False if it is not wanted."""
        few = len(gradient.support.indices) < _FEW * len(W)
        exact = gradient.rows.dtype == gradient.weights.dtype == torch.float32
        wanted = few and exact and W.data_ptr() in self._parameters and W.is_contiguous()
        if wanted:
            self._found.setdefault(W.data_ptr(), []).append(gradient)
        return wanted

    def settle(self) -> None:
        """After backward: what is not a parameter's only gradient is added to the others."""
        for place, (first, *more) in list(self._found.items()):
            parameter = self._parameters[place]
            if parameter.grad is not None or more:
                dense = torch.stack([each.dense() for each in (first, *more)]).sum(0) if more else first.dense()
                parameter.grad = dense if parameter.grad is None else parameter.grad + dense
                del self._found[place]

    def __contains__(self, W: Tensor) -> bool:
        return W.data_ptr() in self._found

    def make_tangent(self, W: Tensor) -> None:
        """Takes away what is along W's rows, which have norm 1."""
        (own,) = self._found[W.data_ptr()]
        self._found[W.data_ptr()] = [replace(own, tangent=True)]

    def norm(self, W: Tensor) -> Float[Tensor, ""]:
        with self._struct(W) as struct:
            squares = library().row_squares(ctypes.byref(struct), pointer(W), *map(LONG, W.shape), threads())
        return torch.tensor(squares, dtype=torch.float64).sqrt().float()

    @contextmanager
    def _struct(self, W: Tensor) -> Iterator[_Struct]:
        (own,) = self._found[W.data_ptr()]
        order, bounds = own.support.by_feature(native.BACKEND.by_feature)
        rows = own.rows if own.rows.stride(1) == 1 else own.rows.contiguous()
        tokens, weights = own.support.tokens, own.weights.contiguous()
        places = (pointer(each).value for each in (rows, tokens, order, bounds, weights))
        first, *others = places
        yield _Struct(first, rows.stride(0), *others, own.tangent)

    def adam(
        self,
        W: Tensor,
        m: Tensor,
        v: Tensor,
        clip: Float[Tensor, ""],
        *,
        keep: float,
        rate: float,
        betas: tuple[float, float],
        by: float,
        epsilon: float,
    ) -> None:
        """m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  W <- keep W - rate m / (sqrt(v) by + epsilon), g = clip dL/dW."""
        numbers = (ctypes.c_float(each) for each in (keep, rate, *betas, by, epsilon))
        with self._struct(W) as struct:
            places = (pointer(each) for each in (clip, W, m, v))
            library().row_adam(ctypes.byref(struct), *places, *map(LONG, W.shape), *numbers, threads())


_collecting: RowGradients | None = None


@contextmanager
def collected(parameters: Sequence[nn.Parameter]) -> Iterator[RowGradients]:
    """Gradients of rows of these are put aside within."""
    global _collecting
    assert _collecting is None, "gradients are put aside for one optimiser at a time"
    _collecting = found = RowGradients(parameters)
    try:
        yield found
    finally:
        _collecting = None


def make_tangent(W: nn.Parameter) -> None:
    """Of the gradient of W, whose rows have norm 1, takes away what is along them."""
    if _collecting is not None and W in _collecting:
        _collecting.make_tangent(W)
        return
    assert W.grad is not None, "a gradient is made tangent after backward"
    W.grad = W.grad.contiguous()
    backends.of(W).project_out(W.grad, W)


def gradient(
    W: Tensor, support: Support, rows: Float[Tensor, "token d"], weights: Float[Tensor, "slot"]
) -> Float[Tensor, "feature d"] | None:
    """dL/dW as above; null: it has been put aside."""
    own = RowGradient(support, rows, weights)
    if _collecting is not None and _collecting.put(W, own):
        return None
    return own.dense()
