"""Sparsity penalties: pure functions of codes. Every one is a mean over tokens and a sum over the features of all groups.

`c` is the weight of each group's features (`decoder_scale`); gradients reach the decoder through it. Signed codes count by
their size. With v = |f| c:

    l1               sum v                        c = |d|: Anthropic, April 2024 update
    tanh             sum tanh(s v)                Anthropic, crosscoders 2024
    tanh_quadratic   sum q (1 + q / frequency)    q = mean over tokens of tanh(s v), of each feature and group
    lp               sum v^p                      Karvonen et al. 2024, arXiv 2408.00113, section 4.2
    l0               active features, straight through `JumpRelu.active`
    l0_target        sum over groups of (l0 / target - 1)^2          Rajamanoharan et al. 2024, arXiv 2407.14435, app. F
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.decompositions.codes import Codes, DenseCodes, GroupCodes, Scales, SparseCodes


def l1(codes: Codes, c: Scales) -> Float[Tensor, ""]:
    return _mean_over_tokens(codes, _weighted(codes, c))


def tanh(codes: Codes, c: Scales, scale: float) -> Float[Tensor, ""]:
    return _mean_over_tokens(codes, [(scale * v).tanh() for v in _weighted(codes, c)])


def tanh_quadratic(codes: Codes, c: Scales, scale: float, frequency: float) -> Float[Tensor, ""]:
    """Features that are often active cost more: twice as much at q = frequency."""
    of_groups = []
    for group, v in zip(codes, _weighted(codes, c), strict=True):
        q = _sum_by_feature(group, (scale * v).tanh()) / codes.n_tokens
        of_groups.append((q * (1 + q / frequency)).sum())
    return torch.stack(of_groups).sum()


def lp(codes: Codes, c: Scales, p: float) -> Float[Tensor, ""]:
    """Codes that are 0 get no gradient, where that of v^p is infinite for p < 1."""
    assert p > 0, f"v^{p} does not vanish where codes do"
    powers = []
    for v in _weighted(codes, c):
        active = v > 0
        powers.append(torch.where(active, torch.where(active, v, 1.0) ** p, 0.0))
    return _mean_over_tokens(codes, powers)


def l0(active: Sequence[GroupCodes]) -> Float[Tensor, ""]:
    """From straight-through indicators of every group."""
    return torch.stack([group.values.sum() for group in active]).sum() / active[0].n_tokens


def l0_target(active: Sequence[GroupCodes], target: float) -> Float[Tensor, ""]:
    """Each group is to have `target` active features a token on average."""
    return torch.stack([(group.values.sum() / group.n_tokens / target - 1).square() for group in active]).sum()


def pre_activation(
    pres: Sequence[Float[Tensor, "token _"]],
    thetas: Sequence[Float[Tensor, "_"] | float],
    of_pre: Scales,
    of_loss: Scales,
) -> Float[Tensor, ""]:
    """sum relu(theta - z a) b: draws pre-activations that do not reach their threshold up to it.

    theta is in units of z a, with a (`of_pre`) the code normalisation of the activation function; b (`of_loss`) weighs
    features. Anthropic, January 2025 update, has a = 1 and b = |d|. Neither gives the decoder a gradient: a small decoder
    row is no way out of being inactive.
    """
    total = []
    for pre, theta, a, b in zip(pres, thetas, of_pre, of_loss, strict=True):
        short = (theta - (pre if a is None else pre * a.detach())).relu()
        total.append((short if b is None else short * b.detach()).sum())
    return torch.stack(total).sum() / pres[0].shape[0]


def p_at(progress: float, p_start: float, p_end: float, p_anneal: tuple[float, float], p_steps: int) -> float:
    """p falls from p_start to p_end in p_steps equal steps, the first at p_anneal[0], each held for 1 / p_steps of the
    way to p_anneal[1]: the last one as well, so that p_end is reached before training ends.
    """
    first, last = p_anneal
    if progress < first or p_steps == 0:
        return p_start
    made = p_steps if last == first else min(p_steps, int((progress - first) / (last - first) * p_steps + 1e-9) + 1)
    return p_start + (p_end - p_start) * made / p_steps


def _weighted(codes: Codes, c: Scales) -> list[Tensor]:
    return [group.weighted(weights).abs() for group, weights in zip(codes, c, strict=True)]


def _mean_over_tokens(codes: Codes, terms: Sequence[Tensor]) -> Float[Tensor, ""]:
    return torch.stack([term.sum() for term in terms]).sum() / codes.n_tokens


def _sum_by_feature(codes: GroupCodes, values: Tensor) -> Float[Tensor, "feature"]:
    """Of values that stand where the codes' own do."""
    match codes:
        case SparseCodes():
            return values.new_zeros(codes.n_features).index_add(0, codes.indices, values)
        case DenseCodes():
            return values.sum(0)
