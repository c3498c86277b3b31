"""Worlds whose features one can count, and dictionaries that are right by construction."""

from collections.abc import Sequence
from typing import Any

import torch

from nndecomp.activations.synthetic import World
from nndecomp.activations.truth import Truth
from nndecomp.config.schema import (
    Activation,
    Frequencies,
    Plan,
    PlantedConfig,
    SyntheticConfig,
    SyntheticShapeConfig,
)
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.spec import ActivationSpec, DictionarySpec, GroupSpec
from nndecomp.targets.base import Shape
from nndecomp.targets.pair import PairedShape
from nndecomp.targets.synthetic import shape_of
from nndecomp.types import Site

CPU = torch.device("cpu")
IN, OUT = Site.parse("L0.mlp_in"), Site.parse("L0.mlp_out")


def settings(**changes: Any) -> SyntheticConfig:
    return SyntheticConfig(**({"seed": 0, "n_features": 20, "l0": 2.0} | changes))


def shape(d_model: int = 32, n_layers: int = 3) -> Shape:
    return shape_of(SyntheticShapeConfig(n_layers=n_layers, d_model=d_model, d_mlp=2 * d_model))


def pair(d_a: int = 32, d_b: int = 24) -> PairedShape:
    sizes = [SyntheticShapeConfig(n_layers=2, d_model=d, d_mlp=8) for d in (d_a, d_b)]
    return PairedShape(shape_of(sizes[0]), shape_of(sizes[1]))


def world(sites: Sequence[Site] = (OUT,), **changes: Any) -> World:
    return World(settings(**changes), shape(), sites)


def planted_settings(**changes: Any) -> PlantedConfig:
    return PlantedConfig(
        **(
            {"seed": 0, "plan": Plan.key_value, "n_layers": 2, "d_model": 64, "n_rules": 16, "d_mlp": 16}
            | {"n_vocab": 256, "keys_per_token": 3.0}
            | changes
        )
    )


def exact(
    truth: Truth, groups: Sequence[tuple[str, Sequence[Site], Sequence[Site], Sequence[int]]]
) -> SparseDictionary:
    """A ReLU dictionary made of true features: (name, reads, writes, features) a group.

    Encoders are the rows of the pseudo-inverse, so orthogonal features are read exactly.
    """
    widths = dict(zip(truth.layout.sites, truth.layout.widths, strict=True))
    specs = tuple(GroupSpec(name, tuple(reads), tuple(writes), len(own)) for name, reads, writes, own in groups)
    dictionary = SparseDictionary(DictionarySpec("sae", "known", widths, specs, ActivationSpec(kind=Activation.relu)))
    with torch.no_grad():
        for bank, (_, reads, writes, own) in zip(dictionary.banks, groups, strict=True):
            directions = torch.cat([truth.directions[site] for site in reads], 1)
            bank.W_enc.copy_(torch.linalg.pinv(directions).T[list(own)])
            bank.b_enc.fill_(-1e-4)
            bank.W_dec.copy_(torch.cat([truth.directions[site] for site in writes], 1)[list(own)])
    return dictionary.eval()


ZIPF = Frequencies.zipf
