"""Laws of whole runs on data of which everything is known: settings -> training -> what was found."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nndecomp import build
from nndecomp.activations.manifest import row_settings
from nndecomp.activations.store_writer import write_store
from nndecomp.config.compose import compose
from nndecomp.evaluation.recovery import Recovery, measurements

UNSEEN = 7  # a seed that nothing was tuned on


def found(world: str, names: Sequence[str], out: Path) -> dict[str, dict[str, float]]:
    """What exp_019 measures of some presets of a world."""
    cfg = build.world(compose("exp_019_ground_truth"), world, UNSEEN)
    cfg = replace(cfg, presets={name: cfg.presets[name] for name in names})
    target = build.target(cfg)
    dictionaries = build.trained(cfg, target, out)
    return {name: numbers(each) for name, each in build.recovered(cfg, target, dictionaries, 4096).items()}


def numbers(of: Recovery) -> dict[str, float]:
    return {row.metric: row.value for row in measurements(of) if row.site == "all"}


@pytest.mark.slow
def test_presets_find_well_separated_features(tmp_path: Path):
    presets = ("standard_april", "topk", "jumprelu", "matching_pursuit", "batchtopk_crosscoder")
    for name, each in found("separated", presets, tmp_path).items():
        assert each["matched_cosine"] > 0.95, f"{name}: {each}"
        assert each["matched_cosine_null"] < 0.5, "what chance reaches"


@pytest.mark.slow
def test_prefixes_keep_parents_whole_that_are_split_without(tmp_path: Path):
    one, nested = found("hierarchy", ("batchtopk", "matryoshka"), tmp_path).values()
    assert nested["split_features"] < one["split_features"] and nested["absorption"] < one["absorption"]


@pytest.mark.slow
def test_features_of_one_model_are_found_in_its_own_group_where_groups_do_not_compete(tmp_path: Path):
    of_groups, competing = found("two_models", ("dfc", "dfc_crosscoder"), tmp_path).values()
    assert of_groups["recovered_in_own_group"] > 0.56 > competing["recovered_in_own_group"]


@pytest.mark.slow
def test_a_cross_layer_feature_is_a_chain_and_a_transcoders_feature_a_rule(tmp_path: Path):
    for name, each in found("chain", ("per_layer_transcoder", "cross_layer_transcoder"), tmp_path).items():
        assert each["matched_cosine"] > 0.9, f"{name}: {each}"


def test_rules_are_found_from_a_store_as_from_rows_as_they_come(tmp_path: Path):
    settings = ["name=planted", "target=planted", "tokens=random", "decomposition=transcoder", "decomposition.k=2"]
    settings += ["decomposition.n_features=64", "target.planted.d_model=64", "target.planted.n_rules=16"]
    settings += ["target.planted.d_mlp=16", "activations.batch_seqs=16", "activations.buffer_tokens=2048"]
    settings += ["activations.normalisation_tokens=2048", "training.n_tokens=60_000", "training.batch_tokens=256"]
    live = compose("config", [*settings, "training.lr=1e-2"])
    target = build.target(live)
    rows = build.harvester(live, target, build.decomposed_sites(live, target.shape))
    about = row_settings(live.target, None, live.tokens, live.activations, target.tokenizer)
    write_store(rows, tmp_path / "store", about, n_rows=20_000, seed=0)
    stored = compose(
        "config", [*settings, "training.lr=1e-2", "activations=store", f"activations.store={tmp_path / 'store'}"]
    )
    for cfg, name in ((live, "live"), (stored, "stored")):
        build.check(cfg, trains=True)
        trained = build.trained(cfg, target, tmp_path / name)
        (of,) = build.recovered(cfg, target, trained, 2048).values()
        assert numbers(of)["matched_cosine"] > 0.95, f"{name}: {numbers(of)}"
