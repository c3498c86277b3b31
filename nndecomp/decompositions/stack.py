"""Dictionaries trained apart, side by side as one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from nndecomp.config.schema import Scope
from nndecomp.decompositions.activation_base import ActivationFunction
from nndecomp.decompositions.activation_selecting import BatchTopK
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.pursuit import MatchingPursuit
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
    stacked = SparseDictionary(
        replace(
            specs[0],
            architecture=architecture,
            widths={site: width for spec in specs for site, width in spec.widths.items()},
            groups=tuple(_groups(specs)),
            activation=replace(specs[0].activation, k=tuple(chain(*(spec.activation.k for spec in specs)))),
        )
    ).to(dictionaries[0].b_dec)
    banks = chain(*(dictionary.banks for dictionary in dictionaries))
    for own, bank in zip(stacked.banks, banks, strict=True):
        own.load_state_dict(bank.state_dict())
    for dictionary in dictionaries:
        for site, span in dictionary.write_layout.spans.items():
            stacked.b_dec[stacked.write_layout.spans[site]] = dictionary.b_dec[span]
    _take_over(stacked, dictionaries)
    return stacked.eval()


def _take_over(stacked: SparseDictionary, parts: Sequence[SparseDictionary]) -> None:
    """What activation functions have learned, which stands by group, or by column of what is written."""
    match stacked.activation:
        case BatchTopK() as own:
            own.threshold = torch.cat([p.activation.threshold for p in parts if isinstance(p.activation, BatchTopK)])
        case MatchingPursuit() as own:
            for part in parts:
                assert isinstance(part.activation, MatchingPursuit), "checked above: all have one activation function"
                for site, span in part.write_layout.spans.items():
                    own.units[stacked.write_layout.spans[site]] = part.activation.units[span]
        case own:
            learned = chain(*(_by_group(part.activation) for part in parts))
            for mine, theirs in zip(_by_group(own), learned, strict=True):
                for tensor, other in zip(mine, theirs, strict=True):
                    tensor.copy_(other)


def _by_group(activation: ActivationFunction) -> list[tuple[Tensor, ...]]:
    """The tensors of each group: thresholds of jumprelu, both vectors of gated."""
    lists = [module for module in activation.children() if isinstance(module, nn.ParameterList)]
    return list(zip(*lists, strict=True))


def _check(specs: Sequence[DictionarySpec]) -> None:
    writes = [site for spec in specs for site in spec.write_layout.sites]
    twice = sorted({str(site) for site in writes if writes.count(site) > 1})
    if twice:
        raise SettingError(f"dictionaries that both write {', '.join(twice)} cannot be stacked: outputs would add up")
    shared = {
        "target": {spec.target for spec in specs},
        "activation": {(spec.activation.kind.value, spec.activation.scope.value) for spec in specs},
        "skip": {spec.skip for spec in specs},
        "encoder": {spec.encoder.value for spec in specs},
        "code_normalisation": {
            (spec.activation.code_normalisation.value, spec.activation.mixed_weights) for spec in specs
        },
        "frozen_scales": {spec.frozen_scales for spec in specs},
        "jumprelu_log_threshold": {spec.activation.log_threshold for spec in specs},
        "centre_input": {spec.centre_input for spec in specs},
    }
    for name, values in shared.items():
        if len(values) > 1:
            raise SettingError(f"dictionaries that differ in {name} cannot be stacked: {', '.join(map(str, values))}")
    if len(specs) > 1 and specs[0].activation.scope is Scope.all:
        raise SettingError("dictionaries with scope=all cannot be stacked: their features would compete across them")


def _groups(specs: Sequence[DictionarySpec]) -> Iterator[GroupSpec]:
    """Of all, under their own names, or by their sites where two parts use the same name."""
    names = [group.name for spec in specs for group in spec.groups]
    unique = len(set(names)) == len(names)
    for spec in specs:
        renamed = {group.name: group.name if unique else _by_sites(group) for group in spec.groups}
        for group in spec.groups:
            encoder = None if group.encoder is None else renamed[group.encoder]
            yield replace(group, name=renamed[group.name], encoder=encoder)


def _by_sites(group: GroupSpec) -> str:
    """Groups that share an encoder differ in what they write."""
    return "+".join(map(str, group.reads if group.encoder is None else (*group.reads, *group.writes)))
