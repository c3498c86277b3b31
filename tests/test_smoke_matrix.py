"""Every architecture x activation function x loss that makes sense trains through the whole path of a run, on masked text,
with all that is measured; the others are refused by one sentence. What there is: `smoke_parts`.

A run trains all losses of an architecture and an activation function side by side. A part of the matrix, with each of its
words, is in the default run; `make test-all` trains all of it.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from decomposition_parts import BOTH_MODELS
from smoke_parts import (
    ALL_ACTIVATIONS,
    ALL_ARCHITECTURES,
    CHOICES,
    CUT,
    LOSSES,
    N_LAYERS,
    N_STEPS,
    THROUGH,
    Cell,
    cells,
    config,
    member,
    planned,
    sensible,
    short_texts,
    small_model,
)

from nndecomp import build
from nndecomp.activations.sequences import Sequences
from nndecomp.build import training
from nndecomp.build.members import Member
from nndecomp.config.compose import compose
from nndecomp.config.schema import Directions, Normalisation, RunConfig, TargetConfig, TargetKind
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.errors import SettingError
from nndecomp.targets.base import Shape, Target


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 30 steps on a model of three layers, whose text is padded; beside it a smaller model."""
    at = tmp_path_factory.mktemp("smoke")
    cfg = compose(
        "config",
        [
            *("name=smoke", "device=cpu", "log.wandb=disabled"),
            *(f"target.path={small_model(at / 'a', 16, N_LAYERS, 0)}", "tokens=files", "tokens.packing=documents"),
            *(f"tokens.path={short_texts(at / 'texts.jsonl')}", "tokens.seq_len=16", "tokens.heldout_fraction=0.2"),
            *("activations.batch_seqs=8", "activations.buffer_tokens=1024", "activations.normalisation_tokens=256"),
            *("activations.drop_first=1", "training.batch_tokens=256", f"training.n_tokens={256 * N_STEPS}"),
            *("training.lr=2e-2", "training.log_every=1", f"training.evaluate_every={CUT}"),
            *(f"training.checkpoint_every={CUT}", "evaluation.n_seqs=4", "evaluation.batch_seqs=2"),
            *("evaluation.patched=[all,single,prefixes]", "evaluation.mean_seqs=2", "evaluation.bootstrap=8"),
        ],
    )
    cfg.paired_target = TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(small_model(at / "b", 12, 2, 1)))
    return cfg


def of(settings: RunConfig, architecture: str, normalisation: Normalisation) -> RunConfig:
    """The run of an architecture: of one model, or of both."""
    both = ALL_ARCHITECTURES[architecture].get("reads") == BOTH_MODELS["reads"]
    return replace(
        settings,
        paired_target=settings.paired_target if both else None,
        activations=replace(settings.activations, normalisation=normalisation),
    )


class Watched:
    """A stream that keeps a copy of the run's directory as it is when the batch after `CUT` is drawn: what is left of a
    run that is killed there."""

    def __init__(self, stream: Any, out: Path, copy: Path) -> None:
        self.stream, self.out, self.copy, self.n = stream, out, copy, 0
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict
        self.layout = stream.layout

    def next_batch(self) -> Any:
        if self.n == CUT:
            shutil.copytree(self.out, self.copy)
        self.n += 1
        return self.stream.next_batch()


def failures(cfg: RunConfig, members: Mapping[str, Member], at: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run of these decompositions does not do as it should, each with the name of the decomposition."""
    target, whole, cut = build.target(cfg), at / "whole", at / "cut"
    for name in ("stream", "sequences", "shuffled_sequences"):
        made = getattr(training, name)
        with_copy = lambda *given, made=made: Watched(made(*given), whole, cut)  # noqa: E731
        monkeypatch.setattr(training, name, with_copy)
    finished = build.trained(cfg, target, whole, members)
    monkeypatch.undo()
    again = build.trained(cfg, target, cut, members)
    found = [*unfallen(whole, members), *unequal(whole, cut, finished, again)]
    return [*found, *mismeasured(cfg, target, finished)]


def unfallen(out: Path, members: Mapping[str, Member]) -> Iterator[str]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in members:
        # What revives features begins with the first dead ones.
        losses = [row["loss"] - row.get("loss/aux", 0.0) for row in rows if row["name"] == name]
        assert len(losses) == N_STEPS and all(map(math.isfinite, losses)), f"{name}: {losses}"
        begin = math.ceil(N_STEPS * members[name].config.k_anneal)  # with fewer features on the way, it rises
        first, last = sum(losses[begin : begin + 5]) / 5, sum(losses[-5:]) / 5
        if not last < first:
            yield f"{name}: its loss went from {first:.4g} to {last:.4g}"


def unequal(
    whole: Path, cut: Path, finished: Mapping[str, SparseDictionary], again: Mapping[str, SparseDictionary]
) -> Iterator[str]:
    """What a run that was cut off, and what a saved dictionary, has otherwise."""
    logs = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, cut)]
    for mine, theirs in zip(*logs, strict=True):
        differing = {key for key in mine if key != "timing" and mine[key] != theirs.get(key)}
        if differing:
            yield f"{mine['name']}: resumed at {CUT}, step {mine['step']} has another {', '.join(sorted(differing))}"
    for name, made in finished.items():
        loaded = SparseDictionary.from_pretrained(whole / "decompositions" / name)
        for how, other in (("resumed", again[name]), ("loaded", loaded)):
            if other.spec != made.spec:
                yield f"{name}: {how}, it is {other.spec}, not {made.spec}"
            mine, theirs = made.state_dict(), other.state_dict()
            if mine.keys() != theirs.keys() or any(not torch.equal(mine[key], theirs[key]) for key in mine):
                yield f"{name}: {how}, its weights differ"
        x = torch.randn(9, made.read_layout.width)
        x = Sequences(x.view(1, *x.shape), torch.arange(9)) if made.needs_sequences else x
        if not torch.equal(made(x)[0], loaded(x)[0]):
            yield f"{name}: loaded, it computes something else"


def mismeasured(cfg: RunConfig, target: Target, finished: Mapping[str, SparseDictionary]) -> Iterator[str]:
    text = build.heldout(cfg, target, sorted({site for made in finished.values() for site in made.writes}))
    n_kept = int(text.keep.sum())
    assert 0 < n_kept < text.keep.numel() - text.keep.shape[0], "the text is to be padded beyond its first positions"
    rows = build.measured(cfg, target, {name: [made] for name, made in finished.items()}, "smoke", text=text)
    for name, made in finished.items():
        own = rows[rows.name == name]
        bad = own[~own.value.map(math.isfinite)]
        if len(bad):
            yield f"{name}: not finite: {', '.join(bad.metric + ' of ' + bad.site + ' ' + bad.inputs)}"
        if set(own[own.metric == "fvu"].n_tokens) != {n_kept}:
            yield f"{name}: measured on {set(own[own.metric == 'fvu'].n_tokens)} tokens, not the {n_kept} that count"
        two = len({site.model for site in (*made.reads, *made.writes)}) > 1
        obstacle = made.live_obstacle() is not None or two
        expected = {"clean"} if obstacle else {"clean", "live"}
        metrics = ("ce_increase", "kl", "top1_agreement", "fvu", "cosine", "l0")
        for metric in metrics:
            inputs = set(own[own.metric == metric].inputs) - {"none"}
            if inputs != expected:
                yield f"{name}: {metric} was measured {sorted(inputs)}, not {sorted(expected)}"
        if obstacle != bool((own.metric == "live_obstacle").any()):
            yield f"{name}: not live, but nothing says why"


def shape_of(cfg: RunConfig) -> Shape:
    return build.settings.shape_of_target(cfg)


def trains(
    settings: RunConfig, architecture: str, chosen: list[Cell], turn: int, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    kinds = list(Normalisation)
    cfg = of(settings, architecture, kinds[turn % len(kinds)])
    members = {str(cell): member(cell, shape_of(cfg)) for cell in chosen if sensible(cell)}
    if members:
        found = failures(cfg, members, tmp_path, patch)
        failed = {each.partition(":")[0] for each in found}
        drawn = [f"{cell}: {planned(cell, shape_of(cfg)).config}" for cell in chosen if str(cell) in failed]
        assert not found, "\n".join((*found, *drawn))


def part() -> dict[str, list[Cell]]:
    """Of each architecture two losses with one activation function: those that had the fewest cells so far."""
    found: dict[str, list[Cell]] = {}
    times: Counter[str] = Counter()
    for i, architecture in enumerate(ALL_ARCHITECTURES):
        losses = THROUGH if i % 4 == 0 else LOSSES
        possible = [cell for cell in cells(losses, architecture) if sensible(cell)]
        rarest = min(possible, key=lambda cell: (times[cell.activation], times[cell.loss]))
        own = [cell for cell in possible if cell.activation == rarest.activation]
        found[architecture] = sorted(own, key=lambda cell: times[cell.loss])[:2]
        times.update(word for cell in found[architecture] for word in {cell.activation, cell.loss})
    return found


PART = part()


def test_the_part_has_each_architecture_activation_function_and_loss():
    chosen = [cell for own in PART.values() for cell in own]
    for kinds, of in ((ALL_ARCHITECTURES, "architecture"), (ALL_ACTIVATIONS, "activation"), (LOSSES | THROUGH, "loss")):
        assert {getattr(cell, of) for cell in chosen} == set(kinds), of


@pytest.mark.parametrize("architecture", PART)
def test_a_part_of_the_matrix_trains(
    architecture: str, settings: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    turn = list(PART).index(architecture)
    trains(settings, architecture, PART[architecture], turn, tmp_path, monkeypatch)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes and types are not checked, which takes half the time: the part above has them checked."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_the_matrix_trains(
    architecture: str, activation: str, settings: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    turn = list(ALL_ARCHITECTURES).index(architecture) + list(ALL_ACTIVATIONS).index(activation)
    chosen = [Cell(architecture, activation, loss) for loss in LOSSES]
    trains(settings, architecture, chosen, turn, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_the_matrix_trains_through_the_target(
    architecture: str, settings: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen = [Cell(architecture, activation, loss) for activation in ALL_ACTIVATIONS for loss in THROUGH]
    trains(settings, architecture, chosen, list(ALL_ARCHITECTURES).index(architecture), tmp_path, monkeypatch)


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_what_makes_no_sense_is_refused_by_one_sentence_and_nothing_else_is(architecture: str, settings: RunConfig):
    shape = shape_of(of(settings, architecture, Normalisation.dataset))
    for cell in cells(LOSSES | THROUGH, architecture):
        if sensible(cell):
            config(cell, shape)
            continue
        with pytest.raises(SettingError) as said:
            config(cell, shape)
        one_sentence(str(said.value))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_any_two_choices_meet_in_the_matrix_or_are_refused_wherever_they_do(settings: RunConfig):
    shapes = {name: shape_of(of(settings, name, Normalisation.dataset)) for name in ALL_ARCHITECTURES}
    every = [cell for cell in cells(LOSSES | THROUGH) if sensible(cell)]
    met = set()
    for cell in every:
        plan = planned(cell, shapes[cell.architecture])
        for said in plan.refused:
            one_sentence(said)
        met |= set(combinations(sorted(plan.drawn.items()), 2))
    # Values that one architecture alone takes meet only some of the others in its few cells.
    alone = {("patterns", i) for i in range(len(CHOICES["patterns"]))}
    alone.add(("directions", CHOICES["directions"].index({"directions": Directions.heads})))
    values = [(name, i) for name in sorted(CHOICES) for i in range(len(CHOICES[name])) if (name, i) not in alone]
    for (a, i), (b, j) in combinations(values, 2):
        if a == b or ((a, i), (b, j)) in met:
            continue
        for cell in every[:: len(every) // 60]:
            with pytest.raises(SettingError):
                config(cell, shapes[cell.architecture], **CHOICES[a][i], **CHOICES[b][j])


def one_sentence(said: str) -> None:
    assert "\n" not in said and said.startswith("decomposition.") and not said.endswith("."), said
    assert "Error" not in said and len(said) < 400, said
