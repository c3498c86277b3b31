"""Activation functions that keep the largest entries."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import Scope
from nndecomp.decompositions import backends
from nndecomp.decompositions.activation_base import Ranking
from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.backends.pure import batchtopk_support, threshold_support, topk_support
from nndecomp.decompositions.codes import Codes, Scales
from nndecomp.decompositions.support import Selected, Support, split_support


class TopK(Ranking):
    """The k largest of each token and group, clipped at 0 (Gao et al. 2024, arXiv 2406.04093, eq. 5).

    With scope `all` the groups of a token share the sum of their k.
    """

    def __init__(self, k: Sequence[int], scope: Scope) -> None:
        super().__init__()
        self.k, self.scope = list(k), scope

    def select(self, of: Sequence[Affine], groups: Sequence[int]) -> list[Selected] | None:
        if self.signed or self.scope is Scope.all:
            return None
        return [backends.of(each.W).topk(each, self.k[group]) for each, group in zip(of, groups, strict=True)]

    def supports(self, scores: Sequence[Float[Tensor, "token _"]], groups: Sequence[int]) -> list[Support]:
        match self.scope:
            case Scope.group:
                return [self._best(each, self.k[group]) for each, group in zip(scores, groups, strict=True)]
            case Scope.all:
                assert len(groups) == len(self.k), f"groups {groups} compete with all {len(self.k)}"
                support = self._best(torch.cat(list(scores), 1), sum(self.k))
                return split_support(support, [each.shape[1] for each in scores])

    def _best(self, scores: Float[Tensor, "token feature"], k: int) -> Support:
        return topk_support(scores, k)

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

    def _best(self, scores: Float[Tensor, "token feature"], k: int) -> Support:
        return topk_support(scores.abs(), k)


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

    def select(self, of: Sequence[Affine], groups: Sequence[int]) -> list[Selected] | None:
        n_tokens, backend = len(of[0].x), backends.of(of[0].W)
        if not self.training:
            each = zip(of, self._thresholds(groups), strict=True)
            return [backend.above(one, threshold.expand(len(one.W))) for one, threshold in each]
        match self.scope:
            case Scope.group:
                each = zip(of, groups, strict=True)
                return [backend.batchtopk([one], self.k[group] * n_tokens)[0] for one, group in each]
            case Scope.all:
                assert len(groups) == len(self.k), f"groups {groups} compete with all {len(self.k)}"
                return backend.batchtopk(of, sum(self.k) * n_tokens)

    def supports(self, scores: Sequence[Float[Tensor, "token _"]], groups: Sequence[int]) -> list[Support]:
        if not self.training:
            return self._above_threshold(scores, groups)
        n_tokens = scores[0].shape[0]
        match self.scope:
            case Scope.group:
                return [
                    batchtopk_support(each, self.k[group] * n_tokens)
                    for each, group in zip(scores, groups, strict=True)
                ]
            case Scope.all:
                assert len(groups) == len(self.k), f"groups {groups} compete with all {len(self.k)}"
                support = batchtopk_support(torch.cat(list(scores), 1), sum(self.k) * n_tokens)
                return split_support(support, [each.shape[1] for each in scores])

    def _above_threshold(self, scores: Sequence[Tensor], groups: Sequence[int]) -> list[Support]:
        each = zip(scores, self._thresholds(groups), strict=True)
        return [threshold_support(score, threshold) for score, threshold in each]

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
