"""What trains components and importances, but for reconstruction.

    faithfulness    sum over maps of |M - V U|_F^2 / sum over maps of the number of entries of M
    minimality      sum over maps and components of  mean_c (1 + beta log2(1 + sum_c))
                    sum_c = sum over tokens of (h + EPSILON)^p,  mean_c = sum_c / number of tokens

One mean over all entries, not a mean of the maps' means; a sum over components, a mean over tokens: coefficients presuppose
both. p moves down: below 1 the gradient p (h + EPSILON)^(p - 1) is steep near 0, and EPSILON, inside the power, keeps it finite.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.config.spd import SPDConfig
from nndecomp.decompositions.spd.components import Components

EPSILON = 1e-12


def faithfulness(matrices: Sequence[Float[Tensor, "_ _"]], components: Sequence[Components]) -> Float[Tensor, ""]:
    errors = [(M - own.product()).square().sum() for M, own in zip(matrices, components, strict=True)]
    return torch.stack(errors).sum() / sum(M.numel() for M in matrices)


def p_at(progress: float, cfg: SPDConfig) -> float:
    """p_start, moving straight to p_end between the shares of training that p_anneal names."""
    if cfg.p_end is None:
        return cfg.p_start
    return cfg.p_start + _share(progress, cfg.p_anneal) * (cfg.p_end - cfg.p_start)


def minimality_at(progress: float, cfg: SPDConfig) -> float:
    """Its coefficient: minimality (minimality_end / minimality)^t, t from 0 to 1 between the shares of minimality_anneal."""
    if cfg.minimality_end is None:
        return cfg.minimality
    return cfg.minimality * (cfg.minimality_end / cfg.minimality) ** _share(progress, cfg.minimality_anneal)


def _share(progress: float, shares: Sequence[float]) -> float:
    start, end = shares
    return min(max((progress - start) / (end - start), 0.0), 1.0)


def minimality(
    upper: Mapping[str, Float[Tensor, "*rows C"]],
    real: Bool[Tensor, "*rows"] | Float[Tensor, "*rows"] | None,
    p: float,
    frequency: float,
) -> Float[Tensor, ""]:
    """upper: h of each map. real: the positions that count, or how often each does; null where all do once. Powers in float32."""
    costs = []
    for h in upper.values():
        values = (h.float() + EPSILON).pow(p).flatten(0, -2)
        sums = values.sum(0) if real is None else (values * real.flatten().unsqueeze(-1)).sum(0)
        means = sums / (len(values) if real is None else real.sum())
        costs.append((means * (1 + frequency * torch.log2(1 + sums))).sum() if frequency else means.sum())
    return torch.stack(costs).sum()
