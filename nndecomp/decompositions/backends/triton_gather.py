"""Sums and dot products of gathered rows.

    add_bags      out[t]  += sum over slots s of token t of weights[s] * table[feature of s]
    dots          out[s]   = rows[token of s] . table[feature of s]
    feature_sums  out[f]   = sum over slots s of feature f of weights[s] * rows[token of s]

A row is read in blocks of columns, each a few wide vector loads; the last block is masked, so that no width is padded to a
power of two. A sum is added up in float32 and in the order of its slots, whatever the block: no atomic additions. Under
autocast rows are read in its type, half as many bytes.
"""

# pyright: reportMissingImports=false

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.decompositions.backends.triton_launch import kernel, n_blocks, power_of_two, rounded
from nndecomp.decompositions.support import Support

# Tuning. Columns of a row that a program holds at most; slots whose rows are under way at once; warps of a program.
COLUMNS, AHEAD, WARPS = 256, 4, 1
# A feature active on more tokens than this is summed in pieces, so that no program works long after the others.
PIECE = 256


@kernel
@no_type_check
def _sum(
    indices, table, weights, order, first, last, column, inside, stride, ORDERED: tl.constexpr, AHEAD: tl.constexpr
):
    """sum over s in [first, last) of weights[s] * table[indices[s], column], slots read through `order` if asked for."""
    total = tl.zeros(column.shape, tl.float32)
    for start in range(first, last, AHEAD):
        for ahead in tl.static_range(AHEAD):
            live = start + ahead < last
            slot = start + ahead
            if ORDERED:
                slot = tl.load(order + slot, mask=live, other=0)
            row = tl.load(indices + slot, mask=live, other=0).to(tl.int64)
            weight = tl.load(weights + slot, mask=live, other=0).to(tl.float32)
            total += weight * tl.load(table + row * stride + column, mask=inside & live, other=0).to(tl.float32)
    return total


@kernel
@no_type_check
def _bag_kernel(
    out, indices, table, offsets, weights, d, out_stride, stride, COLUMNS: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    first, last = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    total = _sum(indices, table, weights, indices, first, last, column, inside, stride, False, AHEAD)
    at = out + bag * out_stride + column
    tl.store(at, tl.load(at, mask=inside, other=0).to(tl.float32) + total, mask=inside)


@kernel
@no_type_check
def _piece_kernel(
    pieces, tokens, rows, bounds, weights, order, owner, ends, d, stride,
    PIECE: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """All pieces but the first of features with more slots than one piece holds: piece p is of feature owner[p]."""
    piece = tl.program_id(0).to(tl.int64)
    feature = tl.load(owner + piece)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    # The last piece of a feature is piece ends[feature] - 1, and its first one, which is not here, holds slot bounds[feature].
    before = tl.load(ends + feature - 1, mask=feature > 0, other=0)
    first = tl.load(bounds + feature) + (piece - before + 1) * PIECE
    last = tl.minimum(first + PIECE, tl.load(bounds + feature + 1))
    total = _sum(tokens, rows, weights, order, first, last, column, inside, stride, True, AHEAD)
    tl.store(pieces + piece * d + column, total, mask=inside)


@kernel
@no_type_check
def feature_row(
    pieces, tokens, rows, bounds, weights, order, ends, feature, column, inside, d, stride,
    PIECE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Some columns of the sum over a feature's slots, in float32, out of its first piece and those that are there."""
    first = tl.load(bounds + feature)
    last = tl.minimum(first + PIECE, tl.load(bounds + feature + 1))
    total = _sum(tokens, rows, weights, order, first, last, column, inside, stride, True, AHEAD)
    before = tl.load(ends + feature - 1, mask=feature > 0, other=0)
    for piece in range(before, tl.load(ends + feature)):
        total += tl.load(pieces + piece * d + column, mask=inside, other=0)
    return total


@kernel
@no_type_check
def _feature_kernel(
    out, pieces, tokens, rows, bounds, weights, order, ends, d, stride,
    PIECE: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    total = feature_row(
        pieces, tokens, rows, bounds, weights, order, ends, feature, column, inside, d, stride, PIECE, AHEAD
    )
    tl.store(out + feature * d + column, total, mask=inside)


@kernel
@no_type_check
def _dots_kernel(
    out, rows, table, indices, offsets, d, row_stride, stride, SLOTS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + token), tl.load(offsets + token + 1)
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        live = slot < last
        feature = tl.load(indices + slot, mask=live, other=0).to(tl.int64)
        total = tl.zeros([SLOTS], tl.float32)
        for block in range(0, d, COLUMNS):
            column = block + tl.arange(0, COLUMNS)
            inside = column < d
            row = tl.load(rows + token * row_stride + column, mask=inside, other=0).to(tl.float32)
            at = table + feature[:, None] * stride + column[None, :]
            others = tl.load(at, mask=live[:, None] & inside[None, :], other=0)
            total += tl.sum(row[None, :] * others.to(tl.float32), 1)
        tl.store(out + slot, total, mask=live)


def add_bags(
    out: Float[Tensor, "token d"],
    support: Support,
    weights: Float[Tensor, "slot"],
    table: Float[Tensor, "feature d"],
) -> None:
    assert out.stride(1) == 1, f"rows of numbers side by side, not of stride {out.stride()}"
    if not out.numel():
        return
    (n_tokens, d), table = out.shape, _rows(rounded(table))
    operands = (out, support.indices, table, support.offsets, weights.contiguous(), d, out.stride(0), table.stride(0))
    columns = _columns(d)
    _bag_kernel[(n_tokens, n_blocks(d, columns))](*operands, COLUMNS=columns, AHEAD=AHEAD, num_warps=WARPS)


def dots(rows: Float[Tensor, "token d"], table: Float[Tensor, "feature d"], support: Support) -> Float[Tensor, "slot"]:
    out = rows.new_empty(len(support.indices))
    rows, table = _rows(rounded(rows)), _rows(rounded(table))
    if out.numel():
        operands = (out, rows, table, support.indices, support.offsets, rows.shape[1], rows.stride(0), table.stride(0))
        _dots_kernel[(len(rows),)](*operands, SLOTS=4 * AHEAD, COLUMNS=_columns(rows.shape[1]), num_warps=4 * WARPS)
    return out


def by_feature(
    indices: Int[Tensor, "slot"], n_features: int
) -> tuple[Int[Tensor, "slot"], Int[Tensor, "feature_and_one"]]:
    """A radix sort, over no more bytes than the number of a feature has; stable, so that every run adds up alike."""
    narrow = torch.int16 if n_features <= torch.iinfo(torch.int16).max else torch.int32
    features, order = indices.to(narrow).sort(stable=True)
    return order, torch.searchsorted(features, torch.arange(n_features + 1, device=indices.device, dtype=narrow))


@dataclass(frozen=True)
class FeatureRows:
    """What kernels want to know to make the sums over features' slots, those of long features but for their first piece made."""

    arguments: tuple[Any, ...]
    tuning: dict[str, Any]
    n_features: int
    n_blocks: int  # of columns

    @staticmethod
    def of(
        support: Support, rows: Float[Tensor, "token d"], weights: Float[Tensor, "slot"], piece: int = PIECE
    ) -> "FeatureRows":
        rows, weights, d = _rows(rounded(rows)), weights.contiguous(), rows.shape[1]
        order, bounds = support.by_feature(by_feature)
        # ends[f]: pieces of the features up to f, the first one of each left out. There are never more than slots // piece.
        ends = ((bounds.diff() - 1).clamp_min(0) // piece).cumsum(0)
        n_pieces, columns = len(order) // piece, _columns(d)
        blocks = n_blocks(d, columns)
        pieces = torch.empty(n_pieces, d, device=rows.device, dtype=torch.float32)
        tuning = {"PIECE": piece, "COLUMNS": columns, "AHEAD": AHEAD, "num_warps": WARPS}
        operands = (pieces, support.tokens, rows, bounds, weights, order)
        if n_pieces and support.n_features:
            # Programs beyond the last piece are given the last feature, find no slots left, and write what nobody reads.
            which = torch.arange(n_pieces, device=rows.device)
            owner = torch.searchsorted(ends, which, right=True).clamp_max(support.n_features - 1)
            _piece_kernel[(n_pieces, blocks)](*operands, owner, ends, d, rows.stride(0), **tuning)
        return FeatureRows((*operands, ends, d, rows.stride(0)), tuning, support.n_features, blocks)


def feature_sums(
    support: Support, rows: Float[Tensor, "token d"], weights: Float[Tensor, "slot"], piece: int = PIECE
) -> Float[Tensor, "feature d"]:
    out = weights.new_empty(support.n_features, rows.shape[1])
    if out.numel():
        made = FeatureRows.of(support, rows, weights, piece)
        _feature_kernel[(made.n_features, made.n_blocks)](out, *made.arguments, **made.tuning)
    return out


def _columns(d: int) -> int:
    """Columns of a block of rows of d numbers."""
    return min(COLUMNS, power_of_two(d))


def _rows(table: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """A span of columns as it is; what is laid out otherwise copied."""
    return table if table.stride(1) == 1 else table.contiguous()
