"""Entries of a batch that may be selected, found tile by tile while pre-activations are in the cache; on the C++ side in cpp/.

Screening: products of 8-bit x and w say what x . w is at most and at least. What can be selected by that is computed once more in
float32, and selected by that. With x = x^ + e and w = w^ + f, x^ and w^ on grids of steps s_x and s_w,

    certain    |x . w - x^ . w^| <= |x^| |f| + |e| |w|, and what sums in float32 round: what float32 selects is never missed
    likely     no more than 4 (s_x |w| + s_w |x|) / sqrt(12), which is at least 4 times the standard deviation of e and f that are spread
               evenly over a step
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from math import inf

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from nndecomp.decompositions.backends.compiled import FLOAT, LONG, library, pointer, threads
from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.support import Selected, Support

# Of W, what is packed at once: it stays in the cache while it meets all tokens.
PACKED = 3 << 18
_SIGMAS = 4.0
# Where 8 bits leave more than this share of all entries, float32 does all of them sooner: of what is computed once more, where every
# entry above a threshold is, and where only the largest are, most of which are clear.
_MANY, _MANY_FOR_LARGEST = 0.06, 0.12


class Bound(Enum):
    """Of what 8 bits can be wrong by."""

    certain = auto()
    likely = auto()


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
            *(LONG(base), _width(of), threads()),
        )

    def screen(self, of: Affine, operands: "Operands", threshold: Float[Tensor, "feature"] | None = None) -> bool:
        """The same of one group, by products in 8 bits: what may be selected, until `rescore`. False: it is too much, and not all
        there."""
        x, W = operands
        share = _MANY_FOR_LARGEST if threshold is None else _MANY
        quantised = (pointer(each) for own in (x, W) for each in (own.q, own.scale, own.a, own.b))
        found = library().candidates_screen(
            *(self.handle, *quantised, *map(LONG, of.W.shape), pointer(of.b), pointer(of.c), pointer(threshold)),
            *(_width(of), LONG(int(share * self.n_tokens * len(of.W))), threads()),
        )
        return found >= 0

    def rescore(self, of: Affine) -> None:
        """In float32, until at least k of every row are left."""
        self._rescore(of)

    def rescore_together(self, of: Affine, n: int, above: float) -> None:
        """In float32, until at least n of all tokens together are left, or all that exceed `above`."""
        self._rescore(of, n=n, above=above)

    def rescore_above(self, of: Affine, threshold: Float[Tensor, "feature"]) -> None:
        """In float32, and only what exceeds the threshold of its feature stays."""
        self._rescore(of, threshold)

    def _rescore(
        self, of: Affine, threshold: Float[Tensor, "feature"] | None = None, n: int = 0, above: float = -inf
    ) -> None:
        library().candidates_rescore(
            *(self.handle, LONG(n), FLOAT(above), pointer(of.x), LONG(of.x.stride(0)), pointer(of.W)),
            *(LONG(of.W.stride(0)), pointer(of.b), pointer(of.c), pointer(threshold), LONG(of.x.shape[1]), threads()),
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


def _width(of: Affine) -> ctypes.c_long:
    return LONG(max(256, min(1024, PACKED // of.x.shape[1])))


@dataclass(frozen=True)
class Quantised:
    """Rows in 8 bits: row * fold = q * scale, but for rounding. Products of two are wrong by at most a a' + b b', as the Bound says."""

    q: Int8[Tensor, "row d"]
    scale: Float[Tensor, "row"]
    a: Float[Tensor, "row"]
    b: Float[Tensor, "row"]


Operands = tuple[Quantised, Quantised]  # x and W


def quantised(of: Affine, bound: Bound) -> Operands | None:
    """x and W, with each dimension divided in one and multiplied in the other so that both have it equally large: a dimension that is
    large in x alone would leave the others no bits. Null where something is not finite."""
    most = 2**31 // (255 * 127)
    assert of.x.shape[1] <= most, f"sums of {of.x.shape[1]} products of 8 bits may leave 32 bits; {most} do not"
    # Of some rows: it need not be exact.
    size_x, size_W = (each[:: 1 + len(each) // 256].square().mean(0).sqrt() for each in (of.x, of.W))
    fold = torch.where((size_x > 0) & (size_W > 0), (size_W / size_x).sqrt(), 1.0)
    x, W = _rounded(of.x, fold), _rounded(of.W, 1 / fold)
    if not all(bool(each.isfinite().all()) for each in (x.norm, W.norm, of.b)):
        return None
    match bound:
        case Bound.certain:
            # More than what sums of d products in float32 round.
            float32 = (of.x.shape[1] + 64) * 2.0**-24
            return (
                Quantised(x.q, x.scale, x.norm + x.error, 1.001 * x.error + float32 * x.norm),
                Quantised(W.q, W.scale, 1.001 * W.error, W.norm),
            )
        case Bound.likely:
            by = _SIGMAS / 12**0.5
            return Quantised(x.q, x.scale, by * x.scale, by * x.norm), Quantised(W.q, W.scale, W.norm, W.scale)


@dataclass(frozen=True)
class _Rounded:
    q: Int8[Tensor, "row d"]
    scale: Float[Tensor, "row"]
    norm: Float[Tensor, "row"]  # of row * fold
    error: Float[Tensor, "row"]  # |row * fold - q * scale|


def _rounded(rows: Float[Tensor, "row d"], fold: Float[Tensor, "d"]) -> _Rounded:
    n, d = rows.shape
    q = torch.empty(n, d, dtype=torch.int8)
    scale, norm, error = torch.empty(n), torch.empty(n), torch.empty(n)
    library().quantise(
        *(pointer(rows), LONG(rows.stride(0)), LONG(n), LONG(d), pointer(fold)),
        *(pointer(q), pointer(scale), pointer(norm), pointer(error), threads()),
    )
    return _Rounded(q, scale, norm, error)
