"""Everything that is measured for a set of decompositions, in as few forward passes as that takes.

One clean pass a batch serves all; zero- and mean-ablation are shared by all that write the same sites.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.config.evaluation import MasksConfig
from nndecomp.config.schema import EvaluationConfig, Inputs, Patched
from nndecomp.decompositions.base import Decomposition, GroupCost, Replacement
from nndecomp.decompositions.replacing import pasted
from nndecomp.evaluation.answers import answers
from nndecomp.evaluation.bootstrap import Ratio, estimate, resamples
from nndecomp.evaluation.costs import axes
from nndecomp.evaluation.patching import (
    Batch,
    CleanRun,
    PatchSet,
    Predictions,
    ablation,
    by_model,
    clean_run,
    first_layer,
    model_of,
    patch_sets,
    patched,
    predictions,
    several_models,
)
from nndecomp.evaluation.reconstruction import Activity, SiteErrors, density_summary, site_means
from nndecomp.evaluation.rows import Measurement
from nndecomp.targets.base import Target
from nndecomp.tokens.batch import TokenBatch
from nndecomp.types import Site


class _Measured:
    """One set of decompositions under measurement: its running sums."""

    def __init__(
        self,
        target: Target,
        decompositions: Sequence[Replacement],
        n_seqs: int,
        means: Mapping[Site, Float[Tensor, " width"]],
        cfg: EvaluationConfig,
    ) -> None:
        self.decompositions = tuple(decompositions)
        self.writes = tuple(sorted(site for each in decompositions for site in each.writes))
        self.reads = tuple(sorted({site for each in decompositions for site in each.reads}))
        self.costs = _costs(self.decompositions)
        _check(self.decompositions, self.writes, means)
        self.sets = patch_sets(self.writes, cfg.patched)
        models = by_model(self.writes)
        self.answers = answers(target, self.decompositions)
        asked = [i for i in cfg.inputs if self.answers.offers(i)]
        apart = several_models((*self.reads, *self.writes))
        obstacles = {i: apart if i is Inputs.live and apart is not None else self.answers.obstacle(i) for i in asked}
        self.obstacle = obstacles.get(Inputs.live)
        self.inputs = [i for i in asked if obstacles[i] is None]
        # Live reconstruction is measured with everything replaced, where errors compound most.
        self.site_sets = list(dict.fromkeys([*(each.sites for each in self.sets), *models]))
        self.predicted = {
            (i, sites): Predictions(n_seqs, model_of(sites)) for i in self.inputs for sites in self.site_sets
        }
        self.errors = {i: {s: SiteErrors(n_seqs, means[s]) for s in self.writes} for i in self.inputs}
        self.activity = {i: Activity(n_seqs, self.costs) for i in self.inputs}
        self.masked: dict[str, Predictions] = {}  # by condition
        self.n_seqs = n_seqs

    def add(self, target: Target, batch: Batch, clean: CleanRun, masks: MasksConfig, seed: int) -> None:
        for inputs in self.inputs:
            if inputs is Inputs.clean:
                self._add_clean(target, batch, clean)
            else:
                self._add_inside(inputs, target, batch, clean)
        for condition, masked in self.answers.masked(batch, masks, seed):
            into = self.masked.setdefault(condition, Predictions(self.n_seqs))
            predictions(target, batch, clean, masked, into)

    def _add_clean(self, target: Target, batch: Batch, clean: CleanRun) -> None:
        rows, actives = self.answers.clean(batch, clean)
        for site in self.writes:
            self.errors[Inputs.clean][site].add(batch, clean.rows[site], rows[site])
        self.activity[Inputs.clean].add(batch, actives)
        for sites in self.site_sets:
            replaced = patched(target, clean, pasted(batch, {site: rows[site] for site in sites}))
            predictions(target, batch, clean, replaced, self.predicted[Inputs.clean, sites])

    def _add_inside(self, inputs: Inputs, target: Target, batch: Batch, clean: CleanRun) -> None:
        def witness(site: Site, arrived: Tensor, rows: Tensor) -> None:
            self.errors[inputs][site].add(batch, arrived, rows)

        for sites in self.site_sets:
            whole = sites == self.writes
            replaced = self.answers.inside(inputs, batch, sites, witness if whole else None, clean)
            actives = predictions(target, batch, clean, replaced, self.predicted[inputs, sites])
            if whole:
                self.activity[inputs].add(batch, actives())


def _costs(decompositions: Sequence[Replacement]) -> tuple[GroupCost, ...]:
    """Groups of all decompositions side by side. A name that occurs twice says which decomposition it belongs to."""
    times = Counter(cost.name for each in decompositions for cost in each.costs)
    return tuple(
        replace(cost, name=f"{cost.name}#{i}", module=f"{cost.module or cost.name}#{i}")
        if times[cost.name] > 1
        else cost
        for i, each in enumerate(decompositions)
        for cost in each.costs
    )


def _check(
    decompositions: Sequence[Replacement], writes: Sequence[Site], means: Mapping[Site, Float[Tensor, " width"]]
) -> None:
    assert decompositions, "nothing to evaluate: there are no decompositions"
    for a, b in combinations(writes, 2):
        same = (a.model, a.layer, a.point) == (b.model, b.layer, b.point)
        assert not (same and (a.head == b.head or None in (a.head, b.head))), (
            f"{a} and {b} are both written: a site can be replaced only once"
        )
    for each in decompositions:
        assert not each.training, f"{type(each).__name__} is in training mode; evaluate it after .eval()"
    missing = [str(site) for site in writes if site not in means]
    assert not missing, f"no means for {', '.join(missing)}: mean-ablation needs them for all written sites"


def _batches(
    heldout: TokenBatch, keep: Bool[Tensor, "batch pos"], batch_seqs: int, device: torch.device
) -> Iterator[Batch]:
    assert keep.shape == heldout.tokens.shape, f"keep is {tuple(keep.shape)}, tokens {tuple(heldout.tokens.shape)}"
    for start in range(0, len(keep), batch_seqs):
        seqs = slice(start, min(start + batch_seqs, len(keep)))
        mask = heldout.mask[seqs]
        yield Batch(
            heldout.tokens[seqs].to(device),
            keep[seqs].flatten().nonzero()[:, 0].to(device),
            seqs,
            (mask[:, 1:] & mask[:, :-1]).to(device),
        )


@torch.no_grad()
def evaluate_all(
    target: Target,
    replacements: Mapping[str, Sequence[Replacement]],
    heldout: TokenBatch,
    keep: Bool[Tensor, "batch pos"],
    means: Mapping[Site, Float[Tensor, " width"]],
    cfg: EvaluationConfig,
    seed: int,
) -> dict[str, list[Measurement]]:
    """Measure each named set of decompositions, whose writes together form one replacement.

    `keep` says which positions are replaced and reconstructed, `means` [width] of each written site what
    mean-ablation puts there. `seed` draws the bootstrap, and masks.
    """
    n_seqs = len(heldout.tokens)
    measured = {name: _Measured(target, each, n_seqs, means, cfg) for name, each in replacements.items()}
    needed = sorted({site for m in measured.values() for site in (*m.reads, *m.writes)})
    parts = [each for m in measured.values() for each in m.decompositions if isinstance(each, Decomposition)]
    attending = [each for each in parts if each.needs_sequences]
    whole = sorted({site for each in attending for site in each.reads})
    site_sets = dict.fromkeys(sites for m in measured.values() for sites in m.site_sets)
    begins = {first_layer(sites) for sites in site_sets} - {0} if target.begins_late else set()
    unpatched = {model: Predictions(n_seqs, model) for model in target.shape.models}
    ablated = {(kind, sites): Predictions(n_seqs, model_of(sites)) for kind in ("zero", "mean") for sites in site_sets}
    batches = partial(_batches, heldout, keep, cfg.batch_seqs, target.device)
    for m in measured.values():
        m.answers.look_ahead(batches, cfg.masks, seed)
    for batch in batches():
        clean = clean_run(target, batch, needed, whole, begins)
        for model, into in unpatched.items():
            into.add(batch, clean, clean.log_p[model])
        for (kind, sites), into in ablated.items():
            values = {site: means[site] if kind == "mean" else None for site in sites}
            predictions(target, batch, clean, patched(target, clean, ablation(batch, values)), into)
        for m in measured.values():
            m.add(target, batch, clean, cfg.masks, seed)
    drawn = resamples(n_seqs, cfg.bootstrap, seed)
    n_kept = int(keep.sum())
    return {
        name: [
            *_prediction_rows(m, unpatched, ablated, drawn, cfg.confidence),
            *_reconstruction_rows(m, n_kept, drawn, cfg.confidence),
        ]
        for name, m in measured.items()
    }


def evaluate(
    target: Target,
    decompositions: Sequence[Replacement],
    heldout: TokenBatch,
    keep: Bool[Tensor, "batch pos"],
    means: Mapping[Site, Float[Tensor, " width"]],
    cfg: EvaluationConfig,
    seed: int,
) -> list[Measurement]:
    """`evaluate_all` for one set of decompositions."""
    return evaluate_all(target, {"": decompositions}, heldout, keep, means, cfg, seed)[""]


def _prediction_rows(
    m: _Measured,
    unpatched: Mapping[str | None, Predictions],
    ablated: Mapping[tuple[str, tuple[Site, ...]], Predictions],
    drawn: Float[Tensor, "resample seq"],
    confidence: float,
) -> Iterator[Measurement]:
    units = {"ce": "nats", "ce_increase": "nats", "kl": "nats", "top1_agreement": "share"}
    ce_clean = {model: predicted.means()["ce"] for model, predicted in unpatched.items()}
    n = int(next(iter(unpatched.values())).n.sum())  # models of a pair predict the same tokens

    def row(metric: str, condition: str, mean: Ratio, each: PatchSet, inputs: str) -> Measurement:
        e = estimate(mean, drawn, confidence)
        suffix = f"_{condition}" if condition else ""
        return Measurement(
            metric + suffix, e.value, units[metric], each.site, each.patched.value, inputs, n, e.low, e.high
        )

    def rows(condition: str, predicted: Predictions, each: PatchSet, inputs: str) -> Iterator[Measurement]:
        means = predicted.means()
        # A row of its own name for each condition; of the replacements, only ce is ambiguous without one.
        yield row("ce", condition or "replaced", means["ce"], each, inputs)
        yield row("ce_increase", condition, means["ce"] - ce_clean[each.model], each, inputs)
        yield row("kl", condition, means["kl"], each, inputs)
        yield row("top1_agreement", condition, means["top1_agreement"], each, inputs)

    for each in m.sets:
        yield row("ce", "clean", ce_clean[each.model], each, "none")
        for kind in ("zero", "mean"):
            yield from rows(kind, ablated[kind, each.sites], each, "none")
        for inputs in m.inputs:
            yield from rows("", m.predicted[inputs, each.sites], each, inputs.value)
        if each.patched is Patched.all:
            for condition, predicted in m.masked.items():
                yield from rows(condition, predicted, each, Inputs.clean_gates.value)
    if m.obstacle is not None:
        yield Measurement(
            "live_obstacle", 1.0, "none", "all", "all", "live", n, note=f"not evaluated live: {m.obstacle}"
        )


def _reconstruction_rows(
    m: _Measured, n_tokens: int, drawn: Float[Tensor, "resample seq"], confidence: float
) -> Iterator[Measurement]:
    units = {"mse": "squared activation", "variance": "squared activation", "fvu": "share", "cosine": "cosine"}
    for inputs in m.inputs:
        activity, means = m.activity[inputs], site_means(m.errors[inputs])
        # Live sums come from the run with everything replaced, clean sums from the undisturbed run.
        patched = "none" if inputs is Inputs.clean else Patched.all.value
        row = partial(Measurement, patched=patched, inputs=inputs.value, n_tokens=n_tokens)
        for (metric, site), mean in means.items():
            e = estimate(mean, drawn, confidence)
            yield row(metric, e.value, units[metric], site, low=e.low, high=e.high)
        fvus = [estimate(means["fvu", str(site)], drawn[:0], confidence).value for site in m.writes]
        yield row("fvu_mean_over_sites", sum(fvus) / len(fvus), "share", "all")
        by_coordinate = {str(site): errors.fvus for site, errors in m.errors[inputs].items()}
        for site, each in {**by_coordinate, "all": torch.cat(list(by_coordinate.values()))}.items():
            yield row("fvu_mean_over_coordinates", each.mean().item(), "share", site)
        for group, density in activity.densities().items():
            for metric, share in density_summary(density).items():
                yield row(metric, share, "share", group)
        for group, mean in activity.l0().items():
            e = estimate(mean, drawn, confidence)
            yield row("l0", e.value, "components/token", group, low=e.low, high=e.high)
        for axis in axes(m.costs, len(m.writes)):
            e = estimate(Ratio(activity.counts @ axis.weights, activity.n), drawn, confidence)
            low, high = e.low + axis.constant, e.high + axis.constant
            yield row(axis.name, e.value + axis.constant, axis.unit, "all", low=low, high=high)
