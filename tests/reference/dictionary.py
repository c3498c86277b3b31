"""Sparse dictionaries the slow and obvious way: loops over tokens and groups, dense matrices, autograd."""

import torch
from torch import Tensor

from nndecomp.config.schema import Activation, CodeNormalisation, Encoder, Scope
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.molt import TransformGroup
from nndecomp.decompositions.spec import GroupSpec


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Sort each row, mark its first k."""
    kept = torch.zeros_like(scores)
    for token, row in enumerate(scores):
        for feature in sorted(range(len(row)), key=lambda f: -float(row[f]))[:k]:
            kept[token, feature] = 1
    return kept


def batchtopk_mask(scores: Tensor, n: int) -> Tensor:
    """Sort all entries, mark the first n."""
    order = sorted(range(scores.numel()), key=lambda i: -float(scores.flatten()[i]))
    kept = torch.zeros(scores.numel(), dtype=scores.dtype)
    kept[order[:n]] = 1
    return kept.view_as(scores)


def topk(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row, clipped at 0."""
    return (pre * topk_mask(pre.detach(), k)).relu()


def batchtopk(pre: Tensor, n: int) -> Tensor:
    """The n largest of all entries, clipped at 0."""
    return (pre * batchtopk_mask(pre.detach(), n)).relu()


def decoder_rows(dictionary: SparseDictionary, group: GroupSpec) -> dict[str, Tensor]:
    """Site -> its block of the group's decoder; of transforms, their matrices as rows."""
    bank = next(bank for bank in dictionary.banks if bank.name == group.name)
    if isinstance(bank, TransformGroup):
        matrices = [matrix(bank, t)[0].flatten() for t in range(bank.n_features)]
        return {str(group.writes[0]): torch.stack(matrices)}
    blocks, start = {}, 0
    for site in group.writes:
        width = dictionary.spec.widths[site]
        blocks[str(site)] = bank.W_dec[:, start : start + width]
        start += width
    return blocks


def code_scale(dictionary: SparseDictionary, group: GroupSpec) -> Tensor:
    """c from the norms of each feature's rows at each site; of a folded dictionary, as it was before."""
    bank = next(bank for bank in dictionary.banks if bank.name == group.name)
    if dictionary.spec.frozen_scales:
        return bank.code_scale
    activation, c = dictionary.spec.activation, []
    blocks = decoder_rows(dictionary, group).values()
    for feature in range(group.n_features):
        norms = [float(block[feature].detach().norm()) for block in blocks]
        of_sae, of_crosscoder = sum(n**2 for n in norms) ** 0.5, sum(norms)
        match activation.code_normalisation:
            case CodeNormalisation.none:
                c.append(1.0)
            case CodeNormalisation.sae:
                c.append(of_sae)
            case CodeNormalisation.crosscoder:
                c.append(of_crosscoder)
            case CodeNormalisation.mixed:
                c.append(activation.mixed_weights[0] * of_sae + activation.mixed_weights[1] * of_crosscoder)
            case CodeNormalisation.decoupled:
                assert len(norms) == 1
                c.append(norms[0])
    return torch.tensor(c, dtype=bank.b_enc.dtype)


def pursuit(residual: Tensor, D: Tensor, k: int) -> Tensor:
    """Codes of one token: gradient pursuit with all correlations and weights written out."""
    directions = D / D.norm(dim=1, keepdim=True)
    weights, taken = torch.zeros(len(D), dtype=D.dtype), []
    for _ in range(k):
        left = residual - weights @ directions
        correlations = directions @ left
        taken.append(max((f for f in range(len(D)) if f not in taken), key=lambda f: float(correlations[f].detach())))
        on_taken = torch.zeros(len(D), dtype=D.dtype)
        on_taken[taken] = 1
        gradient = correlations * on_taken
        step = gradient @ directions
        if float(step.detach().norm()) > 0:
            weights = (weights + gradient * (step @ left) / (step @ step)).relu()
    return weights / D.norm(dim=1)


def pursued(dictionary: SparseDictionary, x: Tensor) -> list[Tensor]:
    """Groups that write a common site as one dictionary of padded rows, the others each alone."""
    spec, banks = dictionary.spec, dictionary.banks
    padded = []
    for bank in banks:
        rows = torch.zeros(bank.n_features, x.shape[1], dtype=x.dtype)
        rows[:, bank.writes] = bank.W_dec
        padded.append(rows)
    overlap = any(set(a.writes) & set(b.writes) for a in spec.groups for b in spec.groups if a is not b)
    residual, units = x - dictionary.b_dec, dictionary.activation.units
    sets = [list(range(len(banks)))] if overlap else [[g] for g in range(len(banks))]
    codes: dict[int, Tensor] = {}
    for groups in sets:
        D = torch.cat([padded[g] for g in groups]) * units
        k = sum(spec.activation.k[g] for g in groups)
        found = torch.stack([pursuit(token * units * (D.abs().sum(0) > 0), D, k) for token in residual])
        codes |= dict(zip(groups, found.split([banks[g].n_features for g in groups], 1), strict=True))
    return [codes[g] for g in range(len(banks))]


def pre_activations(dictionary: SparseDictionary, x: Tensor, g: int) -> Tensor:
    bank, spec = dictionary.banks[g], dictionary.spec
    inputs = x[:, bank.reads] - (dictionary.b_dec[bank.reads] if spec.centre_input else 0)
    pre = inputs @ bank.W_enc.T + bank.b_enc
    if spec.encoder is Encoder.glu:
        pre = pre / (1 + torch.exp(-(inputs @ bank.encoder.W_glu.T + bank.encoder.b_glu)))
    return pre


def encode(dictionary: SparseDictionary, x: Tensor) -> list[Tensor]:
    """Dense codes of a dictionary in training mode, or with a threshold."""
    spec, activation = dictionary.spec, dictionary.activation
    kind, k, everything = spec.activation.kind, spec.activation.k, spec.activation.scope is Scope.all
    if kind is Activation.matching_pursuit:
        return pursued(dictionary, x)
    pres = [pre_activations(dictionary, x, g) for g in range(len(dictionary.banks))]
    scores = [(pre * code_scale(dictionary, group)).detach() for pre, group in zip(pres, spec.groups, strict=True)]
    ranked = [score.abs() if kind is Activation.abs_topk else score for score in scores]
    widths = [score.shape[1] for score in scores]
    codes = []
    for g, pre in enumerate(pres):
        match kind:
            case Activation.relu:
                codes.append(pre.relu())
            case Activation.gated:
                bank = dictionary.banks[g]
                magnitude = activation.r[g].exp() * (pre - bank.b_enc) + activation.b_mag[g]
                codes.append((pre > 0) * magnitude.relu())
            case Activation.topk | Activation.abs_topk:
                kept = (
                    topk_mask(torch.cat(ranked, 1), sum(k)).split(widths, 1)[g]
                    if everything
                    else topk_mask(ranked[g], k[g])
                )
                codes.append(pre * kept if kind is Activation.abs_topk else (pre * kept).relu())
            case Activation.batchtopk if dictionary.training:
                n = len(x) * (sum(k) if everything else k[g])
                kept = (
                    batchtopk_mask(torch.cat(scores, 1), n).split(widths, 1)[g]
                    if everything
                    else batchtopk_mask(scores[g], n)
                )
                codes.append((pre * kept).relu())
            case Activation.batchtopk:
                codes.append(pre * (scores[g] > activation.threshold[0 if everything else g]))
            case Activation.jumprelu:
                codes.append(pre * (scores[g] > activation.theta(g)))
    return codes


def matrix(bank: TransformGroup, t: int) -> tuple[Tensor, Tensor]:
    """A transform as the d x d matrix that is never formed, and what is taken away from what it makes of x."""
    atoms = slice(int(bank.first[t]), int(bank.first[t] + bank.rank[t]))
    return bank.V[atoms].T @ bank.U[atoms], bank.b_V[atoms] @ bank.U[atoms]


def transformed(bank: TransformGroup, x: Tensor, codes: Tensor) -> Tensor:
    """Every transform on its own."""
    total = torch.zeros(len(x), bank.d_write, dtype=x.dtype)
    for t in range(bank.n_features):
        M, shift = matrix(bank, t)
        total = total + codes[:, [t]] * (x @ M - shift)
    return total


def forward(dictionary: SparseDictionary, x: Tensor) -> Tensor:
    """Every group writes every one of its sites by a dense product of its own."""
    spec = dictionary.spec
    written = {}
    for site, span in dictionary.write_layout.spans.items():
        written[str(site)] = dictionary.b_dec[span].expand(len(x), -1)
    for group, bank, codes in zip(spec.groups, dictionary.banks, encode(dictionary, x), strict=True):
        if isinstance(bank, TransformGroup):
            (site,) = map(str, group.writes)
            written[site] = written[site] + transformed(bank, x[:, bank.reads], codes)
            if bank.W_skip is not None:
                written[site] = written[site] + x[:, bank.reads] @ bank.W_skip
            continue
        start = 0
        for site, block in decoder_rows(dictionary, group).items():
            written[site] = written[site] + codes @ block
            if bank.W_skip is not None:
                written[site] = written[site] + x[:, bank.reads] @ bank.W_skip[:, start : start + block.shape[1]]
            start += block.shape[1]
    return torch.cat([written[str(site)] for site in dictionary.write_layout.sites], 1)
