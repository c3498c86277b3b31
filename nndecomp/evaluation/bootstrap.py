"""Intervals by resampling sequences: tokens of one sequence are not independent, sequences are."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Ratio:
    """A mean as a ratio of sums, both kept per sequence: sum of `over` / sum of `under`, in float64.

    Long sequences weigh more, as they should: the mean is over tokens. A difference of two such means over the same
    tokens is the ratio of the differences, so its interval is paired by construction.
    """

    over: Float[Tensor, " seq"]
    under: Float[Tensor, " seq"]

    def __sub__(self, other: "Ratio") -> "Ratio":
        assert torch.equal(self.under, other.under), "a paired difference needs both means over the same tokens"
        return Ratio(self.over - other.over, self.under)


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


def resamples(n_seqs: int, n_resamples: int, seed: int) -> Float[Tensor, "resample seq"]:
    """How often each sequence is drawn in each resample of `n_seqs` sequences with replacement.

    The same table serves every quantity of an evaluation, so intervals are comparable.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_seqs, (n_resamples, n_seqs), generator=generator)
    table = torch.zeros(n_resamples, n_seqs, dtype=torch.float64)
    return table.scatter_add_(1, drawn, torch.ones_like(table))


def estimate(ratio: Ratio, drawn: Float[Tensor, "resample seq"], confidence: float) -> Estimate:
    """The mean and its percentile interval (Efron 1979): quantiles of the mean over resamples of sequences.

    `confidence` is the share of the resampled means inside the interval. Resamples that hold no counted token say
    nothing and are left out.
    """
    assert ratio.over.dtype == ratio.under.dtype == torch.float64, f"sums must be float64, not {ratio.over.dtype}"
    total = ratio.under.sum().item()
    assert total > 0, f"a mean over {total} tokens does not exist"
    value = ratio.over.sum().item() / total
    if len(drawn) == 0:
        return Estimate(value, float("nan"), float("nan"))
    under = drawn @ ratio.under
    means = (drawn @ ratio.over)[under > 0] / under[under > 0]
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)
