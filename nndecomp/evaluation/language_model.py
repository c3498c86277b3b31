"""What a language model is worth as a target: how well it predicts, and how much of that its MLPs do."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from nndecomp.targets.base import Target
from nndecomp.tokens import TokenBatch
from nndecomp.training.language_model import cross_entropy
from nndecomp.types import Point, Site


def unigram_entropy(batch: TokenBatch) -> float:
    """-sum p log p over the frequencies of the tokens in a batch, nats: what knowing frequencies alone would reach."""
    counts = batch.tokens[batch.mask].bincount().double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log()).sum())


def ablated_cross_entropy(target: Target, batch: TokenBatch, layers: Sequence[int], batch_seqs: int) -> float:
    """Cross-entropy with the MLPs of `layers` adding nothing, at every position; nats."""
    with target.patch({Site(layer, Point.mlp_out): torch.zeros_like for layer in layers}):
        return cross_entropy(target.logits, batch, batch_seqs)


def target_scores(target: Target, heldout: TokenBatch, batch_seqs: int) -> dict[str, float]:
    """Held-out cross-entropy, and what zero-ablation adds to it: of all MLPs, and of each alone; nats."""
    ce = cross_entropy(target.logits, heldout, batch_seqs)
    layers = range(target.shape.of(None).n_layers)
    ablated = {
        f"zero_{Site(i, Point.mlp_out)}": ablated_cross_entropy(target, heldout, [i], batch_seqs) for i in layers
    }
    ablated["zero_all"] = ablated_cross_entropy(target, heldout, layers, batch_seqs)
    return {
        "ce_heldout": ce,
        "unigram_entropy": unigram_entropy(heldout),
        **{name: value - ce for name, value in ablated.items()},
    }


@torch.no_grad()
def continuation(
    target: Target, tokens: Int[Tensor, " pos"], n_tokens: int, temperature: float, seed: int
) -> Int[Tensor, " drawn"]:
    """`n_tokens` that follow `tokens`, each drawn from softmax(logits / temperature)."""
    generator, n_prompt = torch.Generator().manual_seed(seed), len(tokens)
    assert n_prompt + n_tokens <= target.shape.n_ctx, f"{n_prompt} + {n_tokens} tokens exceed the context"
    for _ in range(n_tokens):
        p = (target.logits(tokens[None])[0, -1].float().cpu() / temperature).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator).to(tokens.device)])
    return tokens[n_prompt:]
