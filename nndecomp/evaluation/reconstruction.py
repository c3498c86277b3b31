"""How well activations are reconstructed, and by how many components.

    fvu = sum |y - y_hat|^2 / sum |y - mean y|^2        fraction of variance unexplained, 1 - explained variance

y is what arrives at the site in the run that is measured: in the undisturbed run (clean), or in the one with everything
replaced (live), where it is what the module computes from disturbed inputs. Sums are over all kept
tokens, in float64. fvu is 1 for a decomposition that always answers the mean, and the same under y -> a y.

    fvu                        summed errors / summed variances, over coordinates and sites: what varies more weighs more
    fvu_mean_over_sites        sites weigh equally
    fvu_mean_over_coordinates  coordinates weigh equally: a few with most of the variance do not hide the others
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.decompositions.base import Active, GroupCost
from nndecomp.evaluation.bootstrap import Ratio
from nndecomp.evaluation.patching import Batch, exact
from nndecomp.types import Site


class SiteErrors:
    """Running sums of one written site. `centre` [width] is any point near the mean: sums of squares lose no digits."""

    def __init__(self, n_seqs: int, centre: Float[Tensor, " width"]) -> None:
        self.centre = exact(centre)
        self.squared_error, self.cosine, self.squares, self.n = torch.zeros(4, n_seqs, dtype=torch.float64).unbind()
        self.sums = torch.zeros(n_seqs, len(centre), dtype=torch.float64)
        # Of each coordinate, over all sequences.
        self.squared_errors, self.square_sums = torch.zeros(2, len(centre), dtype=torch.float64).unbind()

    def add(self, batch: Batch, y: Float[Tensor, "token width"], y_hat: Float[Tensor, "token width"]) -> None:
        y, y_hat = exact(y), exact(y_hat)
        centred = y - self.centre.to(y)
        errors = (y - y_hat).square()
        self.squared_errors += errors.sum(0).cpu()
        self.square_sums += centred.square().sum(0).cpu()
        self.squared_error[batch.seqs] += batch.per_seq(errors).sum(-1)
        self.cosine[batch.seqs] += batch.per_seq(torch.cosine_similarity(y, y_hat, dim=-1))
        self.squares[batch.seqs] += batch.per_seq(centred.square()).sum(-1)
        self.sums[batch.seqs] += batch.per_seq(centred)
        self.n[batch.seqs] += batch.per_seq(torch.ones(len(y)))

    @property
    def variance(self) -> Float[Tensor, " seq"]:
        """Each sequence's share of sum |y - mean y|^2, the mean taken over all sequences."""
        mean = self.sums.sum(0) / self.n.sum()
        return self.squares - 2 * self.sums @ mean + self.n * mean.square().sum()

    @property
    def fvus(self) -> Float[Tensor, " width"]:
        """Of each coordinate; those that never vary say nothing and are left out."""
        mean = self.sums.sum(0) / self.n.sum()
        variances = self.square_sums - self.n.sum() * mean.square()
        # What rounding leaves of a constant coordinate is not a variance.
        varies = variances > 1e-12 * variances.sum()
        return self.squared_errors[varies] / variances[varies]


def site_means(errors: Mapping[Site, SiteErrors]) -> dict[tuple[str, str], Ratio]:
    """(metric, site) -> its mean: mse and variance per coordinate, fvu, cosine; of each site, and pooled.

    Pooled over all sites as "all"; of two models, over those of each as "A:all" and "B:all" too.
    """
    means: dict[tuple[str, str], Ratio] = {}
    for site, e in errors.items():
        means["mse", str(site)] = Ratio(e.squared_error, e.n * len(e.centre))
        means["variance", str(site)] = Ratio(e.variance, e.n * len(e.centre))
        means["fvu", str(site)] = Ratio(e.squared_error, e.variance)
        means["cosine", str(site)] = Ratio(e.cosine, e.n)
    models = sorted({site.model for site in errors if site.model is not None})
    pools = {"all": list(errors.values())}
    pools |= {f"{model}:all": [e for site, e in errors.items() if site.model == model] for model in models}
    for name, pool in pools.items():
        squared_error, variance, cosine, n, coordinates = (
            torch.stack(each).sum(0)
            for each in zip(
                *((e.squared_error, e.variance, e.cosine, e.n, e.n * len(e.centre)) for e in pool), strict=True
            )
        )
        means["mse", name] = Ratio(squared_error, coordinates)
        means["variance", name] = Ratio(variance, coordinates)
        means["fvu", name] = Ratio(squared_error, variance)
        means["cosine", name] = Ratio(cosine, n)
    return means


class Activity:
    """Which components were active: per sequence and group, and in all for each component."""

    def __init__(self, n_seqs: int, costs: Sequence[GroupCost]) -> None:
        self.costs = tuple(costs)
        self.counts = torch.zeros(n_seqs, len(costs), dtype=torch.float64)
        self.n = torch.zeros(n_seqs, dtype=torch.float64)
        self.firings = [torch.zeros(cost.n_components, dtype=torch.int64) for cost in costs]

    def add(self, batch: Batch, actives: Sequence[Active]) -> None:
        """`actives` of the decompositions, whose groups side by side are the groups of `costs`."""
        counts = torch.cat([active.counts().cpu().double() for active in actives], dim=1)
        firings = [each.cpu() for active in actives for each in active.firings()]
        assert counts.shape == (len(batch.kept), len(self.costs)), (
            f"counts of shape {tuple(counts.shape)} for {len(batch.kept)} tokens and {len(self.costs)} groups"
        )
        self.counts[batch.seqs] += batch.per_seq(counts)
        self.n[batch.seqs] += batch.per_seq(torch.ones(len(counts)))
        for total, each in zip(self.firings, firings, strict=True):
            total += each

    def l0(self) -> dict[str, Ratio]:
        """Mean active components per token of each group."""
        return {cost.name: Ratio(self.counts[:, g], self.n) for g, cost in enumerate(self.costs)}

    def densities(self) -> dict[str, Float[Tensor, " component"]]:
        """Share of tokens on which each component was active, by group, and of all groups together as "all"."""
        n = self.n.sum()
        by_group = {cost.name: each.double() / n for cost, each in zip(self.costs, self.firings, strict=True)}
        return {**by_group, "all": torch.cat(list(by_group.values()))}


DECADES = (1, 2, 3, 4, 5)


def density_summary(density: Float[Tensor, " component"]) -> dict[str, float]:
    """Shares of components: dead (never active), active on fewer than 10^-e of the tokens; and the median density."""
    return {
        "dead_fraction": (density == 0).double().mean().item(),
        **{f"density_below_1e-{e}": (density < 10.0**-e).double().mean().item() for e in DECADES},
        "density_median": density.median().item(),
    }
