"""What the features of each group said about each token.

Two representations with one face. `SparseCodes` lists active (token, feature) pairs as compressed rows and is what
selection produces; `DenseCodes` is the full matrix, for activation functions whose gradient needs it. A slot or entry
whose value is 0 is not active. Gradients flow into the values.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.decompositions import kernels
from nndecomp.decompositions.support import Support


@dataclass(frozen=True)
class SparseCodes:
    """values[s] is the activation of feature support.indices[s] on the token that owns slot s."""

    values: Float[Tensor, "slot"]
    support: Support

    @property
    def indices(self) -> Int[Tensor, "slot"]:
        return self.support.indices

    @property
    def offsets(self) -> Int[Tensor, "token_and_one"]:
        return self.support.offsets

    @property
    def tokens(self) -> Int[Tensor, "slot"]:
        return self.support.tokens

    @property
    def n_tokens(self) -> int:
        return self.support.n_tokens

    @property
    def n_features(self) -> int:
        return self.support.n_features

    def decode(self, W_dec: Float[Tensor, "feature d_write"]) -> Float[Tensor, "token d_write"]:
        return kernels.decode(self.values, self.support, W_dec)

    def __repr__(self) -> str:
        return f"SparseCodes({_sizes(self)})"

    def dense(self) -> Float[Tensor, "token feature"]:
        blank = self.values.new_zeros(self.n_tokens, self.n_features)
        return blank.index_put(
            (self.tokens, self.indices), self.values, accumulate=True
        )  # a slot of 0 may stand anywhere

    def counts(self) -> Int[Tensor, "token"]:
        """Active features of each token."""
        blank = torch.zeros(self.n_tokens, dtype=torch.int64, device=self.values.device)
        return blank.index_add_(0, self.tokens, (self.values != 0).long())

    def firings(self) -> Int[Tensor, "feature"]:
        """Tokens that each feature is active on."""
        blank = torch.zeros(self.n_features, dtype=torch.int64, device=self.values.device)
        return blank.index_add_(0, self.indices, (self.values != 0).long())

    def weighted(self, weights: Float[Tensor, "feature"] | None) -> Float[Tensor, "slot"]:
        """Values times a weight a feature (null: 1), in any order and with zeros left out."""
        return self.values if weights is None else self.values * weights.index_select(0, self.indices)

    def entries(self) -> tuple[Int[Tensor, "slot"], Int[Tensor, "slot"], Float[Tensor, "slot"]]:
        """Tokens, features and values of the active entries, token by token."""
        active = self.values != 0
        return self.tokens[active], self.indices[active], self.values[active]


@dataclass(frozen=True)
class DenseCodes:
    values: Float[Tensor, "token feature"]

    @property
    def n_tokens(self) -> int:
        return self.values.shape[0]

    @property
    def n_features(self) -> int:
        return self.values.shape[1]

    def decode(self, W_dec: Float[Tensor, "feature d_write"]) -> Float[Tensor, "token d_write"]:
        return self.values.to(W_dec.dtype) @ W_dec

    def __repr__(self) -> str:
        return f"DenseCodes({_sizes(self)})"

    def dense(self) -> Float[Tensor, "token feature"]:
        return self.values

    def counts(self) -> Int[Tensor, "token"]:
        """Active features of each token."""
        return (self.values != 0).sum(-1)

    def firings(self) -> Int[Tensor, "feature"]:
        """Tokens that each feature is active on."""
        return (self.values != 0).sum(0)

    def weighted(self, weights: Float[Tensor, "feature"] | None) -> Float[Tensor, "token feature"]:
        """Values times a weight a feature (null: 1)."""
        return self.values if weights is None else self.values * weights

    def entries(self) -> tuple[Int[Tensor, "slot"], Int[Tensor, "slot"], Float[Tensor, "slot"]]:
        """Tokens, features and values of the active entries, token by token."""
        tokens, indices = (self.values != 0).nonzero(as_tuple=True)
        return tokens, indices, self.values[tokens, indices]


GroupCodes = SparseCodes | DenseCodes


def like(codes: GroupCodes, made: Callable[[Tensor, Tensor | None], Tensor]) -> GroupCodes:
    """Of values and, where they are not all there are, the features that they belong to."""
    match codes:
        case SparseCodes():
            return replace(codes, values=made(codes.values, codes.indices))
        case DenseCodes():
            return DenseCodes(made(codes.values, None))


def _sizes(codes: GroupCodes) -> str:
    """How many tokens and features, and how many of these are active on a token."""
    return f"{codes.n_tokens} tokens, {codes.n_features} features, {_mean(codes.counts())} active a token"


def _mean(counts: Int[Tensor, "..."]) -> str:
    return f"{counts.double().mean():.1f}" if counts.numel() else "none"


def _counts(codes: GroupCodes, sizes: Sequence[int]) -> Int[Tensor, "token part"]:
    """Active features of each token in each part."""
    tokens, features, _ = codes.entries()
    ends = torch.tensor(sizes, device=features.device).cumsum(0)
    part = torch.searchsorted(ends, features, right=True)
    blank = torch.zeros(codes.n_tokens * len(sizes), dtype=torch.int64, device=features.device)
    ones = torch.ones_like(features)
    return blank.index_add_(0, tokens * len(sizes) + part, ones).view(codes.n_tokens, len(sizes))


@dataclass(frozen=True)
class Codes:
    """The codes of every group, in the order of the groups."""

    groups: tuple[GroupCodes, ...]
    # Sizes of the parts, adjacent features of one group, that are counted apart; null: each group as a whole.
    parts: tuple[tuple[int, ...], ...] | None = None

    def __repr__(self) -> str:
        """Sizes alone, such as `Codes(23 tokens, 4 groups of 512 features, 16.0 active a group)`."""
        sizes = dict.fromkeys(codes.n_features for codes in self.groups)
        return (
            f"Codes({self.n_tokens} tokens, {len(self)} {'group' if len(self) == 1 else 'groups'} "
            f"of {' or '.join(map(str, sizes))} features, {_mean(self.counts())} active a group)"
        )

    def __iter__(self) -> Iterator[GroupCodes]:
        return iter(self.groups)

    def __getitem__(self, group: int) -> GroupCodes:
        return self.groups[group]

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def n_tokens(self) -> int:
        return self.groups[0].n_tokens

    def counts(self) -> Int[Tensor, "token group"]:
        """Active features of each token and group, or part of one."""
        if self.parts is None:
            return torch.stack([codes.counts() for codes in self.groups], 1)
        return torch.cat([_counts(codes, sizes) for codes, sizes in zip(self.groups, self.parts, strict=True)], 1)

    def firings(self) -> tuple[Int[Tensor, "_"], ...]:
        """For each group, or part of one: tokens that each of its features is active on."""
        whole = [codes.firings() for codes in self.groups]
        if self.parts is None:
            return tuple(whole)
        return tuple(chain(*(each.split(sizes) for each, sizes in zip(whole, self.parts, strict=True))))

    def fired(self) -> Bool[Tensor, "all_features"]:
        """Features active on at least one token, groups side by side."""
        return torch.cat(self.firings()) > 0


# Of each group: c of each feature, by which codes are multiplied where features are compared; null: 1.
Scales = Sequence[Float[Tensor, "_"] | None]


@dataclass(frozen=True)
class Encoding:
    """What encoding a batch gave, for losses. Gradients flow through all but the scales."""

    codes: Codes
    scales: Scales  # as selection and thresholds saw them
    # Of each group: of all entries, or of those that have a code or teach anything; null where an activation function selects.
    pres: tuple[GroupCodes, ...] | None
    gates: tuple[GroupCodes, ...] | None = None  # gated: max(0, pi_gate) of each group
    agreement: float | None = None  # mean over groups; see `Selected`
