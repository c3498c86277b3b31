"""Every score within an interval, collected inside the encoder's matrix product; and how scores are distributed.

A program owns a tile of tokens and a strip of features. What lies within (floor, ceiling] is appended to one list, at a
place that an atomic counter hands out: in any order, so that whoever reads the list sorts it by place first.
"""

# pyright: reportMissingImports=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.backends.triton_launch import INTERPRETED, kernel, n_blocks, operands
from nndecomp.decompositions.backends.triton_scores import halves, pre_activations, scaled

# Tuning, as in `triton_topk`; and the tiles of a strip.
ROWS, FEATURES, DEPTH, WARPS, STAGES = (16, 16, 64, 4, 1) if INTERPRETED else (128, 128, 128, 8, 3)
STRIP = 16


@kernel
@no_type_check
def _collect_kernel(
    z_out, place_out, counter, capacity, base, width, wanted, floor, ceiling, x, W, b, c, n_tokens, n_features, d,
    PER_FEATURE: tl.constexpr, SCALED: tl.constexpr, STRIP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.load(wanted) == 0:
        return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_tokens
    begin = tl.program_id(1) * STRIP * FEATURES
    for start in range(begin, tl.minimum(begin + STRIP * FEATURES, n_features), FEATURES):
        features = start + tl.arange(0, FEATURES)
        inside = features < n_features
        z = pre_activations(x, W, b, rows, in_rows, features, inside, d, ROWS, FEATURES, DEPTH, PRECISION)
        for i in tl.static_range(2):
            half = halves(z)[i]
            for j in tl.static_range(2):
                part = halves(half)[j]
                some = start + (2 * i + j) * (FEATURES // 4) + tl.arange(0, FEATURES // 4)
                in_some = some < n_features
                score = scaled(part, c, some, in_some, SCALED)
                if PER_FEATURE:
                    low = tl.load(floor + some, mask=in_some, other=float("inf"))
                else:
                    low = tl.zeros([FEATURES // 4], tl.float32) + tl.load(floor)
                hit = (score > low[None, :]) & (score <= tl.load(ceiling)) & in_rows[:, None] & in_some[None, :]
                in_row = tl.sum(hit.to(tl.int32), 1)
                total = tl.sum(in_row, 0)
                if total > 0:
                    before = tl.atomic_add(counter, total.to(tl.int64))
                    at = before + (tl.cumsum(in_row, 0) - in_row - 1)[:, None] + tl.cumsum(hit.to(tl.int32), 1)
                    place = rows.to(tl.int64)[:, None] * width + base + some[None, :]
                    tl.store(z_out + at, part, mask=hit & (at < capacity))
                    tl.store(place_out + at, place, mask=hit & (at < capacity))


@kernel
@no_type_check
def _histogram_kernel(
    histogram, level, wanted, x, W, b, c, n_tokens, n_features, d,
    SHIFT: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr, STRIP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the positive scores whose bits above SHIFT + BITS are those of `level`: how often each value of the BITS after."""
    if tl.load(wanted) == 0:
        return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_tokens
    begin = tl.program_id(1) * STRIP * FEATURES
    prefix = tl.load(level) >> (SHIFT + BITS)
    for start in range(begin, tl.minimum(begin + STRIP * FEATURES, n_features), FEATURES):
        features = start + tl.arange(0, FEATURES)
        inside = features < n_features
        z = pre_activations(x, W, b, rows, in_rows, features, inside, d, ROWS, FEATURES, DEPTH, PRECISION)
        score = scaled(z, c, features, inside, SCALED)
        bits = score.to(tl.int32, bitcast=True)
        hit = (score > 0) & ((bits >> (SHIFT + BITS)) == prefix) & in_rows[:, None] & inside[None, :]
        tl.atomic_add(histogram + ((bits >> SHIFT) & ((1 << BITS) - 1)), 1, mask=hit)


@kernel
@no_type_check
def _refine_kernel(histogram, level, rank, wanted, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Sets the BITS of `level` after SHIFT to those of the number of this rank, and the rank to that among equal bits.
    There is nothing to set where there are fewer numbers: `level` stays, and so does the rank."""
    if tl.load(wanted) == 0:
        return
    value = tl.arange(0, 1 << BITS)
    counts = tl.load(histogram + value).to(tl.int64)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    rank_now = tl.load(rank)
    found = (above < rank_now) & (above + counts >= rank_now)
    tl.store(level, tl.load(level) | (tl.sum(tl.where(found, value, 0), 0) << SHIFT))
    tl.store(rank, rank_now - tl.sum(tl.where(found, above, 0), 0))


@dataclass(frozen=True)
class Found:
    """A list of entries, in any order: z, and token * width + feature, where features of groups stand side by side. What is
    found beyond its end is counted."""

    z: Float[Tensor, "entry"]
    places: Int[Tensor, "entry"]
    n_found: Int[Tensor, "1"]
    width: int

    @staticmethod
    def none(capacity: int, width: int, device: torch.device) -> "Found":
        """Empty entries have z 0, at the first place."""
        z = torch.zeros(capacity, device=device)
        counter = torch.zeros(1, device=device, dtype=torch.int64)
        return Found(z, torch.zeros_like(z, dtype=torch.int64), counter, width)


@dataclass(frozen=True)
class Scorer:
    """What kernels want to know of z = x @ W.T + b and of scores z c."""

    arguments: tuple[Any, ...]
    tuning: dict[str, Any]
    grid: tuple[int, int]
    n_features: int
    base: int  # the number of its first feature, among those of all groups

    @staticmethod
    def of(of: Affine, base: int = 0) -> "Scorer":
        x, W, precision = operands(of)
        (n_tokens, d), n_features = x.shape, len(W)
        tuning = {"SCALED": of.c is not None, "STRIP": STRIP, "ROWS": ROWS, "FEATURES": FEATURES}
        tuning |= {"DEPTH": DEPTH // x.element_size(), "PRECISION": precision, "num_warps": WARPS, "num_stages": STAGES}
        b = of.b.contiguous()
        arguments = (x, W, b, b if of.c is None else of.c.contiguous(), n_tokens, n_features, d)
        grid = (n_blocks(n_tokens, ROWS), n_blocks(n_features, STRIP * FEATURES))
        return Scorer(arguments, tuning, grid, n_features, base)

    def collect(self, found: Found, floor: Tensor, ceiling: Float[Tensor, "1"], wanted: Int[Tensor, "1"]) -> None:
        """Appends the entries with floor < score <= ceiling, unless `wanted` is 0. The floor is one number, or one a
        feature."""
        per_feature = floor.ndim == 1 and len(floor) == self.n_features
        assert per_feature or floor.numel() == 1, f"{floor.numel()} floors of {self.n_features} features"
        entries = (found.z, found.places, found.n_found, len(found.z), self.base, found.width, wanted, floor, ceiling)
        _collect_kernel[self.grid](*entries, *self.arguments, PER_FEATURE=per_feature, **self.tuning)


def score_of_rank(scorers: Sequence[Scorer], rank: Int[Tensor, "1"], wanted: Int[Tensor, "1"]) -> Float[Tensor, "1"]:
    """The score with this rank among all positive ones, 0 where fewer are positive: its bits from the highest, in three
    passes. Nothing is done, and the answer is 0, if `wanted` is 0."""
    level, rank = torch.zeros_like(wanted), rank.clone()
    for shift, bits in ((20, 11), (10, 10), (0, 10)):
        histogram = wanted.new_zeros(1 << bits)
        place = {"SHIFT": shift, "BITS": bits}
        for scorer in scorers:
            _histogram_kernel[scorer.grid](histogram, level, wanted, *scorer.arguments, **place, **scorer.tuning)
        _refine_kernel[(1,)](histogram, level, rank, wanted, **place)
    return level.view(torch.float32)
