"""Dictionaries trained apart, side by side as one."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch

from nndecomp.config.schema import Scope
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.activation_selecting import BatchTopK
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.spec import DictionarySpec, GroupSpec
from nndecomp.errors import SettingError


@torch.no_grad()
def stack(dictionaries: Sequence[SparseDictionary], architecture: str) -> SparseDictionary:
    """One dictionary with the groups of all, in eval mode: what it computes is what they compute, side by side.

    Raises SettingError if two write the same site, or if they differ in target, activation function, skip or centring.
    """
    assert dictionaries, "nothing to stack"
    specs = [dictionary.spec for dictionary in dictionaries]
    _check(specs)
    groups = tuple(
        replace(group, name=name)
        for group, name in zip(chain(*(spec.groups for spec in specs)), _names(specs), strict=True)
    )
    stacked = SparseDictionary(
        replace(
            specs[0],
            architecture=architecture,
            widths={site: width for spec in specs for site, width in spec.widths.items()},
            groups=groups,
            activation=replace(specs[0].activation, k=tuple(chain(*(spec.activation.k for spec in specs)))),
        )
    ).to(dictionaries[0].b_dec)
    banks = chain(*(dictionary.banks for dictionary in dictionaries))
    for own, bank in zip(stacked.banks, banks, strict=True):
        own.load_state_dict(bank.state_dict())
    for dictionary in dictionaries:
        for site, span in dictionary.write_layout.spans.items():
            stacked.b_dec[stacked.write_layout.spans[site]] = dictionary.b_dec[span]
    match stacked.activation:
        case BatchTopK():
            parts = [d.activation.threshold for d in dictionaries if isinstance(d.activation, BatchTopK)]
            stacked.activation.threshold = torch.cat(parts)
        case JumpRelu():
            thetas = chain(*(d.activation.threshold for d in dictionaries if isinstance(d.activation, JumpRelu)))
            for own, theta in zip(stacked.activation.threshold, thetas, strict=True):
                own.copy_(theta)
        case _:
            pass
    return stacked.eval()


def _check(specs: Sequence[DictionarySpec]) -> None:
    writes = [site for spec in specs for site in spec.write_layout.sites]
    twice = sorted({str(site) for site in writes if writes.count(site) > 1})
    if twice:
        raise SettingError(f"dictionaries that both write {', '.join(twice)} cannot be stacked: outputs would add up")
    shared = {
        "target": {spec.target for spec in specs},
        "activation": {(spec.activation.kind.value, spec.activation.scope.value) for spec in specs},
        "skip": {spec.skip for spec in specs},
        "centre_input": {spec.centre_input for spec in specs},
    }
    for name, values in shared.items():
        if len(values) > 1:
            raise SettingError(f"dictionaries that differ in {name} cannot be stacked: {', '.join(map(str, values))}")
    if len(specs) > 1 and specs[0].activation.scope is Scope.all:
        raise SettingError("dictionaries with scope=all cannot be stacked: their features would compete across them")


def _names(specs: Sequence[DictionarySpec]) -> list[str]:
    """The groups' own names, or their sites where two parts use the same name."""
    groups: list[GroupSpec] = [group for spec in specs for group in spec.groups]
    names = [group.name for group in groups]
    unique = len(set(names)) == len(names)
    return names if unique else ["+".join(map(str, group.reads)) for group in groups]
