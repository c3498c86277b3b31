"""Which feature of one dictionary is which of another: cosines between decoder rows, and one-to-one assignments.

    cosine[i, j] = <a_i, b_j> / (|a_i| |b_j|)          0 where a row is zero: what points nowhere resembles nothing

An assignment pairs rows of a with rows of b, each at most once, so that the sum of the pairs' cosines is largest
(Kuhn 1955; Jonker & Volgenant 1987 as scipy has it). Best cosines alone let many rows claim the same one: uniqueness is
the share of rows that do not. What chance reaches is said by random rows of the same second moment.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cosines(a: Float[Tensor, "a d"], b: Float[Tensor, "b d"], absolute: bool = False) -> Float[Tensor, "a b"]:
    """Cosine of every row of a with every row of b, in float64; `absolute`: its size, for features without a sign."""
    assert a.shape[1] == b.shape[1], f"rows of {a.shape[1]} and of {b.shape[1]} coordinates have no cosine"
    unit_a, unit_b = (torch.nn.functional.normalize(rows.detach().double(), dim=1, eps=1e-30) for rows in (a, b))
    cosine = (unit_a @ unit_b.T).clamp(-1, 1)
    return cosine.abs() if absolute else cosine


@dataclass(frozen=True)
class Matching:
    """Pair p is row `first[p]` of the one and `second[p]` of the other, in the order of `first`."""

    first: Int[Tensor, " pair"]
    second: Int[Tensor, " pair"]
    cosine: Float[Tensor, " pair"]

    @property
    def mean(self) -> float:
        """Mean matched cosine: the field's MCC, where it is taken over absolute cosines."""
        return self.cosine.mean().item()

    def share_above(self, threshold: float) -> float:
        return (self.cosine > threshold).double().mean().item()


def match(cosine: Float[Tensor, "a b"]) -> Matching:
    """The assignment with the largest sum of cosines: min(a, b) pairs."""
    from scipy.optimize import linear_sum_assignment  # late: slow to import

    assert cosine.numel() > 0, f"there is nothing to match in {tuple(cosine.shape)} cosines"
    rows, columns = linear_sum_assignment(cosine.cpu().numpy(), maximize=True)
    first, second = torch.from_numpy(rows), torch.from_numpy(columns)
    return Matching(first, second, cosine.cpu()[first, second])


def uniqueness(cosine: Float[Tensor, "a b"]) -> float:
    """Share of the rows of a whose best b is their own: distinct best rows of b / rows of a.

    Rows that resemble nothing at all (all cosines 0) have no best one and count as not unique.
    """
    resembles = cosine.amax(1) > 0
    return len(cosine[resembles].argmax(1).unique()) / len(cosine)


def null_cosines(
    like: Float[Tensor, "a d"], other: Float[Tensor, "b d"], n_draws: int, seed: int, absolute: bool = False
) -> Float[Tensor, "draw a"]:
    """What chance reaches: matched cosines with `other` of random rows that have the second moment of `like`.

    Rows are N(0, C) with C = U^T U / a over the unit rows U of `like`, as many as it has, assigned anew in each draw. Where
    a > b, the rows of a draw that get no partner count as 0.
    """
    unit = torch.nn.functional.normalize(like.detach().double(), dim=1, eps=1e-30).cpu()
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(n_draws, len(like), dtype=torch.float64)
    for draw in found:
        # g U / sqrt(a) has covariance U^T U / a, without a factorisation that a singular one would refuse.
        mixed = torch.randn(len(unit), len(unit), generator=generator, dtype=torch.float64) @ unit
        matching = match(cosines(mixed, other.cpu(), absolute))
        draw[matching.first] = matching.cosine
    return found
