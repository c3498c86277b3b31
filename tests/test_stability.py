"""Laws of finding features again, on rows whose answer is known."""

from pathlib import Path

import pytest
import torch
from decomposition_parts import CPU, config
from evaluation_parts import D, ToyTarget, text
from experiment_parts import small_target
from numpy import asarray
from torch import Tensor

from nndecomp import build
from nndecomp.config.compose import compose
from nndecomp.config.schema import Activation, Architecture
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.evaluation.stability import (
    NULLS,
    Again,
    again,
    contained,
    decoder_rows,
    found_again,
    measurements,
    random_rows,
    share_above,
    splitting,
    written_rows,
)
from nndecomp.report import stability

DRAW = torch.Generator().manual_seed(0)
ROWS = [torch.randn(20, 64, generator=DRAW), torch.randn(30, 64, generator=DRAW)]


def shuffled(rows: list[Tensor], noise: float = 0.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    noisy = [each + noise * torch.randn(each.shape, generator=draw) for each in rows]
    return [3 * each[torch.randperm(len(each), generator=draw)] for each in noisy]


def test_the_same_features_in_another_order_and_size_are_all_found_again():
    assert found_again(ROWS, shuffled(ROWS)).tolist() == pytest.approx([1.0] * 50)
    noisy = found_again(ROWS, shuffled(ROWS, 0.3))
    assert 0.9 < noisy.mean() < 0.99 and share_above(noisy, 0.9) > 0.9


def test_a_feature_is_found_only_once():
    """Ten copies of one feature are one feature and nine that nobody has."""
    copies = [ROWS[0][:1].expand(10, -1)]
    assert share_above(found_again(copies, [ROWS[0]]), 0.99) == 0.1
    assert share_above(contained(copies, [ROWS[0]]), 0.99) == 1.0


def test_features_of_one_group_are_not_looked_for_in_another():
    swapped = [ROWS[1][:20], torch.cat([ROWS[0], ROWS[1][20:]])]
    assert share_above(found_again(ROWS, swapped), 0.99) == 10 / 50


def test_chance_finds_nothing_in_many_dimensions_and_much_along_few():
    """The null is about the data: where it varies in two directions, anything random resembles a feature."""
    isotropic = [torch.randn(500, 64, generator=DRAW) for _ in ROWS]
    plane = [torch.randn(500, 2, generator=DRAW) @ torch.randn(2, 64, generator=DRAW) for _ in ROWS]
    in_plane = [y[:20] for y in plane]
    assert share_above(found_again(random_rows(isotropic, ROWS, 0), ROWS), 0.7) == 0.0
    assert share_above(found_again(random_rows(plane, in_plane, 0), in_plane), 0.7) > 0.8


def test_random_directions_have_the_covariance_of_the_data_around_its_mean():
    y = torch.randn(4000, 3, generator=DRAW) * torch.tensor([3.0, 1.0, 0.1]) + 100
    (drawn,) = random_rows([y], [torch.zeros(4000, 3)], 0)
    assert drawn.std(0).tolist() == pytest.approx([3.0, 1.0, 0.1], rel=0.1)
    assert drawn.mean(0).abs().max() < 0.5


def test_a_feature_that_splits_counts_its_parts_and_one_that_is_lost_counts_none():
    e = torch.eye(4)
    small = [e[:3]]
    large = [torch.stack([e[0] + 0.2 * e[3], e[0] - 0.2 * e[3], e[1], e[3]])]
    assert splitting(small, large, 0.7).tolist() == [2, 1, 0]
    assert contained(small, large).tolist() == pytest.approx([0.9806, 1, 0], abs=1e-4)


def test_features_that_never_fire_do_not_count():
    target = ToyTarget(3)
    made, n = always_on(target), 24
    heldout, keep = text()
    alive, written = written_rows(target, made, heldout, keep, batch_seqs=4)
    assert [len(y) for y in written] == [int(keep.sum())] * 3
    assert [y.shape[1] for y in written] == [3 * D, 2 * D, D]
    assert [int(each.sum()) for each in alive] == [n - 1, n, n] and not alive[0][5]
    assert [len(rows) for rows in decoder_rows(made, alive)] == [n - 1, n, n]


def always_on(target: ToyTarget) -> SparseDictionary:
    """Codes are always positive, but for one feature that never is."""
    cfg = config(architecture=Architecture.cross_layer_transcoder, activation=Activation.relu, k=None)
    made = build_dictionary(cfg, target.shape, 0, CPU, "toy").eval()
    with torch.no_grad():
        for bank in made.banks:
            bank.b_enc.fill_(10.0)
        made.banks[0].b_enc[5] = -100.0
    return made


def looked_for(wider: bool, noise: float = 0.0) -> Again:
    b = shuffled(ROWS, noise)
    nulls = {"random": random_rows(ISOTROPIC, ROWS, 0), "untrained": random_rows(ISOTROPIC, ROWS, 1)}
    return again("clt", "clt_seed0", "clt_seed1", wider, ROWS, [torch.cat([each] * (1 + wider)) for each in b], nulls)


ISOTROPIC = [torch.randn(500, 64, generator=torch.Generator().manual_seed(2)) for _ in ROWS]


def test_chance_is_looked_for_in_the_same_rows_and_by_the_same_rule_as_features_are():
    """A null by another rule (best cosines against matched ones) would be too high or too low."""
    found = looked_for(wider=False)
    drawn = random_rows(ISOTROPIC, ROWS, 0)
    assert torch.equal(found.nulls["random"], found_again(drawn, shuffled(ROWS)))
    assert torch.equal(
        looked_for(wider=True).nulls["random"], contained(drawn, [x.repeat(2, 1) for x in shuffled(ROWS)])
    )
    assert found.cosine.min() > 0.999 and max(null.max() for null in found.nulls.values()) < 0.7


def test_rows_tell_shares_of_all_groups_and_of_each():
    found = again("m", "a", "b", False, ROWS, [torch.zeros(0, 64), ROWS[1]], {null: ROWS for null in NULLS})
    rows = {(row.metric, row.site): row.value for row in measurements(found, ["L0", "L1"], 10)}
    assert rows["found_again_70", "all"] == 30 / 50
    assert (rows["found_again_70", "L0"], rows["found_again_70", "L1"]) == (0.0, 1.0)
    assert (rows["n_alive", "all"], rows["n_alive", "L0"], rows["n_alive", "L1"]) == (50, 20, 30)
    assert rows["found_again_70_untrained", "all"] == 30 / 50
    assert {row.note for row in measurements(found, ["L0", "L1"], 10)} == {"in b"}


def test_a_feature_that_stands_twice_in_the_wider_dictionary_counts_as_split():
    rows = {
        row.metric: row.value for row in measurements(looked_for(wider=True), ["L0", "L1"], 10) if row.site == "all"
    }
    assert (rows["contained_90"], rows["split"]) == (1.0, 1.0) and rows["contained_70_random"] == 0.0


def test_the_table_has_a_line_for_each_kind_of_pair_and_means_over_pairs():
    found = [looked_for(False), looked_for(False, noise=20.0), looked_for(True)]
    lines = stability.summary(found)
    assert lines["looked for in"].tolist() == list(stability.SOUGHT.values())
    assert lines["> 0.9"].tolist() == ["50.0 ± 70.7%", "100.0%"]
    assert lines["random directions > 0.7"].tolist() == ["0.0 ± 0.0%", "0.0%"]
    assert lines["split"].tolist() == ["-", "100.0%"]
    assert stability.scores(found)["clt/found_again_90"] == 0.5


def test_the_figure_shows_the_whole_distribution_of_every_pair_and_of_chance():
    drawn = stability.figure([looked_for(False), looked_for(True)], {"clt": "cross_layer_transcoder"})
    drawn.draw_without_rendering()
    panels = drawn.axes
    assert [len(panel.lines) for panel in panels] == [3, 3]
    x, y = (asarray(each) for each in panels[0].lines[2].get_data())
    assert (x[0], y[0], x[-1], y[-1]) == (0, 1, 1, 0)
    assert y[x < 0.999].min() == 1, "all are found"
    chance = asarray(panels[0].lines[0].get_ydata())
    assert chance[0] > 0.9 and chance[140] == 0, "random directions end below 0.7"


def test_an_untrained_dictionary_is_what_training_begins_with(tmp_path: Path):
    """In raw units, as trained ones are: directions over several sites cannot be compared otherwise."""
    small_target(tmp_path / "model")
    one_step = ["training.lr=1e-12", "training.n_tokens=256", "activations.normalisation_tokens=256"]
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"def area(r): return {i} * r * r\n" * 99)
    model = [f"target.path={tmp_path / 'model'}", "target.kind=llama_simple_mlp"]
    model += ["tokens=files", f"tokens.path={tmp_path / 'text'}"]
    cfg = compose("exp_022_stability", ["+scale=smoke", *model, *one_step])
    target, members = build.target(cfg), {k: v for k, v in build.members(cfg).items() if v.seed < 2 and "clt" in k}
    starts, trained = build.untrained(cfg, target, members), build.trained(cfg, target, tmp_path / "run", members)
    for name, start in starts.items():
        for own, other in zip(start.banks, trained[name].banks, strict=True):
            torch.testing.assert_close(own.W_dec, other.W_dec, rtol=1e-5, atol=1e-9)
    first, second = (start.banks[0].W_dec for start in starts.values())
    assert not torch.allclose(first, second, rtol=0.1, atol=0), "seeds differ"
