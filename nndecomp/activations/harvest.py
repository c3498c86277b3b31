"""From batches of tokens to rows of activations: all sites side by side, masked positions gone."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.config.schema import ActivationsConfig, require
from nndecomp.targets.base import Target
from nndecomp.tokens.batch import TokenBatch
from nndecomp.types import Layout, Site


@runtime_checkable
class Tokens(Protocol):
    """An endless stream of token batches; its state is plain values that JSON can hold."""

    def next_batch(self, batch_seqs: int) -> TokenBatch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def kept(batch: TokenBatch, cfg: ActivationsConfig) -> Bool[Tensor, "batch pos"]:
    """The positions that count, in training and in evaluation alike.

    Not padding; not BOS if `drop_bos`; not the first `drop_first` positions of a row.
    """
    keep = batch.mask & ~batch.is_bos if cfg.drop_bos else batch.mask.clone()
    keep[:, : cfg.drop_first] = False
    return keep


def check_positions(cfg: ActivationsConfig, seq_len: int) -> None:
    """SettingError if `drop_first` leaves nothing of a sequence."""
    require(
        cfg.drop_first < seq_len,
        f"activations.drop_first={cfg.drop_first} leaves nothing of tokens.seq_len={seq_len} positions",
    )


class Harvester:
    """Runs the target over a token stream: one forward pass for all sites, stopped after the last of them.

    Rows come in token order (sequence by sequence, position by position), with the columns of `layout`. Its state is
    the token stream's state.

    Raises SettingError if `drop_first` leaves nothing of a sequence.
    """

    def __init__(
        self, target: Target, tokens: Tokens, sites: Sequence[Site], cfg: ActivationsConfig, *, seq_len: int
    ) -> None:
        check_positions(cfg, seq_len)
        self.target, self.tokens, self.cfg, self.seq_len = target, tokens, cfg, seq_len
        self.layout = Layout.of({site: target.shape.width(site) for site in sites})
        self.dtype = getattr(torch, cfg.dtype.value)
        self.device = target.device

    @property
    def rows_at_most(self) -> int:
        """Rows from one forward pass if no position is masked."""
        return self.cfg.batch_seqs * self.seq_len

    def next_rows(self) -> Float[Tensor, "token width"]:
        """The rows of the next batch of sequences, in `cfg.dtype`, on the target's device."""
        batch = self._next_tokens()
        # The mask is read where the tokens are (the CPU), so that a GPU is never waited for.
        keep = kept(batch, self.cfg).flatten()
        index = keep.nonzero().squeeze(1)
        everything = len(index) == keep.numel()
        index = index.to(self.device, non_blocking=True)
        rows = torch.empty(len(index), self.layout.width, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            recorded = self._recorded(batch)
            for site, span in self.layout.spans.items():
                values = recorded.pop(site).flatten(0, 1)
                if everything:
                    rows[:, span].copy_(values)
                elif values.dtype == self.dtype:
                    torch.index_select(values, 0, index, out=rows[:, span])
                else:
                    rows[:, span].copy_(values.index_select(0, index))
        return rows

    def next_sequences(self) -> tuple[Float[Tensor, "batch pos width"], Bool[Tensor, "batch pos"]]:
        """The next batch of whole sequences, and which of their positions count (on the CPU)."""
        batch = self._next_tokens()
        values = torch.empty(*batch.tokens.shape, self.layout.width, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            recorded = self._recorded(batch)
            for site, span in self.layout.spans.items():
                values[..., span].copy_(recorded.pop(site))
        return values, kept(batch, self.cfg)

    def _next_tokens(self) -> TokenBatch:
        batch = self.tokens.next_batch(self.cfg.batch_seqs)
        assert batch.tokens.shape == (self.cfg.batch_seqs, self.seq_len), (
            f"the token stream gave {tuple(batch.tokens.shape)}, not {(self.cfg.batch_seqs, self.seq_len)}"
        )
        return batch

    def _recorded(self, batch: TokenBatch) -> dict[Site, Tensor]:
        return self.target.record(batch.tokens.to(self.device, non_blocking=True), self.layout.sites)

    def state_dict(self) -> dict[str, Any]:
        return self.tokens.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens.load_state_dict(state)
