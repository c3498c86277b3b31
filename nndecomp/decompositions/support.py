"""Which (token, feature) pairs of a group are active."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Sort = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # of indices and n_features, as backends have it


@dataclass(frozen=True)
class Support:
    """Active (token, feature) pairs of one group, token by token: token t owns slots offsets[t] to offsets[t+1]."""

    indices: Int[Tensor, "slot"]
    offsets: Int[Tensor, "token_and_one"]
    n_features: int
    _sorted: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    @property
    def n_tokens(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def tokens(self) -> Int[Tensor, "slot"]:
        """The token of each slot."""
        ids = torch.arange(self.n_tokens, device=self.offsets.device)
        return torch.repeat_interleave(ids, self.offsets.diff(), output_size=len(self.indices))

    def by_feature(self, sort: Sort) -> tuple[Int[Tensor, "slot"], Int[Tensor, "feature_and_one"]]:
        """Slots sorted by feature, and where each feature's slots start: the same pairs in CSC order. Sorted once, by whoever asks
        first."""
        if not self._sorted:
            self._sorted.append(sort(self.indices, self.n_features))
        return self._sorted[0]

    @staticmethod
    def of(tokens: Int[Tensor, "slot"], indices: Int[Tensor, "slot"], n_tokens: int, n_features: int) -> "Support":
        """From pairs sorted by token."""
        bounds = torch.arange(n_tokens + 1, device=tokens.device)
        return Support(indices, torch.searchsorted(tokens, bounds), n_features)


@dataclass(frozen=True)
class Selected:
    """values[s] is the pre-activation z at slot s, without gradient."""

    support: Support
    values: Float[Tensor, "slot"]
    # Where entries were screened in low precision: of what full precision selects, the share that was found, on some tokens.
    agreement: float | None = None


def split_slots(
    indices: Int[Tensor, "slot"], widths: Sequence[int]
) -> list[tuple[Bool[Tensor, "slot"], Int[Tensor, "_"]]]:
    """For groups whose features stand side by side: which slots are a group's, and the features within it."""
    parts, start = [], 0
    for width in widths:
        own = (indices >= start) & (indices < start + width)
        parts.append((own, indices[own] - start))
        start += width
    return parts
