"""The random weights that a dictionary is made with, before anything is known of its data."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import Architecture, DecompositionConfig
from nndecomp.decompositions.attention import AttentionGroup
from nndecomp.decompositions.encoders import GluEncoder
from nndecomp.decompositions.geometry import unit
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.molt import TransformGroup
from nndecomp.decompositions.spec import GroupSpec
from nndecomp.types import Layout

_START_TIED = (
    *(Architecture.sae, Architecture.per_layer_sae, Architecture.crosscoder, Architecture.causal_crosscoder),
    Architecture.dedicated_feature_crosscoder,
)


def is_tied(spec: GroupSpec, tied: bool | None) -> bool:
    """Whether a group's encoder starts as its decoder's transpose: where it writes what it reads, or a part of it."""
    return set(spec.writes) <= set(spec.reads) if tied is None else tied


def initial_decoder_norm(cfg: DecompositionConfig) -> float:
    """1 for what starts as the transpose of its encoder; small for transcoders, whose random outputs would only have to
    be unlearned."""
    if cfg.decoder_norm is not None:
        return cfg.decoder_norm
    tied = cfg.architecture in _START_TIED if cfg.tied is None else cfg.tied
    return 1.0 if tied or cfg.unit_norm_decoder else 0.1


@torch.no_grad()
def randomise(dictionary: SparseDictionary, seed: int, decoder_norm: float, tied: bool | None) -> None:
    """Random directions: unit encoder rows, decoder rows of `decoder_norm` at every site they write.

    With inputs scaled to E|x|^2 = width, unit encoder rows give pre-activations of unit variance, and scores of attention too. Directions depend on the
    seed and the sites alone, not on the other groups: a layer starts the same in a stack as by itself, and the same in a
    transcoder as in a cross-layer one. Groups that write parts of what one encoder reads have, together, rows of `decoder_norm`.
    """
    for spec, bank in zip(dictionary.spec.groups, dictionary.banks, strict=True):
        reads = " ".join(map(str, spec.reads))
        W_enc = _directions(f"{seed} W_enc {reads}", *bank.W_enc.shape)
        if bank.encoder is not None:
            bank.W_enc.copy_(W_enc)
        if isinstance(bank.encoder, GluEncoder):
            bank.encoder.W_glu.copy_(_directions(f"{seed} W_glu {reads}", *bank.W_enc.shape))
        if isinstance(bank, AttentionGroup):
            for name, W in (("W_Q", bank.W_Q), ("W_K", bank.W_K)):
                W.copy_(_directions(f"{seed} {name} {reads}", *W.flatten(0, 1).shape).view_as(W))
        if isinstance(bank, TransformGroup):
            V, U = (_directions(f"{seed} {name} {reads}", *W.shape) for name, W in (("V", bank.V), ("U", bank.U)))
            bank.start_decoder(V, U, decoder_norm)
            continue
        if is_tied(spec, tied):
            rows = W_enc[:, read_columns(dictionary, spec)]
            if rows.shape != W_enc.shape:
                rows = unit(rows) * (rows.shape[1] / W_enc.shape[1]) ** 0.5
            bank.W_dec.copy_(decoder_norm * rows)
            continue
        layout = dictionary.write_layout
        columns = [
            _directions(f"{seed} W_dec {reads} {site}", spec.n_features, width)
            for site, width in zip(layout.sites, layout.widths, strict=True)
            if site in spec.writes
        ]
        bank.W_dec.copy_(decoder_norm * torch.cat(columns, 1))


@torch.no_grad()
def compare_fairly(dictionary: SparseDictionary) -> None:
    """Encoder rows longer where c is smaller, so that z c starts with the same variance in all groups.

    c by sums of decoder norms is smaller for features that write fewer sites, which would never win against the others.
    """
    c = [1.0 if (own := dictionary.scale(g)) is None else float(own.mean()) for g in range(len(dictionary.banks))]
    for bank, own in zip(dictionary.banks, c, strict=True):
        bank.W_enc.mul_(max(c) / own)


def read_columns(dictionary: SparseDictionary, spec: GroupSpec) -> slice:
    """Which of the columns that a tied group reads stand for those it writes: the same sites, or else all."""
    if not set(spec.writes) <= set(spec.reads):
        return slice(None)
    columns = Layout.of({site: dictionary.spec.widths[site] for site in spec.reads}).span(spec.writes)
    assert columns is not None, f"the sites that group {spec.name} writes are not adjacent among those it reads"
    return columns


def _directions(label: str, n: int, d: int) -> Float[Tensor, "n d"]:
    """n random unit vectors, the same for the same label."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") >> 1
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)
