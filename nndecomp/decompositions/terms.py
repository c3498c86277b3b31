"""The terms of a dictionary's loss on one batch, but for the penalty, whose state is its own (`Sparsity`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences, rows_of
from nndecomp.config.schema import CodeNormalisation, Dead, DecompositionConfig, PreActivationLoss
from nndecomp.decompositions import losses, penalties
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.activation_selecting import AbsTopK
from nndecomp.decompositions.codes import DenseCodes, Encoding
from nndecomp.decompositions.dead import aux_codes, dead_pre_activations, ghost, unexplained
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.matryoshka import prefix_reconstructions


@dataclass(frozen=True)
class Batch:
    """In the units of training."""

    dictionary: SparseDictionary
    cfg: DecompositionConfig
    encoding: Encoding
    x: RowsOrSequences
    y: Float[Tensor, "token d_writes"]

    def reconstruction(self, residual: Float[Tensor, "token d_writes"]) -> Float[Tensor, ""]:
        return losses.reconstruction(residual, self.y, self.cfg.reconstruction, self.dictionary.write_layout)


def fit(batch: Batch) -> tuple[Float[Tensor, "token d_writes"], Float[Tensor, ""]]:
    """y - y_hat, and the reconstruction loss: with matryoshka the weighted sum over prefixes."""
    dictionary, codes, shares = batch.dictionary, batch.encoding.codes, batch.cfg.matryoshka
    if shares is None:
        residual = batch.y - dictionary.decode(codes, batch.x)
        return residual, batch.reconstruction(residual)
    residuals = [batch.y - y_hat for y_hat in prefix_reconstructions(dictionary, codes, batch.x, shares)]
    weights = batch.cfg.matryoshka_weights or [1 / len(shares)] * len(shares)
    fits = [weight * batch.reconstruction(residual) for weight, residual in zip(weights, residuals, strict=True)]
    return residuals[-1], torch.stack(fits).sum()


def gate(batch: Batch) -> Float[Tensor, ""] | None:
    """The gate alone has to reconstruct; decoder, skip and bias learn nothing from it (Rajamanoharan et al. 2024, arXiv
    2404.16014, eq. 8), or with `gate_trains_decoder` what they learn from any reconstruction."""
    dictionary, gates = batch.dictionary, batch.encoding.gates
    if gates is None:
        return None
    seen: Callable[[Tensor], Tensor] = (lambda w: w) if batch.cfg.gate_trains_decoder else Tensor.detach
    y_hat = seen(dictionary.b_dec).repeat(len(batch.y), 1)
    for bank, own in zip(dictionary.banks, gates, strict=True):
        y_hat[:, bank.writes] += own.decode(seen(bank.W_dec))
        if bank.W_skip is not None:
            y_hat[:, bank.writes] += rows_of(batch.x[:, bank.reads]) @ seen(bank.W_skip)
    return batch.cfg.gate_coefficient * batch.reconstruction(batch.y - y_hat)


def pre_activation(batch: Batch, dead: Bool[Tensor, "all_features"]) -> Float[Tensor, ""] | None:
    """See `penalties.pre_activation`. Where the activation function compares z c, features weigh alike."""
    cfg, activation, banks = batch.cfg, batch.dictionary.activation, batch.dictionary.banks
    if cfg.pre_activation_loss is PreActivationLoss.none:
        return None
    thetas = [activation.theta(g) if isinstance(activation, JumpRelu) else 0.0 for g in range(len(banks))]
    weights = [None] * len(banks)
    if cfg.code_normalisation is CodeNormalisation.none:
        mixed = (cfg.mixed_weights[0], cfg.mixed_weights[1])
        weights = [bank.scale(cfg.penalty_normalisation, mixed) for bank in banks]
    if cfg.pre_activation_loss is PreActivationLoss.dead:
        mask = dead.to(batch.y.dtype).split([bank.n_features for bank in banks])
        weights = [own if weight is None else own * weight for own, weight in zip(mask, weights, strict=True)]
    pres, scales = batch.encoding.pres, batch.encoding.scales
    assert pres is not None, f"pre_activation_loss with {type(activation).__name__}"
    dense = [pre.values for pre in pres if isinstance(pre, DenseCodes)]
    assert len(dense) == len(banks), "entries that are far from active are what this loss is about"
    return cfg.pre_activation_coefficient * penalties.pre_activation(dense, thetas, scales, weights)


def revival(
    batch: Batch,
    residual: Float[Tensor, "token d_writes"],
    fit: Float[Tensor, ""],
    dead: Sequence[Int[Tensor, "_"]],
) -> Float[Tensor, ""] | None:
    """aux_k or ghost gradients: mean over groups, 0 for those without dead features; None if no group has any."""
    cfg, banks = batch.cfg, batch.dictionary.banks
    terms = []
    for g, own in enumerate(dead):
        if len(own) == 0:
            continue
        bank, left = banks[g], residual[:, banks[g].writes]
        pre = dead_pre_activations(batch.dictionary, batch.x, g, own)
        if cfg.dead is Dead.ghost:
            terms.append(ghost(left, pre, bank.W_dec[own], fit))
        else:
            c, signed = batch.encoding.scales[g], isinstance(batch.dictionary.activation, AbsTopK)
            codes = aux_codes(pre, None if c is None else c[own], cfg.aux_k, signed)
            terms.append(unexplained(left, bank.answers(batch.x[:, bank.reads], codes, own)))
    return cfg.aux_coefficient * torch.stack(terms).sum() / len(banks) if terms else None
