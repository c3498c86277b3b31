"""Dictionaries of two models of other families and widths, from settings to the report, live and from a paired store."""

from pathlib import Path

import pytest
import torch
from tiny_models import N_VOCAB, save_tiny_model

from nndecomp import build
from nndecomp.activations.manifest import row_settings
from nndecomp.activations.store import open_store
from nndecomp.activations.store_writer import write_store
from nndecomp.config.compose import compose
from nndecomp.config.schema import RunConfig
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.errors import SettingError
from nndecomp.types import Site

WIDTHS = {"A": 32, "B": 48}
SITES = [Site.parse("A:L1.resid_post"), Site.parse("B:L1.resid_post")]
EXP_015, EXP_016 = "exp_015_crosscoder_model_diff", "exp_016_dedicated_feature_crosscoder"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A gpt2 and a llama of other width that share a tokenizer, and text of its words."""
    made = tmp_path_factory.mktemp("models")
    paths = [
        save_tiny_model("gpt2", made / "gpt2", n_embd=WIDTHS["A"]),
        save_tiny_model("llama", made / "llama", hidden_size=WIDTHS["B"]),
    ]
    draw = torch.Generator().manual_seed(3)
    (made / "text").mkdir()
    for i in range(80):
        words = torch.randint(N_VOCAB - 1, (60,), generator=draw).tolist()
        (made / "text" / f"{i}.txt").write_text(" ".join(f"w{word}" for word in words))
    return [
        *(f"target.{key}" for key in ("kind=huggingface", f"path={paths[0]}")),
        *(f"paired_target.{key}" for key in ("kind=huggingface", f"path={paths[1]}")),
        *("tokens=files", "tokens.kind=files", f"tokens.path={made / 'text'}", "tokens.seq_len=20"),
        *("decomposition.layers=[1]", "decomposition.n_features=48", "decomposition.initial_tokens=256"),
        *("training.n_tokens=2560", "training.batch_tokens=128", "training.lr=1e-2", "training.log_every=1"),
        *("activations.buffer_tokens=1024", "evaluation.n_seqs=6"),
    ]


def settings(models: list[str], *more: str, name: str = EXP_015) -> RunConfig:
    cfg = compose(name, ["+scale=smoke", *models, *more])
    build.check(cfg, trains=True)
    return cfg


def stored(cfg: RunConfig, out: Path) -> str:
    """What exp_030 does."""
    target = build.target(cfg)
    harvester = build.harvester(cfg, target, SITES)
    named = row_settings(cfg.target, cfg.paired_target, cfg.tokens, cfg.activations, target.tokenizer)
    write_store(harvester, out, named, n_rows=2048, seed=0)
    return f"activations.store={out}"


def fvus(cfg: RunConfig, dictionaries: dict[str, SparseDictionary]) -> dict[tuple[str, str], float]:
    found = build.compared(cfg, build.target(cfg), dictionaries)
    return {
        (name, model): float(each.diff.groups[f"fvu_{model}"].iloc[-1])
        for name, each in found.items()
        for model in WIDTHS
    }


def test_a_crosscoder_of_two_families_of_other_widths_explains_both(models: list[str], tmp_path: Path):
    """DFC: one width for both models, so that models of other widths cannot be compared at all."""
    cfg = settings(models)
    target = build.target(cfg)
    dictionaries = build.trained(cfg, target, tmp_path)
    for made in dictionaries.values():
        assert made.read_layout.widths == made.write_layout.widths == tuple(WIDTHS.values())
        assert made.banks[0].W_dec.shape == (48, sum(WIDTHS.values()))
    explained = fvus(cfg, dictionaries)
    assert all(value < 0.9 for value in explained.values()), explained
    found = build.compared(cfg, target, dictionaries)
    scores = build.reported_difference(found, target, tmp_path)
    kinds = [count for name, count in scores.items() if name.startswith("l1/")]
    assert sum(kinds) == (found["l1"].diff.features.frequency > 0).sum()


def test_a_paired_store_trains_as_both_models_do(models: list[str], tmp_path: Path):
    live = settings(models)
    place = stored(live, tmp_path / "store")
    cfg = settings(models, "activations=store", "activations.dtype=float32", place)
    target = build.target(cfg)
    opened = open_store(tmp_path / "store")
    assert opened.layout.sites == tuple(SITES) and opened.layout.widths == tuple(WIDTHS.values())
    scales, alive = build.scales(cfg, target, SITES), build.scales(live, target, SITES)
    for site in SITES:
        assert scales[site] == pytest.approx(alive[site], rel=0.1), "each model's own scale"
    assert scales[SITES[0]] != pytest.approx(scales[SITES[1]], rel=0.1)
    explained = fvus(cfg, build.trained(cfg, target, tmp_path / "run"))
    assert all(value < 0.9 for value in explained.values()), explained


def test_a_store_of_one_pair_is_refused_for_another(models: list[str], tmp_path: Path):
    place = stored(settings(models), tmp_path / "store")
    paths = {line.split("=")[0]: line.split("=", 1)[1] for line in models if ".path=" in line}
    swapped = [f"target.path={paths['paired_target.path']}", f"paired_target.path={paths['target.path']}"]
    cfg = compose(EXP_015, ["+scale=smoke", *models, *swapped, "activations=store", "activations.dtype=float32", place])
    with pytest.raises(SettingError, match=r"target\.path"):
        build.store(cfg, build.target(cfg), SITES)


def test_no_way_of_choosing_starves_a_group_where_training_starts_and_exclusivity_is_exact(
    models: list[str], tmp_path: Path
):
    cfg = settings(models, "decomposition.n_exclusive=[24,24]", name=EXP_016)
    target = build.target(cfg)
    start = build.activity(cfg, target, build.untrained(cfg, target))
    assert list(start) == ["k_per_group", "all_none", "all_sae", "all_crosscoder"]
    for name, found in start.items():
        assert (found.alive > 0.5).all(), f"{name}:\n{found}"
    dictionaries = build.trained(cfg, target, tmp_path)
    for name, made in dictionaries.items():
        shapes = [(tuple(bank.W_enc.shape), tuple(bank.W_dec.shape)) for bank in made.banks]
        assert shapes == [((24, 32), (24, 32)), ((48, 80), (48, 80)), ((24, 48), (24, 48))], name
    end = build.activity(cfg, target, dictionaries)
    scores = build.reported_activity(start, end, tmp_path)
    assert scores["k_per_group/alive_A_start"] == start["k_per_group"].alive[0]
    assert (tmp_path / "figures" / "activity.svg").exists()
