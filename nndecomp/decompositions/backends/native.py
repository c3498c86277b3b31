"""The hot path in C++ (cpp/), for float32 on the CPU.

    encoder   x and W are packed, and multiplied a tile at a time in registers; entries are selected while a tile is in the cache,
              so that no [token, feature] matrix is written or read. Where the processor has products in 8 bits, by these first
              (`candidates`): in float32 is computed what may be selected
    sums      over active entries alone, rows of columns' spans in place, without copies

Compiled on first use for the machine at hand (a C++ compiler with OpenMP, five seconds) and kept in the user's cache directory. Where it
cannot be, that is said once and PyTorch's own operations take its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nndecomp.decompositions.backends.candidates import Bound, Operands, candidates, quantised
from nndecomp.decompositions.backends.compiled import LONG, library, pointer, threads
from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.backends.pure import pre_and_score
from nndecomp.decompositions.support import Selected, Support, split_slots

# Thresholds are guessed at this share below the last batch's.
_CAUTION = 0.15
# The share of all entries up to which those asked for are found sooner by 8 bits.
_FEW = {Bound.certain: 0.012, Bound.likely: 0.03}
# Screening is checked on this many tokens of every batch. A key that exceeds the smallest one by less than rounding is no miss.
_CHECKED, _ROUNDING = 8, 1e-5


class Native:
    """Where the threshold of a batch was is remembered for the next one. It saves work and changes nothing: a guess that turns out too
    high is given up, and all is computed again in the same blocks.

    bound: products of the encoder go in 8 bits first; null: in float32. By a certain bound no more is selected, and no less, than by
    float32. By a likely one some tokens of every batch are looked through in float32, and if anything was missed there, the whole
    batch is done in float32, as it is where 8 bits leave too much to compute once more. What is computed depends on the batch alone.
    """

    def __init__(self, bound: Bound | None) -> None:
        self.name = "native_int8" if bound is Bound.likely else "native"
        self.bound = bound
        # By encoder: the smallest key that the last batch kept.
        self._last: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def topk(self, of: Affine, k: int) -> Selected:
        assert 0 < k <= len(of.W), f"k={k} of {len(of.W)} features"
        of = _contiguous(of)

        def plain() -> list[Selected]:
            with candidates(len(of.x), k) as found:
                found.add(of)
                return [found.selected(len(of.W))]

        if (operands := self._operands([of], k * len(of.x))) is None:
            return self._unscreened(plain())[0]
        with candidates(len(of.x), k) as found:
            if not found.screen(of, operands[0]):
                return self._unscreened(plain())[0]
            found.rescore(of)
            selected = found.selected(len(of.W))
        return self._checked([of], [selected], _keys(of, selected).view(-1, k).amin(1, keepdim=True), plain)[0]

    def batchtopk(self, of: Sequence[Affine], n_slots: int) -> list[Selected]:
        banks = list(map(_contiguous, of))
        n_slots = min(n_slots, len(of[0].x) * sum(len(each.W) for each in of))

        def plain() -> list[Selected]:
            found = self._batchtopk(banks, n_slots, None)
            assert found is not None, "without screening nothing is too much"
            return found

        operands = self._operands(banks, n_slots)
        found = None if operands is None else self._batchtopk(banks, n_slots, operands)
        if found is None:
            return self._unscreened(plain())
        together = torch.cat([_keys(each, own) for each, own in zip(banks, found, strict=True)])
        smallest = together.amin().reshape(1, 1) if len(together) == n_slots else torch.zeros(1, 1)
        return self._checked(banks, found, smallest, plain)

    def _batchtopk(
        self, of: Sequence[Affine], n_slots: int, operands: Sequence[Operands] | None
    ) -> list[Selected] | None:
        """Null: screening leaves too much."""
        n_tokens, widths = len(of[0].x), [len(each.W) for each in of]
        last = self._last.get(of[0].W)
        guess = max(0.0, _sampled(of, n_slots) if last is None else (1 - _CAUTION) * last)
        while True:
            with candidates(n_tokens, 0, guess) as found:
                for i, (each, base) in enumerate(zip(of, accumulate(widths, initial=0), strict=False)):
                    if operands is None:
                        found.add(each, base=base)
                        continue
                    with candidates(n_tokens, 0, guess) as part:
                        if not part.screen(each, operands[i]):
                            return None
                        part.rescore_together(each, n_slots, guess)
                        found.append(part, base)
                if len(found) < n_slots and guess > 0:
                    guess = guess / 2 if guess > 1e-6 else 0.0
                    continue
                self._last[of[0].W] = found.keep(n_slots)
                together = found.selected(sum(widths))
                break
        if len(of) == 1:
            return [together]
        parts = zip(split_slots(together.support.indices, widths), widths, strict=True)
        return [
            Selected(Support.of(together.support.tokens[own], indices, n_tokens, width), together.values[own])
            for (own, indices), width in parts
        ]

    def above(self, of: Affine, threshold: Float[Tensor, "feature"]) -> Selected:
        of, threshold = _contiguous(of), threshold.contiguous()

        def plain() -> list[Selected]:
            with candidates(len(of.x)) as found:
                found.add(of, threshold)
                return [found.selected(len(of.W))]

        if (operands := self._operands([of], 0)) is None:
            return self._unscreened(plain())[0]
        with candidates(len(of.x)) as found:
            if not found.screen(of, operands[0], threshold):
                return self._unscreened(plain())[0]
            found.rescore_above(of, threshold)
            selected = found.selected(len(of.W))
        return self._checked([of], [selected], threshold[None], plain)[0]

    def _operands(self, of: Sequence[Affine], n_slots: int) -> list[Operands] | None:
        """In 8 bits; null where they are not wanted, or are of no use to find so many."""
        if self.bound is None or n_slots > _FEW[self.bound] * len(of[0].x) * sum(len(each.W) for each in of):
            return None
        found = [quantised(each, self.bound) for each in of]
        complete = [each for each in found if each is not None]
        return complete if len(complete) == len(found) else None

    def _checked(
        self,
        of: Sequence[Affine],
        found: list[Selected],
        smallest: Float[Tensor, "token_or_one feature_or_one"],
        plain: Callable[[], list[Selected]],
    ) -> list[Selected]:
        """What was found, or, if the bound is only likely and float32 finds more on some tokens, what float32 finds."""
        if self.bound is not Bound.likely:
            return found
        agreement = min(_agreement(each, own, smallest) for each, own in zip(of, found, strict=True))
        return [replace(own, agreement=agreement) for own in (found if agreement == 1 else plain())]

    def _unscreened(self, found: list[Selected]) -> list[Selected]:
        return [replace(own, agreement=1.0) for own in found] if self.bound is Bound.likely else found

    def by_feature(
        self, indices: Int[Tensor, "slot"], n_features: int
    ) -> tuple[Int[Tensor, "slot"], Int[Tensor, "feature_and_one"]]:
        indices = indices.contiguous()
        order, bounds = torch.empty_like(indices), torch.empty(n_features + 1, dtype=torch.int64)
        library().by_feature(pointer(indices), LONG(len(indices)), LONG(n_features), pointer(order), pointer(bounds))
        return order, bounds

    def add_bags(
        self,
        out: Float[Tensor, "token d"],
        support: Support,
        weights: Float[Tensor, "slot"],
        table: Float[Tensor, "feature d"],
    ) -> None:
        table, weights = _rows(table), weights.contiguous()
        assert out.stride(1) == 1, f"rows of numbers side by side, not of stride {out.stride()}"
        library().bag(
            *(pointer(table), LONG(table.stride(0)), pointer(support.indices), pointer(support.offsets)),
            *(pointer(weights), LONG(len(out)), LONG(out.shape[1]), pointer(out), LONG(out.stride(0))),
            threads(),
        )

    def dots(
        self, rows: Float[Tensor, "token d"], table: Float[Tensor, "feature d"], support: Support
    ) -> Float[Tensor, "slot"]:
        rows, table = _rows(rows), _rows(table)
        out = torch.empty(len(support.indices))
        library().dots(
            *(pointer(rows), LONG(rows.stride(0)), pointer(table), LONG(table.stride(0))),
            *(pointer(support.indices), pointer(support.offsets), LONG(len(rows)), LONG(rows.shape[1])),
            *(pointer(out), threads()),
        )
        return out

    def project_out(self, grad: Float[Tensor, "feature d"], W: Float[Tensor, "feature d"]) -> None:
        assert grad.is_contiguous() and W.is_contiguous(), (
            f"rows side by side, not of strides {grad.stride()}, {W.stride()}"
        )
        library().project_out(pointer(grad), pointer(W), *map(LONG, W.shape), threads())

    def normalise(self, W: Float[Tensor, "feature d"]) -> None:
        assert W.is_contiguous(), f"rows side by side, not of strides {W.stride()}"
        library().normalise(pointer(W), *map(LONG, W.shape), threads())

    def feature_sums(
        self, support: Support, rows: Float[Tensor, "token d"], weights: Float[Tensor, "slot"]
    ) -> Float[Tensor, "feature d"]:
        rows, weights = _rows(rows), weights.contiguous()
        order, bounds = support.by_feature(self.by_feature)
        out = torch.empty(support.n_features, rows.shape[1])
        library().feature_sums(
            *(pointer(rows), LONG(rows.stride(0)), pointer(support.tokens), pointer(order), pointer(bounds)),
            *(pointer(weights), LONG(support.n_features), LONG(rows.shape[1]), pointer(out), threads()),
        )
        return out


PLAIN, CERTAIN, LIKELY = Native(None), Native(Bound.certain), Native(Bound.likely)


def exact() -> Native:
    """What selects as float32 does, as fast as this processor can."""
    return CERTAIN if library().screening_pays() else PLAIN


def _rows(table: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """A span of columns as it is; what is laid out otherwise copied."""
    return table if table.stride(1) == 1 else table.contiguous()


def _keys(of: Affine, found: Selected) -> Float[Tensor, "slot"]:
    """z c of what was selected."""
    return found.values if of.c is None else found.values * of.c[found.support.indices]


def _agreement(of: Affine, found: Selected, smallest: Float[Tensor, "token_or_one feature_or_one"]) -> float:
    """Of what float32 selects on some tokens, the share that was found. `smallest`: what keys of each token or feature must exceed."""
    n_tokens = len(of.x)
    rows = torch.arange(0, n_tokens, max(1, n_tokens // _CHECKED))
    _, keys = pre_and_score(replace(of, x=of.x[rows]))
    smallest = smallest[rows] if len(smallest) == n_tokens else smallest
    due = keys > smallest + _ROUNDING * smallest.abs()
    for i, row in enumerate(rows.tolist()):
        due[i, found.support.indices[found.support.offsets[row] : found.support.offsets[row + 1]]] = False
    n_missed = int(due.sum())
    n_found = int(found.support.offsets.diff()[rows].sum())
    return n_found / (n_found + n_missed) if n_missed else 1.0


def _sampled(of: Sequence[Affine], n_slots: int) -> float:
    """About the smallest of the n_slots largest keys, from some of the tokens."""
    n_tokens = len(of[0].x)
    every = max(1, n_tokens // 64)
    keys = [torch.addmm(each.b, each.x[::every], each.W.T) for each in of]
    keys = [key if each.c is None else key * each.c for key, each in zip(keys, of, strict=True)]
    sample = torch.cat([key.flatten() for key in keys])
    rank = min(len(sample), int(1.2 * n_slots * len(keys[0]) / n_tokens) + 16)
    return float(sample.topk(rank, sorted=False).values.amin())


def _contiguous(of: Affine) -> Affine:
    return Affine(of.x.contiguous(), of.W.contiguous(), of.b.contiguous(), None if of.c is None else of.c.contiguous())
