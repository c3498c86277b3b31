"""Replacing activations in the target and reading what that does to its predictions.

Only positions where `keep` is true are replaced, in every condition: the others (padding, BOS) hold activations that no
decomposition was asked to explain. Predictions are scored wherever the next token is real.

    zero, mean   ablation: written sites become 0, or their mean over training text
    clean        written sites become the reconstruction computed from the undisturbed run
    live         written sites become the reconstruction computed from what arrives inside the patched run
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences, beside
from nndecomp.activations.sequences import Sequences as WholeSequences
from nndecomp.config.schema import Patched
from nndecomp.decompositions.base import Decomposition
from nndecomp.decompositions.replacing import Known, Sequences
from nndecomp.evaluation.bootstrap import Ratio
from nndecomp.targets.base import Replace, Target
from nndecomp.types import Point, Site

_HELD = 1 << 27  # 512 MiB


@dataclass(frozen=True)
class PatchSet:
    """Sites replaced together, all in one model."""

    patched: Patched
    sites: tuple[Site, ...]

    @property
    def model(self) -> str | None:
        """Of two models under study, the one whose sites these are, and whose predictions they change."""
        return model_of(self.sites)

    @property
    def site(self) -> str:
        """How rows name the sites: of two models `A:all` is everything that is written in A."""
        match self.patched:
            case Patched.all:
                return "all" if self.model is None else f"{self.model}:all"
            case Patched.single:
                return str(self.sites[0])
            case Patched.prefixes:
                return f"{self.sites[0]}-{self.sites[-1]}"


def patch_sets(writes: Sequence[Site], patched: Sequence[Patched]) -> list[PatchSet]:
    """What is replaced together when `writes` are the sites of a decomposition, in model order, each model by itself."""
    sets: list[PatchSet] = []
    for sites in by_model(writes):
        ways = {
            Patched.all: [sites],
            Patched.single: [(site,) for site in sites],
            Patched.prefixes: [sites[: n + 1] for n in range(len(sites))],
        }
        sets += [PatchSet(kind, each) for kind in patched for each in ways[kind]]
    return sets


def by_model(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """The sites of each model, in model order; one entry where there is one model."""
    models = sorted({site.model or "" for site in sites})
    return [tuple(sorted(site for site in sites if (site.model or "") == model)) for model in models]


def several_models(sites: Sequence[Site]) -> str | None:
    """Why all of `sites` cannot be replaced in one run, or None."""
    apart = len(by_model(sites)) > 1
    return "its sites are in two models, of which neither reads what the other writes" if apart else None


def model_of(sites: Sequence[Site]) -> str | None:
    """The one model that all of `sites` are in."""
    models = {site.model for site in sites}
    assert len(models) == 1, f"sites of several models are not replaced together: {', '.join(map(str, sites))}"
    return models.pop()


def exact(values: Tensor) -> Tensor:
    """In float64: where the values are, or on the CPU if their device has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


@dataclass(frozen=True)
class Batch(Sequences):
    """Some sequences of the held-out text, and which of their positions count."""

    seqs: slice  # which sequences of the held-out text
    predicts: Bool[Tensor, "batch pos-1"]  # predictions of a real token

    def per_seq(self, values: Float[Tensor, "token *rest"]) -> Float[Tensor, "batch *rest"]:
        """Rows summed by the sequence they belong to, in float64."""
        values = exact(values)
        seq = (self.kept // self.tokens.shape[1]).to(values.device)
        sums = values.new_zeros(len(self.tokens), *values.shape[1:])
        return sums.index_add_(0, seq, values).cpu()


@dataclass(frozen=True)
class CleanRun:
    """The undisturbed run: its activations at the kept positions and its next-token log-probabilities, by model."""

    rows: dict[Site, Float[Tensor, "token width"]]
    whole: dict[Site, WholeSequences]  # all positions, of the sites where they were asked for
    log_p: dict[str | None, Float[Tensor, "batch pos vocab"]]
    residual: dict[int, Float[Tensor, "batch pos d_model"]]  # what enters the layers at which other runs can begin

    @cached_property
    def top(self) -> dict[str | None, Int[Tensor, "batch pos"]]:
        """The most likely next token, looked for once for all that is compared with this run."""
        return {model: log_p.argmax(-1) for model, log_p in self.log_p.items()}

    @cached_property
    def p(self) -> dict[str | None, Float[Tensor, "batch pos vocab"] | None]:
        """Probabilities, computed once for all that is compared with this run; null where they would take more than _HELD numbers."""
        return {model: log_p.exp() if log_p.numel() <= _HELD else None for model, log_p in self.log_p.items()}

    def read_by(self, decomposition: Decomposition) -> RowsOrSequences:
        """What it reads, as its `forward` takes it."""
        sites = decomposition.read_layout.sites
        return beside([(self.whole if decomposition.needs_sequences else self.rows)[site] for site in sites])

    def before(self, sites: Sequence[Site]) -> dict[Known, RowsOrSequences]:
        """What a run with `sites` replaced does not come by, since it begins at the first of them (`patched`)."""
        layer = first_layer(sites)
        if layer not in self.residual:
            return {}
        values = ((whole, held) for whole, held in ((False, self.rows), (True, self.whole)))
        return {(site, whole): value for whole, held in values for site, value in held.items() if site.layer < layer}


def first_layer(sites: Iterable[Site]) -> int:
    return min(site.layer for site in sites)


def clean_run(
    target: Target, batch: Batch, sites: Sequence[Site], whole: Sequence[Site] = (), begins: Collection[int] = ()
) -> CleanRun:
    """One forward pass a model that yields activations and predictions. `whole`: where all positions are wanted; `begins`: layers
    at which runs of `patched` are to begin."""
    rows: dict[Site, Tensor] = {}
    sequences: dict[Site, WholeSequences] = {}
    log_p: dict[str | None, Tensor] = {}
    residual: dict[int, Tensor] = {}

    def keep_at(site: Site) -> Replace:
        def record(value: Tensor) -> None:
            rows[site] = batch.rows(value)
            if site in whole:
                sequences[site] = batch.whole(value)

        return record

    def entering(layer: int) -> Replace:
        return lambda value: residual.update({layer: value})

    entered = target.patch({Site(layer, Point.resid_pre): entering(layer) for layer in begins})
    with entered, target.patch({site: keep_at(site) for site in sites}):
        for model in target.shape.models:
            log_p[model] = target.predicting(model).logits(batch.tokens).float().log_softmax(-1)
    return CleanRun(rows, sequences, log_p, residual)


@contextmanager
def patched(target: Target, clean: CleanRun, replacements: Mapping[Site, Replace]) -> Iterator[None]:
    """`target.patch` of the batch that `clean` has seen. Layers before the first replaced one would compute what they did there, and do not."""
    layer = first_layer(replacements)
    begun = target.begun(layer, clean.residual[layer]) if layer in clean.residual else nullcontext()
    with begun, target.patch(replacements):
        yield


def ablation(batch: Batch, values: Mapping[Site, Float[Tensor, " width"] | None]) -> dict[Site, Replace]:
    """Sites become constant: the given vector, or zero."""

    def constant(vector: Tensor | None) -> Replace:
        def replace(value: Tensor) -> Tensor:
            row = value.new_zeros(value.shape[-1]) if vector is None else vector.to(value.device)
            return batch.put(value, row.expand(len(batch.kept), -1))

        return replace

    return {site: constant(vector) for site, vector in values.items()}


class Predictions:
    """What the target (of two: `model`) predicted under one condition, summed per sequence in float64.

    ce    -log Q(next token), nats
    kl    KL(P || Q) with P the clean run's prediction and Q this run's, nats
    agree no token is more likely in this run than the clean run's most likely one
    """

    def __init__(self, n_seqs: int, model: str | None = None) -> None:
        self.model = model
        self.ce, self.kl, self.agree, self.n = torch.zeros(4, n_seqs, dtype=torch.float64).unbind()

    def add(self, batch: Batch, clean: CleanRun, log_qs: Iterable[Float[Tensor, "pos vocab"]]) -> None:
        """`log_qs`: log-probabilities, one sequence after the other, so that only one need exist at a time."""
        known = clean.p[self.model]
        for i, (log_p, log_q) in enumerate(zip(clean.log_p[self.model], log_qs, strict=True)):
            seq, predicts = batch.seqs.start + i, batch.predicts[i]
            log_p, log_q = log_p[:-1], log_q[:-1]
            p = log_p.exp() if known is None else known[i, :-1]
            ce = -log_q.gather(-1, batch.tokens[i, 1:, None])[:, 0]
            kl = (p * (log_p - log_q)).sum(-1)
            # The largest value is found much faster than its place.
            agree = (log_q.gather(-1, clean.top[self.model][i, :-1, None])[:, 0] == log_q.amax(-1)).float()
            sums = torch.stack([ce, kl, agree, torch.ones_like(ce)]) * predicts
            assert sums.isfinite().all(), f"predictions of held-out sequence {seq} are not finite numbers"
            # Some devices have no float64: sums over one sequence in float32 there, over sequences in float64 here.
            ce_sum, kl_sum, agree_sum, n = sums.sum(-1).cpu().double()
            self.ce[seq], self.kl[seq], self.agree[seq], self.n[seq] = ce_sum, kl_sum, agree_sum, n

    def means(self) -> dict[str, Ratio]:
        return {
            "ce": Ratio(self.ce, self.n),
            "kl": Ratio(self.kl, self.n),
            "top1_agreement": Ratio(self.agree, self.n),
        }


Yielded = TypeVar("Yielded")


def predictions(
    target: Target, batch: Batch, clean: CleanRun, replaced: AbstractContextManager[Yielded], into: Predictions
) -> Yielded:
    """One forward pass within `replaced`, its predictions added to `into`; returns what `replaced` yields."""
    with replaced as yielded:
        logits = target.predicting(into.model).logits(batch.tokens)
    into.add(batch, clean, (each.float().log_softmax(-1) for each in logits))
    return yielded
