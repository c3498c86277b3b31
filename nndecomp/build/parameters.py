"""Settings -> a parameter decomposition, trained, and the gates behind which it is measured."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nndecomp.build.measuring import heldout, measured, scores
from nndecomp.build.parameter_checks import check_parameters
from nndecomp.config.evaluation import MasksConfig
from nndecomp.config.schema import (
    EvaluationConfig,
    Inputs,
    Patched,
    RunConfig,
    SPDConfig,
    require,
)
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.spd.gates import Gate, GateKind
from nndecomp.decompositions.spd.pretrained import load_parameters, save_parameters
from nndecomp.evaluation.heldout_losses import losses, means
from nndecomp.evaluation.masking import chosen_maps
from nndecomp.targets.base import Target
from nndecomp.targets.maps import find_maps
from nndecomp.tokens import heldout_tokens, open_tokens
from nndecomp.training.language_model import TokenBatches
from nndecomp.training.log import Log
from nndecomp.training.loop import train
from nndecomp.training.parameters import SPDObjective
from nndecomp.training.state import saved_steps
from nndecomp.training.subjects import LanguageModel
from nndecomp.types import Site

NAME = "spd"  # of the parameter decomposition in its run


def objective(cfg: RunConfig, spd: SPDConfig, target: Target) -> SPDObjective:
    """As it is drawn, before its warm-up."""
    decomposition = ParameterDecomposition(find_maps(target.module(), spd.maps), spd.importance, cfg.seed, spd.tie)
    for name in decomposition.maps:
        target.place_of_map(name)  # refused now, not when it is evaluated
    rows = (batch_seqs(cfg), cfg.tokens.seq_len)
    return SPDObjective(decomposition, LanguageModel(target), spd, rows)


def token_batches(cfg: RunConfig, target: Target) -> TokenBatches:
    tokens = open_tokens(cfg.tokens, target.tokenizer, cfg.seed)
    return TokenBatches(tokens, batch_seqs(cfg), target.device)


def batch_seqs(cfg: RunConfig) -> int:
    """Of training."""
    return cfg.training.batch_tokens // cfg.tokens.seq_len


def trained_parameters(cfg: RunConfig, target: Target, out: Path) -> ParameterDecomposition:
    """The parameter decomposition of `spd`, as `trained_objective` trains it."""
    return trained_objective(cfg, target, out).finished()


def trained_objective(cfg: RunConfig, target: Target, out: Path) -> SPDObjective:
    """Trains the parameter decomposition of `spd`, going on from a checkpoint, and saves it; in eval mode."""
    spd = cfg.spd
    require(spd is not None, "spd=null, but this experiment trains a parameter decomposition; write e.g. +spd=tiny")
    assert spd is not None
    require(
        not cfg.log.utilisation,
        "log.utilisation=true is of dictionaries, but spd names a parameter decomposition; write false",
    )
    check_parameters(cfg)
    heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)  # too little is refused now, not at the end
    made = objective(cfg, spd, target)
    check_subsets(cfg.evaluation, list(made.decomposition.maps))  # refused now, not when it is evaluated
    if not saved_steps(out / "checkpoint"):
        made.start(cfg.name)
    evaluate = _looking(cfg, target, made, out.name) if cfg.training.evaluate_every else None
    with Log(out, cfg.log, name=f"{cfg.name}/{out.name}") as progress:
        batches = token_batches(cfg, target)
        train({NAME: made}, batches, cfg.training, out, log=progress, evaluate=evaluate, description=cfg.name)
    save_parameters(made.finished(), out / "decompositions" / NAME, target.name)
    return made.eval()


def saved_parameters(run: Path, target: Target) -> ParameterDecomposition:
    """What a finished run trained."""
    return load_parameters(run / "decompositions" / NAME, target.module())


def gates(cfg: EvaluationConfig) -> list[Gate]:
    """Those that a parameter decomposition is measured behind."""
    found = [
        Gate(GateKind.importance),
        *(Gate(GateKind.threshold, each) for each in cfg.thresholds),
        *(Gate(GateKind.topk, each) for each in cfg.topk),
        *(Gate(GateKind.topk_all, each) for each in cfg.topk_all),
    ]
    return [*found, *(replace(each, delta=True) for each in found if cfg.delta)]


def gated(
    cfg: EvaluationConfig,
    target: Target,
    decompositions: Mapping[str, ParameterDecomposition],
    writes: Sequence[Site] | None = None,
) -> dict[str, GatedParameters]:
    """Each behind each gate, as `<name>_<gate>`; a gate for more components than there are is left out, as `left_out` says.

    writes: only maps that take part in these sites are gated, the others stay as they are; null: all.
    """
    made = {
        f"{name}_{gate.name}": GatedParameters(each, target, gate, writes)
        for name, each in decompositions.items()
        for gate in gates(cfg)
        if fits(gate, each)
    }
    for each in made.values():
        check_subsets(cfg, each.places)
    return made


def check_subsets(cfg: EvaluationConfig, maps: Collection[str]) -> None:
    """SettingError for a subset of the decomposed maps that has none."""
    for name, patterns in cfg.masks.subsets.items():
        require(
            bool(chosen_maps(maps, patterns)),
            f"evaluation.masks.subsets.{name}={patterns} matches none of the maps that are measured: {', '.join(maps)}",
        )


def left_out(cfg: EvaluationConfig, name: str, decomposition: ParameterDecomposition) -> list[str]:
    """A sentence if some gates are for more components than there are."""
    gone = [gate.name for gate in gates(cfg) if not fits(gate, decomposition)]
    sizes = decomposition.sizes.values()
    return [
        f"{name} has no points {', '.join(gone)}: its smallest map has {min(sizes)} components, all maps together {sum(sizes)}"
        for _ in gone[:1]
    ]


def fits(gate: Gate, decomposition: ParameterDecomposition) -> bool:
    sizes = decomposition.sizes.values()
    match gate.kind, gate.value:
        case GateKind.topk, int(k):
            return k <= min(sizes)
        case GateKind.topk_all, int(k):
            return k <= sum(sizes)
        case _:
            return True


def _looking(cfg: RunConfig, target: Target, made: SPDObjective, run: str) -> Callable[[int], dict[str, float]]:
    """Held-out scores on the way, of masks as they are trained and of binary ones, and losses; the text is read once."""
    quick = replace(
        cfg.evaluation,
        patched=[Patched.all],
        bootstrap=0,
        pursuit=[],
        masks=MasksConfig(),
        topk=[],
        topk_all=[],
        inputs=[Inputs.clean_gates],
    )
    now = gated(quick, target, {NAME: made.decomposition})
    text = heldout(cfg, target, next(iter(now.values())).writes)

    def look(step: int) -> dict[str, float]:
        progress = step * cfg.training.batch_tokens / cfg.training.n_tokens
        found = means(*losses(made, text.tokens, batch_seqs(cfg), progress, cfg.seed))
        return {f"{NAME}/{name}": value for name, value in found.items()} | scores(
            measured(replace(cfg, evaluation=quick), target, {n: [g] for n, g in now.items()}, run, text=text)
        )

    return look
