"""A decomposition as a list of features: what each reads and writes, and when it is active."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.config.checks import require
from nndecomp.decompositions.base import Decomposition
from nndecomp.decompositions.codes import Codes
from nndecomp.decompositions.group import Group
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.molt import TransformGroup
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.errors import SettingError

ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Features:
    """Features of all groups side by side. Where a feature neither reads nor writes, its rows are zero.

    `groups` says which features are in which group; groups that share an encoder are one list of features.
    """

    encoder: Float[Tensor, "feature d_reads"]
    decoder: Float[Tensor, "feature d_writes"]
    groups: Mapping[str, Int[Tensor, " _"]]

    @property
    def n_features(self) -> int:
        return len(self.decoder)


@torch.no_grad()
def features_of(decomposition: Decomposition) -> Features:
    """Raises SettingError for a decomposition whose parts are not features with one direction each."""
    match decomposition:
        case SparseDictionary():
            return _of_dictionary(decomposition)
        case NeuronBaseline():
            return _of_neurons(decomposition)
        case other:
            raise SettingError(
                f"decomposition: the parts of a {type(other).__name__} are not directions, so none can be matched with "
                "true features; leave it out"
            )


def _of_dictionary(dictionary: SparseDictionary) -> Features:
    require(
        not dictionary.needs_sequences,
        "decomposition.architecture=lorsa reads several positions, but true features are known of tokens one by one; "
        "leave it out",
    )
    encoders, decoders, groups, n = [], [], {}, 0
    for spec, bank in zip(dictionary.spec.groups, dictionary.banks, strict=True):
        if spec.encoder is None:
            groups[spec.name] = torch.arange(n, n + bank.n_features)
            n += bank.n_features
            encoders.append(bank.W_enc.new_zeros(bank.n_features, dictionary.read_layout.width))
            encoders[-1][:, bank.reads] = bank.W_enc
            decoders.append(bank.W_enc.new_zeros(bank.n_features, dictionary.write_layout.width))
        of = list(groups).index(spec.name if spec.encoder is None else spec.encoder)
        decoders[of][:, bank.writes] += _writes(bank)
    return Features(torch.cat(encoders).cpu(), torch.cat(decoders).cpu(), groups)


def _writes(bank: Group) -> Float[Tensor, "feature d_write"]:
    """Decoder rows; of a transform, what it makes of the direction that its encoder reads: M(e) - M(0), |e| = 1."""
    match bank:
        case TransformGroup():
            own = bank.transform == torch.arange(bank.n_features, device=bank.V.device)[:, None]
            read = torch.nn.functional.normalize(bank.W_enc, dim=1) @ bank.V.T
            return (own * read) @ bank.U
        case _:
            return bank.W_dec


def _of_neurons(neurons: NeuronBaseline) -> Features:
    """What a neuron writes is what its layer makes of it alone, less what it makes of none."""
    d_mlp, n_layers = neurons.costs[0].n_components, len(neurons.layers)
    encoder = torch.eye(d_mlp * n_layers)
    decoder = torch.zeros(d_mlp * n_layers, neurons.write_layout.width)
    groups = {}
    for i, site in enumerate(neurons.writes):
        own = torch.arange(i * d_mlp, (i + 1) * d_mlp)
        decoder[own, neurons.write_layout.spans[site]] = neurons.written(i).float().cpu()
        groups[f"L{site.layer}"] = own
    return Features(encoder, decoder, groups)


@torch.no_grad()
def codes_of(decomposition: Decomposition, x: Float[Tensor, "token d_reads"]) -> tuple[Tensor, Tensor]:
    """Reconstruction [token, d_writes] and dense codes [token, feature], features as `features_of` lists them."""
    device = next((each.device for each in decomposition.parameters()), x.device)
    y_hats, codes = [], []
    for rows in x.split(ROWS_AT_A_TIME):
        y_hat, active = decomposition(rows.to(device))
        assert isinstance(active, Codes), f"{type(decomposition).__name__} says {type(active).__name__}, not codes"
        own = [
            group.dense()
            for g, group in enumerate(active)
            if not isinstance(decomposition, SparseDictionary) or decomposition.spec.groups[g].encoder is None
        ]
        y_hats.append(y_hat.float().cpu())
        codes.append(torch.cat(own, 1).float().cpu())
    return torch.cat(y_hats), torch.cat(codes)
