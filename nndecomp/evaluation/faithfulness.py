"""Do replacements of MLPs compute as the target does? Their derivatives beside the target's, active sets held constant.

J of the target and J' of a replacement, [d_out, d_in], at the same point of the same text:

    cosine          <J, J'> / (|J| |J'|), of flattened matrices; 0 where J' = 0
    relative error  |J' - J| / |J|, Frobenius norms; places where J = 0 are left out

    local           J = d mlp_out / d mlp_in of one layer at one token, the active sets those of the undisturbed run
    end to end      J = d (logits of the target's n most likely next tokens at one position of a sequence)
                      / d (residual stream that enters the first replaced layer, at all positions up to that one),
                    all layers replaced at once from what arrives, the active sets those of this run (of parameter
                    decompositions: of the undisturbed run, as in their training)

Beside its own active set each replacement is measured with a random one: as many units on every token and in every module,
drawn evenly from those that are active anywhere in the text; parameter decompositions also with masks as training draws them.
End to end there is also the target without its MLPs: residual stream and attention are all that is left, and their part of the
Jacobian every replacement has for nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.config.faithfulness import FaithfulnessConfig
from nndecomp.config.schema import EvaluationConfig, require
from nndecomp.decompositions.held import Masks
from nndecomp.decompositions.replacing import Sequences
from nndecomp.evaluation.bootstrap import Ratio, estimate, resamples
from nndecomp.evaluation.held import HeldReplacement
from nndecomp.evaluation.rows import Measurement
from nndecomp.targets.base import Target
from nndecomp.tokens.batch import TokenBatch
from nndecomp.training.progress import Progress
from nndecomp.types import Point, Site

# Rows of a Jacobian that are computed at a time.
CHUNK = 64
UNITS = {"cosine": "cosine", "error": "share", "l0": "components/token"}


def cosine(J: Float[Tensor, "sample *axes"], other: Float[Tensor, "sample *axes"]) -> Float[Tensor, " sample"]:
    return torch.nn.functional.cosine_similarity(J.flatten(1).double(), other.flatten(1).double(), eps=1e-30)


def relative_error(J: Float[Tensor, "sample *axes"], other: Float[Tensor, "sample *axes"]) -> Float[Tensor, " sample"]:
    """Of `other` from J."""
    return (other - J).flatten(1).double().norm(dim=1) / J.flatten(1).double().norm(dim=1)


def by_token(f: Callable[[Tensor], Tensor], x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out d_in"]:
    """Jacobians of an f that treats every token on its own: rows of all tokens are summed before one backward pass serves all."""
    J = torch.func.jacrev(lambda rows: f(rows).sum(0), chunk_size=CHUNK)(x)
    return J.transpose(0, 1)


def random_masks(masks: Masks, alive: Sequence[Bool[Tensor, " _"]], draw: torch.Generator) -> Masks:
    """1 for as many units of every token and group as `masks` has, drawn evenly from those alive."""
    drawn = []
    for mask, living in zip(masks, alive, strict=True):
        counts = (mask != 0).sum(1, keepdim=True)
        assert counts.max() <= living.sum(), f"{int(counts.max())} units active, {int(living.sum())} alive"
        order = (
            torch.rand(mask.shape, generator=draw).to(mask.device).masked_fill(~living, -1).argsort(1, descending=True)
        )
        first = torch.arange(mask.shape[1], device=mask.device).expand_as(order) < counts
        drawn.append(torch.zeros_like(mask).scatter(1, order, first.to(mask.dtype)))
    return drawn


@dataclass(frozen=True)
class Place(Sequences):
    """Some sequences of the held-out text, and where in them Jacobians are taken."""

    seqs: Int[Tensor, " batch"]  # their numbers in the text
    sampled: Int[Tensor, " sample"]  # rows, among the kept ones, at which MLPs are compared
    at: Int[Tensor, " batch"]  # position whose logits are differentiated

    @property
    def sampled_seqs(self) -> Int[Tensor, " sample"]:
        return self.seqs[(self.kept[self.sampled] // self.tokens.shape[1]).cpu()]


def places(
    text: TokenBatch,
    keep: Bool[Tensor, "batch pos"],
    tokens_per_seq: int,
    batch_seqs: int,
    device: torch.device,
    seed: int,
) -> Iterator[Place]:
    """Positions are drawn from the kept ones, without replacement."""
    fewest = int(keep.sum(1).min())
    require(
        tokens_per_seq <= fewest,
        f"faithfulness.tokens_per_seq={tokens_per_seq} is more than the {fewest} tokens that count in one of the held-out "
        "sequences; write fewer, or a longer tokens.seq_len",
    )
    draw = torch.Generator().manual_seed(seed)
    for seqs in torch.arange(len(keep)).split(batch_seqs):
        chance = torch.rand(keep[seqs].shape, generator=draw).masked_fill(~keep[seqs], -1)
        ranked = chance.argsort(1, descending=True)
        local = torch.zeros_like(keep[seqs]).scatter(1, ranked[:, :tokens_per_seq], True)
        kept = keep[seqs].flatten().nonzero()[:, 0]
        sampled = local.flatten()[kept].nonzero()[:, 0]
        tokens, kept, sampled, at = (each.to(device) for each in (text.tokens[seqs], kept, sampled, ranked[:, 0]))
        yield Place(tokens, kept, seqs, sampled, at)


def last_logits(target: Target, place: Place) -> Float[Tensor, "batch vocab"]:
    """At `place.at`; the LM head sees no other position."""
    final = target.final(place.tokens)
    return target.head(final[torch.arange(len(final), device=final.device), place.at]).float()


def logits_jacobian(
    target: Target, place: Place, stream: Site, x: Float[Tensor, "batch pos d"], top: Int[Tensor, "batch logit"]
) -> Float[Tensor, "batch logit pos d"]:
    """Of the logits `top` at `place.at` with respect to `x`, put at `stream`; within a patch, of the patched target."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        with target.patch({stream: lambda _: x}):
            chosen = last_logits(target, place).gather(1, top)
        # Sequences do not see each other, so one backward pass serves all of them.
        rows = [torch.autograd.grad(each.sum(), x, retain_graph=True)[0] for each in chosen.unbind(1)]
    return torch.stack(rows, 1)


class _Means:
    """Means over samples, whose intervals are over sequences."""

    def __init__(self, n_seqs: int) -> None:
        self.n_seqs = n_seqs
        self.sums: dict[tuple[str, str], Tensor] = {}

    def add(self, metric: str, site: str, seqs: Int[Tensor, " sample"], values: Float[Tensor, " sample"]) -> None:
        assert values.isfinite().all(), f"{metric} at {site} is not finite"
        sums = self.sums.setdefault((metric, site), torch.zeros(2, self.n_seqs, dtype=torch.float64))
        values = values.double().cpu()
        sums.index_add_(1, seqs, torch.stack([values, torch.ones_like(values)]))

    def compare(self, scope: str, site: str, seqs: Tensor, J: Tensor, other: Tensor, condition: str = "") -> None:
        suffix = f"{scope}{condition and f'_{condition}'}"
        counts = (J != 0).flatten(1).any(1)
        J, other, seqs = J[counts], other[counts], seqs[counts.cpu()]
        self.add(f"jacobian_cosine_{suffix}", site, seqs, cosine(J, other))
        self.add(f"jacobian_error_{suffix}", site, seqs, relative_error(J, other))

    def measurements(
        self, inputs: str, drawn: Float[Tensor, "resample seq"], confidence: float
    ) -> Iterator[Measurement]:
        """`inputs`: what active sets were chosen from where all layers were replaced."""
        for (metric, site), (over, under) in self.sums.items():
            e = estimate(Ratio(over, under), drawn, confidence)
            whole = "end_to_end" in metric
            unit = next(unit for name, unit in UNITS.items() if name in metric)
            patched, seen = ("all", inputs) if whole else ("none", "clean")
            yield Measurement(metric, e.value, unit, site, patched, seen, int(under.sum()), e.low, e.high)


class _Truth:
    """What the target itself does at one place; every Jacobian is computed once."""

    def __init__(self, target: Target, place: Place, sites: Sequence[Site], n_logits: int) -> None:
        self.target, self.place = target, place
        recorded = target.record(place.tokens, sites)
        self.rows = {site: place.rows(values) for site, values in recorded.items()}
        self.sampled = {site: rows[place.sampled] for site, rows in self.rows.items()}
        self.streams = {site: value for site, value in recorded.items() if site.point is Point.resid_pre}
        self.top = last_logits(target, place).topk(n_logits).indices
        self._local: dict[int, Tensor] = {}
        self._whole: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def local(self, layer: int) -> Float[Tensor, "sample d d"]:
        """Of the MLP of a layer."""
        if layer not in self._local:
            site = Site(layer, Point.mlp_in)
            self._local[layer] = by_token(lambda x: self.target.mlp_of(site, x).float(), self.sampled[site])
        return self._local[layer]

    def own_masks(self, replacement: HeldReplacement) -> Masks:
        """At the sampled tokens."""
        return [mask[self.place.sampled] for mask in replacement.own_masks(self.place, self.rows)]

    def end_to_end(self, first: int, without: tuple[int, ...] = ()) -> Float[Tensor, "batch logit pos d"]:
        """Of the logits with respect to the stream entering layer `first`, with MLPs of the layers `without` adding nothing."""
        if (first, without) not in self._whole:
            silent = {Site(layer, Point.mlp_out): torch.zeros_like for layer in without}
            with self.target.patch(silent):
                self._whole[first, without] = self.logits(first)
        return self._whole[first, without]

    def logits(self, first: int) -> Float[Tensor, "batch logit pos d"]:
        """Within a patch, of the patched target."""
        stream = Site(first, Point.resid_pre)
        return logits_jacobian(self.target, self.place, stream, self.streams[stream], self.top)


@torch.no_grad()
def faithfulness(
    target: Target,
    replacements: Mapping[str, HeldReplacement],
    text: TokenBatch,
    keep: Bool[Tensor, "batch pos"],
    cfg: FaithfulnessConfig,
    evaluation: EvaluationConfig,
    seed: int,
) -> dict[str, list[Measurement]]:
    """Of each named replacement: `jacobian_{cosine, error}_{local, end_to_end}` with its own active sets, `.._random` with random
    ones, `.._stochastic` with those that training draws, and end to end `.._zero` without MLPs; `l0_{local, end_to_end}`,
    active units of a module. Site `all`: over all layers.
    """
    sites = sorted({site for each in replacements.values() for site in _sites(each)})
    where = list(places(text, keep, cfg.tokens_per_seq, evaluation.batch_seqs, target.device, seed))
    alive = _alive(target, replacements, where, sites)
    means = {name: _Means(len(keep)) for name in replacements}
    draw = torch.Generator().manual_seed(seed)
    with Progress("Jacobians", len(where) * len(replacements), 0, unit="batches") as progress:
        for place in where:
            truth = _Truth(target, place, sites, cfg.n_logits)
            for name, each in replacements.items():
                _local(each, truth, alive[name], draw, means[name])
                _end_to_end(each, truth, alive[name], draw, means[name])
                progress.advance(1)
    drawn = resamples(len(keep), evaluation.bootstrap, seed)
    confidence = evaluation.confidence
    return {name: list(each.measurements(replacements[name].inputs, drawn, confidence)) for name, each in means.items()}


def _sites(replacement: HeldReplacement) -> set[Site]:
    """What is recorded of the undisturbed run."""
    inputs = {Site(layer, Point.mlp_in) for layer in replacement.layers}
    return {*replacement.reads, *inputs, Site(min(replacement.layers), Point.resid_pre)}


def _alive(
    target: Target, replacements: Mapping[str, HeldReplacement], where: Sequence[Place], sites: Sequence[Site]
) -> dict[str, list[Bool[Tensor, " _"]]]:
    """Units active on any token of the text, of the undisturbed run or the replaced one."""
    alive: dict[str, list[Tensor]] = {}
    for place in where:
        rows = {site: place.rows(values) for site, values in target.record(place.tokens, sites).items()}
        for name, each in replacements.items():
            masks = zip(each.own_masks(place, rows), each.own_masks_replaced(place), strict=True)
            fired = [(clean != 0).any(0) | (live != 0).any(0) for clean, live in masks]
            before = alive.get(name, fired)
            alive[name] = [a | b for a, b in zip(before, fired, strict=True)]
    return alive


def _l0(masks: Masks) -> Float[Tensor, " token"]:
    """Active units of a token, mean over modules."""
    return torch.stack([(mask != 0).sum(1).double() for mask in masks]).mean(0)


def _local(
    replacement: HeldReplacement,
    truth: _Truth,
    alive: Sequence[Bool[Tensor, " _"]],
    draw: torch.Generator,
    means: _Means,
) -> None:
    own, seqs = truth.own_masks(replacement), truth.place.sampled_seqs
    means.add("l0_local", "all", seqs, _l0(own))
    sets = {"": own, "random": random_masks(own, alive, draw)}
    if (drawn := replacement.stochastic_masks(truth.place, draw)) is not None:
        sets["stochastic"] = [mask[truth.place.sampled] for mask in drawn]
    for condition, masks in sets.items():
        for layer in replacement.layers:
            x = truth.sampled[Site(layer, Point.mlp_in)]
            J = by_token(lambda x, at=layer, a=masks: replacement.mlp_out(at, x, truth.sampled, a), x)
            for site in (f"L{layer}", "all"):
                means.compare("local", site, seqs, truth.local(layer), J, condition)


def _end_to_end(
    replacement: HeldReplacement,
    truth: _Truth,
    alive: Sequence[Bool[Tensor, " _"]],
    draw: torch.Generator,
    means: _Means,
) -> None:
    place, first = truth.place, min(replacement.layers)
    own = replacement.own_masks_replaced(place)
    means.add("l0_end_to_end", "all", place.seqs[(place.kept // place.tokens.shape[1]).cpu()], _l0(own))
    clean = truth.end_to_end(first)
    sets = {"": own, "random": random_masks(own, alive, draw)}
    if (drawn := replacement.stochastic_masks(place, draw)) is not None:
        sets["stochastic"] = drawn
    for condition, masks in sets.items():
        with replacement.installed(place, masks):
            means.compare("end_to_end", "all", place.seqs, clean, truth.logits(first), condition)
    without = truth.end_to_end(first, replacement.layers)
    means.compare("end_to_end", "all", place.seqs, clean, without, "zero")
