"""Every file of conf/decomposition: it says where it is from, and trains."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from smoke_parts import short_texts, small_model

from nndecomp import build
from nndecomp.build.members import Member, decompositions
from nndecomp.config.compose import compose
from nndecomp.config.registry import CONF
from nndecomp.config.schema import RunConfig, TargetConfig, TargetKind
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.errors import SettingError

FILES = {path.stem: path for path in sorted((CONF / "decomposition").glob("*.yaml"))}
# The trainers of dictionary_learning and its forks, crosslayer-transcoder, sparsify, and the newer architectures.
FIELD = {
    *("standard", "standard_april", "gated", "topk", "batchtopk", "jumprelu", "p_anneal", "gated_anneal", "matryoshka"),
    *("crosscoder", "batchtopk_crosscoder", "dfc", "clt_jumprelu_tanh", "clt_topk", "skip_transcoder", "molt", "lorsa"),
}
BASELINES = ("neurons", "neurons_by_output_norm", "neurons_by_attribution", "principal_directions", "random_directions")
OURS = (*BASELINES, "neuron_start")  # no paper's: baselines, and what starts as one
TRAINED = [name for name in FILES if name not in BASELINES]
N_CHUNKS, N_STEPS = 10, 4


def test_the_fields_trainers_are_there():
    assert FILES.keys() >= FIELD


@pytest.mark.parametrize("name", [name for name in FILES if name not in OURS])
def test_a_preset_names_paper_or_source_in_its_first_lines(name: str):
    lines = FILES[name].read_text().splitlines()
    comment = " ".join(line for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    sources = r"\(?20\d\d\)?|dictionary_learning|SAELens|sparsify|Language-Model-SAEs|[Cc]ross-?layer-transcoder"
    assert re.search(sources, comment), comment


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """On two models of three layers, in which the presets' layer 2 is."""
    at = tmp_path_factory.mktemp("presets")
    cfg = compose(
        "config",
        [
            *("name=presets", "device=cpu", "log.wandb=disabled", "decomposition.n_features=96", "decomposition.k=6"),
            *(f"target.path={small_model(at / 'a', 16, 3, 0)}", "tokens=files", "tokens.packing=documents"),
            *(f"tokens.path={short_texts(at / 'texts.jsonl')}", "tokens.seq_len=16", "tokens.heldout_fraction=0.2"),
            *("activations.batch_seqs=8", "activations.buffer_tokens=512", "activations.normalisation_tokens=256"),
            *("training.batch_tokens=64", f"training.n_tokens={64 * N_STEPS}", "training.log_every=1"),
            *("training.lr_warmup=0", "evaluation.n_seqs=4", "evaluation.batch_seqs=4", "evaluation.patched=[all]"),
            *("evaluation.mean_seqs=2", "evaluation.bootstrap=0"),
        ],
    )
    cfg.paired_target = TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(small_model(at / "b", 12, 3, 1)))
    return cfg


@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_presets_are_refused_nothing_and_train(chunk: int, settings: RunConfig, tmp_path: Path):
    """With few features, from few rows; whatever else their files say stays."""
    names = TRAINED[chunk::N_CHUNKS]
    few = ["initial_tokens=1024", "n_features=96"]
    cfg = replace(settings, presets={name: [name, *few] for name in names})
    both = {name for name, each in decompositions(cfg).items() if each.reads[0].startswith("A:")}
    for own in (both, set(names) - both):
        if not own:
            continue
        run = replace(
            cfg,
            presets={name: words for name, words in cfg.presets.items() if name in own},
            paired_target=cfg.paired_target if own == both else None,
        )
        build.check(run, trains=True, patches=False)  # of several layers, which one figure would not compare
        trains(run, tmp_path / ("both" if own == both else "one"))


def test_what_one_figure_cannot_compare_is_refused_before_it_trains():
    with pytest.raises(SettingError, match=r"b writes layers=\[0\] and a layers=\[2\], .* give b layers=\[2\]"):
        build.check(
            compose("exp_027_train_presets", ["+scale=smoke", "+presets={a: [topk], b: [transcoder]}"]), trains=True
        )
    same = compose("exp_027_train_presets", ["+scale=smoke", '+presets={a: [topk], b: [transcoder, "layers=[2]"]}'])
    build.check(same, trains=True)
    variant = compose("exp_017_clt_replacement_model", ["+scale=smoke", "+compare.variants.x.layers=[0]"])
    with pytest.raises(SettingError, match=r"x_k\d+\S* writes layers=\[0\]"):
        build.check(variant, trains=True)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["decomposition=crosscoder"],
            "measures nothing of crosscoder, since group shared reads L3.resid_post, which runs",
        ),
        (["decomposition=dfc", "+target@paired_target=tiny"], "since its sites are in two models"),
    ],
)
def test_dictionaries_without_live_inputs_are_not_trained_to_be_measured_on_them_alone(overrides, sentence):
    def check(inputs: str) -> None:
        asked = ["+scale=smoke", *overrides, f"evaluation.inputs=[{inputs}]"]
        build.check(compose("exp_027_train_presets", asked), trains=True)

    check("clean,live")
    with pytest.raises(SettingError, match=sentence):
        check("live")


def trains(cfg: RunConfig, out: Path) -> None:
    target = build.target(cfg)
    members: dict[str, Member] = build.trainable(cfg)
    finished = build.trained(cfg, target, out, members)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name, made in finished.items():
        losses = [row["loss"] for row in rows if row["name"] == name]
        assert len(losses) == N_STEPS and all(map(math.isfinite, losses)), f"{name}: {losses}"
        first = build_dictionary(members[name].config, target.shape, cfg.seed, target.device, target.name)
        before = dict(first.named_parameters())
        still = [key for key, p in made.named_parameters() if key in before and torch.equal(p, before[key])]
        assert not still, f"{name}: {', '.join(still)} did not learn"
    measured = build.measured(cfg, target, {name: [made] for name, made in finished.items()}, "presets")
    assert measured.value.map(math.isfinite).all()
    assert set(measured.name) == set(finished)
