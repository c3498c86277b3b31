"""Sparse dictionaries the slow and obvious way: loops over tokens and groups, dense matrices, autograd."""

import torch
from torch import Tensor

from nndecomp.config.schema import Activation
from nndecomp.decompositions.groups import SparseDictionary


def topk(pre: Tensor, k: int) -> Tensor:
    """Sort each row, keep its first k, clip at 0."""
    kept = torch.zeros_like(pre)
    for token, row in enumerate(pre.detach()):
        for feature in sorted(range(len(row)), key=lambda f: -float(row[f]))[:k]:
            kept[token, feature] = 1
    return (pre * kept).relu()


def batchtopk(pre: Tensor, n: int) -> Tensor:
    """Sort all entries, keep the first n, clip at 0."""
    order = sorted(range(pre.numel()), key=lambda i: -float(pre.detach().flatten()[i]))
    kept = torch.zeros(pre.numel(), dtype=pre.dtype)
    kept[order[:n]] = 1
    return (pre * kept.view_as(pre)).relu()


def encode(dictionary: SparseDictionary, x: Tensor) -> list[Tensor]:
    """Dense codes of a dictionary in training mode (topk, batchtopk within groups), or with a threshold."""
    spec, all_codes = dictionary.spec, []
    for g, bank in enumerate(dictionary.banks):
        inputs = x[:, bank.reads] - (dictionary.b_dec[bank.reads] if spec.centre_input else 0)
        pre = inputs @ bank.W_enc.T + bank.b_enc
        match spec.activation.kind:
            case Activation.relu:
                all_codes.append(pre.relu())
            case Activation.topk:
                all_codes.append(topk(pre, spec.activation.k[g]))
            case Activation.batchtopk if dictionary.training:
                all_codes.append(batchtopk(pre, spec.activation.k[g] * len(x)))
            case Activation.batchtopk:
                all_codes.append(pre * (pre > dictionary.activation.threshold[g]))
            case Activation.jumprelu:
                all_codes.append(pre * (pre > dictionary.activation.threshold[g]))
    return all_codes


def forward(dictionary: SparseDictionary, x: Tensor) -> Tensor:
    """Every group writes every one of its sites by a dense product of its own."""
    spec = dictionary.spec
    written = {}
    for site, span in dictionary.write_layout.spans.items():
        written[site] = dictionary.b_dec[span].expand(len(x), -1)
    for group, bank, codes in zip(spec.groups, dictionary.banks, encode(dictionary, x), strict=True):
        start = 0
        for site in group.writes:
            columns = slice(start, start + spec.widths[site])
            written[site] = written[site] + codes @ bank.W_dec[:, columns]
            if bank.W_skip is not None:
                written[site] = written[site] + x[:, bank.reads] @ bank.W_skip[:, columns]
            start = columns.stop
    return torch.cat([written[site] for site in dictionary.write_layout.sites], 1)
