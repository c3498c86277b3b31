"""Whether training again finds the same features: with another seed, or with more features; and what chance would find.

    found again     a feature's matched cosine: decoder rows of two dictionaries assigned one to one (`matching.match`)
    contained       its best cosine with any feature of a larger dictionary: one direction, no assignment
    splitting       how many features of the larger dictionary resemble it more than any other of the small one's

Only features that are alive count, on both sides: dead ones keep the directions they started with. Two nulls say what
the same numbers are where nothing was learned in common: random directions with the covariance of what is written, and a
dictionary that was never trained. Decoder rows are compared as raw activations, all sites that a group writes side by side.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.activations.sequences import beside
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.molt import require_rows
from nndecomp.decompositions.replacing import Sequences
from nndecomp.evaluation.matching import cosines, match
from nndecomp.evaluation.rows import Measurement
from nndecomp.targets.base import Target
from nndecomp.tokens.batch import TokenBatch

CUTOFFS = (0.5, 0.7, 0.9)
NULLS = ("random", "untrained")

# Rows of each group of a dictionary.
Rows = Sequence[Float[Tensor, "_ _"]]


@torch.no_grad()
def written_rows(
    target: Target, dictionary: SparseDictionary, text: TokenBatch, keep: Bool[Tensor, "batch pos"], batch_seqs: int
) -> tuple[list[Bool[Tensor, " feature"]], list[Float[Tensor, "token _"]]]:
    """Of each group: which features were active on the text, and what the target has where the group writes."""
    require_rows(dictionary.banks, "their decoder rows cannot be found again")
    layout = dictionary.write_layout
    firings = [torch.zeros(bank.n_features, dtype=torch.int64) for bank in dictionary.banks]
    written: list[list[Tensor]] = [[] for _ in dictionary.banks]
    for part, kept in zip(text.split(batch_seqs), keep.split(batch_seqs), strict=True):
        batch = Sequences(part.tokens.to(target.device), kept.flatten().nonzero()[:, 0].to(target.device))
        found = target.record(batch.tokens, sorted({*dictionary.reads, *dictionary.writes}))
        taken = batch.whole if dictionary.needs_sequences else batch.rows
        _, codes = dictionary(beside([taken(found[site]) for site in dictionary.read_layout.sites]))
        y = torch.cat([batch.rows(found[site]) for site in layout.sites], 1)
        for g, (bank, fired) in enumerate(zip(dictionary.banks, codes.firings(), strict=True)):
            firings[g] += fired.cpu()
            written[g].append(y[:, bank.writes].cpu())
    return [fired > 0 for fired in firings], [torch.cat(parts) for parts in written]


def decoder_rows(dictionary: SparseDictionary, of: Sequence[Bool[Tensor, " feature"]]) -> list[Float[Tensor, "_ _"]]:
    """Decoder rows of the features chosen in each group."""
    return [bank.W_dec.detach().cpu()[chosen] for bank, chosen in zip(dictionary.banks, of, strict=True)]


def random_rows(written: Sequence[Float[Tensor, "token _"]], like: Rows, seed: int) -> list[Float[Tensor, "_ _"]]:
    """As many random directions in each group as `like` has, with the covariance of what is written there."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for y, rows in zip(written, like, strict=True):
        # g Y / sqrt(n) has the covariance of the n rows of Y.
        centred = (y - y.mean(0)).double()
        drawn = torch.randn(len(rows), len(y), generator=generator, dtype=torch.float64)
        found.append(drawn @ centred / len(y) ** 0.5)
    return found


def found_again(a: Rows, b: Rows) -> Float[Tensor, " feature"]:
    """Matched cosine of every feature of a, groups side by side; 0 for those that got no partner."""
    each = []
    for own, other in zip(a, b, strict=True):
        cosine = torch.zeros(len(own), dtype=torch.float64)
        if len(own) and len(other):
            matching = match(cosines(own, other))
            cosine[matching.first] = matching.cosine
        each.append(cosine)
    return torch.cat(each)


def contained(small: Rows, large: Rows) -> Float[Tensor, " feature"]:
    """Best cosine of every feature of `small` with any of `large` in the same group; 0 where there is none."""
    return torch.cat(
        [
            cosines(own, other).amax(1) if len(other) else torch.zeros(len(own), dtype=torch.float64)
            for own, other in zip(small, large, strict=True)
        ]
    )


def splitting(small: Rows, large: Rows, cutoff: float) -> Int[Tensor, " feature"]:
    """For every feature of `small`: features of `large` that are nearest to it, and nearer than `cutoff`."""
    counts = []
    for own, other in zip(small, large, strict=True):
        count = torch.zeros(len(own), dtype=torch.int64)
        if len(own) and len(other):
            best, nearest = cosines(own, other).max(0)
            count += nearest[best > cutoff].bincount(minlength=len(own))
        counts.append(count)
    return torch.cat(counts)


def share_above(cosine: Float[Tensor, " feature"], cutoff: float) -> float:
    return (cosine > cutoff).double().mean().item()


@dataclass(frozen=True)
class Again:
    """How much of `first` is in `second`: cosines of the features of `first`, its groups side by side, and of both nulls."""

    method: str  # that both are instances of
    first: str
    second: str
    wider: bool  # second has more features: cosines are best ones (`contained`), else matched ones (`found_again`)
    n_of_group: tuple[int, ...]  # features of first that are alive, by group
    cosine: Float[Tensor, " feature"]
    nulls: dict[str, Float[Tensor, " feature"]]  # by NULLS: in place of the features of `first`
    parts: Int[Tensor, " feature"]  # features of second nearest to each, nearer than 0.7


def again(method: str, first: str, second: str, wider: bool, a: Rows, b: Rows, nulls: Mapping[str, Rows]) -> Again:
    """Looks for rows a, of `first`, among rows b, of `second`."""
    assert set(nulls) == set(NULLS), f"chance is told by {', '.join(NULLS)}, not by {', '.join(nulls)}"
    look = contained if wider else found_again
    chance = {name: look(rows, b) for name, rows in nulls.items()}
    n = tuple(len(rows) for rows in a)
    return Again(method, first, second, wider, n, look(a, b), chance, splitting(a, b, 0.7))


def measurements(of: Again, groups: Sequence[str], n_tokens: int) -> Iterator[Measurement]:
    """Shares above each of CUTOFFS and the mean, with those of the nulls, over all groups and of each."""
    prefix = "contained" if of.wider else "found_again"
    n_of_group = dict(zip(groups, of.n_of_group, strict=True))

    def row(metric: str, value: float, unit: str, site: str) -> Measurement:
        return Measurement(metric, value, unit, site, "none", "clean", n_tokens, note=f"in {of.second}")

    for end, cosine in (("", of.cosine), *((f"_{name}", of.nulls[name]) for name in NULLS)):
        parts = dict(zip(groups, cosine.split(of.n_of_group), strict=True))
        for site, own in {"all": cosine, **{name: part for name, part in parts.items() if len(part)}}.items():
            yield row(f"{prefix}_cosine{end}", own.mean().item(), "cosine", site)
            for cutoff in CUTOFFS:
                yield row(f"{prefix}_{100 * cutoff:.0f}{end}", share_above(own, cutoff), "share", site)
    for site, n in {"all": sum(of.n_of_group), **n_of_group}.items():
        yield row("n_alive", float(n), "features", site)
    if of.wider:
        yield row("split", (of.parts > 1).double().mean().item(), "share", "all")
