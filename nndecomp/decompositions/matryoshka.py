"""Matryoshka dictionaries: the first features of each group, the first and second block, ... each reconstruct on their own
(Bussmann et al. 2025, arXiv 2503.17547). What is active is decided once, among all features.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences, rows_of
from nndecomp.decompositions.codes import Codes, GroupCodes, SparseCodes
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.support import Support


def block_sizes(n_features: int, shares: Sequence[float]) -> list[int]:
    """How many features each block has: its share, rounded down, and the rest in the last block."""
    sizes = [int(share * n_features + 1e-9) for share in shares[:-1]]
    sizes.append(n_features - sum(sizes))
    assert min(sizes) > 0, f"blocks of {sizes} features: shares {list(shares)} of {n_features} leave one empty"
    return sizes


def prefix_reconstructions(
    dictionary: SparseDictionary, codes: Codes, x: RowsOrSequences, shares: Sequence[float]
) -> list[Float[Tensor, "token d_writes"]]:
    """y_hat from the first block of every group, from the first two, ..., from all; bias and skip are in each."""
    y_hat = dictionary.b_dec.repeat(codes.n_tokens, 1)
    for bank in dictionary.banks:
        if bank.W_skip is not None:
            y_hat[:, bank.writes] += rows_of(x[:, bank.reads]) @ bank.W_skip
    blocks = [
        decode_blocks(group, bank.W_dec, block_sizes(bank.n_features, shares))
        for bank, group in zip(dictionary.banks, codes, strict=True)
    ]
    prefixes = []
    for i in range(len(shares)):
        y_hat = y_hat.clone()
        for bank, of_blocks in zip(dictionary.banks, blocks, strict=True):
            y_hat[:, bank.writes] += of_blocks[i]
        prefixes.append(y_hat)
    return prefixes


def decode_blocks(
    codes: GroupCodes, W_dec: Float[Tensor, "feature d_write"], sizes: Sequence[int]
) -> Sequence[Float[Tensor, "token d_write"]]:
    """What the features of each block add, one block after the other."""
    if not isinstance(codes, SparseCodes):
        values, rows = codes.values.to(W_dec.dtype).split(list(sizes), 1), W_dec.split(list(sizes))
        return [value @ row for value, row in zip(values, rows, strict=True)]
    # One pass over the slots, as if every block of every token were a token of its own.
    block = torch.zeros_like(codes.indices)
    for end in torch.tensor(sizes[:-1]).cumsum(0).tolist():
        block += codes.indices >= end
    place, order = (codes.tokens * len(sizes) + block).sort(stable=True)
    support = Support.of(place, codes.indices[order], codes.n_tokens * len(sizes), codes.n_features)
    decoded = SparseCodes(codes.values[order], support).decode(W_dec)
    return decoded.view(codes.n_tokens, len(sizes), -1).unbind(1)
