"""What a trained decomposition consists of: components and weights, of each part and in all."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from nndecomp.decompositions.attention import AttentionGroup
from nndecomp.decompositions.group import Group
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.importance import LayerwiseImportance


@dataclass(frozen=True)
class Part:
    """`parameters`: all that training moved; `gate_parameters`: those among them that decide what is active (encoders and
    thresholds, importance functions). None where they are not of one part alone."""

    n_components: int
    parameters: int | None
    gate_parameters: int | None


@dataclass(frozen=True)
class Parts:
    """`parts` by the names that their costs and rows have. The whole has more weights than they: biases that are added to
    what a site is written, thresholds, and whatever is common to all."""

    parts: dict[str, Part]
    whole: Part


def parts_of_dictionary(dictionary: SparseDictionary) -> Parts:
    banks = {bank.name: bank for bank in dictionary.banks}
    gates = {name: _gate(bank) for name, bank in banks.items()}
    parts = {
        # A bank that is counted in several parts has its weights in common.
        cost.name: Part(cost.n_components, _n(banks[cost.name].parameters()), gates[cost.name])
        if cost.name in banks
        else Part(cost.n_components, None, None)
        for cost in dictionary.costs
    }
    n_components = sum(part.n_components for part in parts.values())
    gate = sum(gates.values()) + _n(dictionary.activation.parameters())
    return Parts(parts, Part(n_components, _n(dictionary.parameters()), gate))


def parts_of_parameters(decomposition: ParameterDecomposition, names: Iterable[str]) -> Parts:
    """`names`: of the parts, in the order of the maps."""
    importance = decomposition.importance
    own = [_n(f.parameters()) for f in importance.functions] if isinstance(importance, LayerwiseImportance) else None
    parts = {}
    shared = {*decomposition.tie, *decomposition.tie.values()}
    for i, (name, (path, components)) in enumerate(zip(names, decomposition.components.items(), strict=True)):
        gate, n = None if own is None else own[i], _n(components.parameters())
        parts[name] = Part(components.V.shape[1], None if gate is None or path in shared else n + gate, gate)
    n_components = sum(part.n_components for part in parts.values())
    return Parts(parts, Part(n_components, _n(decomposition.parameters()), _n(importance.parameters())))


def _gate(bank: Group) -> int:
    encoder = 0 if bank.own_encoder is None else _n(bank.own_encoder.parameters())
    attends = isinstance(bank, AttentionGroup)
    return encoder + (_n([bank.W_Q, bank.W_K, bank.b_Q, bank.b_K]) if attends else 0)


def _n(parameters: Iterable[nn.Parameter]) -> int:
    return sum(each.numel() for each in parameters)
