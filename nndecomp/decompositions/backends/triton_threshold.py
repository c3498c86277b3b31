"""Selection by a threshold: one a feature, or the one that leaves a number of slots in the whole batch.

Of the whole batch, without reading anything back from the device: the threshold of the last batch, or a sample of tokens,
gives a guess, low by a margin, and what is above it is collected. If that is too few or too many, which the device knows, kernels that
otherwise return at once find the exact threshold and collect again. Then the best of the collected are taken: exact for
any input, and at the cost of one matrix product where the guess was good.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.backends.triton_collect import Found, Scorer, score_of_rank
from nndecomp.decompositions.support import Selected, Support, split_slots

# Tuning. Tokens of the sample; by how much more than the wanted entries its guess lets through, and the list has room for;
# the share of the last threshold that is the next guess.
SAMPLE, MARGIN, CAPACITY, CAUTION = 128, 1.3, 2.0, 0.9
# Entries a token that the list of a threshold has room for at first.
FIRST_ROOM = 128


def above(of: Affine, threshold: Float[Tensor, "feature"], room: int | None = None) -> Selected:
    """Reads the number of entries back from the device: it is a size."""
    (n_tokens, n_features), device = (len(of.x), len(of.W)), of.x.device
    scorer = Scorer.of(of)
    unbounded = torch.full((1,), math.inf, device=device)
    room = min(FIRST_ROOM * n_tokens, n_tokens * n_features) if room is None else room
    while True:
        found = Found.none(room, n_features, device)
        scorer.collect(found, threshold.float().contiguous(), unbounded, torch.ones_like(unbounded, dtype=torch.int32))
        n_found = int(found.n_found)
        if n_found <= room:
            break
        room = n_found
    places, order = _in_order(found.places[:n_found], n_tokens * n_features)
    support = Support.of(places // n_features, places % n_features, n_tokens, n_features)
    return Selected(support, found.z[:n_found][order].to(of.W.dtype))


class BatchTopK:
    """Remembers where the threshold of an encoder's last batch was: it saves work and changes nothing."""

    def __init__(self) -> None:
        self._last: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, of: Sequence[Affine], n_slots: int) -> list[Selected]:
        last = self._last.get(of[0].W)
        selected, threshold = batchtopk(of, n_slots, None if last is None else CAUTION * last)
        self._last[of[0].W] = threshold
        return selected


def batchtopk(
    of: Sequence[Affine], n_slots: int, guess: Float[Tensor, "1"] | None = None
) -> tuple[list[Selected], Float[Tensor, "1"]]:
    """The smallest score that was selected comes second.

    Of one group always n_slots slots, so that sizes are known without asking the device: slots left over have value 0
    and stand at the first feature of the first token, which may have a slot of its own as well. Of several groups each has
    the slots that it won, a number that is read back.
    """
    n_tokens, widths, device = len(of[0].x), [len(each.W) for each in of], of[0].x.device
    width = sum(widths)
    n_slots = min(n_slots, n_tokens * width)
    scorers = [Scorer.of(each, base) for each, base in zip(of, accumulate(widths, initial=0), strict=False)]
    found = _candidates(scorers, n_slots, width, _guess(of, n_slots) if guess is None else guess)
    scores = found.z
    if any(each.c is not None for each in of):
        c = [torch.ones(len(each.W), device=device) if each.c is None else each.c.float() for each in of]
        scores = found.z * torch.cat(c)[found.places % width]
    best = scores.topk(n_slots, sorted=False)
    threshold = best.values.amin()[None]
    places, order = _in_order(torch.where(best.values > 0, found.places[best.indices], 0), n_tokens * width)
    values = torch.where(best.values > 0, found.z[best.indices], 0)[order].to(of[0].W.dtype)
    tokens, indices = places // width, places % width
    if len(of) == 1:
        return [Selected(Support.of(tokens, indices, n_tokens, width), values)], threshold
    parts = []
    for (own, features), n_features in zip(split_slots(indices, widths), widths, strict=True):
        parts.append(Selected(Support.of(tokens[own], features, n_tokens, n_features), values[own]))
    return parts, threshold


def _candidates(scorers: Sequence[Scorer], n_slots: int, width: int, guess: Float[Tensor, "1"]) -> Found:
    """A list that has the n_slots best of the batch, or all positive ones where there are fewer, and perhaps some more."""
    unbounded = torch.full_like(guess, math.inf)
    found = Found.none(int(CAPACITY * n_slots) + 16, width, guess.device)
    for scorer in scorers:
        scorer.collect(found, guess, unbounded, torch.ones_like(guess, dtype=torch.int32))

    fits = (found.n_found <= len(found.z)) & ((found.n_found >= n_slots) | (guess <= 0))
    again = (~fits).int()
    exact = score_of_rank(scorers, torch.full_like(found.n_found, n_slots), again)
    found.n_found.mul_(fits)
    found.z.masked_fill_(~fits, 0)  # infinity too
    for scorer in scorers:  # fewer than n_slots
        scorer.collect(found, exact, unbounded, again)
    below = torch.nextafter(exact, torch.zeros_like(exact))
    for scorer in scorers:  # as many of those equal to the threshold as there is room for
        scorer.collect(found, below, exact, again * (exact > 0))
    return found


def _in_order(places: Int[Tensor, "entry"], end: int) -> tuple[Int[Tensor, "entry"], Int[Tensor, "entry"]]:
    """Places below `end`, token by token, and where each stood: sorted over no more bytes than they have."""
    narrow = places.int() if end <= torch.iinfo(torch.int32).max else places
    in_order, order = narrow.sort(stable=True)
    return in_order.long(), order


def _guess(of: Sequence[Affine], n_slots: int) -> Float[Tensor, "1"]:
    """A threshold above which somewhat more than n_slots scores are, judged by some of the tokens; at least 0."""
    n_tokens = len(of[0].x)
    every = max(n_tokens // SAMPLE, 1)
    sample = []
    for each in of:
        z = torch.addmm(each.b, each.x[::every], each.W.T)
        sample.append((z if each.c is None else z * each.c).flatten())
    scores = torch.cat(sample)
    rank = min(math.ceil(MARGIN * n_slots * len(of[0].x[::every]) / n_tokens) + 16, len(scores))
    return scores.topk(rank, sorted=False).values.amin().clamp_min(0).float()[None]
