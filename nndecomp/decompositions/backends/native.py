"""The hot path in C++ (cpp/), for float32 on the CPU.

    encoder   in blocks of features, into one buffer that is used again; entries are selected while a block is in the cache,
              so that no [token, feature] matrix is written or read
    sums      over active entries alone, rows of columns' spans in place, without copies

Compiled on first use for the machine at hand (a C++ compiler with OpenMP, two seconds) and kept in the user's cache directory. Where it
cannot be, that is said once and PyTorch's own operations take its place.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nndecomp.decompositions.backends.candidates import Operands, candidates, quantised
from nndecomp.decompositions.backends.compiled import LONG, library, pointer, threads
from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.backends.pure import pre_and_score
from nndecomp.decompositions.support import Selected, Support, split_slots

# Thresholds are guessed at this share below the last batch's.
_CAUTION = 0.15
# Screening is checked on this many tokens of every batch. A key that exceeds the smallest one by less than rounding is no miss.
_CHECKED, _ROUNDING = 8, 1e-5


class Native:
    """Where the threshold of a batch was is remembered for the next one. It saves work and changes nothing: a guess that turns out too
    high is given up, and all is computed again in the same blocks.

    screens: products of the encoder in 8 bits first; see `candidates`. Some tokens of every batch are looked through in float32. If
    anything was missed there, the whole batch is done in float32, so that what is computed depends on the batch alone.
    """

    def __init__(self, screens: bool = False) -> None:
        self.name = "native_int8" if screens else "native"
        self.screens = screens
        # By encoder: the smallest key that the last batch kept.
        self._last: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def topk(self, of: Affine, k: int) -> Selected:
        assert 0 < k <= len(of.W), f"k={k} of {len(of.W)} features"
        of = _contiguous(of)
        operands = quantised(of) if self.screens else None
        if operands is None:
            return self._topk(of, k, None)
        found = self._topk(of, k, operands)
        agreement = _agreement(of, found, _keys(of, found).view(-1, k).amin(1, keepdim=True))
        return replace(self._topk(of, k, None) if agreement < 1 else found, agreement=agreement)

    def _topk(self, of: Affine, k: int, operands: Operands | None) -> Selected:
        with candidates(len(of.x), k) as found:
            if operands is None:
                found.add(of)
            else:
                found.screen(of, operands)
            return found.selected(len(of.W))

    def batchtopk(self, of: Sequence[Affine], n_slots: int) -> list[Selected]:
        banks = list(map(_contiguous, of))
        n_slots = min(n_slots, len(of[0].x) * sum(len(each.W) for each in of))
        operands = [quantised(each) for each in banks] if self.screens else []
        complete = [each for each in operands if each is not None]
        if not self.screens or len(complete) < len(banks):
            return self._batchtopk(banks, n_slots, None)
        found = self._batchtopk(banks, n_slots, complete)
        together = torch.cat([_keys(each, own) for each, own in zip(banks, found, strict=True)])
        smallest = together.amin().reshape(1, 1) if len(together) == n_slots else torch.zeros(1, 1)
        agreement = min(_agreement(each, own, smallest) for each, own in zip(banks, found, strict=True))
        found = self._batchtopk(banks, n_slots, None) if agreement < 1 else found
        return [replace(own, agreement=agreement) for own in found]

    def _batchtopk(self, of: Sequence[Affine], n_slots: int, operands: Sequence[Operands] | None) -> list[Selected]:
        n_tokens, widths = len(of[0].x), [len(each.W) for each in of]
        last = self._last.get(of[0].W)
        guess = max(0.0, _sampled(of, n_slots) if last is None else (1 - _CAUTION) * last)
        while True:
            with candidates(n_tokens, 0, guess) as found:
                for i, (each, base) in enumerate(zip(of, accumulate(widths, initial=0), strict=False)):
                    if operands is None:
                        found.add(each, base=base)
                    else:
                        with candidates(n_tokens, 0, guess) as part:
                            part.screen(each, operands[i], guess)
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
        operands = quantised(of) if self.screens else None
        if operands is None:
            return self._above(of, threshold, None)
        found = self._above(of, threshold, operands)
        agreement = _agreement(of, found, threshold[None])
        return replace(self._above(of, threshold, None) if agreement < 1 else found, agreement=agreement)

    def _above(self, of: Affine, threshold: Float[Tensor, "feature"], operands: Operands | None) -> Selected:
        with candidates(len(of.x)) as found:
            if operands is None:
                found.add(of, threshold)
            else:
                found.screen(of, operands, threshold=threshold)
            return found.selected(len(of.W))

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


BACKEND, SCREENING = Native(), Native(screens=True)


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
