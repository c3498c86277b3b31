"""Activation functions that keep the largest entries."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import Scope
from nndecomp.decompositions import backends
from nndecomp.decompositions.activation_base import Ranking
from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.codes import Codes, Scales
from nndecomp.decompositions.selection import Above, BatchBest, Competition, TokenBest, split
from nndecomp.decompositions.support import Selected


class TopK(Ranking):
    """The k largest of each token and group, clipped at 0 (Gao et al. 2024, arXiv 2406.04093, eq. 5).

    With scope `all` the groups of a token share the sum of their k.
    """

    def __init__(self, k: Sequence[int], scope: Scope) -> None:
        super().__init__()
        self.k, self.scope = list(k), scope

    @property
    def together(self) -> bool:
        return self.scope is Scope.all

    def select(self, of: Sequence[Affine], groups: Sequence[int]) -> list[Selected] | None:
        if self.signed:
            return None
        if self.together:
            return self._best_of_all(of, groups)
        return [backends.of(each.W).topk(each, self.k[group]) for each, group in zip(of, groups, strict=True)]

    def _best_of_all(self, of: Sequence[Affine], groups: Sequence[int]) -> list[Selected]:
        """Of the best of every group."""
        k, n_tokens, widths = sum(self.k[group] for group in groups), len(of[0].x), [len(each.W) for each in of]
        best = TokenBest(sum(widths), k)
        found = [backends.of(each.W).topk(each, min(k, width)) for each, width in zip(of, widths, strict=True)]
        for each, own, base in zip(of, found, accumulate(widths, initial=0), strict=False):
            features, values = own.support.indices.view(n_tokens, -1), own.values.view(n_tokens, -1)
            best.offer(features + base, values if each.c is None else values * each.c[features], (values,))
        parts = zip(split(best.found(), widths), found, strict=True)
        return [Selected(part.support, part.values[0], own.agreement) for part, own in parts]

    def competition(self, n_tokens: int, n_features: int, groups: Sequence[int]) -> Competition:
        return TokenBest(n_features, sum(self.k[group] for group in groups), signed=self.signed)

    def live_obstacle(self) -> str | None:
        shared = self.scope is Scope.all and len(self.k) > 1
        return (
            "features of all groups compete for the same k, so none is known before the last is read"
            if shared
            else None
        )


class AbsTopK(TopK):
    """The k of each token and group that are largest in absolute value, with their signs."""

    signed = True


class BatchTopK(Ranking):
    """The k * tokens largest of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    In training each group keeps its k * tokens largest positive entries; with scope `all` the groups share the sum.
    In evaluation an entry is active if it exceeds a threshold, one a group (or one for all), so that tokens do not
    depend on their batch: the moving average over training steps of the smallest positive value kept. The average
    starts at its first value, so it needs no bias correction. Values and thresholds are in units of z c.
    """

    def __init__(self, k: Sequence[int], scope: Scope, threshold_rate: float) -> None:
        super().__init__()
        self.k, self.scope, self.threshold_rate = list(k), scope, threshold_rate
        n_thresholds = len(self.k) if scope is Scope.group else 1
        self.threshold: Tensor
        self.register_buffer("threshold", torch.full((n_thresholds,), torch.nan))

    @property
    def together(self) -> bool:
        return self.training and self.scope is Scope.all

    def select(self, of: Sequence[Affine], groups: Sequence[int]) -> list[Selected] | None:
        n_tokens, backend = len(of[0].x), backends.of(of[0].W)
        if not self.training:
            each = zip(of, self._thresholds(groups), strict=True)
            return [backend.above(one, threshold.expand(len(one.W))) for one, threshold in each]
        if self.together:
            return backend.batchtopk(of, self._n_slots(n_tokens, groups))
        each = zip(of, groups, strict=True)
        return [backend.batchtopk([one], self._n_slots(n_tokens, [group]))[0] for one, group in each]

    def competition(self, n_tokens: int, n_features: int, groups: Sequence[int]) -> Competition:
        if self.training:
            return BatchBest(n_tokens, n_features, self._n_slots(n_tokens, groups))
        (threshold,) = self._thresholds(groups)
        return Above(n_tokens, threshold.expand(n_features))

    def _n_slots(self, n_tokens: int, groups: Sequence[int]) -> int:
        return sum(self.k[group] for group in groups) * n_tokens

    def _thresholds(self, groups: Sequence[int]) -> list[Float[Tensor, ""]]:
        if bool(self.threshold.isnan().any()):
            raise ValueError(
                "batchtopk has no inference threshold yet: it is learned in training steps (after_step), "
                "and evaluating without one would silently be another activation function"
            )
        threshold = self.threshold.expand(len(self.k))
        return [threshold[group] for group in groups]

    @torch.no_grad()
    def after_step(self, codes: Codes, scales: Scales) -> None:
        values = [group.weighted(c).flatten() for group, c in zip(codes, scales, strict=True)]
        competing = values if self.scope is Scope.group else [torch.cat(values)]
        smallest = torch.stack([_smallest_positive(v) for v in competing]).to(self.threshold)
        moved = self.threshold.lerp(smallest, self.threshold_rate)
        moved = torch.where(self.threshold.isnan(), smallest, moved)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))


def _smallest_positive(values: Float[Tensor, "slot"]) -> Float[Tensor, ""]:
    """Infinite if there is none."""
    positive = torch.where(values > 0, values, torch.inf)
    return torch.cat([positive, positive.new_full((1,), torch.inf)]).amin()
