"""What trains a parameter decomposition, on held-out text: the very losses of training, without its gradients.

    loss/<name> = sum over batches of n_b L_b / sum over batches of n_b         n_b: real tokens of the batch, L_b: its loss

Batches have as many sequences as those of training (all there are, where these are fewer), because a loss belongs to a whole
batch: an adversary has one source for all of it, and minimality's frequency term sums over it. Sequences that fill none are left out.
Masks are drawn and adversaries climb as in training; sources that training carries from step to step stay as it left them.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import EvaluationConfig
from nndecomp.config.spd import Reconstructed, SPDConfig
from nndecomp.evaluation.bootstrap import Ratio, estimate, resamples
from nndecomp.evaluation.rows import Measurement
from nndecomp.tokens.batch import TokenBatch
from nndecomp.training.parameters import SPDObjective
from nndecomp.training.randomness import random_state_kept

_UNITS = {"total": "none", "faithfulness": "squared weight", "minimality": "importance to the p/token"}


def metric(name: str) -> str:
    return f"loss/{name}"


@torch.no_grad()
def losses(
    objective: SPDObjective, text: TokenBatch, batch_seqs: int, progress: float, seed: int
) -> tuple[dict[str, Float[Tensor, " batch"]], Float[Tensor, " batch"]]:
    """By name the loss of each batch, `total` with their coefficients, and its number of real tokens, float64.

    progress: share of training behind, by which p of minimality is annealed. Adversaries make gradients of their own.
    """
    assert not objective.training, "sources that persist would be moved: measure losses after .eval()"
    size = min(batch_seqs, len(text))
    device = next(objective.decomposition.parameters()).device
    each: list[dict[str, Tensor]] = []
    n_tokens = []
    for i, batch in enumerate(text.split(size)):
        if len(batch) < size:
            break
        with random_state_kept():
            torch.manual_seed(seed + i * size)
            total, terms = objective.loss(batch.to(device), progress)
        each.append(
            {"total": total, **{name: terms[name] for name in ("faithfulness", "minimality", *objective.cfg.losses)}}
        )
        n_tokens.append(batch.mask.sum())
    found = {name: torch.stack([terms[name] for terms in each]).double().cpu() for name in each[0]}
    return found, torch.stack(n_tokens).double()


def means(found: Mapping[str, Tensor], n_tokens: Float[Tensor, " batch"]) -> dict[str, float]:
    return {metric(name): float((values * n_tokens).sum() / n_tokens.sum()) for name, values in found.items()}


def loss_rows(
    cfg: SPDConfig,
    found: Mapping[str, Tensor],
    n_tokens: Float[Tensor, " batch"],
    evaluation: EvaluationConfig,
    seed: int,
) -> Iterator[Measurement]:
    """Intervals are over batches, of which one says nothing."""
    drawn = resamples(len(n_tokens), evaluation.bootstrap if len(n_tokens) > 1 else 0, seed)
    for name, values in found.items():
        e = estimate(Ratio(values * n_tokens, n_tokens), drawn, evaluation.confidence)
        hidden = name in cfg.losses and cfg.losses[name].reconstructed is Reconstructed.hidden
        unit = _UNITS.get(name, "squared activation" if hidden else "nats")
        yield Measurement(metric(name), e.value, unit, "all", "none", "clean_gates", int(n_tokens.sum()), e.low, e.high)
