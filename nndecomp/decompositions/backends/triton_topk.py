"""The k best scores of every token, selected inside the encoder's matrix product: no [token, feature] tensor exists.

A program owns a tile of tokens and a strip of features, and walks along the strip tile by tile. For each of its tokens it
keeps a list of candidates and a floor: scores above the floor are appended, and when a list could overflow, the k best of
it stay and the k-th best becomes the floor. Every dropped score has k better ones in its strip, so the k best of the
strips' lists are the k best of all: exact for any input, and the same on every run. Scores of tile n are above the floor
with probability about k / (n * FEATURES), so lists grow slowly and are seldom shortened: about log4(features / CANDIDATES)
times for scores in random order, which costs little beside the product.
"""

# pyright: reportMissingImports=false

from typing import no_type_check

import torch
import triton.language as tl

from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.backends.triton_launch import (
    INTERPRETED,
    kernel,
    n_blocks,
    operands,
    power_of_two,
    processors,
)
from nndecomp.decompositions.backends.triton_scores import (
    feature_of,
    halves,
    largest,
    number_of,
    packed,
    pre_activations,
    rank_key,
    scaled,
    z_of,
)
from nndecomp.decompositions.support import Selected, Support

# Tuning. A tile: tokens, features, and bytes of a row of x or W per step; warps and pipelined steps. A list has room for
# `SPARE` tiles beside its k best. Programs a multiprocessor. Entries of lists that a program shortens or merges at a time.
ROWS, FEATURES, DEPTH, WARPS, STAGES = (16, 16, 64, 4, 1) if INTERPRETED else (128, 128, 128, 8, 3)
SPARE, PROGRAMS, ENTRIES = 1, 2, 4096
# Tokens that a program merges: as many as there are where programs run one after the other.
MERGED = 16 if INTERPRETED else 1


@kernel
@no_type_check
def _topk_kernel(
    entries, counts, floors, x, W, b, c, n_tokens, n_features, d, k, strip,
    SCALED: tl.constexpr, ROOM: tl.constexpr, SHORTENED: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_tokens
    lists = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    begin = tl.program_id(1) * strip
    end = tl.minimum(begin + strip, n_features)
    # Lists of this tile start here, and of its rows `own` further on.
    base = tl.program_id(0).to(tl.int64) * ROWS * tl.num_programs(1) * ROOM
    own = (tl.arange(0, ROWS) * tl.num_programs(1) + tl.program_id(1)) * ROOM
    count = tl.zeros([ROWS], tl.int32)
    # No number is at most NaN, which is no floor.
    floor = tl.full([ROWS], float("nan"), tl.float32)
    for start in range(begin, end, FEATURES):
        features = start + tl.arange(0, FEATURES)
        inside = features < end
        z = pre_activations(x, W, b, rows, in_rows, features, inside, d, ROWS, FEATURES, DEPTH, PRECISION)
        # An eighth at a time, so that what a thread handles stays in its registers.
        for i in tl.static_range(2):
            half = halves(z)[i]
            for j in tl.static_range(2):
                quarter = halves(half)[j]
                for n in tl.static_range(2):
                    at = start + (4 * i + 2 * j + n) * (FEATURES // 8)
                    part = halves(quarter)[n]
                    count = _append(entries + base, part, c, own, in_rows, at, end, floor, count, SCALED)
        if tl.max(count, 0) > ROOM - FEATURES:
            tl.store(counts + lists, count, mask=in_rows)
            tl.debug_barrier()  # what one thread wrote, others read
            for block in range(0, ROWS, SHORTENED):
                some = tl.program_id(0) * ROWS + block + tl.arange(0, SHORTENED)
                _shorten(entries, counts, floors, c, some, n_tokens, k, SCALED, ROOM)
            tl.debug_barrier()
            count = tl.load(counts + lists, mask=in_rows, other=0)
            floor = tl.load(floors + lists, mask=in_rows, other=0)
    tl.store(counts + lists, count, mask=in_rows)


@kernel
@no_type_check
def _append(entries, z, c, own, in_rows, start, end, floor, count, SCALED: tl.constexpr):
    """Writes what is above the floor, or no number, to the ends of the lists; returns how long they are then."""
    features = start + tl.arange(0, z.shape[1])
    inside = features < end
    below = scaled(z, c, features, inside, SCALED) <= floor[:, None]
    hit = (below == 0) & in_rows[:, None] & inside[None, :]
    place = (own + count - 1)[:, None] + tl.cumsum(hit.to(tl.int32), 1)
    tl.store(entries + place, packed(z, features[None, :]), mask=hit)
    return count + tl.sum(hit.to(tl.int32), 1)


@kernel
@no_type_check
def _shorten(entries, counts, floors, c, rows, n_tokens, k, SCALED: tl.constexpr, ROOM: tl.constexpr):
    """Of the lists of some rows, the k best stay, in their order."""
    in_rows = rows < n_tokens
    lists = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    count = tl.load(counts + lists, mask=in_rows, other=0)
    place = tl.arange(0, ROOM)
    live = place[None, :] < count[:, None]
    entry = tl.load(entries + lists[:, None] * ROOM + place[None, :], mask=live, other=0)
    taken, kth = largest(_keys(entry, c, live, SCALED), live, k)
    tl.debug_barrier()  # all is read before any of it is overwritten
    to = lists[:, None] * ROOM + tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(entries + to, entry, mask=taken)
    tl.store(counts + lists, tl.minimum(count, k), mask=in_rows)
    tl.store(floors + lists, number_of(kth), mask=in_rows)


@kernel
@no_type_check
def _keys(entry, c, live, SCALED: tl.constexpr):
    """By which entries of lists are compared; 0 of what is not live."""
    score = z_of(entry)
    if SCALED:
        score = score * tl.load(c + feature_of(entry), mask=live, other=0).to(tl.float32)
    return tl.where(live, rank_key(score), 0)


@kernel
@no_type_check
def _merge_kernel(
    index_out, value_out, entries, counts, c, n_tokens, k,
    SCALED: tl.constexpr, STRIPS: tl.constexpr, ROOM: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The k best of each token's lists, by feature."""
    token = (tl.program_id(0).to(tl.int64) * MERGED + tl.arange(0, MERGED))[:, None]
    place = tl.arange(0, STRIPS * ROOM)[None, :]
    in_tokens = token < n_tokens
    live = in_tokens & (place % ROOM < tl.load(counts + token * STRIPS + place // ROOM, mask=in_tokens, other=0))
    entry = tl.load(entries + token * STRIPS * ROOM + place, mask=live, other=0)
    taken, _ = largest(_keys(entry, c, live, SCALED), live, k)
    to = token * k + tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(index_out + to, feature_of(entry).to(tl.int64), mask=taken)
    tl.store(value_out + to, z_of(entry), mask=taken)


def _strips(n_tokens: int, n_features: int, room: int, device: torch.device) -> int:
    """Strips of features, a power of two, that give every multiprocessor its programs; none shorter than four tiles, and
    their lists merged at once."""
    wanted = PROGRAMS * processors(device) // max(n_blocks(n_tokens, ROWS), 1)
    most = min(wanted, n_features // (4 * FEATURES), ENTRIES // room)
    return power_of_two(most + 1) // 2 if most > 1 else 1


def topk(of: Affine, k: int, n_strips: int | None = None) -> Selected:
    """Of equal entries those with the lowest features. Slots of a token are in the order of their features."""
    (n_tokens, d), n_features, device = of.x.shape, len(of.W), of.x.device
    assert 0 < k <= n_features, f"k={k} of {n_features} features"
    room = power_of_two(k + SPARE * FEATURES)
    n_strips = _strips(n_tokens, n_features, room, device) if n_strips is None else n_strips
    indices = torch.empty(n_tokens * k, device=device, dtype=torch.int64)
    values = torch.empty(n_tokens * k, device=device, dtype=of.W.dtype)
    if n_tokens:
        entries = torch.empty(n_tokens * n_strips * room, device=device, dtype=torch.int64)
        counts = torch.empty(n_tokens * n_strips, device=device, dtype=torch.int32)
        floors = torch.empty_like(counts, dtype=torch.float32)
        x, W, precision = operands(of)
        c = of.b if of.c is None else of.c.contiguous()  # not read where there is none
        _topk_kernel[(n_blocks(n_tokens, ROWS), n_strips)](
            *(entries, counts, floors, x, W, of.b.contiguous(), c),
            *(n_tokens, n_features, d, k, n_blocks(n_features, n_strips)),
            **{"SCALED": of.c is not None, "ROOM": room, "SHORTENED": min(max(ENTRIES // room, 1), ROWS), "ROWS": ROWS},
            **{
                "FEATURES": FEATURES,
                "DEPTH": DEPTH // x.element_size(),
                "PRECISION": precision,
                "num_warps": WARPS,
                "num_stages": STAGES,
            },
        )
        _merge_kernel[(n_blocks(n_tokens, MERGED),)](
            *(indices, values, entries, counts, c, n_tokens, k),
            **{"SCALED": of.c is not None, "STRIPS": n_strips, "ROOM": room, "MERGED": MERGED, "num_warps": 4},
        )
    offsets = torch.arange(n_tokens + 1, device=device) * k
    return Selected(Support(indices, offsets, n_features), values)
