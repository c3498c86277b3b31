"""From settings to objects. The one file that knows every kind of everything.

settings -> target -> tokens -> stream of rows -> objectives -> trained dictionaries -> measurements
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.activations.buffer import check_capacity
from nndecomp.activations.harvest import Harvester, check_positions, kept
from nndecomp.activations.manifest import row_settings
from nndecomp.activations.statistics import measure, site_means, site_scales
from nndecomp.activations.store import Store, open_store, verify
from nndecomp.activations.stream import RowStream, StoreStream, live_stream
from nndecomp.checkpoint import write_text
from nndecomp.config.compose import load
from nndecomp.config.schema import (
    Activation,
    ActivationsKind,
    Architecture,
    DecompositionConfig,
    Normalisation,
    Patched,
    RunConfig,
    require,
)
from nndecomp.decompositions.architectures import build_dictionary, wire
from nndecomp.decompositions.base import Decomposition
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.neurons import NeuronBaseline, build_neurons
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.evaluation.context import context
from nndecomp.evaluation.rows import join, table, write_rows
from nndecomp.evaluation.suite import evaluate_all
from nndecomp.targets.base import Target, TargetShape
from nndecomp.targets.load import load_target, target_shape
from nndecomp.tokens import TokenBatch, heldout_tokens, open_tokens
from nndecomp.training.log import Log, check_log
from nndecomp.training.loop import train
from nndecomp.types import Site

if TYPE_CHECKING:
    from pandas import DataFrame


def device(cfg: RunConfig) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU."""
    match cfg.device:
        case "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        case "mps":
            require(torch.backends.mps.is_available(), "device=mps is not on this machine; write device=auto")
        case name if name.startswith("cuda"):
            n_devices, index = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
            require(index < n_devices, f"device={name} is not among {n_devices} CUDA devices; write device=auto")
        case _:
            pass
    return torch.device(cfg.device)


def decompositions(cfg: RunConfig) -> dict[str, DecompositionConfig]:
    """Every decomposition of a run by name: the one of `decomposition`, or the grid of `compare`."""
    if cfg.compare is None:
        return {cfg.decomposition.architecture.value: cfg.decomposition}
    return {
        f"{architecture.value}_k{k}": of_architecture(cfg.decomposition, architecture, k)
        for architecture in cfg.compare.architectures
        for k in cfg.compare.k
    }


def of_architecture(cfg: DecompositionConfig, architecture: Architecture, k: int) -> DecompositionConfig:
    """The same settings with another wiring, where it takes the place of the MLPs, as its file in conf/ has it."""
    match architecture:
        case Architecture.per_layer_sae:
            reads, changes = ["mlp_out"], {"skip": False, "centre_input": True, "unit_norm_decoder": True}
        case Architecture.per_layer_transcoder | Architecture.cross_layer_transcoder:
            reads, changes = ["mlp_in"], {}
        case Architecture.neurons:
            # Their number is the target's d_mlp; n_features only must not refuse k.
            reads, changes = ["mlp_hidden"], {"activation": Activation.topk, "n_features": max(cfg.n_features, k)}
        case Architecture.sae | Architecture.transcoder:
            require(False, f"compare.architectures has {architecture.value}; write per_layer_{architecture.value}")
            raise AssertionError
    return replace(cfg, architecture=architecture, reads=reads, writes=["mlp_out"], k=k, **changes)


def check(cfg: RunConfig, trains: bool = False) -> None:
    """Refuses (SettingError) what sizes alone can refuse: no weight is loaded, nothing is written.

    trains: the experiment trains decompositions.
    """
    device(cfg)
    check_log(cfg.log)
    if cfg.pretrain is not None:
        return  # the target is made by the run
    shape = target_shape(cfg.target)
    check_length(cfg, shape)
    check_positions(cfg.activations, cfg.tokens.seq_len)
    if trains:
        trainable(cfg)
    if cfg.runs:
        check_runs(cfg)
    sites = decomposed_sites(cfg, shape)
    if cfg.activations.store is not None:
        open_store(Path(cfg.activations.store), sites)


def decomposed_sites(cfg: RunConfig, shape: TargetShape) -> list[Site]:
    """Every site that a decomposition of the run reads or writes; SettingError if the target has no such site."""
    groups = [group for each in decompositions(cfg).values() for group in wire(each, shape).groups]
    return sorted({site for group in groups for site in (*group.reads, *group.writes)})


def check_length(cfg: RunConfig, shape: TargetShape) -> None:
    require(
        cfg.tokens.seq_len <= shape.n_ctx,
        f"tokens.seq_len={cfg.tokens.seq_len} is more than the {shape.n_ctx} tokens the target takes in",
    )


def check_runs(cfg: RunConfig) -> list[Path]:
    """The finished runs at or below `runs`, which all must be of the run's own target."""
    from nndecomp.report.collect import find_runs  # late: loads pandas

    runs = find_runs([Path(run) for run in cfg.runs])
    for run in runs:
        theirs = load(run / "config.yaml").target
        require(
            theirs == cfg.target,
            f"runs: {run} is of target.path={theirs.path} (revision {theirs.revision}, {theirs.dtype.value}), "
            f"but this run has target.path={cfg.target.path} (revision {cfg.target.revision}, {cfg.target.dtype.value})",
        )
    return runs


def target(cfg: RunConfig) -> Target:
    return load_target(cfg.target, device(cfg))


def harvester(cfg: RunConfig, target: Target, sites: Sequence[Site]) -> Harvester:
    """Rows at `sites` over the training split, from its start."""
    tokens = open_tokens(cfg.tokens, target.tokenizer, cfg.seed)
    return Harvester(target, tokens, sites, cfg.activations, seq_len=cfg.tokens.seq_len)


def stream(cfg: RunConfig, target: Target, sites: Sequence[Site]) -> RowStream:
    """Batches of training.batch_tokens shuffled rows at `sites`."""
    match cfg.activations.kind:
        case ActivationsKind.live:
            return live_stream(harvester(cfg, target, sites), cfg.training.batch_tokens, cfg.seed)
        case ActivationsKind.store:
            rows, window_rows = store(cfg, target, sites), cfg.activations.buffer_tokens
            return StoreStream(rows, cfg.training.batch_tokens, cfg.seed, window_rows, target.device)


def store(cfg: RunConfig, target: Target, sites: Sequence[Site]) -> Store:
    """The store of `activations`, refused if it holds rows of another model, text or other sites."""
    settings = row_settings(cfg.target, cfg.tokens, cfg.activations, target.tokenizer)
    opened = open_store(Path(str(cfg.activations.store)), sites, settings)
    opened.check_target(target)
    if cfg.activations.verify:
        verify(opened)
    return opened


def scales(cfg: RunConfig, target: Target, sites: Sequence[Site]) -> dict[Site, float]:
    """What each site's rows are divided by while training; folded into the weights afterwards."""
    match cfg.activations.normalisation:
        case Normalisation.none:
            return dict.fromkeys(sites, 1.0)
        case Normalisation.dataset if cfg.activations.kind is ActivationsKind.store:
            rows = store(cfg, target, sites)
            return site_scales(rows.statistics, rows.layout)
        case Normalisation.dataset:
            rows = harvester(cfg, target, sites)
            return site_scales(measure(rows, cfg.activations.normalisation_tokens), rows.layout)


def trainable(cfg: RunConfig) -> dict[str, DecompositionConfig]:
    """The decompositions to train; SettingError if there is none, or the buffer cannot hold their rows."""
    every = decompositions(cfg)
    configs = {name: each for name, each in every.items() if each.architecture is not Architecture.neurons}
    require(bool(configs), "decomposition.architecture=neurons is a baseline that is never trained; write another one")
    if cfg.activations.kind is ActivationsKind.live:
        rows_at_most = cfg.activations.batch_seqs * cfg.tokens.seq_len
        check_capacity(cfg.activations.buffer_tokens, cfg.training.batch_tokens, rows_at_most)
    return configs


def trained(cfg: RunConfig, target: Target, out: Path) -> dict[str, SparseDictionary]:
    """Trains every dictionary of the run on one stream, going on from a checkpoint, and saves them."""
    configs = trainable(cfg)
    heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)  # too little is refused now, not at the end
    dictionaries = {
        name: build_dictionary(each, target.shape, cfg.seed, target.device, target.name)
        for name, each in configs.items()
    }
    sites = sorted({site for each in dictionaries.values() for site in (*each.reads, *each.writes)})
    rows, site_scale = stream(cfg, target, sites), scales(cfg, target, sites)
    objectives = {
        name: DictionaryObjective(each, configs[name], rows.layout, site_scale) for name, each in dictionaries.items()
    }
    evaluate = looking(cfg, target, objectives, out.name) if cfg.training.evaluate_every else None
    with Log(out, cfg.log, name=f"{cfg.name}/{out.name}") as progress:
        train(objectives, rows, cfg.training, out, log=progress, evaluate=evaluate, description=cfg.name)
    finished = {name: objective.finished() for name, objective in objectives.items()}
    for name, dictionary in finished.items():
        dictionary.save_pretrained(out / "decompositions" / name)
    return finished


def looking(
    cfg: RunConfig, target: Target, objectives: Mapping[str, DictionaryObjective], run: str
) -> Callable[[int], dict[str, float]]:
    """What the loop calls for held-out scores on the way; the text is read once."""
    quick = replace(cfg, evaluation=replace(cfg.evaluation, patched=[Patched.all], bootstrap=0))
    text = heldout(cfg, target, sorted({site for each in objectives.values() for site in each.dictionary.writes}))

    def look(step: int) -> dict[str, float]:
        now = {name: [objective.finished()] for name, objective in objectives.items()}
        return scores(measured(quick, target, now, run, text=text))

    return look


def baselines(cfg: RunConfig, target: Target) -> dict[str, NeuronBaseline]:
    """What the run compares with and need not train."""
    return {
        name: build_neurons(each, target).eval()
        for name, each in decompositions(cfg).items()
        if each.architecture is Architecture.neurons
    }


@dataclass(frozen=True)
class Heldout:
    """Held-out text, which of its positions count, and the mean of each written site over training text."""

    tokens: TokenBatch
    keep: Bool[Tensor, "batch pos"]
    means: dict[Site, Float[Tensor, " width"]]


def heldout(cfg: RunConfig, target: Target, writes: Sequence[Site]) -> Heldout:
    tokens = heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
    rows = harvester(cfg, target, writes)
    means = site_means(measure(rows, cfg.evaluation.mean_seqs * cfg.tokens.seq_len), rows.layout)
    return Heldout(tokens, kept(tokens, cfg.activations), means)


def measured(
    cfg: RunConfig,
    target: Target,
    replacements: Mapping[str, Sequence[Decomposition]],
    run: str,
    seeds: Mapping[str, int] | None = None,
    text: Heldout | None = None,
) -> "DataFrame":
    """Rows for each named replacement, on held-out text, read anew unless it is given.

    `seeds` are those of training, where they are not the run's.
    """
    writes = sorted({site for parts in replacements.values() for part in parts for site in part.writes})
    text = heldout(cfg, target, writes) if text is None else text
    found = evaluate_all(target, replacements, text.tokens, text.keep, text.means, cfg.evaluation, cfg.seed)
    contexts = {
        name: context(cfg, target, parts, run, name, (seeds or {}).get(name, cfg.seed))
        for name, parts in replacements.items()
    }
    return join([table(contexts[name], measurements) for name, measurements in found.items()])


def scores(rows: "DataFrame") -> dict[str, float]:
    """The few numbers by which runs are compared at a glance, everything replaced: scores.json."""
    whole = rows[(rows.site == "all") & rows.metric.isin(["ce_increase", "fvu"])]
    columns = (whole[column] for column in ("name", "metric", "inputs", "value"))
    return {f"{name}/{metric}_{inputs}": value for name, metric, inputs, value in zip(*columns, strict=True)}


def reported(rows: "DataFrame", out: Path) -> dict[str, float]:
    """Writes the rows, draws the Pareto figure, writes and prints the table, and returns the scores."""
    from nndecomp.report import figures, style, tables  # late: matplotlib and pandas are slow to import

    write_rows(rows, out / "rows.parquet")
    style.save(figures.pareto(rows), out / "figures", "pareto")
    table = tables.summary(rows)
    write_text(out / "table.md", tables.markdown(table))
    print(tables.terminal(table), *tables.notices(rows), sep="\n")
    return scores(rows)
