"""Gradients of rows that are never written down.

    dL/dW[f] = sum over the slots s of feature f of  weights[s] * rows[token of s]

An optimiser that makes it a row at a time, as it moves the row, saves writing, reading and keeping what is as large as W. Within
`collected`, such gradients of some parameters are put aside for it; where anything else adds to the gradient, they are added up.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.decompositions import backends
from nndecomp.decompositions.backends.interface import AdamNumbers, RowGradient, RowUpdate
from nndecomp.decompositions.support import Support


class RowGradients:
    """Of some parameters, by where they are in memory."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = {p.data_ptr(): p for p in parameters}
        self._found: dict[int, list[RowGradient]] = {}
        self._updates: dict[int, RowUpdate] = {}

    def put(self, W: Tensor, gradient: RowGradient) -> bool:
        """Puts a gradient aside; False if it is not wanted."""
        updates = backends.row_updates(W)
        if W.data_ptr() not in self._parameters or updates is None or not W.is_contiguous():
            return False
        few = len(gradient.support.indices) < updates.few * len(W)
        exact = gradient.rows.dtype == gradient.weights.dtype == torch.float32
        if few and exact:
            own = replace(gradient, rows=updates.rounded(gradient.rows))
            self._found.setdefault(W.data_ptr(), []).append(own)
        return few and exact

    def settle(self) -> None:
        """After backward: what is not a parameter's only gradient is added to the others."""
        for place, (first, *more) in list(self._found.items()):
            parameter = self._parameters[place]
            if parameter.grad is not None or more:
                dense = torch.stack([_dense(each) for each in (first, *more)]).sum(0) if more else _dense(first)
                parameter.grad = dense if parameter.grad is None else parameter.grad + dense
                del self._found[place]

    def __contains__(self, W: Tensor) -> bool:
        return W.data_ptr() in self._found

    def make_tangent(self, W: Tensor) -> None:
        """Takes away what is along W's rows, which have norm 1."""
        (own,) = self._found[W.data_ptr()]
        self._found[W.data_ptr()] = [replace(own, tangent=True)]

    def norm(self, W: Tensor) -> Float[Tensor, ""]:
        return self._update(W).norm()

    def adam(
        self, W: Tensor, m: Tensor, v: Tensor, n: Float[Tensor, ""], clip: Float[Tensor, ""], numbers: AdamNumbers
    ) -> None:
        """See `RowUpdate`."""
        self._update(W).adam(m, v, n, clip, numbers)

    def _update(self, W: Tensor) -> RowUpdate:
        place = W.data_ptr()
        if place not in self._updates:
            (own,), updates = self._found[place], backends.row_updates(W)
            assert updates is not None, f"{backends.of(W).name} takes no rows, and has put some aside"
            self._updates[place] = updates(own, W)
        return self._updates[place]


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
    return _dense(own)


def _dense(of: RowGradient) -> Float[Tensor, "feature d"]:
    assert not of.tangent, "made tangent only where nothing adds to it"
    return backends.of(of.rows).feature_sums(of.support, of.rows, of.weights)
