"""Laws of how many weights a decomposition has."""

from dataclasses import replace
from typing import Any

import pytest
from decomposition_parts import (
    ACTIVATIONS,
    ARCHITECTURES,
    GRID,
    N_LAYERS,
    PURSUIT,
    SHAPE,
    D,
    F,
    config,
    dictionary,
    shape_of,
)

from nndecomp.config.schema import Architecture
from nndecomp.decompositions.sizes import n_features_for, n_parameters

L, BLOCKS = N_LAYERS, N_LAYERS * (N_LAYERS + 1) // 2


def test_parameters_are_counted_as_by_hand():
    transcoders, clt = config(), config(architecture=Architecture.cross_layer_transcoder)
    biases = F * L + D * L
    assert n_parameters(transcoders, SHAPE) == F * D * (L + L) + biases
    assert n_parameters(clt, SHAPE) == F * D * (L + BLOCKS) + biases
    assert n_parameters(replace(clt, skip=True), SHAPE) == n_parameters(clt, SHAPE) + BLOCKS * D * D


@pytest.mark.parametrize(("architecture", "activation"), GRID)
def test_parameters_are_those_of_the_dictionary_that_is_built(architecture: str, activation: str):
    settings: dict[str, Any] = ARCHITECTURES[architecture] | (ACTIVATIONS | PURSUIT)[activation]
    built = sum(parameter.numel() for parameter in dictionary(**settings).parameters())
    assert n_parameters(config(**settings), shape_of(settings)) == built


@pytest.mark.parametrize("architecture", ["cross_layer_transcoder", "skip_cross_layer_transcoder", "per_layer_sae"])
def test_matched_sizes_differ_by_less_than_half_a_feature_of_each_group(architecture: str):
    budget = n_parameters(config(n_features=400), SHAPE)
    cfg = config(**ARCHITECTURES[architecture])
    matched = replace(cfg, n_features=n_features_for(cfg, SHAPE, budget))
    one_more = n_parameters(replace(matched, n_features=matched.n_features + 1), SHAPE) - n_parameters(matched, SHAPE)
    assert abs(n_parameters(matched, SHAPE) - budget) <= one_more / 2


def test_a_cross_layer_transcoder_of_the_same_size_has_fewer_features():
    """2 L blocks against L + L (L + 1) / 2."""
    clt = config(architecture=Architecture.cross_layer_transcoder)
    budget = n_parameters(config(n_features=900), SHAPE)
    assert n_features_for(clt, SHAPE, budget) == pytest.approx(900 * 2 * L / (L + BLOCKS), rel=0.05)


def test_a_size_is_its_own_match():
    for settings in ARCHITECTURES.values():
        cfg = config(**settings)
        assert n_features_for(cfg, shape_of(settings), n_parameters(cfg, shape_of(settings))) == F


def test_a_budget_below_the_smallest_dictionary_is_refused():
    with pytest.raises(AssertionError, match="fewer than"):
        n_features_for(config(skip=True), SHAPE, 10)
