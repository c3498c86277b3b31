"""What a language model is worth as a target: how well it predicts, and how much of that each MLP does."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from nndecomp.targets.base import Target
from nndecomp.tokens import TokenBatch
from nndecomp.training.language_model import cross_entropy
from nndecomp.types import Point, Site


def unigram_entropy(batch: TokenBatch) -> float:
    """-sum p log p over the tokens' frequencies in the batch, in nats: what knowing frequencies alone would reach."""
    counts = batch.tokens[batch.mask].bincount().double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log()).sum())


def ablated_cross_entropy(target: Target, batch: TokenBatch, layers: Sequence[int], batch_seqs: int) -> float:
    """Cross-entropy with the MLPs of `layers` adding nothing, at every position; nats."""
    with target.patch({Site(layer, Point.mlp_out): torch.zeros_like for layer in layers}):
        return cross_entropy(target.logits, batch, batch_seqs)


@torch.no_grad()
def continuation(
    target: Target, tokens: Int[Tensor, " pos"], n_tokens: int, temperature: float, generator: torch.Generator
) -> Int[Tensor, " longer"]:
    """`tokens` and `n_tokens` more, each drawn from softmax(logits / temperature), within the target's context."""
    assert len(tokens) + n_tokens <= target.shape.n_ctx, f"{len(tokens)} + {n_tokens} tokens exceed the context"
    for _ in range(n_tokens):
        p = (target.logits(tokens[None])[0, -1].float().cpu() / temperature).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator).to(tokens.device)])
    return tokens
