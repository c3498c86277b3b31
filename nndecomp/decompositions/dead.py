"""Losses that revive features which have not fired for long: they explain what the living ones left over.

Both take the residual e = sg(y - y_hat) where one group writes, and the pre-activations and decoder rows of that group's
dead features alone. They decode without bias, and no living feature learns from them.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nndecomp.activations.sequences import RowsOrSequences
from nndecomp.decompositions.groups import SparseDictionary


def dead_features(tokens_since_fired: Int[Tensor, "feature"], dead_after_tokens: int) -> Bool[Tensor, "feature"]:
    """Features that have not fired for so many tokens."""
    return tokens_since_fired >= dead_after_tokens


def aux_k(
    residual: Float[Tensor, "token d_write"],
    pre: Float[Tensor, "token dead"],
    c: Float[Tensor, "dead"] | None,
    W_dec: Float[Tensor, "dead d_write"],
    k: int,
    signed: bool = False,
) -> Float[Tensor, ""]:
    """How badly the dead features alone explain the residual (Gao et al. 2024, arXiv 2406.04093, app. A.2).

    e_hat = of each token, the k dead features with the largest z c, z clipped at 0 (signed: the largest |z c|)
    |e - e_hat|^2 / |e - mean e|^2
    """
    assert len(W_dec) > 0, "aux_k of a group without dead features"
    return unexplained(residual, aux_codes(pre, c, k, signed) @ W_dec)


def aux_codes(
    pre: Float[Tensor, "token dead"], c: Float[Tensor, "dead"] | None, k: int, signed: bool = False
) -> Float[Tensor, "token dead"]:
    """The k dead features that answer for what the others left over."""
    score = pre.detach() if c is None else pre.detach() * c.detach()
    indices = (score.abs() if signed else score).topk(min(k, pre.shape[1]), sorted=False).indices
    values = pre.gather(1, indices)
    return torch.zeros_like(pre).scatter(1, indices, values if signed else values.relu())


def unexplained(residual: Float[Tensor, "token d_write"], e_hat: Float[Tensor, "token d_write"]) -> Float[Tensor, ""]:
    """|e - e_hat|^2 / |e - mean e|^2, with e given."""
    residual = residual.detach()
    error = (residual - e_hat).square().sum()
    return _ratio(error, (residual - residual.mean(0)).square().sum())


def ghost(
    residual: Float[Tensor, "token d_write"],
    pre: Float[Tensor, "token dead"],
    W_dec: Float[Tensor, "dead d_write"],
    fit: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Ghost gradients (Jermyn & Templeton, Anthropic, January 2024 update).

        g = exp(z) @ W_dec,    e_hat = g |e| / (2 |g|)    each token's factor is a constant
        |e - e_hat|^2, scaled by a constant so that it is as large as the reconstruction loss `fit`

    The factors make e_hat indifferent to how large exp(z) is: its largest exponent is taken away first.
    """
    assert len(W_dec) > 0, "ghost gradients of a group without dead features"
    residual = residual.detach()
    ghosts = (pre - pre.detach().amax(1, keepdim=True)).exp() @ W_dec
    share = residual.norm(dim=1, keepdim=True) / (2 * ghosts.detach().norm(dim=1, keepdim=True)).clamp_min(1e-20)
    error = (residual - share * ghosts).square().sum(1).mean()
    return error * _ratio(fit.detach(), error.detach())


def dead_pre_activations(
    dictionary: SparseDictionary, x: RowsOrSequences, group: int, dead: Int[Tensor, "dead"]
) -> Float[Tensor, "token dead"]:
    """Of some features of a group, by their own rows of its encoder alone. The input is given: no gradient goes there."""
    return dictionary.banks[group].pre_activations(dictionary.read(x, group).detach(), dead)


def families(dictionary: SparseDictionary) -> list[list[int]]:
    """Groups that share an encoder, the owner first. Their features are the same ones, written to several places."""
    shared: dict[nn.Module, list[int]] = {}
    for g, bank in enumerate(dictionary.banks):
        shared.setdefault(bank.encoder or bank, []).append(g)
    return list(shared.values())


def fired_anywhere(
    fired: Bool[Tensor, "all_features"], dictionary: SparseDictionary, of: list[list[int]]
) -> Bool[Tensor, "all_features"]:
    """A feature lives if it is active in any of the groups that share its encoder."""
    if len(of) == len(dictionary.banks):
        return fired
    parts = list(fired.split([bank.n_features for bank in dictionary.banks]))
    for family in of:
        together = torch.stack([parts[g] for g in family]).any(0)
        for g in family:
            parts[g] = together
    return torch.cat(parts)


def _ratio(a: Float[Tensor, ""], b: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """a / b, and 0 where b is."""
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), torch.zeros_like(a))
