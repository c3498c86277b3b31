"""Training a dictionary by what putting it into the target does to the target's predictions.

    loss = local loss + end_to_end_coefficient * damage

    damage, kl   mean over predictions of KL(P || Q)          P: the target's prediction, Q: that of the target with
    damage, ce   mean over predictions of -log Q(next token)  reconstructions in place; nats

Gradients reach the dictionary through the frozen target (Braun et al. 2024, arXiv 2405.12241, eq. 3, who patch one site;
with all sites at once it is the loss of the replacement model). Of two models, each one's own predictions are meant. The
local loss, and with it what is counted as firing, is that of the clean activations of the same batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nndecomp.activations.sequences import RowsOrSequences
from nndecomp.config.schema import DecompositionConfig, EndToEnd, Together, TrainingConfig
from nndecomp.decompositions.base import LiveRun
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.decompositions.replacing import live, pasted
from nndecomp.targets.base import Replace, Target
from nndecomp.training.clean_sequences import CleanBatch
from nndecomp.types import Site

# Log-probabilities that exist at a time: 256 MiB in float32.
CHUNK_VALUES = 2**26


def kl_divergence(
    clean: Float[Tensor, "row vocab"], patched: Float[Tensor, "row vocab"], weights: Float[Tensor, " row"]
) -> Float[Tensor, ""]:
    """sum over rows of weight * KL(softmax clean || softmax patched), nats; gradients reach `patched` alone."""
    each = lambda p, q, w: (w * F.kl_div(_log_p(q), _log_p(p), reduction="none", log_target=True).sum(-1)).sum()  # noqa: E731
    return _in_chunks(each, clean.detach(), patched, weights)


def cross_entropy(
    patched: Float[Tensor, "row vocab"], tokens: Int[Tensor, " row"], weights: Float[Tensor, " row"]
) -> Float[Tensor, ""]:
    """sum over rows of weight * -log softmax(patched)[token], nats."""
    each = lambda q, t, w: (w * F.cross_entropy(q.float(), t, reduction="none")).sum()  # noqa: E731
    return _in_chunks(each, patched, tokens, weights)


def _log_p(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
    return logits.float().log_softmax(-1)


def _in_chunks(each: Any, *rows: Tensor) -> Tensor:
    """The sum of `each` over chunks of rows, whose intermediate values are made again for the gradient, not kept."""
    n_values = max(tensor.shape[1] for tensor in rows if tensor.ndim == 2)
    parts = zip(*(tensor.split(max(1, CHUNK_VALUES // n_values)) for tensor in rows), strict=True)
    # Nothing in it is random.
    sums = [checkpoint(each, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum()  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _Scaled:
    """A dictionary that works on normalised activations, as the target meets it: on raw ones."""

    local: DictionaryObjective

    @property
    def dictionary(self) -> SparseDictionary:
        return self.local.dictionary

    @property
    def reads(self) -> tuple[Site, ...]:
        return self.dictionary.reads

    @property
    def writes(self) -> tuple[Site, ...]:
        return self.dictionary.writes

    @property
    def needs_sequences(self) -> bool:
        return self.dictionary.needs_sequences

    def live_run(self) -> "_ScaledRun":
        return _ScaledRun(self, self.dictionary.live_run())


@dataclass(frozen=True)
class _ScaledRun:
    of: _Scaled
    run: LiveRun

    def read(self, site: Site, value: RowsOrSequences) -> None:
        self.run.read(site, self.of.local.reads.normalised(site, value))

    def write(self, site: Site) -> Float[Tensor, "token width"]:
        return self.of.local.writes.raw(site, self.run.write(site))

    def active(self) -> Any:
        return self.run.active()


class EndToEndObjective(nn.Module):
    """A local objective, and beside it the damage done to the target's predictions. Batches are `CleanBatch`es.

    all      every written site is replaced at once; reads are taken inside the patched run. In training, batchtopk
             selects among the kept positions of the batch, in each group when its turn comes.
    single   one written site at a time is replaced by its clean reconstruction, drawn anew each step from torch's
             generator, which the loop keeps and restores.

    With end_to_end=none it is the local objective, on batches of sequences.
    """

    def __init__(self, local: DictionaryObjective, target: Target) -> None:
        super().__init__()
        self.local, self.target = local, target

    @property
    def cfg(self) -> DecompositionConfig:
        return self.local.cfg

    @property
    def dictionary(self) -> SparseDictionary:
        return self.local.dictionary

    def loss(self, batch: CleanBatch, progress: float) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss and detached metrics: those of the local objective, and `end_to_end` in nats a prediction."""
        local, terms = self.local.loss(batch.clean, progress)
        if self.cfg.end_to_end is EndToEnd.none:
            return local, terms
        damage = self.damage(batch)
        weighted = self.cfg.end_to_end_coefficient * damage
        loss = local + weighted
        own = {"loss": loss.detach(), "end_to_end": damage.detach(), "loss/end_to_end": weighted.detach()}
        return loss, {**terms, **own}

    def damage(self, batch: CleanBatch) -> Float[Tensor, ""]:
        """Nats a prediction, mean over the models that are patched; see the top of the file."""
        replacements = self._replacements(batch)
        models = list(dict.fromkeys(site.model for site in replacements))
        with self.target.patch(replacements):
            patched = {model: self.target.predicting(model).logits(batch.tokens).flatten(0, 1) for model in models}
        # The last position of a sequence predicts nothing that is known: its weight is 0.
        weights = F.pad(batch.predicts.float(), (0, 1)).flatten() / batch.n_predictions
        match self.cfg.end_to_end:
            case EndToEnd.kl:
                assert batch.logits.keys() >= set(models), (
                    "the divergence from clean predictions needs the clean logits"
                )
                each = [kl_divergence(batch.logits[model].flatten(0, 1), patched[model], weights) for model in models]
            case EndToEnd.ce:
                following = F.pad(batch.tokens[:, 1:], (0, 1)).flatten()
                each = [cross_entropy(patched[model], following, weights) for model in models]
            case EndToEnd.none:
                raise AssertionError("no damage is asked for")
        return torch.stack(each).mean()

    def _replacements(self, batch: CleanBatch) -> dict[Site, Replace]:
        dictionary = self.dictionary
        match self.cfg.end_to_end_sites:
            case Together.all:
                return live(batch, [_Scaled(self.local)], dictionary.writes)[0]
            case Together.single:
                site = dictionary.writes[int(torch.randint(len(dictionary.writes), ()))]
                y_hat, _ = dictionary(self.local.split(batch.clean)[0])
                return pasted(batch, {site: self.local.writes.raw(site, y_hat[:, dictionary.write_layout.spans[site]])})

    def before_step(self) -> None:
        self.local.before_step()

    def clipped_apart(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        return self.local.clipped_apart()

    def after_step(self) -> None:
        self.local.after_step()

    def take_resets(self) -> Sequence[tuple[nn.Parameter, Tensor]]:
        return self.local.take_resets()

    def own_training(self, cfg: TrainingConfig) -> TrainingConfig:
        return self.local.own_training(cfg)

    def lr_shares(self) -> dict[str, float]:
        return {f"local.{name}": share for name, share in self.local.lr_shares().items()}

    def finished(self) -> SparseDictionary:
        return self.local.finished()
