"""Where training starts: what is worked out from data, and from the target's own weights, before the first step.

    b_dec    zero, mean or geometric median of what is written
    W_dec    random; in the leading principal directions of what is written; what the target's MLP answers to the feature's
             encoder direction; the MLP's own neurons
    W_enc    of a tied group: the decoder's directions again
    b_enc    minus the mean pre-activation, where that is asked for
    norms    of decoder rows: the best of a grid on the data, where that is asked for

All in the units in which training sees rows: after normalisation, where a bias of raw activations would be far off.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences, rows_of
from nndecomp.config.schema import AttentionStart, Decoder, DecompositionConfig, Directions, InitialBias
from nndecomp.decompositions import archetypal
from nndecomp.decompositions.attention import AttentionGroup
from nndecomp.decompositions.geometry import geometric_median, principal_directions, unit
from nndecomp.decompositions.group import Group
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.initial import is_tied, read_columns
from nndecomp.decompositions.spec import GroupSpec
from nndecomp.decompositions.units import Columns
from nndecomp.targets.base import Target
from nndecomp.types import Layout, Point, Site

# Llamascopium's grid (language-model SAEs of OpenMOSS): coarse, then fine around the best.
COARSE, FINE = torch.linspace(0.1, 5.0, 50), torch.linspace(-0.09, 0.1, 20)
AT_A_TIME = 1024  # rows


@dataclass(frozen=True)
class Given:
    """What a start has to go by."""

    x: RowsOrSequences
    y: Float[Tensor, "token d_writes"]
    reads: Columns
    writes: Columns
    target: Target | None  # needed where the target's weights are
    seed: int


@torch.no_grad()
def start(dictionary: SparseDictionary, cfg: DecompositionConfig, given: Given) -> None:
    """From random weights to those that training begins with."""
    dictionary.b_dec.copy_(initial_bias(given.y, dictionary.write_layout, cfg.initial_bias))
    for spec, bank in zip(dictionary.spec.groups, dictionary.banks, strict=True):
        place_decoder(dictionary, spec, bank, cfg, given)
        if isinstance(bank, AttentionGroup) and cfg.attention_start is AttentionStart.target:
            attend_as_target(spec, bank, given)
        if cfg.unit_norm_decoder:
            bank.W_dec.copy_(unit(bank.W_dec))
    if cfg.centre_pre_activations:
        for g, bank in enumerate(dictionary.banks):
            centre_pre_activations(dictionary, bank, g, rows_of(given.x))
    if cfg.decoder_norm_search:
        search_decoder_norm(dictionary, rows_of(given.x), given.y)


def place_decoder(
    dictionary: SparseDictionary, spec: GroupSpec, bank: Group, cfg: DecompositionConfig, given: Given
) -> None:
    """Decoder rows where the settings say, and with them the encoder of a tied group."""
    if cfg.decoder is Decoder.archetypal:
        points = given.y[:, bank.writes] - dictionary.b_dec[bank.writes]
        archetypal.place(bank, points)
    match cfg.directions:
        case Directions.random:
            if cfg.decoder is not Decoder.archetypal:
                return
        case Directions.active_subspace:
            into_active_subspace(bank, given.y[:, bank.writes], cfg.subspace_share)
        case Directions.mlp_response:
            answer_as_mlp(spec, bank, given, dictionary)
        case Directions.neurons:
            become_neurons(spec, bank, given, dictionary, as_loud=cfg.decoder_norm is None)
        case Directions.heads:
            assert isinstance(bank, AttentionGroup), "checked with the settings"
            move_as_heads(spec, bank, given, cfg.subspace_share)
    if bank.encoder is not None and is_tied(spec, cfg.tied):
        columns = read_columns(dictionary, spec)
        norms = bank.W_enc[:, columns].norm(dim=1, keepdim=True)
        bank.W_enc[:, columns] = unit(bank.W_dec) * norms


def initial_bias(y: Float[Tensor, "token d_writes"], layout: Layout, kind: InitialBias) -> Float[Tensor, "d_writes"]:
    match kind:
        case InitialBias.zero:
            return torch.zeros_like(y[0])
        case InitialBias.mean:
            return y.mean(0)
        case InitialBias.geometric_median:
            return torch.cat([geometric_median(y[:, span]) for span in layout.spans.values()])


def into_active_subspace(bank: Group, y: Float[Tensor, "token d_write"], share: float) -> None:
    """Decoder rows into the leading directions of what is written, at each site; their norms there stay."""
    start = 0
    for width in bank.write_widths:
        columns = slice(start, start + width)
        U = principal_directions(y[:, columns], max(1, round(share * width)))
        rows = bank.W_dec[:, columns]
        bank.W_dec[:, columns] = unit(rows @ U @ U.T) * rows.norm(dim=1, keepdim=True)
        start += width


def answer_as_mlp(spec: GroupSpec, bank: Group, given: Given, dictionary: SparseDictionary) -> None:
    """W_dec_i ~ mlp(mu + R e_i) - mean over j of mlp(mu + R e_j), with e_i the encoder's direction, mu the mean of what is
    read and R its mean distance from it. At later layers rows start at zero: the MLP does not write there.
    """
    target, own = _target(given), mlp_out_of(spec)
    x = rows_of(given.x[:, bank.reads])
    mean = x.mean(0)
    radius = (x - mean).norm(dim=1).mean()
    reads, writes = given.reads, given.writes
    probes = (mean + radius * unit(bank.W_enc)) * reads.s[bank.reads] + reads.m[bank.reads]
    columns = dictionary.write_layout.spans[own]
    answers = torch.cat([target.mlp_of(spec.reads[0], part).float() for part in probes.split(AT_A_TIME)])
    _write_at(bank, columns, (answers - answers.mean(0)) / writes.s[columns])


def become_neurons(spec: GroupSpec, bank: Group, given: Given, dictionary: SparseDictionary, as_loud: bool) -> None:
    """The first features are neurons of the MLP, drawn at random where there are more neurons; further features stay as they are.

    W_enc_i = read_i s_read / |.|,  b_enc_i = (bias_i + read_i . m_read) / |.|,  W_dec_i ~ write_i / s_write

    so that a feature's pre-activation is its neuron's, over |read_i s_read|. `as_loud`: W_dec_i = |read_i s_read| write_i / s_write,
    and a relu feature adds what a relu neuron does. At later layers rows start at zero.
    """
    neurons, own = _target(given).neurons_of(spec.reads[0]), mlp_out_of(spec)
    draw = torch.Generator().manual_seed(given.seed)
    chosen = torch.randperm(len(neurons.bias), generator=draw)[: bank.n_features].sort().values.to(neurons.bias.device)
    n = len(chosen)
    read = neurons.read[chosen] * given.reads.s[bank.reads]
    norm = read.norm(dim=1)
    bank.W_enc[:n] = read / norm[:, None]
    bank.b_enc[:n] = (neurons.bias[chosen] + neurons.read[chosen] @ given.reads.m[bank.reads]) / norm
    columns = dictionary.write_layout.spans[own]
    write = neurons.write[chosen] / given.writes.s[columns]
    _write_at(bank, columns, write, norm * write.norm(dim=1) if as_loud else None)


def attend_as_target(spec: GroupSpec, bank: AttentionGroup, given: Given) -> None:
    """Patterns are those of the target's heads, each as often as patterns are asked for, adjacent ones the same."""
    heads = _target(given).heads_of(spec.reads[0])
    s, m = given.reads.s[bank.reads], given.reads.m[bank.reads]
    times = bank.n_patterns // len(heads.W_Q)
    # Its scores may be scaled otherwise.
    scale = heads.scale * bank.d_qk**0.5
    for own_W, own_b, W, b in (
        (bank.W_Q, bank.b_Q, scale * heads.W_Q, scale * heads.b_Q),
        (bank.W_K, bank.b_K, heads.W_K, heads.b_K),
    ):
        own_W.copy_((W.mT * s).repeat_interleave(times, 0))
        own_b.copy_((b + m @ W).repeat_interleave(times, 0))


def move_as_heads(spec: GroupSpec, bank: AttentionGroup, given: Given, share: float) -> None:
    """Each feature a direction of its head's values, a random one of the leading principal directions of these: v_i = W_V a and
    o_i ~ a W_O, so that with all of them a head's output can be had. Norms stay as they are.

    Llamascopium starts so, with directions in what is read; here they are taken in the head's d_head values, where there
    are no others.
    """
    heads = _target(given).heads_of(spec.reads[0])
    times = bank.n_patterns // len(heads.W_V)
    x = rows_of(given.x[:, bank.reads]) * given.reads.s[bank.reads] + given.reads.m[bank.reads]
    own = bank.n_features // len(heads.W_V)
    draw = torch.Generator().manual_seed(given.seed)
    v, o = [], []
    for W_V, W_O in zip(heads.W_V, heads.W_O, strict=True):
        U = principal_directions(x @ W_V, max(1, round(share * W_V.shape[1])))
        a = torch.randn(own, U.shape[1], generator=draw).to(U) @ U.T
        v.append(a @ W_V.T * given.reads.s[bank.reads])
        o.append(a @ W_O / given.writes.s[bank.writes])
    assert times * len(heads.W_V) == bank.n_patterns, "checked with the wiring"
    for W, rows in ((bank.W_enc, torch.cat(v)), (bank.W_dec, torch.cat(o))):
        W.copy_(unit(rows) * W.norm(dim=1, keepdim=True))


def mlp_out_of(spec: GroupSpec) -> Site:
    """Where the MLP writes that reads what a group reads; checked with the wiring."""
    (read,) = spec.reads
    own = [
        site
        for site in spec.writes
        if site.point is Point.mlp_out and (site.model, site.layer) == (read.model, read.layer)
    ]
    assert read.point is Point.mlp_in and len(own) == 1, f"group {spec.name} does not stand in the place of an MLP"
    return own[0]


def _write_at(
    bank: Group, columns: slice, directions: Float[Tensor, "row d"], norms: Float[Tensor, "row"] | None = None
) -> None:
    """The first decoder rows along `directions` at one site, with these norms or those that they had there, and zero elsewhere."""
    own, n = slice(columns.start - bank.writes.start, columns.stop - bank.writes.start), len(directions)
    norms = bank.W_dec[:n, own].norm(dim=1) if norms is None else norms
    bank.W_dec[:n] = 0
    bank.W_dec[:n, own] = unit(directions) * norms[:, None]


def _target(given: Given) -> Target:
    assert given.target is not None, "directions from the target's MLPs need the target"
    return given.target


def centre_pre_activations(
    dictionary: SparseDictionary, bank: Group, group: int, x: Float[Tensor, "token d_reads"]
) -> None:
    """b_enc such that the mean of x W_enc + b_enc is 0."""
    if bank.own_encoder is None:
        return
    mean = dictionary.read(x, group).mean(0) @ bank.W_enc.T + bank.b_enc
    bank.b_enc.sub_(mean)
    dictionary.activation.fold_bias(group, mean)


def search_decoder_norm(
    dictionary: SparseDictionary, x: Float[Tensor, "token d_reads"], y: Float[Tensor, "token d_writes"]
) -> None:
    """Decoder rows all of that norm, at each site, which leaves the least squared error."""
    shapes = [_unit_at_sites(bank) for bank in dictionary.banks]

    def error(norm: float) -> float:
        for bank, rows in zip(dictionary.banks, shapes, strict=True):
            bank.W_dec.copy_(norm * rows)
        parts = zip(x.split(AT_A_TIME), y.split(AT_A_TIME), strict=True)
        return sum(float((dictionary(part)[0] - goal).double().square().sum()) for part, goal in parts)

    coarse = min(COARSE.tolist(), key=error)
    # The fine grid reaches below the coarse one's step; a norm of zero would be no dictionary.
    best = min((norm for norm in (coarse + FINE).tolist() if norm > 0), key=error)
    error(best)


def _unit_at_sites(bank: Group) -> Float[Tensor, "feature d_write"]:
    """Decoder rows with norm 1 at each site, and 0 where they are zero."""
    return torch.cat([unit(part) for part in bank.W_dec.split(list(bank.write_widths), 1)], 1)
