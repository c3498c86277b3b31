"""From an architecture's name and the sites it is given to the groups it consists of.

Everything is checked against the shape of the target, before any weight is loaded.

    sae                      1 group         one site -> itself
    per_layer_sae            1 a site        each site -> itself
    transcoder               1 group         one site -> another, e.g. L3.mlp_in -> L3.mlp_out
    per_layer_transcoder     1 a layer       L<l>.mlp_in -> L<l>.mlp_out
    cross_layer_transcoder   1 a layer       L<l>.mlp_in -> mlp_out of layers l, l+1, ... (Ameisen et al. 2025)
    neurons                  1 a layer       L<l>.mlp_hidden -> L<l>.mlp_out
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nndecomp.config.schema import Activation, Architecture, DecompositionConfig, require
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.spec import ActivationSpec, DictionarySpec, GroupSpec
from nndecomp.errors import SettingError
from nndecomp.targets.base import TargetShape
from nndecomp.types import Point, Site

_SAES = (Architecture.sae, Architecture.per_layer_sae)


@dataclass(frozen=True)
class Wiring:
    """Groups, and k of each: one an entry, or none for activation functions without k."""

    groups: tuple[GroupSpec, ...]
    k: tuple[int, ...]
    widths: dict[Site, int]


def wire(cfg: DecompositionConfig, shape: TargetShape) -> Wiring:
    """The groups of an architecture on a target of this shape.

    Raises SettingError for layers, sites or lists of k that do not fit the architecture or the target.
    """
    reads, writes = _sites("reads", cfg.reads, cfg, shape), _sites("writes", cfg.writes, cfg, shape)
    name = cfg.architecture.value
    match cfg.architecture:
        case Architecture.sae | Architecture.per_layer_sae:
            require(
                reads == writes,
                f"decomposition.writes={cfg.writes} differs from decomposition.reads={cfg.reads}, "
                f"but decomposition.architecture={name} writes what it reads",
            )
            require(
                not cfg.skip,
                f"decomposition.skip=true would let decomposition.architecture={name} copy its input; write skip=false",
            )
            pairs = [((site,), (site,)) for site in reads]
        case Architecture.transcoder:
            for setting, sites in (("reads", reads), ("writes", writes)):
                require(
                    len(sites) == 1,
                    f"decomposition.{setting} stands for {len(sites)} sites ({_list(sites)}), but "
                    "decomposition.architecture=transcoder takes one; choose one layer with decomposition.layers, "
                    "or per_layer_transcoder",
                )
            pairs = [(reads, writes)]
        case Architecture.per_layer_transcoder | Architecture.neurons:
            _require_one_a_layer(cfg, reads, writes)
            pairs = [((read,), (write,)) for read, write in zip(reads, writes, strict=True)]
        case Architecture.cross_layer_transcoder:
            _require_one_a_layer(cfg, reads, writes)
            for setting, sites in (("reads", reads), ("writes", writes)):
                require(
                    len({site.point for site in sites}) == 1,
                    f"decomposition.{setting}={getattr(cfg, setting)} mixes points; "
                    "decomposition.architecture=cross_layer_transcoder takes the same point at every layer",
                )
            pairs = [((read,), writes[i:]) for i, read in enumerate(reads)]
    if cfg.architecture is Architecture.sae:
        require(
            len(reads) == 1,
            f"decomposition.reads stands for {len(reads)} sites ({_list(reads)}), but decomposition.architecture=sae "
            "takes one; choose one layer with decomposition.layers, or per_layer_sae",
        )
    if cfg.architecture is Architecture.neurons:
        _require_neurons(reads, writes)
    one_a_layer = len({group_reads[0].layer for group_reads, _ in pairs}) == len(pairs)
    n_features = shape.d_mlp if cfg.architecture is Architecture.neurons else cfg.n_features
    groups = tuple(
        GroupSpec(
            name=f"L{group_reads[0].layer}" if one_a_layer else str(group_reads[0]),
            reads=group_reads,
            writes=group_writes,
            n_features=n_features,
        )
        for group_reads, group_writes in pairs
    )
    return Wiring(groups, _k_of(cfg, groups), {site: shape.width(site) for site in (*reads, *writes)})


def dictionary_spec(cfg: DecompositionConfig, shape: TargetShape, target: str) -> DictionarySpec:
    """What `build_dictionary` builds; raises SettingError as `wire` does."""
    assert cfg.architecture is not Architecture.neurons, "neurons are a NeuronBaseline, not a dictionary"
    wiring = wire(cfg, shape)
    return DictionarySpec(
        architecture=cfg.architecture.value,
        target=target,
        widths=wiring.widths,
        groups=wiring.groups,
        activation=ActivationSpec(
            kind=cfg.activation,
            scope=cfg.scope,
            k=wiring.k,
            threshold_rate=cfg.threshold_rate,
            initial_threshold=cfg.jumprelu_threshold,
            bandwidth=cfg.jumprelu_bandwidth,
        ),
        skip=cfg.skip,
        centre_input=cfg.centre_input,
    )


def build_dictionary(
    cfg: DecompositionConfig, shape: TargetShape, seed: int, device: torch.device, target: str
) -> SparseDictionary:
    """An initialised dictionary, to be trained. `target` is the name of the model it will be trained on.

    Raises SettingError as `wire` does.
    """
    dictionary = SparseDictionary(dictionary_spec(cfg, shape, target))
    dictionary.initialise(seed, decoder_norm=_initial_decoder_norm(cfg))
    return dictionary.to(device)


def _initial_decoder_norm(cfg: DecompositionConfig) -> float:
    """1 for SAEs, which start as the transpose of their encoder; small for transcoders, whose random outputs would
    only have to be unlearned."""
    return 1.0 if cfg.architecture in _SAES or cfg.unit_norm_decoder else 0.1


def _sites(setting: str, names: Sequence[str], cfg: DecompositionConfig, shape: TargetShape) -> tuple[Site, ...]:
    """Points expanded over layers, single sites as they are; in model order, each checked and named once."""
    require(bool(names), f"decomposition.{setting} is empty; name a point such as mlp_in or a site such as L3.mlp_in")
    layers = list(range(shape.n_layers)) if cfg.layers is None else cfg.layers
    for layer in layers:
        require(
            0 <= layer < shape.n_layers,
            f"decomposition.layers={cfg.layers} asks for layer {layer}, "
            f"but the target has layers 0 to {shape.n_layers - 1}",
        )
    sites = []
    for name in names:
        if name in Point.__members__:
            point = Point[name]
            sites += [Site(0, point)] if point is Point.embed else [Site(layer, point) for layer in layers]
            continue
        require(
            cfg.layers is None,
            f"decomposition.layers={cfg.layers} has no meaning for the single site {name!r} of "
            f"decomposition.{setting}; write layers=null, or a point such as mlp_in",
        )
        sites.append(_parse(setting, name))
    for site in sites:
        shape.check(site, f"decomposition.{setting}")
    require(len(set(sites)) == len(sites), f"decomposition.{setting}={list(names)} names a site twice")
    return tuple(sorted(sites))


def _parse(setting: str, name: str) -> Site:
    try:
        return Site.parse(name)
    except SettingError as error:
        raise SettingError(f"decomposition.{setting}: {error}") from None


def _require_one_a_layer(cfg: DecompositionConfig, reads: Sequence[Site], writes: Sequence[Site]) -> None:
    name = cfg.architecture.value
    for setting, sites in (("reads", reads), ("writes", writes)):
        require(
            len({site.layer for site in sites}) == len(sites),
            f"decomposition.{setting} has two sites in one layer ({_list(sites)}), "
            f"but decomposition.architecture={name} takes one a layer",
        )
    require(
        [site.layer for site in reads] == [site.layer for site in writes],
        f"decomposition.reads ({_list(reads)}) and decomposition.writes ({_list(writes)}) do not pair: "
        f"decomposition.architecture={name} reads and writes the same layers",
    )


def _require_neurons(reads: Sequence[Site], writes: Sequence[Site]) -> None:
    for setting, sites, point in (("reads", reads, Point.mlp_hidden), ("writes", writes, Point.mlp_out)):
        require(
            {site.point for site in sites} == {point},
            f"decomposition.{setting} is {_list(sites)}, but decomposition.architecture=neurons "
            f"can only have {point.value}",
        )


def _k_of(cfg: DecompositionConfig, groups: Sequence[GroupSpec]) -> tuple[int, ...]:
    if cfg.activation not in (Activation.topk, Activation.batchtopk):
        return ()
    if isinstance(cfg.k, list):
        require(
            len(cfg.k) == len(groups),
            f"decomposition.k={cfg.k} has {len(cfg.k)} entries, but the decomposition has {len(groups)} groups "
            f"({', '.join(group.name for group in groups)}); write one number, or one a group",
        )
    ks = cfg.ks if isinstance(cfg.k, list) else cfg.ks * len(groups)
    for k, group in zip(ks, groups, strict=True):
        require(
            k <= group.n_features,
            f"decomposition.k={k} is more than the {group.n_features} features of group {group.name}",
        )
    return tuple(ks)


def _list(sites: Sequence[Site]) -> str:
    return ", ".join(map(str, sites))
