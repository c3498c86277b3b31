"""How many weights a decomposition has, and how wide it may be to have as many as another.

cross-layer transcoder of L layers    F d (L + L (L + 1) / 2) + biases
per-layer transcoder                  F d (L + L)             + biases
"""

from dataclasses import replace

import torch

from nndecomp.config.schema import Architecture, DecompositionConfig
from nndecomp.decompositions.architectures import dictionary_spec
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.targets.base import Shape


def n_parameters(cfg: DecompositionConfig, shape: Shape) -> int:
    """All that training moves, of the dictionary that these settings make for a target of this shape."""
    with torch.device("meta"):  # sizes alone
        dictionary = SparseDictionary(dictionary_spec(cfg, shape, ""))
    return sum(parameter.numel() for parameter in dictionary.parameters())


def n_features_for(cfg: DecompositionConfig, shape: Shape, budget: int) -> int:
    """Features a group with which the number of parameters comes closest to `budget`.

    It is a + b F for F features a group, whatever the wiring: two sizes tell a and b.
    """
    # Transforms come in sets, one of each rank as often as `ranks` says.
    step = sum(count for _, count in cfg.ranks) if cfg.architecture is Architecture.molt else 1
    smallest = -(-max([1, *cfg.ks]) // step) * step if cfg.selects else step
    at = [n_parameters(replace(cfg, n_features=smallest + i * step), shape) for i in (0, 1)]
    b = at[1] - at[0]
    assert b > 0, f"{cfg.architecture.value} does not grow with its features"
    found = smallest + step * round((budget - at[0]) / b)
    assert found >= smallest, (
        f"{budget} parameters are fewer than the {at[0]} of the smallest {cfg.architecture.value}, {smallest} features a group"
    )
    return found
