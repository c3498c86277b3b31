"""A tile of scores, and the k largest of a row of numbers: what the encoder's kernels are made of.

z     [row, feature]  = x @ W.T + b      in float32, whatever the type of x and W
score [row, feature]  = z * c
"""

# pyright: reportMissingImports=false

from typing import no_type_check

import triton.language as tl

from nndecomp.decompositions.backends.triton_launch import kernel


@kernel
@no_type_check
def pre_activations(
    x, W, b, rows, in_rows, features, in_features, d,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z of one tile; what lies outside of the matrix reads as 0."""
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    left = x + rows.to(tl.int64)[:, None] * d
    right = W + features.to(tl.int64)[None, :] * d
    for start in range(0, d, DEPTH):
        column = start + tl.arange(0, DEPTH)
        inside = column < d
        of_x = tl.load(left + column[None, :], mask=in_rows[:, None] & inside[None, :], other=0)
        of_W = tl.load(right + column[:, None], mask=inside[:, None] & in_features[None, :], other=0)
        total = tl.dot(of_x, of_W, total, input_precision=PRECISION)
    return total + tl.load(b + features, mask=in_features, other=0).to(tl.float32)[None, :]


@kernel
@no_type_check
def scaled(z, c, features, in_features, SCALED: tl.constexpr):
    """Scores of a tile."""
    score = z
    if SCALED:
        score = z * tl.load(c + features, mask=in_features, other=0).to(tl.float32)[None, :]
    return score


@kernel
@no_type_check
def halves(z):
    """The first and the second half of the columns."""
    return z.reshape(z.shape[0], 2, z.shape[1] // 2).permute(0, 2, 1).split()


@kernel
@no_type_check
def rank_key(score):
    """Unsigned integers in the order of the numbers, NaN above infinity; 0 is below every number."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@kernel
@no_type_check
def number_of(key):
    """The number that has this key; NaN for 0."""
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ -2147483648, ~bits).to(tl.float32, bitcast=True)


@kernel
@no_type_check
def packed(z, feature):
    """Both in 64 bits, which are written at once."""
    return (z.to(tl.int32, bitcast=True).to(tl.int64) << 32) | feature.to(tl.int64)


@kernel
@no_type_check
def z_of(entry):
    return (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@kernel
@no_type_check
def feature_of(entry):
    return entry.to(tl.int32)


@kernel
@no_type_check
def largest(key, live, k):
    """Which of the live entries of each row [row, entry] are its k largest, the leftmost of equal ones, and the k-th
    largest key: found bit by bit, from the highest, as the largest number that k keys reach. All, and 0, where fewer are
    live. Dead entries have key 0."""
    kth = tl.zeros([key.shape[0]], tl.uint32)
    bit = tl.full([key.shape[0]], 2147483648, tl.uint32)
    for _ in range(32):
        reached = tl.sum((key >= (kth | bit)[:, None]).to(tl.int32), 1)
        kth = tl.where(reached >= k, kth | bit, kth)
        bit = bit >> 1
    above = key > kth[:, None]
    level = live & (key == kth[:, None])
    room = k - tl.sum(above.to(tl.int32), 1)
    return above | (level & (tl.cumsum(level.to(tl.int32), 1) <= room[:, None])), kth
