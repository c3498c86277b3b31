"""Selection by a threshold: one a feature, or the one that leaves a number of slots in the whole batch.

Of the whole batch, without reading anything back from the device: a sample of tokens gives a guess of the threshold, low
by a margin, and what is above it is collected. If that is too few or too many, which the device knows, kernels that
otherwise return at once find the exact threshold and collect again. Then the best of the collected are taken: exact for
any input, and as fast as one matrix product where the sample was representative.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.decompositions.backends.triton_collect import Found, Scorer
from nndecomp.decompositions.kernels import Support

# Tuning. Tokens of the sample; by how much more than the wanted entries the guess lets through, and the list has room for.
SAMPLE, MARGIN, CAPACITY = 128, 1.3, 2.0
# Entries a token that the list of a threshold has room for at first.
FIRST_ROOM = 128


def linear_above(
    x: Float[Tensor, "token d"],
    W: Float[Tensor, "feature d"],
    b: Float[Tensor, "feature"],
    c: Float[Tensor, "feature"] | None,
    threshold: Float[Tensor, "feature"],
    room: int | None = None,
) -> tuple[Support, Float[Tensor, "slot"]]:
    """Every entry with z * c > threshold, and its z. Reads their number back from the device: it is a size."""
    scorer = Scorer.of(x, W, b, c)
    ceiling, yes = x.new_full((1,), math.inf, dtype=torch.float32), torch.ones(1, device=x.device, dtype=torch.int32)
    room = min(FIRST_ROOM * len(x), len(x) * len(W)) if room is None else room
    while True:
        found = Found.none(room, x.device)
        scorer.collect(found, threshold.float().contiguous(), ceiling, yes)
        n_found = int(found.n_found)
        if n_found <= room:
            break
        room = n_found
    places, order = found.places[:n_found].sort()
    support = Support.of(places // len(W), places % len(W), len(x), len(W))
    return support, found.z[:n_found][order].to(W.dtype)


def linear_batchtopk(
    x: Float[Tensor, "token d"],
    W: Float[Tensor, "feature d"],
    b: Float[Tensor, "feature"],
    c: Float[Tensor, "feature"] | None,
    n_slots: int,
    guess: Float[Tensor, "1"] | None = None,
) -> tuple[Support, Float[Tensor, "slot"]]:
    """The n_slots largest strictly positive z * c of the batch, and their z. Always n_slots slots: those left over have
    value 0 and stand at the first feature of the first token, which may stand there as well."""
    n_tokens, n_features = len(x), len(W)
    assert 0 < n_slots <= n_tokens * n_features, f"{n_slots} slots of {n_tokens} tokens, {n_features} features"
    scorer = Scorer.of(x, W, b, c)
    floor = _guess(x, W, b, c, n_slots) if guess is None else guess
    everything = x.new_full((1,), math.inf, dtype=torch.float32)
    capacity = int(CAPACITY * n_slots) + 16
    found = Found.none(capacity, x.device)
    scorer.collect(found, floor, everything, torch.ones_like(found.n_found, dtype=torch.int32))

    fits = (found.n_found <= capacity) & ((found.n_found >= n_slots) | (floor <= 0))
    again = (~fits).int()
    exact = scorer.level_of_rank(torch.full_like(found.n_found, n_slots), again)
    found.n_found.mul_(fits)
    found.z.mul_(fits)
    scorer.collect(found, exact, everything, again)  # fewer than n_slots; then, as far as there is room, its equals
    below = torch.nextafter(exact, torch.zeros_like(exact))
    scorer.collect(found, below, exact, again * (exact > 0))

    scores = found.z if c is None else found.z * c[found.places % n_features]
    best = scores.topk(n_slots, sorted=False)
    places, order = torch.where(best.values > 0, found.places[best.indices], 0).sort()
    support = Support.of(places // n_features, places % n_features, n_tokens, n_features)
    values = torch.where(best.values > 0, found.z[best.indices], 0)
    return support, values[order].to(W.dtype)


def _guess(
    x: Float[Tensor, "token d"],
    W: Float[Tensor, "feature d"],
    b: Float[Tensor, "feature"],
    c: Float[Tensor, "feature"] | None,
    n_slots: int,
) -> Float[Tensor, "1"]:
    """A threshold above which somewhat more than n_slots scores are, judged by some of the tokens; at least 0."""
    some = x[:: max(len(x) // SAMPLE, 1)]
    scores = torch.addmm(b, some, W.T)
    scores = (scores if c is None else scores * c).flatten()
    rank = min(math.ceil(MARGIN * n_slots * len(some) / len(x)) + 16, len(scores))
    return scores.topk(rank, sorted=False).values.amin().clamp_min(0).float()[None]
