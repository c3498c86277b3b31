"""From an architecture's name and the sites it is given to the groups it consists of.

Everything is checked against the shape of the target, before any weight is loaded.

    sae                           1 group         one site -> itself
    per_layer_sae                 1 a site        each site -> itself
    transcoder                    1 group         one site -> another, e.g. L3.mlp_in -> L3.mlp_out
    per_layer_transcoder          1 a layer       L<l>.mlp_in -> L<l>.mlp_out
    cross_layer_transcoder        1 a layer       L<l>.mlp_in -> mlp_out of layers l, l+1, ... (Ameisen et al. 2025)
    crosscoder                    1 group         all sites -> all sites (Lindsey et al. 2024)
    crosscoder, decoupled         1 a write       all sites -> one site, all with the first one's encoder
    causal_crosscoder             1 a layer       site of layer l -> the same point of layers l, l+1, ...
    dedicated_feature_crosscoder  up to 3         A -> A, A and B -> A and B, B -> B (Jiralerspong & Bricken 2026)
    molt                          1 a layer       L<l>.mlp_in -> L<l>.mlp_out, through linear maps of low rank
    lorsa                         1 a layer       L<l>.attn_in -> L<l>.attn_out, of this and earlier positions
    neurons                       1 a layer       not a dictionary: see its own file
    principal_, random_directions 1 a site        each site -> itself, by all its directions: see directions.py
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nndecomp.config.schema import Architecture, AttentionStart, CodeNormalisation, DecompositionConfig, require
from nndecomp.decompositions.spec import AttentionSpec, GroupSpec
from nndecomp.decompositions.start_checks import check_start
from nndecomp.errors import SettingError
from nndecomp.targets.base import Shape, TargetShape
from nndecomp.types import Point, Site

_SAES = (Architecture.sae, Architecture.per_layer_sae)
_DIRECTIONS = (Architecture.principal_directions, Architecture.random_directions)
_ONE_SITE = (Architecture.sae, Architecture.transcoder)
_ONE_A_LAYER = (
    *(Architecture.per_layer_transcoder, Architecture.cross_layer_transcoder, Architecture.neurons),
    *(Architecture.molt, Architecture.lorsa, Architecture.causal_crosscoder),
)
_EVERY_HEAD = "z.h*"


@dataclass(frozen=True)
class Wiring:
    """Groups, and k of each: one an entry, or none for activation functions without k."""

    groups: tuple[GroupSpec, ...]
    k: tuple[int, ...]
    widths: dict[Site, int]


def wire(cfg: DecompositionConfig, shape: Shape) -> Wiring:
    """The groups of an architecture on a target of this shape.

    Raises SettingError for layers, sites or lists of k that do not fit the architecture or the target.
    """
    reads, writes = _sites("reads", cfg.reads, cfg, shape), _sites("writes", cfg.writes, cfg, shape)
    _check_sites(cfg, reads, writes)
    groups = _groups(cfg, shape, reads, writes)
    check_start(cfg, groups, shape)
    return Wiring(groups, _k_of(cfg, groups), {site: shape.width(site) for site in (*reads, *writes)})


def _groups(
    cfg: DecompositionConfig, shape: Shape, reads: tuple[Site, ...], writes: tuple[Site, ...]
) -> tuple[GroupSpec, ...]:
    n = cfg.n_features
    match cfg.architecture:
        case Architecture.sae | Architecture.per_layer_sae:
            return _named([((site,), (site,)) for site in reads], n)
        case Architecture.transcoder:
            return _named([(reads, writes)], n)
        case Architecture.per_layer_transcoder:
            return _named([((read,), (write,)) for read, write in zip(reads, writes, strict=True)], n)
        case Architecture.molt:
            named = _named([((read,), (write,)) for read, write in zip(reads, writes, strict=True)], n)
            return tuple(replace(group, ranks=_ranks(cfg, group, shape)) for group in named)
        case Architecture.lorsa:
            named = _named([((read,), (write,)) for read, write in zip(reads, writes, strict=True)], n)
            return tuple(replace(group, attention=_attention(cfg, group.reads[0], shape)) for group in named)
        case Architecture.neurons:
            pairs = [((read,), (write,)) for read, write in zip(reads, writes, strict=True)]
            return _named(pairs, shape.of(None).d_mlp)
        case Architecture.principal_directions | Architecture.random_directions:
            named = _named([((site,), (site,)) for site in reads], n)
            return tuple(replace(group, n_features=shape.width(group.reads[0])) for group in named)
        case Architecture.cross_layer_transcoder | Architecture.causal_crosscoder:
            return _named([((read,), writes[i:]) for i, read in enumerate(reads)], n)
        case Architecture.crosscoder if cfg.code_normalisation is CodeNormalisation.decoupled:
            first = str(writes[0])
            return tuple(
                GroupSpec(str(site), reads, (site,), n, encoder=None if i == 0 else first)
                for i, site in enumerate(writes)
            )
        case Architecture.crosscoder:
            return (GroupSpec("shared", reads, writes, n),)
        case Architecture.dedicated_feature_crosscoder:
            assert cfg.n_exclusive is not None, "checked with the settings"
            a, b = shape.models
            of = lambda sites, model: tuple(site for site in sites if site.model == model)  # noqa: E731
            groups = (
                GroupSpec(str(a), of(reads, a), of(writes, a), cfg.n_exclusive[0]),
                GroupSpec("shared", reads, writes, n),
                GroupSpec(str(b), of(reads, b), of(writes, b), cfg.n_exclusive[1]),
            )
            return tuple(group for group in groups if group.n_features > 0)


def _named(pairs: Sequence[tuple[tuple[Site, ...], tuple[Site, ...]]], n_features: int) -> tuple[GroupSpec, ...]:
    """Groups named by their layer where each has its own, else by what they read."""
    places = [(reads[0].model, reads[0].layer) for reads, _ in pairs]
    alone = len(set(places)) == len(pairs) and len({model for model, _ in places}) == 1
    return tuple(
        GroupSpec(f"L{reads[0].layer}" if alone else str(reads[0]), reads, writes, n_features)
        for reads, writes in pairs
    )


def _ranks(cfg: DecompositionConfig, group: GroupSpec, shape: Shape) -> tuple[tuple[int, int], ...]:
    """Of all features of a group: periods side by side would be transforms of one rank apart from each other."""
    periods = cfg.n_features // sum(count for _, count in cfg.ranks)
    largest = min(shape.width(site) for site in (*group.reads, *group.writes))
    require(
        cfg.ranks[-1][0] <= largest,
        f"decomposition.ranks={cfg.ranks} has a rank above {largest}, the narrower of the sites of group {group.name}",
    )
    return tuple((rank, count * periods) for rank, count in cfg.ranks)


def _attention(cfg: DecompositionConfig, read: Site, shape: Shape) -> AttentionSpec:
    own = shape.of(read.model)
    n_heads, d_qk = cfg.n_qk_heads or own.n_heads, cfg.d_qk or own.d_head
    require(
        cfg.n_features % n_heads == 0,
        f"decomposition.n_features={cfg.n_features} is not a multiple of the {n_heads} attention patterns of "
        "decomposition.n_qk_heads, which have equally many features",
    )
    if cfg.attention_start is AttentionStart.target:
        require(
            n_heads % own.n_heads == 0 and d_qk == own.d_head,
            f"decomposition.n_qk_heads={n_heads} and d_qk={d_qk} do not fit decomposition.attention_start=target: the "
            f"target has {own.n_heads} heads of {own.d_head}; write a multiple, or attention_start=random",
        )
    rotary = own.rotary[read.layer] if cfg.rotary and own.rotary else ()
    require(
        2 * len(rotary) <= d_qk,
        f"decomposition.d_qk={d_qk} is less than the {2 * len(rotary)} coordinates that the target turns with position; "
        "write more, or rotary=false",
    )
    return AttentionSpec(n_heads, d_qk, rotary)


def _check_sites(cfg: DecompositionConfig, reads: tuple[Site, ...], writes: tuple[Site, ...]) -> None:
    """Whether an architecture can be made of these sites."""
    name = cfg.architecture.value
    same = (*_SAES, *_DIRECTIONS, Architecture.causal_crosscoder, Architecture.dedicated_feature_crosscoder)
    require(
        cfg.architecture not in same or reads == writes,
        f"decomposition.writes={cfg.writes} differs from decomposition.reads={cfg.reads}, "
        f"but decomposition.architecture={name} writes what it reads",
    )
    require(
        not cfg.skip or not set(reads) & set(writes),
        f"decomposition.skip=true would let decomposition.architecture={name} copy its input; write skip=false",
    )
    if cfg.architecture in _ONE_SITE:
        for setting, sites in (("reads", reads), ("writes", writes)):
            require(
                len(sites) == 1,
                f"decomposition.{setting} stands for {len(sites)} sites ({_list(sites)}), but "
                f"decomposition.architecture={name} takes one; choose one layer with decomposition.layers, "
                f"or per_layer_{name}",
            )
    if cfg.architecture in _ONE_A_LAYER:
        _require_one_a_layer(cfg, reads, writes)
    if cfg.architecture in (Architecture.cross_layer_transcoder, Architecture.causal_crosscoder):
        for setting, sites in (("reads", reads), ("writes", writes)):
            require(
                len({(site.model, site.point, site.head) for site in sites}) == 1,
                f"decomposition.{setting}={getattr(cfg, setting)} mixes points; "
                f"decomposition.architecture={name} takes the same point at every layer",
            )
    if cfg.architecture is Architecture.crosscoder:
        require(
            len(writes) > 1,
            f"decomposition.writes stands for one site ({_list(writes)}), but decomposition.architecture=crosscoder "
            "explains several at once; write sae for one",
        )
    if cfg.architecture is Architecture.dedicated_feature_crosscoder:
        require(
            {site.model for site in reads} == {"A", "B"},
            f"decomposition.reads={cfg.reads} must have sites of both models (A: and B:), since "
            "decomposition.architecture=dedicated_feature_crosscoder tells them apart",
        )
    if cfg.architecture is Architecture.neurons:
        _require_points(cfg, reads, writes, Point.mlp_hidden, Point.mlp_out)
    if cfg.architecture is Architecture.lorsa:
        _require_points(cfg, reads, writes, Point.attn_in, Point.attn_out)


def _sites(setting: str, names: Sequence[str], cfg: DecompositionConfig, shape: Shape) -> tuple[Site, ...]:
    """Points expanded over layers, single sites as they are; in model order, each checked and named once."""
    require(bool(names), f"decomposition.{setting} is empty; name a point such as mlp_in or a site such as L3.mlp_in")
    sites = []
    for name in names:
        model, _, place = name.rpartition(":")
        require(
            not model or shape.models != (None,),
            f"decomposition.{setting}={list(names)} names model {model}, but there is one target; write paired_target for "
            "a second, e.g. +target@paired_target=tiny_docs",
        )
        require(
            bool(model) or shape.models == (None,),
            f"decomposition.{setting}={list(names)} does not say which of two models it is in; begin each with A: (target) "
            "or B: (paired_target), or leave paired_target out",
        )
        if place in Point.__members__ or place == _EVERY_HEAD:
            sites += _over_layers(place, cfg, model or None, shape.of(model or None))
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


def _over_layers(point: str, cfg: DecompositionConfig, model: str | None, shape: TargetShape) -> list[Site]:
    """A point at every layer asked for; `z.h*` at every head of each."""
    layers = list(range(shape.n_layers)) if cfg.layers is None else cfg.layers
    for layer in layers:
        require(
            0 <= layer < shape.n_layers,
            f"decomposition.layers={cfg.layers} asks for layer {layer}, "
            f"but the target has layers 0 to {shape.n_layers - 1}",
        )
    if point == _EVERY_HEAD:
        return [Site(layer, Point.z, head, model) for layer in layers for head in range(shape.n_heads)]
    if Point[point] is Point.embed:
        return [Site(0, Point.embed, model=model)]
    return [Site(layer, Point[point], model=model) for layer in layers]


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


def _require_points(
    cfg: DecompositionConfig, reads: Sequence[Site], writes: Sequence[Site], read: Point, write: Point
) -> None:
    for setting, sites, point in (("reads", reads, read), ("writes", writes, write)):
        require(
            {site.point for site in sites} == {point},
            f"decomposition.{setting} is {_list(sites)}, but decomposition.architecture={cfg.architecture.value} "
            f"can only have {point.value}",
        )


def _k_of(cfg: DecompositionConfig, groups: Sequence[GroupSpec]) -> tuple[int, ...]:
    if not cfg.selects:
        return ()
    if isinstance(cfg.k, list):
        require(
            len(cfg.k) == len(groups),
            f"decomposition.k={cfg.k} has {len(cfg.k)} entries, but the decomposition has {len(groups)} groups "
            f"({', '.join(group.name for group in groups)}); write one number, or one a group",
        )
    ks = cfg.ks if isinstance(cfg.k, list) else cfg.ks * len(groups)
    for k, group in zip(ks, groups, strict=True):
        for name, n in (("k", k), *([] if cfg.k_start is None else [("k_start", cfg.k_start)])):
            require(
                n <= group.n_features,
                f"decomposition.{name}={n} is more than the {group.n_features} features of group {group.name}",
            )
    return tuple(ks)


def _list(sites: Sequence[Site]) -> str:
    return ", ".join(map(str, sites))
