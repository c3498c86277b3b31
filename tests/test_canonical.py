"""Laws of what is compared with what, and how it is reported: exp_024."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.patches import Rectangle

from nndecomp import build
from nndecomp.build.canonical import pairs
from nndecomp.config.compose import compose, dump, load
from nndecomp.config.schema import CanonicalConfig
from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.pretrained import save_parameters
from nndecomp.errors import SettingError
from nndecomp.evaluation.comparing_units import Comparison, Instance, Kind, Pair, compare
from nndecomp.evaluation.units import Activity, Units
from nndecomp.report import canonical, canonical_figures
from nndecomp.targets.base import Target
from nndecomp.targets.maps import find_maps

N_TOKENS, D = 600, 12
SETTINGS = CanonicalConfig(n_null=1000)


def units(n: int, seed: int) -> Units:
    draw = torch.Generator().manual_seed(seed)
    active = torch.rand(N_TOKENS, n, generator=draw) < 0.08
    tokens, which = active.nonzero(as_tuple=True)
    activity = Activity(tokens, which, torch.ones(len(tokens)), N_TOKENS, n)
    read, write = torch.randn(2, n, D, generator=draw)
    return Units("L0", "", 0, {"in": read}, {"out": write}, True, activity)


def halved(whole: Units) -> Units:
    """Every unit as two, of the same directions: one on the even of its tokens, one on the odd."""
    of = whole.activity
    split = Activity(of.tokens, 2 * of.units + of.tokens % 2, of.values, N_TOKENS, 2 * of.n_units)
    reads, writes = (
        {space: rows.repeat_interleave(2, 0) for space, rows in side.items()} for side in (whole.reads, whole.writes)
    )
    return Units("L0", "", 0, reads, writes, True, split)


ONE = units(20, 0)


def comparisons() -> list[Comparison]:
    """Of seeds that agree, a start that has nothing of it, a larger one with every unit in two, and another method."""
    made = {
        Pair(Kind.seed, Instance("sae", 1, 0), Instance("sae", 1, 1)): ONE.of(torch.randperm(20)),
        Pair(Kind.untrained, Instance("sae", 1, 0), Instance("sae", 1, 1, trained=False)): units(20, 1),
        Pair(Kind.size, Instance("sae", 1, 0), Instance("sae", 2, 1)): halved(ONE),
        Pair(Kind.method, Instance("sae", 1, 0), Instance("spd c_fc", 1, 1)): halved(ONE),
    }
    return [compare(pair, [ONE], [second], SETTINGS, 0, 20) for pair, second in made.items()]


@pytest.fixture(scope="module")
def found() -> list[Comparison]:
    torch.manual_seed(0)
    return comparisons()


def test_what_is_the_same_is_found_kept_and_linked_to_its_own_alone(found: Sequence[Comparison]):
    same = found[0]
    assert same.weights is not None and same.agreement() == 1
    for compared in same.by().values():
        assert compared.matched.share_above(0.99) == 1 and compared.best.p().max() <= 0.001
    assert same.cover.parts.tolist() == [1] * 20 and same.graph.share_one_to_one() == 1
    assert same.absorbed is not None and same.absorbed.fraction.max() < 1e-12


def test_what_was_never_trained_has_nothing_of_it(found: Sequence[Comparison]):
    line = canonical.raw(found, 0.7)[1]
    assert line["weights_matched_found"] == line["activity_matched_found"] == line["kept"] == 0
    assert line["activity_matched_p_001"] <= 0.1


def test_a_larger_one_of_halves_splits_every_unit_and_absorbs_each_by_half(found: Sequence[Comparison]):
    line = canonical.raw(found, 0.7)[2]
    assert line["split"] == line["recall"] == line["precision"] == 1 and line["children"] == 2
    assert line["weights_best_found"] == 1, "halves have the direction of the whole"
    # The other half writes along the same direction, where the nearest unit is silent.
    assert line["absorption_fraction"] == pytest.approx(0.5, abs=0.1) and line["absorption_parents"] == 20


def test_between_methods_links_are_counted_from_both_sides(found: Sequence[Comparison]):
    line = canonical.raw(found, 0.7)[3]
    assert line["degree"] == 2 and line["degree_back"] == 1 and line["linked"] == line["linked_back"] == 1
    assert line["edges_one_to_one"] == 0 and line["largest_component"] == 3
    assert line["lost_back"] == 0 or line["kept_back"] > 0


def test_tables_say_what_was_looked_for_in_what(found: Sequence[Comparison]):
    lines = canonical.raw(found, 0.7)
    table = canonical.found_table(lines, 0.7)
    assert table["looked for in"].tolist() == ["other seed", "before training", "larger, other seed"]
    assert table["size"].tolist() == ["×1", "×1", "×1 in ×2"]
    assert table["weights > 0.7"].tolist() == ["100.0%", "0.0%", "100.0%"]
    assert canonical.split_table(lines)["split"].tolist() == ["0.0%", "100.0%"]
    between = canonical.method_table(lines, 0.7, 0.3)
    assert between["units of"].tolist() == ["sae", "spd c_fc"] and between["mean links"].tolist() == ["2.00", "1.00"]
    assert canonical.scores(lines)["sae/x1_in_x2/split"] == 1
    assert canonical.everywhere(found, 0.7) == {"sae/x1/in_every_seed": 1}


def test_a_unit_that_one_seed_lacks_is_not_in_every_seed(found: Sequence[Comparison]):
    lacking = ONE.of(torch.arange(15))
    other = compare(Pair(Kind.seed, Instance("sae", 1, 0), Instance("sae", 1, 2)), [ONE], [lacking], SETTINGS, 0, 20)
    assert canonical.everywhere([*found, other], 0.7) == {"sae/x1/in_every_seed": 0.75}


def test_figures_have_a_panel_for_each_question(found: Sequence[Comparison]):
    lines = canonical.raw(found, 0.7)
    colours = {"sae": "per_layer_sae", "spd c_fc": "spd c_fc"}
    links = canonical_figures.degrees(found, ["spd c_fc"])
    assert links is not None and canonical_figures.degrees(found, []) is None
    drawn = [
        (canonical_figures.found_again(lines, colours, 0.7), 4),
        (canonical_figures.children(found, colours), 1),
        (canonical_figures.between(lines, 0.7), 1),
        (links, 1),
    ]
    for figure, n_panels in drawn:
        figure.draw_without_rendering()
        assert len(figure.axes) == n_panels
        assert all(0 <= legend.get_window_extent().x0 <= figure.bbox.width / 2 for legend in figure.legends)
    heights = [bar.get_height() for bar in drawn[1][0].axes[0].patches if isinstance(bar, Rectangle)]
    assert heights == pytest.approx([0, 1, 0, 0, 0, 0, 0, 1, 0, 0]), "kept at the same size, two in the larger one"


def test_methods_of_which_some_were_never_compared_are_no_grid(found: Sequence[Comparison]):
    two = [Pair(Kind.method, Instance("clt", 1, 0), Instance(f"spd {part}", 1, 1)) for part in ("c_fc", "down_proj")]
    lacking = [*found, *(compare(pair, [ONE], [halved(ONE)], SETTINGS, 0, 20) for pair in two)]
    with pytest.raises(AssertionError, match="^spd down_proj and sae were not compared, but spd c_fc and sae, "):
        canonical_figures.degrees(lacking, ["spd c_fc", "spd down_proj"])


def test_every_two_seeds_and_sizes_are_compared_and_methods_never_with_the_same_seed():
    instances = [Instance(method, times, seed) for method in "ab" for times in (1, 2, 4) for seed in (0, 1, 2)]
    starts = [Instance(method, times, 1, trained=False) for method in "ab" for times in (1, 2, 4)]
    asked = pairs([*instances, *starts, Instance("neurons", 1, 0)], reference=2)
    count = {kind: sum(pair.kind is kind for pair in asked) for kind in Kind}
    assert count == {Kind.seed: 2 * 3 * 3, Kind.untrained: 2 * 3, Kind.size: 2 * 3 * 3, Kind.method: 3 * 3}
    for pair in asked:
        assert pair.first.trained and pair.second.trained == (pair.kind is not Kind.untrained)
        same = pair.first.seed == pair.second.seed
        assert not same or "neurons" in (pair.first.method, pair.second.method)
    assert {p.first.times for p in asked if p.kind is Kind.method} == {2}


def test_one_seed_or_one_size_cannot_be_compared():
    with pytest.raises(SettingError, match=r"compare.seeds must name at least two"):
        build.instances(compose("exp_024_canonical_units", ["+scale=smoke", "compare.seeds=[0]"]))
    with pytest.raises(SettingError, match=r"canonical.times=\[1\] must be at least two increasing"):
        compose("exp_024_canonical_units", ["+scale=smoke", "canonical.times=[1]"])


def test_sizes_are_multiples_of_each_method_with_the_same_seeds():
    made = build.instances(compose("exp_024_canonical_units", ["+scale=smoke", "compare.seeds=[3,5]"]))
    assert {each.times: member.config.n_features for each, member in made.items()} == {1: 64, 2: 128, 4: 256}
    assert all(each.seed == member.seed for each, member in made.items())
    assert {each.method for each in made} == {"sae", "transcoder", "clt"}


def finished_run(directory: Path, target: Target, n: int, seed: int, *overrides: str) -> Path:
    """What exp_023 leaves of `n` components in two maps."""
    cfg = compose("exp_023_train_spd_pile", ["+scale=smoke", f"seed={seed}", *overrides])
    directory.mkdir(parents=True)
    for name in ("scores.json", "provenance.json"):
        (directory / name).write_text("{}")
    (directory / "config.yaml").write_text(dump(cfg))
    maps = find_maps(target.module(), {"h.1.mlp.c_fc": n // 2, "h.1.mlp.down_proj": n // 2})
    importance = ImportanceConfig(kind=ImportanceKind.shared_mlp, hidden=[4])
    save_parameters(ParameterDecomposition(maps, importance, seed), directory / "decompositions" / "spd", target.name)
    return directory


def test_parameter_decompositions_of_finished_runs_are_instances_by_size_and_seed(tmp_path: Path):
    cfg = compose("exp_024_canonical_units", ["+scale=smoke"])
    target = build.target(cfg)
    assert build.component_instances(cfg, target) == {}
    for times, seed in ((2, 1), (1, 0), (1, 1)):
        finished_run(tmp_path / "runs" / f"{times}_{seed}", target, 16 * times, seed)
    # Two seeds of one size, and one of the other.
    with pytest.raises(SettingError, match=r"runs have seeds \[1\] and \[0, 1\] at their sizes|\[0, 1\] and \[1\]"):
        build.component_instances(replace(cfg, runs=[str(tmp_path / "runs")]), target)
    finished_run(tmp_path / "runs" / "2_0", target, 32, 0)
    made = build.component_instances(replace(cfg, runs=[str(tmp_path / "runs")]), target)
    assert list(made) == [Instance("spd", times, seed) for times in (1, 2) for seed in (0, 1)]
    assert [sum(each.sizes.values()) for each in made.values()] == [16, 16, 32, 32]
    finished_run(tmp_path / "runs" / "again", target, 16, 0)
    with pytest.raises(SettingError, match="each with every seed once"):
        build.component_instances(replace(cfg, runs=[str(tmp_path / "runs")]), target)


def test_a_run_without_a_parameter_decomposition_is_refused(tmp_path: Path):
    cfg = compose("exp_024_canonical_units", ["+scale=smoke", f"runs=[{tmp_path}/run]"])
    target = build.target(cfg)
    run = finished_run(tmp_path / "run", target, 16, 0)
    (run / "config.yaml").write_text(dump(replace(load(run / "config.yaml"), spd=None)))
    with pytest.raises(SettingError, match="trained no parameter decomposition"):
        build.component_instances(cfg, target)
