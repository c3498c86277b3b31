"""What end-to-end training reads: whole sequences, with the target's clean activations and predictions.

Rows are not shuffled over sequences: what a replacement does to predictions is a matter of a whole sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.activations.harvest import Tokens, check_positions, kept
from nndecomp.activations.sequences import Sequences as WholeSequences
from nndecomp.config.schema import ActivationsConfig
from nndecomp.decompositions.replacing import Sequences
from nndecomp.targets.base import Replace, Target
from nndecomp.types import Layout, Site


@dataclass(frozen=True)
class CleanBatch(Sequences):
    """Sequences with what the undisturbed target made of them."""

    clean: WholeSequences  # activations at the sites of the stream's layout
    predicts: Bool[Tensor, "batch pos-1"]  # predictions of a real token
    n_predictions: int
    logits: dict[str | None, Float[Tensor, "batch pos vocab"]]  # of each model; empty where no objective asks for them


class CleanSequences:
    """Batches of `batch_seqs` sequences and one clean forward pass of each. Its state is the token stream's state.

    logits: whether predictions are wanted, of every model that has sites; without them the pass stops after the last site.
    """

    def __init__(
        self,
        target: Target,
        tokens: Tokens,
        sites: Sequence[Site],
        cfg: ActivationsConfig,
        *,
        batch_seqs: int,
        seq_len: int,
        logits: bool,
    ) -> None:
        check_positions(cfg, seq_len)
        self.target, self.tokens, self.cfg = target, tokens, cfg
        self.batch_seqs, self.logits = batch_seqs, logits
        self.layout = Layout.of({site: target.shape.width(site) for site in sites})

    def next_batch(self) -> CleanBatch:
        batch = self.tokens.next_batch(self.batch_seqs)
        # Masks are read where the tokens are (the CPU), so that a GPU is never waited for.
        index = kept(batch, self.cfg).flatten().nonzero().squeeze(1)
        predicts = batch.mask[:, 1:] & batch.mask[:, :-1]
        n_predictions = int(predicts.sum())
        assert len(index) > 0 and n_predictions > 0, f"a batch of {len(batch)} sequences has nothing to learn from"
        device = self.target.device
        tokens, index, predicts = (each.to(device, non_blocking=True) for each in (batch.tokens, index, predicts))
        whole, logits = self._clean(Sequences(tokens, index))
        return CleanBatch(tokens, index, whole, predicts, n_predictions, logits)

    @torch.no_grad()
    def _clean(self, batch: Sequences) -> tuple[WholeSequences, dict[str | None, Float[Tensor, "batch pos vocab"]]]:
        values: dict[Site, Tensor] = {}
        logits = {}
        if self.logits:
            with self.target.patch({site: _keeping(site, values) for site in self.layout.sites}):
                for model in dict.fromkeys(site.model for site in self.layout.sites):
                    logits[model] = self.target.predicting(model).logits(batch.tokens)
        else:
            values = self.target.record(batch.tokens, self.layout.sites)
        return batch.whole(torch.cat([values[site] for site in self.layout.sites], -1)), logits

    def state_dict(self) -> dict[str, Any]:
        return self.tokens.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens.load_state_dict(state)


def _keeping(site: Site, values: dict[Site, Tensor]) -> Replace:
    def keep(value: Tensor) -> None:
        values[site] = value.float()

    return keep
