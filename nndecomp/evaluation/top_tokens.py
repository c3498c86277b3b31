"""Where in a text features are most active: what a reader looks at first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from nndecomp.decompositions.codes import Codes


@dataclass(frozen=True)
class Moment:
    """A token on which a feature is active, and what stands before it."""

    value: float
    before: tuple[int, ...]  # token ids
    token: int


def most_active(
    batches: Iterable[tuple[Int[Tensor, "batch pos"], Int[Tensor, " token"], Codes]],
    features: Sequence[int],
    n: int,
    context: int,
    sizes: Sequence[int],
) -> dict[int, list[Moment]]:
    """The `n` largest activations of each of `features` (numbered over all groups of `sizes`), one a sequence at most.

    batches: tokens, which of their positions (flattened) the codes are of, and the codes.
    """
    found: dict[int, list[Moment]] = {feature: [] for feature in features}
    for tokens, kept, codes in batches:
        start = 0
        for group, size in zip(codes, sizes, strict=True):
            rows, indices, values = group.entries()
            for feature in features:
                if start <= feature < start + size:
                    own = indices == feature - start
                    found[feature] += _best(tokens, kept[rows[own]], values[own], context)
            start += size
        for feature, moments in found.items():
            found[feature] = sorted(moments, key=lambda moment: -moment.value)[:n]
    return found


def _best(tokens: Tensor, places: Tensor, values: Tensor, context: int) -> list[Moment]:
    """The largest activation of each sequence."""
    best: dict[int, tuple[float, int]] = {}
    for place, value in zip(places.tolist(), values.tolist(), strict=True):
        seq, pos = divmod(place, tokens.shape[1])
        if seq not in best or value > best[seq][0]:
            best[seq] = (value, pos)
    return [
        Moment(value, tuple(tokens[seq, max(0, pos - context) : pos].tolist()), int(tokens[seq, pos]))
        for seq, (value, pos) in best.items()
    ]
