"""From what groups read to their codes, for each family of activation functions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.decompositions import backends, pursuit
from nndecomp.decompositions.activation_base import ActivationFunction, Pointwise, Ranking
from nndecomp.decompositions.activation_pointwise import Gated
from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.codes import Codes, DenseCodes, Encoding, GroupCodes, Scales, SparseCodes, like
from nndecomp.decompositions.encoders import LinearEncoder
from nndecomp.decompositions.group import Group
from nndecomp.decompositions.pursuit import MatchingPursuit
from nndecomp.decompositions.selection import Above, Competition, Found, blocks, split
from nndecomp.decompositions.support import Selected, Support, split_slots

# Entries are listed where less than this share of them counts: beyond, dense products cost less. It is looked up on _SAMPLE tokens or
# a few more, of batches of at least _MANY, and at every n-th feature, about _FEATURES in all.
_DENSE, _SAMPLE, _MANY, _FEATURES = 0.05, 32, 256, 1024
Inputs = Sequence[Float[Tensor, "token _"]]
# What was taken away from what a group reads, if that alone is trained: null, where rows want a gradient, or nothing was taken.
Centres = Sequence[Float[Tensor, "_"] | None]
Made = TypeVar("Made")


def encode(
    activation: ActivationFunction,
    banks: Sequence[Group],
    inputs: Inputs,
    groups: Sequence[int],
    scales: Scales,
    together: Sequence[Sequence[int]],
    whole: bool,
    centres: Centres,
) -> Encoding:
    """Of `banks`, which are the groups of these numbers. `together`: which of them, by number, pursue jointly. `whole`: see
    `SparseDictionary.encoding`."""
    match activation:
        case Pointwise():
            learns = torch.is_grad_enabled()
            near = None if whole else _near(activation, banks, inputs, groups, scales, learns)
            return _pointwise(activation, banks, inputs, groups, scales, near, centres)
        case Ranking():
            return _ranked(activation, banks, inputs, groups, scales, centres)
        case MatchingPursuit():
            return Encoding(_pursued(activation, banks, inputs, groups, together), scales, None)
        case other:
            raise AssertionError(f"{type(other).__name__} does not encode")


def _by_encoder(banks: Sequence[Group], inputs: Inputs, made: Callable[[Group, Tensor], Made]) -> list[Made]:
    """Computed once for banks that share an encoder, which read the same."""
    known: dict[int, Made] = {}
    for bank, x in zip(banks, inputs, strict=True):
        if id(bank.encoder) not in known:
            known[id(bank.encoder)] = made(bank, x)
    return [known[id(bank.encoder)] for bank in banks]


def _pointwise(
    activation: Pointwise,
    banks: Sequence[Group],
    inputs: Inputs,
    groups: Sequence[int],
    scales: Scales,
    near: list[Selected] | list[Found] | None,
    centres: Centres,
) -> Encoding:
    """Of the entries that are `near`, or of all."""
    pres: list[GroupCodes]
    if near is None:
        pres = [DenseCodes(pre) for pre in _by_encoder(banks, inputs, lambda bank, x: bank.pre_activations(x))]
    else:
        pres = [_active(*own) for own in zip(banks, inputs, near, centres, strict=True)]
    each = zip(pres, groups, scales, banks, strict=True)
    codes = [like(pre, lambda z, at, g=g, c=c, b=bank.b_enc: activation(z, g, c, b, at)) for pre, g, c, bank in each]
    gates = None
    if isinstance(activation, Gated):
        gate = activation.gate
        gates = tuple(like(pre, lambda z, _: gate(z)) for pre in pres)
    return Encoding(Codes(tuple(codes)), scales, tuple(pres), gates, None if near is None else _agreement(near))


@torch.no_grad()
def _near(
    activation: Pointwise,
    banks: Sequence[Group],
    inputs: Inputs,
    groups: Sequence[int],
    scales: Scales,
    learns: bool,
) -> list[Selected] | list[Found] | None:
    """The entries that have a code or teach anything, where they are few: then the rest need not be computed with. Null where it
    is not so, which some tokens and features tell: a function of the batch alone, so that a resumed run decides alike. On a GPU their
    number would have to be asked for, and the whole matrix is cheap."""
    n_tokens = len(inputs[0])
    if n_tokens < _MANY or inputs[0].device.type != "cpu":
        return None
    scales = scales if activation.scaled else [None] * len(banks)
    floors = []
    for bank, x, g, c in zip(banks, inputs, groups, scales, strict=True):
        floor = activation.floor(g, learns)
        if floor is None:
            return None
        sample = torch.arange(0, bank.n_features, max(1, bank.n_features // _FEATURES), device=x.device)
        some = bank.pre_activations(x[:: n_tokens // _SAMPLE], sample)
        if float(((some if c is None else some * c[sample]) > floor[sample]).float().mean()) > _DENSE:
            return None
        floors.append(floor.to(bank.W_enc))
    if not _apart(banks):
        return _found(banks, inputs, scales, [Above(n_tokens, floor) for floor in floors])
    each = zip(_affine(banks, inputs, scales), floors, strict=True)
    return [backends.of(of.W).above(of, floor) for of, floor in each]


def _apart(banks: Sequence[Group]) -> bool:
    """Whether every group has an affine encoder of its own."""
    encoders = [bank.linear_encoder for bank in banks]
    return len(set(map(id, encoders))) == len(banks) and all(type(encoder) is LinearEncoder for encoder in encoders)


def _affine(banks: Sequence[Group], inputs: Inputs, scales: Scales) -> list[Affine]:
    each = zip(inputs, banks, scales, strict=True)
    return [Affine(x, bank.W_enc, bank.b_enc, c) for x, bank, c in each]


def _active(
    bank: Group, x: Float[Tensor, "token d_read"], own: Selected | Found, centre: Float[Tensor, "d_read"] | None
) -> SparseCodes:
    """Pre-activations of what is active; gradients reach no others."""
    found = Found(own.support, (own.values,)) if isinstance(own, Selected) else own
    # The centre's gradient needs that of no row: a sum over all that is active is saved.
    seen = x if centre is None else x.detach()
    return SparseCodes(bank.linear_encoder.at(seen, found, centre), found.support)


def _ranked(
    activation: Ranking, banks: Sequence[Group], inputs: Inputs, groups: Sequence[int], scales: Scales, centres: Centres
) -> Encoding:
    found = _selected(activation, banks, inputs, groups, scales)
    codes = [_active(*own) for own in zip(banks, inputs, found, centres, strict=True)]
    if not activation.signed:
        # A negative pre-activation among the k largest becomes 0, which is not active.
        codes = [replace(own, values=own.values.relu()) for own in codes]
    return Encoding(Codes(tuple(codes)), scales, None, agreement=_agreement(found))


@torch.no_grad()
def _selected(
    activation: Ranking, banks: Sequence[Group], inputs: Inputs, groups: Sequence[int], scales: Scales
) -> list[Selected] | list[Found]:
    """What is active, by the backend where every group has an affine encoder of its own and the backend can select."""
    found = activation.select(_affine(banks, inputs, scales), groups) if _apart(banks) else None
    if found is not None:
        return found
    n_tokens, widths = len(inputs[0]), [bank.n_features for bank in banks]
    if activation.together:
        assert len(groups) == len(activation.k), f"groups {groups} compete with all {len(activation.k)}"
        all_of_them = activation.competition(n_tokens, sum(widths), groups)
        (together,) = _found(banks, inputs, scales, [all_of_them])
        return split(together, widths)
    each = zip(groups, widths, strict=True)
    return _found(banks, inputs, scales, [activation.competition(n_tokens, width, [group]) for group, width in each])


def _found(banks: Sequence[Group], inputs: Inputs, scales: Scales, competitions: Sequence[Competition]) -> list[Found]:
    """Of each group's competition, or of one that all groups share, their features side by side: by encoders of any kind, a block of
    features at a time, which is computed once for groups that share an encoder."""
    widths = [bank.n_features for bank in banks]
    bases = [0] * len(banks) if len(competitions) == len(banks) else [0, *accumulate(widths)]
    sharing: dict[int, list[int]] = {}
    for i, bank in enumerate(banks):
        sharing.setdefault(id(bank.encoder), []).append(i)
    for own in sharing.values():
        x, encoder = inputs[own[0]], banks[own[0]].linear_encoder
        for some in blocks(len(x), widths[own[0]]):
            maps = encoder.affine(x, some)
            pre = encoder.combine(*maps)
            for i in own:
                c = scales[i]
                competition = competitions[i % len(competitions)]
                competition.add(bases[i] + some.start, pre if c is None else pre * c[some], maps)
    return [each.found() for each in competitions]


def _agreement(found: Sequence[Selected] | Sequence[Found]) -> float | None:
    """Mean over groups; null where nothing was screened."""
    shares = [own.agreement for own in found if isinstance(own, Selected) and own.agreement is not None]
    return sum(shares) / len(shares) if shares else None


def _pursued(
    activation: MatchingPursuit,
    banks: Sequence[Group],
    inputs: Inputs,
    groups: Sequence[int],
    together: Sequence[Sequence[int]],
) -> Codes:
    place = {g: i for i, g in enumerate(groups)}
    codes: dict[int, SparseCodes] = {}
    for joint in together:
        own = [place[g] for g in joint]
        k = sum(activation.k[g] for g in joint)
        found = _pursued_jointly([banks[i] for i in own], [inputs[i] for i in own], activation.units, k)
        codes.update(zip(joint, found, strict=True))
    return Codes(tuple(codes[g] for g in groups))


def _pursued_jointly(
    banks: Sequence[Group], inputs: Inputs, units: Float[Tensor, "d_writes"], k: int
) -> list[SparseCodes]:
    """Of groups that together write what they read."""
    start, stop = min(bank.writes.start for bank in banks), max(bank.writes.stop for bank in banks)
    n_tokens = len(inputs[0])
    x = inputs[0].new_zeros(n_tokens, stop - start)
    for bank, own in zip(banks, inputs, strict=True):
        x[:, bank.reads.start - start : bank.reads.stop - start] = own
    rows = [torch.nn.functional.pad(bank.W_dec, (bank.writes.start - start, stop - bank.writes.stop)) for bank in banks]
    taken, values = pursuit.codes(x * units[start:stop], torch.cat(rows) * units[start:stop], k)
    tokens = torch.arange(n_tokens, device=taken.device).repeat_interleave(k)
    return [
        SparseCodes(values.flatten()[own], Support.of(tokens[own], features, n_tokens, bank.n_features))
        for bank, (own, features) in zip(
            banks, split_slots(taken.flatten(), [bank.n_features for bank in banks]), strict=True
        )
    ]
