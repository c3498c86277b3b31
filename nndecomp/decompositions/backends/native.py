"""The hot path in C++ (native.cpp), for float32 on the CPU.

    encoder   in blocks of features, into one buffer that is used again; entries are selected while a block is in the cache,
              so that no [token, feature] matrix is written or read
    sums      over active entries alone, rows of columns' spans in place, without copies

Compiled on first use for the machine at hand (a C++ compiler with OpenMP, two seconds) and kept in the user's cache directory. Where it
cannot be, that is said once and PyTorch's own operations take its place.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from math import inf
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.support import Selected, Support, split_slots

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17"),
    # Sums in any order, and no bookkeeping of floating-point exceptions. NaN and infinity stay what they are.
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)
# Numbers of one block of pre-activations: it stays in the cache between the product and the selection.
BLOCK = 1 << 22
# Thresholds are guessed at this share of the last batch's; of tokens at what all but a few exceeded.
_CAUTION, _SHORT = 0.9, 0.02


@cache
def obstacle() -> str | None:
    """Why there is none, in words; null: there is one, compiled."""
    if platform.system() != "Linux":
        return f"native kernels are made for Linux alone, and this is {platform.system()}"
    if shutil.which(_compiler()) is None:
        return f"there is no C++ compiler ({_compiler()}; CXX names another one)"
    if _library_path().exists():
        return None
    complaint = _compile(_library_path())
    return None if complaint is None else f"{_compiler()} cannot compile {SOURCE.name}: {complaint}"


@cache
def available() -> bool:
    why = obstacle()
    if why is not None:
        logger.warning("%s: the hot path runs in PyTorch's own operations, slower", why)
    return why is None


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _library_path() -> Path:
    """Of this source, compiler and processor: another one has a library of its own."""
    processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    flags = [line for line in processor.splitlines() if line.startswith(("flags", "Features", "model name"))]
    made_of = "\n".join((SOURCE.read_text(), *FLAGS, _compiler(), *flags))
    cache_directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_directory / "nndecomp" / f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"


def _compile(path: Path) -> str | None:
    """What the compiler says if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}")
    made = subprocess.run([_compiler(), *FLAGS, str(SOURCE), "-o", str(own)], capture_output=True, text=True)
    if made.returncode:
        return made.stderr.strip().splitlines()[0] if made.stderr.strip() else f"exit status {made.returncode}"
    own.replace(path)  # whole or not at all, also where several processes start at once
    return None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library_path()))
    library.candidates_new.restype = ctypes.c_void_p
    library.candidates_count.restype = library.candidates_short.restype = ctypes.c_long
    library.candidates_threshold.restype = ctypes.c_float
    library.candidates_keep.restype = ctypes.c_float
    return library


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.dtype in (torch.float32, torch.int64), f"native kernels take float32 and int64, not {tensor.dtype}"
    return ctypes.c_void_p(tensor.data_ptr())


_LONG, _INT, _FLOAT = ctypes.c_long, ctypes.c_int, ctypes.c_float


def _threads() -> ctypes.c_int:
    return _INT(torch.get_num_threads())


class _Candidates:
    """Entries of a batch that may be selected."""

    def __init__(self, n_tokens: int, k: int, threshold: float) -> None:
        self.n_tokens = n_tokens
        self.handle = ctypes.c_void_p(_library().candidates_new(_LONG(n_tokens), _LONG(k), _FLOAT(threshold)))

    def add(self, of: Affine, threshold: Float[Tensor, "feature"] | None = None, base: int = 0) -> None:
        """`base`: the number of the first feature."""
        n_features = len(of.W)
        width = min(n_features, max(256, BLOCK // max(self.n_tokens, 1)))
        height = max(1, BLOCK // width)
        buffer = _buffer(min(height, self.n_tokens) * width)
        for token in range(0, self.n_tokens, height):
            x = of.x[token : token + height]
            for first in range(0, n_features, width):
                own = slice(first, min(first + width, n_features))
                W = of.W[own]
                pre = buffer[: len(x) * len(W)].view(len(x), len(W))
                torch.mm(x, W.T, out=pre)
                _library().candidates_add(
                    *(self.handle, _pointer(pre), _LONG(len(W)), _LONG(base + first), _pointer(of.b[own])),
                    *(_pointer(None if each is None else each[own]) for each in (of.c, threshold)),
                    *(_LONG(token), _LONG(len(x)), _threads()),
                )

    def short(self) -> Int[Tensor, "row"]:
        """Tokens with fewer than k."""
        rows = torch.empty(self.n_tokens, dtype=torch.int64)
        return rows[: _library().candidates_short(self.handle, _pointer(rows))]

    def replace(self, by: "_Candidates", rows: Int[Tensor, "row"]) -> None:
        _library().candidates_replace(self.handle, by.handle, _pointer(rows))

    def threshold(self) -> float:
        """What most tokens' k-th key exceeds; once they have been selected."""
        return _library().candidates_threshold(self.handle, _FLOAT(_SHORT))

    def __len__(self) -> int:
        return _library().candidates_count(self.handle)

    def keep(self, n: int) -> float:
        """The n largest. Returns the smallest key among them; 0 if there are not so many."""
        return _library().candidates_keep(self.handle, _LONG(n))

    def selected(self, n_features: int) -> Selected:
        offsets = torch.empty(self.n_tokens + 1, dtype=torch.int64)
        _library().candidates_offsets(self.handle, _pointer(offsets), _threads())
        n_slots = int(offsets[-1])
        indices, values = torch.empty(n_slots, dtype=torch.int64), torch.empty(n_slots)
        _library().candidates_take(self.handle, _pointer(offsets), _pointer(indices), _pointer(values), _threads())
        return Selected(Support(indices, offsets, n_features), values)


@contextmanager
def _candidates(n_tokens: int, k: int = 0, threshold: float = -inf) -> Iterator[_Candidates]:
    found = _Candidates(n_tokens, k, threshold)
    try:
        yield found
    finally:
        _library().candidates_free(found.handle)


_buffers: dict[str, Tensor] = {}


def _buffer(n: int) -> Float[Tensor, "number"]:
    """Fresh memory costs more than what is written to it."""
    if n > len(_buffers.get("pre", ())):
        _buffers["pre"] = torch.empty(n)
    return _buffers["pre"]


class Native:
    name = "native"

    def __init__(self) -> None:
        # By encoder, k (0: of a batch) and the smallest key that the last batch kept: where the next one's is looked for. It saves work
        # and changes nothing.
        self._last: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def topk(self, of: Affine, k: int) -> Selected:
        """Every token's threshold starts where most tokens of the last batch had theirs; tokens for which that is too high are made again."""
        assert 0 < k <= len(of.W), f"k={k} of {len(of.W)} features"
        of, key = _contiguous(of), of.W
        last_k, guess = self._last.get(key) or (k, -inf)
        with _candidates(len(of.x), k, guess if last_k == k else -inf) as found:
            found.add(of)
            short = found.short()
            if len(short):
                with _candidates(len(short), k) as again:
                    again.add(Affine(of.x[short], of.W, of.b, of.c))
                    found.replace(again, short)
            selected = found.selected(len(of.W))
            least = found.threshold()
        self._last[key] = (k, least - (1 - _CAUTION) * abs(least))
        return selected

    def batchtopk(self, of: Sequence[Affine], n_slots: int) -> list[Selected]:
        """The first threshold is guessed from the last batch, or from a few tokens; a guess that is too high is seen, and made again."""
        n_tokens, key = len(of[0].x), of[0].W
        widths = [len(each.W) for each in of]
        n_slots = min(n_slots, n_tokens * sum(widths))
        banks = list(map(_contiguous, of))
        per_token, guess = self._last.get(key) or (1, 0.0)
        guess = max(0.0, _sampled(banks, n_slots) if per_token else _CAUTION * guess)
        while True:
            with _candidates(n_tokens, 0, guess) as found:
                for each, base in zip(banks, accumulate(widths, initial=0), strict=False):
                    found.add(each, base=base)
                if len(found) < n_slots and guess > 0:
                    guess = guess / 2 if guess > 1e-6 else 0.0
                    continue
                self._last[key] = (0, found.keep(n_slots))
                together = found.selected(sum(widths))
                break
        if len(of) == 1:
            return [together]
        parts = zip(split_slots(together.support.indices, widths), widths, strict=True)
        return [
            Selected(Support.of(together.support.tokens[own], indices, n_tokens, width), together.values[own])
            for (own, indices), width in parts
        ]

    def above(self, of: Affine, threshold: Float[Tensor, "feature"]) -> Selected:
        with _candidates(len(of.x)) as found:
            found.add(_contiguous(of), threshold.contiguous())
            return found.selected(len(of.W))

    def by_feature(
        self, indices: Int[Tensor, "slot"], n_features: int
    ) -> tuple[Int[Tensor, "slot"], Int[Tensor, "feature_and_one"]]:
        indices = indices.contiguous()
        order, bounds = torch.empty_like(indices), torch.empty(n_features + 1, dtype=torch.int64)
        _library().by_feature(
            _pointer(indices), _LONG(len(indices)), _LONG(n_features), _pointer(order), _pointer(bounds)
        )
        return order, bounds

    def add_bags(
        self,
        out: Float[Tensor, "token d"],
        support: Support,
        weights: Float[Tensor, "slot"],
        table: Float[Tensor, "feature d"],
    ) -> None:
        table, weights = _rows(table), weights.contiguous()
        assert out.stride(1) == 1, f"rows of numbers side by side, not of stride {out.stride()}"
        _library().bag(
            *(_pointer(table), _LONG(table.stride(0)), _pointer(support.indices), _pointer(support.offsets)),
            *(_pointer(weights), _LONG(len(out)), _LONG(out.shape[1]), _pointer(out), _LONG(out.stride(0))),
            _threads(),
        )

    def dots(
        self, rows: Float[Tensor, "token d"], table: Float[Tensor, "feature d"], support: Support
    ) -> Float[Tensor, "slot"]:
        rows, table = _rows(rows), _rows(table)
        out = torch.empty(len(support.indices))
        _library().dots(
            *(_pointer(rows), _LONG(rows.stride(0)), _pointer(table), _LONG(table.stride(0))),
            *(_pointer(support.indices), _pointer(support.offsets), _LONG(len(rows)), _LONG(rows.shape[1])),
            *(_pointer(out), _threads()),
        )
        return out

    def feature_sums(
        self, support: Support, rows: Float[Tensor, "token d"], weights: Float[Tensor, "slot"]
    ) -> Float[Tensor, "feature d"]:
        rows, weights = _rows(rows), weights.contiguous()
        order, bounds = support.by_feature(self.by_feature)
        out = torch.empty(support.n_features, rows.shape[1])
        _library().feature_sums(
            *(_pointer(rows), _LONG(rows.stride(0)), _pointer(support.tokens), _pointer(order), _pointer(bounds)),
            *(_pointer(weights), _LONG(support.n_features), _LONG(rows.shape[1]), _pointer(out), _threads()),
        )
        return out


BACKEND = Native()


def _rows(table: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """A span of columns as it is; what is laid out otherwise copied."""
    return table if table.stride(1) == 1 else table.contiguous()


def _sampled(of: Sequence[Affine], n_slots: int) -> float:
    """About the smallest of the n_slots largest keys, from some of the tokens."""
    n_tokens = len(of[0].x)
    every = max(1, n_tokens // 64)
    keys = [torch.addmm(each.b, each.x[::every], each.W.T) for each in of]
    keys = [key if each.c is None else key * each.c for key, each in zip(keys, of, strict=True)]
    sample = torch.cat([key.flatten() for key in keys])
    rank = min(len(sample), int(1.2 * n_slots * len(keys[0]) / n_tokens) + 16)
    return float(sample.topk(rank, sorted=False).values.amin())


def _contiguous(of: Affine) -> Affine:
    return Affine(of.x.contiguous(), of.W.contiguous(), of.b.contiguous(), None if of.c is None else of.c.contiguous())
