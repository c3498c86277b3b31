"""Settings -> decompositions of every size and seed -> their units -> which of them are whose."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from nndecomp.activations.harvest import kept
from nndecomp.build.baselines import baselines
from nndecomp.build.members import Member, decompositions
from nndecomp.build.parameters import saved_parameters
from nndecomp.build.settings import check_runs, trainable
from nndecomp.build.training import untrained
from nndecomp.config.compose import load
from nndecomp.config.schema import CanonicalConfig, RunConfig, require
from nndecomp.decompositions.base import Decomposition
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.evaluation.comparing_units import Comparison, Instance, Kind, Pair, compare
from nndecomp.evaluation.component_units import component_units
from nndecomp.evaluation.units import Units, units_of
from nndecomp.targets.base import Target
from nndecomp.tokens import heldout_tokens
from nndecomp.training.progress import Progress


def canonical_settings(cfg: RunConfig) -> CanonicalConfig:
    require(cfg.canonical is not None, "canonical is null, so no sizes are named; write +canonical.times=[1,2,4]")
    assert cfg.canonical is not None
    return cfg.canonical


def instances(cfg: RunConfig) -> dict[Instance, Member]:
    """Every dictionary that `compare` names, at every size. SettingError for fewer than two seeds."""
    found = {}
    for name, member in trainable(cfg).items():
        method, _, seed = name.rpartition("_seed")
        require(
            bool(method) and len((cfg.compare and cfg.compare.seeds) or []) > 1,
            "compare.seeds must name at least two, since units are looked for in another seed; write compare.seeds=[0,1]",
        )
        for times in canonical_settings(cfg).times:
            sized = replace(member.config, n_features=times * member.config.n_features)
            found[Instance(method, times, int(seed))] = Member(sized, member.seed)
    return found


def starts(cfg: RunConfig, target: Target, instances: Mapping[Instance, Member]) -> dict[Instance, SparseDictionary]:
    """Of every method and size, what the second seed's training began with: what was never trained for the text has in common
    with what was no more than the model and the sizes."""
    second = sorted({each.seed for each in instances})[1]
    members = {each.name: member for each, member in instances.items() if each.seed == second}
    made = untrained(cfg, target, members)
    return {replace(each, trained=False): made[each.name] for each in instances if each.name in made}


def baseline_instances(cfg: RunConfig, target: Target) -> dict[Instance, Decomposition]:
    """What `compare` names and is not trained, such as the model's neurons: of one size, without a seed."""
    return {Instance(name, 1, 0): each for name, each in baselines(cfg, target).items()}


def component_instances(cfg: RunConfig, target: Target) -> dict[Instance, ParameterDecomposition]:
    """Parameter decompositions of `runs`: their sizes are multiples of the smallest, by all components together."""
    made = {}
    for run in check_runs(cfg) if cfg.runs else []:
        there = load(run / "config.yaml")
        require(
            there.spd is not None, f"runs: {run} trained no parameter decomposition; name runs of exp_004 or exp_023"
        )
        made[run] = (saved_parameters(run, target), there.seed)
    sizes = {run: sum(each.sizes.values()) for run, (each, _) in made.items()}
    found: dict[Instance, ParameterDecomposition] = {}
    for run, (each, seed) in made.items():
        least = min(sizes.values())
        instance = Instance("spd", sizes[run] // least, seed)
        require(
            sizes[run] % least == 0 and instance not in found,
            f"runs: {run} has {sizes[run]} components and seed {seed}, beside {', '.join(map(str, sizes.values()))} in all; "
            "sizes must be multiples of the smallest, each with every seed once",
        )
        found[instance] = each
    seeds = {times: {each.seed for each in found if each.times == times} for times in {each.times for each in found}}
    require(
        all(own == next(iter(seeds.values())) for own in seeds.values()),
        f"runs have seeds {' and '.join(str(sorted(own)) for own in seeds.values())} at their sizes, but each size needs the same",
    )
    return dict(sorted(found.items(), key=lambda item: (item[0].times, item[0].seed)))


def method_architectures(cfg: RunConfig, compared: Iterable[Instance]) -> dict[str, str]:
    """By method, for its colour; kinds of component are told apart by their names, but for the first."""
    known = {name.partition("_seed")[0]: each.architecture.value for name, each in decompositions(cfg).items()}
    components = list(dict.fromkeys(each.method for each in compared if each.method not in known))
    return known | {method: "spd" if method == components[0] else method for method in components}


def units(
    cfg: RunConfig, target: Target, made: Mapping[Instance, Decomposition | ParameterDecomposition]
) -> dict[Instance, list[Units]]:
    """The units that are active on enough of the held-out text. Kinds of unit of one method count as methods: "spd c_fc"."""
    text = heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
    keep, at_once = kept(text, cfg.activations), cfg.evaluation.batch_seqs
    found: dict[Instance, list[Units]] = {}
    for instance, each in made.items():
        match each:
            case ParameterDecomposition():
                groups = component_units(target, each, text, keep, at_once)
            case _:
                groups = units_of(target, each, text, keep, at_once)
        for group in groups:
            own = replace(instance, method=f"{instance.method} {group.part}") if group.part else instance
            found.setdefault(own, []).append(group.active_on(canonical_settings(cfg).min_tokens))
    return found


def pairs(instances: Sequence[Instance], reference: int) -> list[Pair]:
    """What is compared with what. Methods meet at the size `reference`, or at the only one they have."""
    by_method: dict[str, dict[int, list[Instance]]] = {}
    for each in instances:
        if each.trained:
            by_method.setdefault(each.method, {}).setdefault(each.times, []).append(each)
    starts = [each for each in instances if not each.trained]
    found = []
    for sizes in by_method.values():
        for of_size in sizes.values():
            found += [Pair(Kind.seed, a, b) for a, b in combinations(of_size, 2)]
            first = of_size[0]
            of_both = [each for each in starts if (each.method, each.times) == (first.method, first.times)]
            found += [Pair(Kind.untrained, first, each) for each in of_both]
        for small, large in combinations(sizes.values(), 2):
            found += [Pair(Kind.size, a, b) for a, b in zip(small, large[1:] + large[:1], strict=True)]
    at_reference = [sizes.get(reference, next(iter(sizes.values()))) for sizes in by_method.values()]
    for one, other in combinations(at_reference, 2):
        n = max(len(one), len(other))
        # Of one seed, methods may start with the same directions.
        found += [Pair(Kind.method, one[i % len(one)], other[(i + 1) % len(other)]) for i in range(n)]
    return found


def compared_units(cfg: RunConfig, units: Mapping[Instance, list[Units]]) -> list[Comparison]:
    """Every pair, with chance of its own. The text is shifted by a sequence or more."""
    settings = canonical_settings(cfg)
    asked = pairs(list(units), settings.times[len(settings.times) // 2])
    found = []
    with Progress("units compared", len(asked), 0, unit="pairs") as progress:
        for i, pair in enumerate(asked):
            own, other = units[pair.first], units[pair.second]
            found.append(compare(pair, own, other, settings, cfg.seed + i, cfg.tokens.seq_len))
            progress.advance(1)
    return found
