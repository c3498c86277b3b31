"""How much of what is known a decomposition found: features of which there is a truth.

Found features are paired with true ones, each at most once, by the cosines of what they write (Hungarian assignment;
Lieberum et al. and SAELens call its mean MCC). A found feature that never fires on the sample is paired with nothing; a true
feature without a partner counts as 0 everywhere. So all means are over true features, and cannot be had by finding few.

    matched_cosine      mean cosine of paired decoder rows over all written sites side by side; `recovered_90`, `recovered_95`:
                        share of true features whose partner is above 0.9, 0.95; of one site: that site's columns alone
    matched_cosine_null the same for random rows of the found rows' second moment
    encoder_cosine      of the pair's encoder row and the true feature's direction where it is read
    recovered_in_own_group  of features of one model alone: share whose best partner in that model's own group is above 0.9
    uniqueness          distinct best true features of the found ones that fire / those found
    precision recall    of "the found feature fires" as a guess at "the true feature fires"; f1 their harmonic mean
    shrinkage           1 - mean of (found magnitude / true magnitude) where both fire; magnitude is code times row norm
    true_l0 l0          features active on a token
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.activations.truth import Truth
from nndecomp.decompositions.base import Decomposition
from nndecomp.evaluation.absorption import Absorption, absorption
from nndecomp.evaluation.features import Features, codes_of, features_of
from nndecomp.evaluation.matching import Matching, cosines, match, null_cosines, uniqueness
from nndecomp.evaluation.rows import Measurement
from nndecomp.types import Layout, Site

NULL_DRAWS = 3


@dataclass(frozen=True)
class Recovery:
    """Of each true feature its partner (-1 without one) and what that is worth; nan where there is nothing to divide by."""

    partner: Int[Tensor, " true"]
    cosine: Float[Tensor, " true"]
    encoder_cosine: Float[Tensor, " true"]
    site_cosine: Mapping[Site, Float[Tensor, " true"]]  # nan where the true feature is not at a site
    precision: Float[Tensor, " true"]
    recall: Float[Tensor, " true"]
    f1: Float[Tensor, " true"]
    magnitude: Float[Tensor, " true"]  # found over true where both fire; nan where they never do
    frequency: Float[Tensor, " true"]
    found_frequency: Float[Tensor, " feature"]
    classes: Mapping[str, Int[Tensor, " _"]]
    in_own_group: Mapping[str, Float[Tensor, " _"]]  # cosine with the best pairing within the group of the class's name
    uniqueness: float
    null: float
    true_l0: float
    l0: float
    fvu: float
    absorption: Absorption | None
    n_tokens: int

    @property
    def recovered(self) -> Bool[Tensor, " true"]:
        return self.cosine > 0.9


@torch.no_grad()
def recovery(decomposition: Decomposition, truth: Truth, seed: int) -> Recovery:
    """`seed` draws the null distribution."""
    x, y = (_columns(truth, layout) for layout in (decomposition.read_layout, decomposition.write_layout))
    y_hat, codes = codes_of(decomposition, x)
    found = features_of(decomposition)
    true_writes, true_reads = (
        _directions(truth, each) for each in (decomposition.write_layout, decomposition.read_layout)
    )
    fires, alive = codes != 0, (codes != 0).any(0)
    # Signed codes make d and -d the same feature, and its encoder row the same as minus it.
    signed = bool((codes < 0).any())
    cosine = cosines(true_writes, found.decoder, absolute=signed)
    cosine[:, ~alive] = 0
    partner, matched = _partners(match(cosine.clamp(min=0)), truth.n_features)
    firing = _firing(truth.codes != 0, fires, partner)
    encoder = _paired(true_reads, found.encoder, partner)
    return Recovery(
        partner=partner,
        cosine=matched,
        encoder_cosine=encoder.abs() if signed else encoder,
        site_cosine=_site_cosines(true_writes, found, partner, decomposition.write_layout),
        precision=firing[0],
        recall=firing[1],
        f1=firing[2],
        magnitude=_magnitudes(truth, true_writes, codes, found, partner),
        frequency=(truth.codes != 0).double().mean(0),
        found_frequency=fires.double().mean(0),
        classes=truth.classes,
        in_own_group={
            name: _within(cosine, own, found.groups[name])
            for name, own in truth.classes.items()
            if name in found.groups
        },
        uniqueness=uniqueness(cosine[:, alive].T) if alive.any() else 0.0,
        null=_null(found.decoder[alive], true_writes, seed),
        true_l0=(truth.codes != 0).double().sum(1).mean().item(),
        l0=fires.double().sum(1).mean().item(),
        fvu=((y - y_hat).double().square().sum() / (y - y.mean(0)).double().square().sum()).item(),
        absorption=absorption(truth, y, codes, found.decoder, true_writes, _bias(truth, decomposition.write_layout)),
        n_tokens=len(y),
    )


def _columns(truth: Truth, layout: Layout) -> Float[Tensor, "token columns"]:
    return torch.cat([truth.rows[:, truth.layout.spans[site]] for site in layout.sites], 1)


def _directions(truth: Truth, layout: Layout) -> Float[Tensor, "true columns"]:
    """What each true feature adds at these sites; zero at a site that is not described."""
    n = truth.n_features
    zero = {site: torch.zeros(n, width) for site, width in zip(layout.sites, layout.widths, strict=True)}
    return torch.cat([truth.directions.get(site, zero[site]) for site in layout.sites], 1)


def _bias(truth: Truth, layout: Layout) -> Float[Tensor, " columns"]:
    return torch.cat([truth.bias[site] for site in layout.sites])


def _partners(matching: Matching, n_true: int) -> tuple[Int[Tensor, "true"], Float[Tensor, "true"]]:
    """Pairs that share nothing are none."""
    partner, cosine = torch.full((n_true,), -1), torch.zeros(n_true, dtype=torch.float64)
    real = matching.cosine > 0
    partner[matching.first[real]] = matching.second[real]
    cosine[matching.first[real]] = matching.cosine[real]
    return partner, cosine


def _paired(
    true: Float[Tensor, "true d"], found: Float[Tensor, "feature d"], partner: Int[Tensor, "true"]
) -> Float[Tensor, "true"]:
    """Cosine of each true row with its partner's; 0 without one."""
    own = torch.nn.functional.cosine_similarity(true.double(), found[partner.clamp(min=0)].double(), dim=1, eps=1e-30)
    return torch.where(partner >= 0, own, 0.0)


def _site_cosines(
    true: Float[Tensor, "true d_writes"], found: Features, partner: Int[Tensor, "true"], layout: Layout
) -> dict[Site, Float[Tensor, "true"]]:
    of_sites = {}
    for site, span in layout.spans.items():
        own = _paired(true[:, span], found.decoder[:, span], partner)
        of_sites[site] = torch.where(true[:, span].norm(dim=1) > 0, own, torch.nan)
    return of_sites


def _firing(
    true: Bool[Tensor, "token true"], found: Bool[Tensor, "token feature"], partner: Int[Tensor, "true"]
) -> Float[Tensor, "3 true"]:
    """Precision, recall and F1; 0 without a partner, nan for a true feature that never fires on the sample."""
    guess = found[:, partner.clamp(min=0)] & (partner >= 0)
    both = (guess & true).sum(0).double()
    n_guess, n_true = guess.sum(0).double(), true.sum(0).double()
    precision = torch.where(n_guess > 0, both / n_guess.clamp(min=1), 0.0)
    recall = both / n_true
    f1 = 2 * both / (n_guess + n_true)
    return torch.where(n_true > 0, torch.stack([precision, recall, f1]), torch.nan)


def _magnitudes(
    truth: Truth,
    true_writes: Float[Tensor, "true d_writes"],
    codes: Float[Tensor, "token feature"],
    found: Features,
    partner: Int[Tensor, "true"],
) -> Float[Tensor, "true"]:
    of_partner = codes[:, partner.clamp(min=0)]
    both = (of_partner != 0) & (truth.codes != 0) & (partner >= 0)
    ours = (of_partner.abs() * both).double().sum(0) * found.decoder[partner.clamp(min=0)].norm(dim=1)
    theirs = (truth.codes * both).double().sum(0) * true_writes.norm(dim=1)
    return torch.where(theirs > 0, ours / theirs, torch.nan)


def _within(
    cosine: Float[Tensor, "true feature"], own: Int[Tensor, "own"], group: Int[Tensor, "_"]
) -> Float[Tensor, "own"]:
    """The same pairing between the true features of a class and the found features of one group."""
    return _partners(match(cosine[own][:, group].clamp(min=0)), len(own))[1]


def _null(found: Float[Tensor, "alive d"], true: Float[Tensor, "true d"], seed: int) -> float:
    """Over true features, as matched_cosine is."""
    if len(found) == 0:
        return 0.0
    return null_cosines(found, true, NULL_DRAWS, seed).clamp(min=0).sum(1).mean().item() / len(true)


def measurements(of: Recovery) -> Iterator[Measurement]:
    """Summaries as rows; means over true features."""

    def row(metric: str, value: float, unit: str, site: str = "all") -> Measurement:
        return Measurement(metric, value, unit, site, "none", "clean", of.n_tokens)

    yield row("matched_cosine", of.cosine.mean().item(), "cosine")
    yield row("matched_cosine_null", of.null, "cosine")
    yield row("recovered_90", (of.cosine > 0.9).double().mean().item(), "share")
    yield row("recovered_95", (of.cosine > 0.95).double().mean().item(), "share")
    yield row("encoder_cosine", of.encoder_cosine.mean().item(), "cosine")
    yield row("uniqueness", of.uniqueness, "share")
    for name in ("precision", "recall", "f1"):
        yield row(name, getattr(of, name).nanmean().item(), "share")
    yield row("shrinkage", 1 - of.magnitude.nanmean().item(), "share")
    yield row("true_l0", of.true_l0, "features/token")
    yield row("l0", of.l0, "features/token")
    yield row("dead_fraction", (of.found_frequency == 0).double().mean().item(), "share")
    yield row("fvu", of.fvu, "share")
    for site, cosine in of.site_cosine.items():
        if not bool(cosine.isnan().all()):
            yield row("matched_cosine", cosine.nanmean().item(), "cosine", str(site))
    for name, own in of.classes.items():
        yield row("recovered_90", of.recovered[own].double().mean().item(), "share", name)
        yield row("f1", of.f1[own].nanmean().item(), "share", name)
    for name, cosine in of.in_own_group.items():
        yield row("recovered_in_own_group", (cosine > 0.9).double().mean().item(), "share", name)
    exclusive = [of.in_own_group[name] for name in ("A", "B") if name in of.in_own_group]
    if exclusive:
        yield row("recovered_in_own_group", (torch.cat(exclusive) > 0.9).double().mean().item(), "share")
    if of.absorption is not None:
        yield row("absorption", of.absorption.fraction, "share")
        yield row("full_absorption", of.absorption.full, "share")
        yield row("split_features", of.absorption.split, "features/parent")


def feature_columns(of: Recovery) -> dict[str, list[float]]:
    """One entry a true feature, by column."""
    columns = {
        "partner": of.partner,
        "cosine": of.cosine,
        "encoder_cosine": of.encoder_cosine,
        "precision": of.precision,
        "recall": of.recall,
        "f1": of.f1,
        "magnitude": of.magnitude,
        "frequency": of.frequency,
    }
    return {name: values.tolist() for name, values in columns.items()}
