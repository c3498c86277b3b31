"""Laws of the parts of an evaluation: sums, intervals, x-axes, rows."""

import math
from pathlib import Path

import pytest
import torch

from nndecomp.decompositions.base import GroupCost
from nndecomp.errors import SettingError
from nndecomp.evaluation.bootstrap import Ratio, estimate, resamples
from nndecomp.evaluation.costs import VALUE_BITS, axes
from nndecomp.evaluation.patching import Batch
from nndecomp.evaluation.reconstruction import SiteErrors, density_summary, site_means
from nndecomp.evaluation.rows import COLUMNS, Context, Measurement, join, read_rows, table, write_rows
from nndecomp.types import Point, Site

SITE = Site(0, Point.mlp_out)
NOTHING = torch.zeros(0, 4, dtype=torch.float64)


def batches(n_seqs: int, pos: int, batch_seqs: int) -> list[Batch]:
    """All positions of all sequences, `batch_seqs` at a time."""
    tokens = torch.zeros(n_seqs, pos, dtype=torch.int64)
    parts = [slice(start, min(start + batch_seqs, n_seqs)) for start in range(0, n_seqs, batch_seqs)]
    return [
        Batch(tokens[part], torch.arange(len(tokens[part]) * pos), part, torch.ones(len(tokens[part]), pos - 1).bool())
        for part in parts
    ]


def site_mean(metric: str, y: torch.Tensor, y_hat: torch.Tensor, batch_seqs: int = 2) -> float:
    """The pooled mean over [seq pos width] activations, centred anywhere."""
    errors = SiteErrors(len(y), torch.full(y.shape[2:], 3.0))
    for batch in batches(len(y), y.shape[1], batch_seqs):
        errors.add(batch, y[batch.seqs].flatten(0, 1), y_hat[batch.seqs].flatten(0, 1))
    return estimate(site_means({SITE: errors})[metric, "all"], torch.zeros(0, len(y), dtype=torch.float64), 0.95).value


def test_fvu_is_one_for_the_mean_zero_for_perfection_and_blind_to_scale():
    y = torch.randn(4, 6, 5) * torch.tensor([10.0, 1, 1, 0.1, 5]) + 7
    y_hat = y + torch.randn_like(y)
    mean = y.mean((0, 1)).expand_as(y)
    assert site_mean("fvu", y, mean) == pytest.approx(1, abs=1e-5)
    assert site_mean("fvu", y, y) == 0
    for scale in (1e-4, 1e4):
        assert site_mean("fvu", scale * y, scale * y_hat) == pytest.approx(site_mean("fvu", y, y_hat), rel=1e-3)
    expected = (y - y_hat).double().square().sum() / (y - mean).double().square().sum()
    assert site_mean("fvu", y, y_hat) == pytest.approx(expected.item(), rel=1e-5)


def test_fvu_sees_a_constant_offset_and_pooled_sums_do_not_depend_on_the_batching():
    y = torch.randn(5, 6, 3)
    assert site_mean("fvu", y, y + 1) == pytest.approx((1 / y.var((0, 1), correction=0).mean()).item(), rel=1e-5)
    y_hat = torch.randn_like(y)
    for metric in ("fvu", "mse", "cosine"):
        assert site_mean(metric, y, y_hat, 1) == pytest.approx(site_mean(metric, y, y_hat, 5), rel=1e-12)


def test_a_coordinate_with_most_of_the_variance_hides_the_others_from_the_pooled_fvu_alone():
    """The first of four coordinates is explained, the second half, the third not at all, the fourth never varies."""
    y = torch.randn(4, 50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 1, 1, 0]) + 7
    mean = y.mean((0, 1)).expand_as(y)
    y_hat = torch.stack([y[..., 0], (y[..., 1] + mean[..., 1]) / 2, mean[..., 2], y[..., 3]], -1)
    errors = SiteErrors(4, torch.full((4,), 3.0))
    for batch in batches(4, 50, 3):
        errors.add(batch, y[batch.seqs].flatten(0, 1), y_hat[batch.seqs].flatten(0, 1))
    assert site_mean("fvu", y, y_hat) < 2e-4
    torch.testing.assert_close(errors.fvus, torch.tensor([0, 0.25, 1], dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_mse_and_cosine_by_hand():
    y, y_hat = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 0.0], [0.0, 0.0]]])
    assert site_mean("mse", y, y_hat) == pytest.approx((16 + 4) / 4)
    # A reconstruction that is zero points nowhere: cosine 0.
    assert site_mean("cosine", y, y_hat) == pytest.approx((0.6 + 0) / 2)


def test_x_axes_of_two_layers_by_hand():
    """A cross-layer transcoder on 2 layers of width 10: the first layer's 32 features write twice, the second's 8 once,
    beside a linear map of 10 x 10."""
    first = GroupCost(
        "L0", n_components=32, parameters=10 + 2 * 10, n_writes=2, gate_parameters=320, linear_parameters=0
    )
    second = GroupCost("L1", n_components=8, parameters=10 + 10, n_writes=1, gate_parameters=80, linear_parameters=100)
    active = torch.tensor([3.0, 5.0], dtype=torch.float64)
    by_name = {axis.name: axis.of(active).item() for axis in axes([first, second], n_writes=2)}
    assert by_name == {
        "active_per_module": (3 + 5) / 2,
        "active_per_reconstruction": (3 * 2 + 5) / 2,  # layer 0 gets 3, layer 1 gets 3 + 5
        "active_parameters": 3 * 30 + 5 * 20 + 100,
        "active_parameters_with_gate": 3 * 30 + 5 * 20 + 100 + 320 + 80,
        "gate_parameters": 320 + 80,
        "description_length": 3 * (5 + VALUE_BITS) + 5 * (3 + VALUE_BITS),
    }


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw = torch.Generator().manual_seed(0)
    drawn, hits, trials = resamples(60, 300, seed=1), 0, 300
    for _ in range(trials):
        n = torch.randint(5, 20, (60,), generator=draw).double()
        sums = n * (1 + torch.randn(60, generator=draw, dtype=torch.float64))  # tokens of a sequence move together
        e = estimate(Ratio(sums, n), drawn, 0.9)
        assert e.low <= e.value <= e.high
        hits += e.low <= 1 <= e.high
    assert 0.84 < hits / trials < 0.95


def test_intervals_are_deterministic_paired_and_weigh_long_sequences_more():
    n = torch.tensor([1.0, 9.0, 2.0, 8.0], dtype=torch.float64)
    a = Ratio(torch.tensor([1.0, 0, 2, 0], dtype=torch.float64), n)
    drawn = resamples(4, 100, seed=5)
    assert torch.equal(drawn, resamples(4, 100, seed=5)) and not torch.equal(drawn, resamples(4, 100, seed=6))
    assert drawn.sum(1).eq(4).all()
    assert estimate(a, drawn, 0.95).value == 3 / 20
    shifted = Ratio(a.over + 2 * n, n)
    difference = estimate(shifted - a, drawn, 0.95)
    assert difference.low == pytest.approx(2) == difference.high
    assert estimate(shifted, drawn, 0.95).high - estimate(shifted, drawn, 0.95).low > 0.1
    with pytest.raises(AssertionError, match="0.0 tokens"):
        estimate(Ratio(n * 0, n * 0), drawn, 0.95)


def test_density_summary_by_hand():
    summary = density_summary(torch.tensor([0, 0.0005, 0.05, 0.5], dtype=torch.float64))
    assert summary["dead_fraction"] == 0.25
    assert summary["density_below_1e-1"] == 0.75
    assert summary["density_below_1e-3"] == 0.5
    assert summary["density_below_1e-5"] == 0.25


CONTEXT = Context(
    experiment="exp", run="r", name="n", target="t", tokens="x", split="heldout", architecture="sae", layers="0,1",
    n_features=8, activation="relu", k=math.nan, seed=0,
)  # fmt: skip


def test_rows_come_back_from_disk_as_they_were(tmp_path: Path):
    rows = table(CONTEXT, [Measurement("ce_clean", 1.5, "nats", "all", "all", "none", 10, 1.0, 2.0)])
    assert {column: str(dtype) for column, dtype in rows.dtypes.items()} == COLUMNS
    path = tmp_path / "rows.parquet"
    write_rows(join([rows, rows]), path)
    back = read_rows(path)
    assert back.equals(join([rows, rows])) and len(back) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_foreign_table_is_refused(tmp_path: Path):
    import pandas

    pandas.DataFrame({"metric": ["x"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(SettingError, match=r"not a table of measurements, it has no column experiment, run"):
        read_rows(tmp_path / "rows.parquet")
    with pytest.raises(AssertionError, match="has columns"):
        write_rows(pandas.DataFrame({"metric": ["x"]}), tmp_path / "other.parquet")


def test_no_measurements_make_an_empty_table_of_the_same_kind():
    assert {column: str(dtype) for column, dtype in table(CONTEXT, []).dtypes.items()} == COLUMNS
