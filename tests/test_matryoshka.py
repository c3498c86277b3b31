"""Prefixes of a dictionary reconstruct on their own, from one choice of active features."""

from typing import Any

import pytest
import torch
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, F, config, inputs, objective, planted, settled, train

from nndecomp.config.schema import Activation, Architecture, Reconstruction
from nndecomp.decompositions import losses
from nndecomp.decompositions.matryoshka import block_sizes, decode_blocks, prefix_reconstructions
from nndecomp.errors import SettingError

SHARES = [0.1, 0.3, 0.6]
ONE: dict[str, Any] = {"architecture": Architecture.transcoder, "layers": [1]}


@pytest.mark.parametrize(
    ("n", "shares", "sizes"),
    [
        (24, SHARES, [2, 7, 15]),  # 2.4 and 7.2, rounded down; the rest
        (100, [0.29, 0.71], [29, 71]),  # 0.29 * 100 is 28.999... in floats
        (10, [1.0], [10]),
    ],
)
def test_blocks_have_their_share_and_the_last_one_the_rest(n: int, shares: list[float], sizes: list[int]):
    assert block_sizes(n, shares) == sizes


# Transforms have no decoder rows to take a prefix of: their settings refuse matryoshka (test_molt).
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if "ranks" not in ARCHITECTURES[name]])
def test_each_prefix_is_the_dictionary_without_the_features_after_it(architecture: str, activation: str):
    made = settled(**ARCHITECTURES[architecture], **ACTIVATIONS[activation])
    x = inputs(made)
    codes = made.encode(x)
    fast = prefix_reconstructions(made, codes, x, SHARES)
    ends = [2, 9, 24]
    for prefix, end in zip(fast, ends, strict=True):
        slow = made.b_dec.repeat(len(x), 1)
        for bank, group in zip(made.banks, codes, strict=True):
            kept = group.dense().clone()
            kept[:, end:] = 0
            slow[:, bank.writes] += kept @ bank.W_dec
            if bank.W_skip is not None:
                slow[:, bank.writes] += x[:, bank.reads] @ bank.W_skip
        torch.testing.assert_close(prefix, slow)
    torch.testing.assert_close(fast[-1], made(x)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_prefixes_are_those_of_the_slow_sum(activation: str):
    grads = []
    for slow in (False, True):
        made = settled(**ONE, **ACTIVATIONS[activation])
        x = inputs(made)
        (codes,), (bank,) = made.encode(x), made.banks
        if slow:
            parts = [codes.dense()[:, a:b] @ bank.W_dec[a:b] for a, b in ((0, 2), (2, 9), (9, 24))]
        else:
            parts = decode_blocks(codes, bank.W_dec, [2, 7, 15])
        sum((i + 1) * part.square().sum() for i, part in enumerate(parts)).backward()
        grads.append([bank.W_enc.grad, bank.b_enc.grad, bank.W_dec.grad])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("weights", "each"), [(None, [1 / 3] * 3), ([1.0, 0.5, 2.0], [1.0, 0.5, 2.0])])
def test_the_loss_is_the_weighted_sum_over_prefixes(weights: list[float] | None, each: list[float]):
    """By default their mean. dictionary_learning takes the mean of terms that it has divided by their number already:
    reconstruction then counts a third of what it should beside aux-k."""
    made = objective(**ONE, matryoshka=SHARES, matryoshka_weights=weights, reconstruction=Reconstruction.sum_of_squares)
    rows = planted(made.layout, 60)
    _, metrics = made.loss(rows, 0.5)
    x, y = (rows[:, span] for span in made.layout.spans.values())
    prefixes = prefix_reconstructions(made.dictionary, made._step.encoding.codes, x, SHARES)
    slow = sum(w * float((y - p.detach()).square().sum(1).mean()) for w, p in zip(each, prefixes, strict=True))
    assert float(metrics["loss/reconstruction"]) == pytest.approx(slow, rel=1e-5)
    last = losses.fvu(y - prefixes[-1].detach(), y, made.dictionary.write_layout)
    assert float(metrics["fvu"]) == pytest.approx(float(last), rel=1e-5), "fvu is that of the whole dictionary"


def test_one_block_is_no_matryoshka():
    plain, one = objective(**ONE), objective(**ONE, matryoshka=[1.0])
    rows = planted(plain.layout, 60)
    torch.testing.assert_close(plain.loss(rows, 0.5)[0], one.loss(rows, 0.5)[0])


def test_early_features_learn_to_stand_alone():
    """At the same number of active features, the first quarter explains more than that of a plain dictionary."""
    left = {}
    for shares in (None, [0.25, 0.75]):
        made = objective(
            **ARCHITECTURES["sae"], activation=Activation.batchtopk, k=3, matryoshka=shares, dead_after_tokens=5000
        )
        train(made, 150, lr=3e-3)
        rows = planted(made.layout, 500, seed=77)
        made.eval()
        codes = made.dictionary.encode(rows)
        first, _ = prefix_reconstructions(made.dictionary, codes, rows, [0.25, 0.75])
        left[shares is None] = float(losses.fvu(rows - first.detach(), rows, made.dictionary.write_layout))
    assert left[False] < 0.85 * left[True]


def test_an_empty_block_is_refused():
    with pytest.raises(SettingError, match="leaves a block of 24 features empty"):
        config(matryoshka=[0.01, 0.99], n_features=F)
