"""Training a language model from nothing with the common loop: next-token cross-entropy, and batches of tokens.

loss = - mean over predicted positions of  log p(token_{i+1} | token_0 .. token_i)      in nats
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.activations.harvest import Tokens
from nndecomp.config.schema import TrainingConfig
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP
from nndecomp.tokens import TokenBatch


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], batch: TokenBatch, reduction: str = "mean"
) -> Float[Tensor, "..."]:
    """Cross-entropy of every token but the first of a row, padding left out; nats, "mean" or "sum" over positions."""
    targets = batch.tokens[:, 1:].masked_fill(~batch.mask[:, 1:], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction=reduction)


class NextToken(nn.Module):
    """The objective of a language model."""

    def __init__(self, model: LlamaSimpleMLP) -> None:
        super().__init__()
        self.model = model

    def loss(self, batch: TokenBatch, progress: float) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        loss = next_token_loss(self.model(batch.tokens), batch)
        return loss, {"ce": loss.detach()}

    def before_step(self) -> None:
        pass

    def clipped_apart(self) -> list[tuple[list[nn.Parameter], float]]:
        return []

    def after_step(self) -> None:
        pass

    def own_training(self, cfg: TrainingConfig) -> TrainingConfig:
        return cfg

    def take_resets(self) -> list[tuple[nn.Parameter, Tensor]]:
        return []

    def lr_shares(self) -> dict[str, float]:
        return {}


class TokenBatches:
    """A token stream as the loop wants it: batches of one size, on the device that trains."""

    def __init__(self, stream: Tokens, batch_seqs: int, device: torch.device) -> None:
        self.stream, self.batch_seqs, self.device = stream, batch_seqs, device

    def next_batch(self) -> TokenBatch:
        return self.stream.next_batch(self.batch_seqs).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


@torch.no_grad()
def cross_entropy(
    predict: Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch pos vocab"]], batch: TokenBatch, batch_seqs: int
) -> float:
    """Mean next-token cross-entropy of a model, or of a target's `logits`, `batch_seqs` sequences at a time; nats."""
    sums = [next_token_loss(predict(part.tokens), part, "sum").double().cpu() for part in batch.split(batch_seqs)]
    return float(torch.stack(sums).sum() / batch.mask[:, 1:].sum().cpu())
