"""Entries of a batch that may be selected, found block by block while pre-activations are in the cache; on the C++ side in cpp/.

Screening: x . w from 8-bit x and w has an error with a standard deviation of at most (|w| s_x + |x| s_w) / sqrt(12), s the steps of
the grids. What could be selected if its error were _SIGMAS of these is computed once more in float32, and selected by that.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float, Int8, Num
from torch import Tensor

from nndecomp.decompositions.backends.compiled import FLOAT, LONG, library, pointer, threads
from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.support import Selected, Support

# Of W, what is packed at once: it stays in the cache while it meets all tokens.
PACKED = 3 << 17
# Entries of one block of products in 8 bits: it stays in the cache between the product and the selection.
BLOCK = 1 << 22
_SIGMAS = 4.0


class Candidates:
    """Entries of a batch that may be selected."""

    def __init__(self, n_tokens: int, k: int, threshold: float) -> None:
        self.n_tokens = n_tokens
        self.handle = ctypes.c_void_p(library().candidates_new(LONG(n_tokens), LONG(k), FLOAT(threshold)))

    def add(self, of: Affine, threshold: Float[Tensor, "feature"] | None = None, base: int = 0) -> None:
        """All entries of a group whose first feature has the number `base`."""
        library().candidates_add(
            *(self.handle, pointer(of.x), LONG(of.x.stride(0)), pointer(of.W), LONG(of.W.stride(0))),
            *(*map(LONG, of.W.shape), pointer(of.b), pointer(of.c), pointer(threshold)),
            *(LONG(base), LONG(max(256, min(1024, PACKED // of.x.shape[1]))), threads()),
        )

    def screen(
        self,
        of: Affine,
        operands: "Operands",
        above: float = -inf,
        threshold: Float[Tensor, "feature"] | None = None,
    ) -> int:
        """The same of one group, by products in 8 bits, and what may be selected once more in float32: where no k is asked for, z c
        exceeds `above`, or the threshold of each feature. Returns how many there were to compute once more."""
        x, W = operands
        for rows, own in _blocks(self.n_tokens, len(of.W)):
            n_rows, n = rows.stop - rows.start, own.stop - own.start
            product = _block(n_rows, n, torch.int32)
            torch._int_mm(x.q[rows], W.q[own].T, out=product)  # pyright: ignore[reportPrivateImportUsage]
            library().candidates_screen(
                *(self.handle, pointer(product), LONG(n), LONG(own.start), pointer(of.b[own])),
                *(pointer(None if each is None else each[own]) for each in (of.c, threshold)),
                *(pointer(W.scale[own]), pointer(W.norm[own]), pointer(x.scale), pointer(x.norm)),
                *(FLOAT(_SIGMAS / 12**0.5), LONG(rows.start), LONG(n_rows), threads()),
            )
        return library().candidates_rescore(
            *(self.handle, pointer(of.x), LONG(of.x.stride(0)), pointer(of.W), LONG(of.W.stride(0))),
            *(pointer(of.b), pointer(of.c), pointer(threshold), FLOAT(above), LONG(of.x.shape[1]), threads()),
        )

    def append(self, part: "Candidates", base: int) -> None:
        """What was found of a group whose first feature has the number `base`."""
        library().candidates_append(self.handle, part.handle, LONG(base), threads())

    def __len__(self) -> int:
        return library().candidates_count(self.handle)

    def keep(self, n: int) -> float:
        """The n largest. Returns the smallest key among them; 0 if there are not so many."""
        return library().candidates_keep(self.handle, LONG(n))

    def selected(self, n_features: int) -> Selected:
        offsets = torch.empty(self.n_tokens + 1, dtype=torch.int64)
        library().candidates_offsets(self.handle, pointer(offsets), threads())
        n_slots = int(offsets[-1])
        indices, values = torch.empty(n_slots, dtype=torch.int64), torch.empty(n_slots)
        library().candidates_take(self.handle, pointer(offsets), pointer(indices), pointer(values), threads())
        return Selected(Support(indices, offsets, n_features), values)


@contextmanager
def candidates(n_tokens: int, k: int = 0, threshold: float = -inf) -> Iterator[Candidates]:
    found = Candidates(n_tokens, k, threshold)
    try:
        yield found
    finally:
        library().candidates_free(found.handle)


_buffers: dict[torch.dtype, Tensor] = {}


def _block(n_tokens: int, n_features: int, dtype: torch.dtype) -> Num[Tensor, "token feature"]:
    """Memory that is used again: fresh memory costs more than what is written to it."""
    n = n_tokens * n_features
    if n > len(_buffers.get(dtype, ())):
        _buffers[dtype] = torch.empty(n, dtype=dtype)
    return _buffers[dtype][:n].view(n_tokens, n_features)


def _blocks(n_tokens: int, n_features: int) -> Iterator[tuple[slice, slice]]:
    """Tokens and features, BLOCK entries or fewer at a time."""
    width = min(n_features, max(256, BLOCK // max(n_tokens, 1)))
    height = max(1, BLOCK // width)
    for token in range(0, n_tokens, height):
        for feature in range(0, n_features, width):
            yield slice(token, min(token + height, n_tokens)), slice(feature, min(feature + width, n_features))


Operands = tuple["Quantised", "Quantised"]  # x and W


@dataclass(frozen=True)
class Quantised:
    """Rows in 8 bits: x * fold = q * scale, but for rounding; norm = |x * fold|."""

    q: Int8[Tensor, "row d"]
    scale: Float[Tensor, "row"]
    norm: Float[Tensor, "row"]

    @staticmethod
    def of(x: Float[Tensor, "row d"], fold: Float[Tensor, "d"]) -> "Quantised":
        n, d = x.shape
        q = torch.empty(n, d, dtype=torch.int8)
        scale, norm = torch.empty(n), torch.empty(n)
        library().quantise(
            *(pointer(x), LONG(x.stride(0)), LONG(n), LONG(d), pointer(fold)),
            *(pointer(q), pointer(scale), pointer(norm), threads()),
        )
        return Quantised(q, scale, norm)


def quantised(of: Affine) -> Operands | None:
    """x and W, with each dimension divided in one and multiplied in the other so that both have it equally large: a dimension that is
    large in x alone would leave the others no bits. Null where something is not finite."""
    # Of some rows: it need not be exact.
    size_x, size_W = (each[:: 1 + len(each) // 256].square().mean(0).sqrt() for each in (of.x, of.W))
    fold = torch.where((size_x > 0) & (size_W > 0), (size_W / size_x).sqrt(), 1.0)
    x, W = Quantised.of(of.x, fold), Quantised.of(of.W, 1 / fold)
    finite = all(bool(each.isfinite().all()) for each in (x.norm, W.norm, of.b))
    return (x, W) if finite else None
