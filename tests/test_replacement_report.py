"""Laws of comparing replacement models at the same sparsity, on rows made up so that the right answer is known."""

import math

import pandas
import pytest
from matplotlib.figure import Figure
from numpy import asarray

from nndecomp.evaluation.bootstrap import Estimate
from nndecomp.evaluation.rows import Context, Measurement, join, table
from nndecomp.report.replacement import METRICS, Kind, at_sparsity, figure, matched, mean_over_seeds

AXIS = "active_per_reconstruction"
KINDS = {
    "clt_k4_seed0": [Kind("clt", "features", 100), Kind("clt", "parameters", 100)],
    "clt_k16_seed0": [Kind("clt", "features", 100), Kind("clt", "parameters", 100)],
    "neurons_k4": [Kind("neurons", "features", None)],
    "neurons_k16": [Kind("neurons", "features", None)],
}


def measured(name: str, architecture: str, k: int, active: float, value: float, seed: int = 0) -> pandas.DataFrame:
    context = Context(
        experiment="exp", run="run", name=name, target="toy", tokens="text", split="heldout",
        architecture=architecture, layers="0,1", n_features=64, activation="topk", k=float(k), seed=seed,
    )  # fmt: skip
    rows = [Measurement(AXIS, active, "components", "all", "all", "live", 100, active, active)]
    rows += [Measurement(each, value, "", "all", "all", "live", 100, value - 0.1, value + 0.1) for each in METRICS]
    return table(context, rows)


def rows() -> pandas.DataFrame:
    return join(
        [
            measured("clt_k4_seed0", "cross_layer_transcoder", 4, 4.0, 0.8),
            measured("clt_k16_seed0", "cross_layer_transcoder", 16, 16.0, 0.4),
            measured("neurons_k4", "neurons", 4, 4.0, 3.0),
            measured("neurons_k16", "neurons", 16, 16.0, 1.0),
        ]
    )


def exact(value: float) -> Estimate:
    return Estimate(value, value - 1, value + 1)


def test_between_two_measurements_the_value_is_linear_in_the_logarithm_of_what_is_active():
    """8 lies half way between 4 and 16; the order in which points come does not matter."""
    points = [(16.0, exact(1.0)), (4.0, exact(3.0)), (64.0, exact(-5.0))]
    assert at_sparsity(points, 8.0) == exact(2.0)
    assert at_sparsity(points, 32.0) == exact(-2.0)


def test_nothing_is_said_beyond_what_was_measured():
    points = [(4.0, exact(3.0)), (16.0, exact(1.0))]
    assert math.isnan(at_sparsity(points, 3.0).value) and math.isnan(at_sparsity(points, 17.0).value)
    assert math.isnan(at_sparsity([(4.0, exact(3.0))], 8.0).value)


def test_a_measurement_that_missed_its_sparsity_by_a_hundredth_stands_for_it():
    assert at_sparsity([(15.9, exact(1.0))], 16.0) == exact(1.0)
    assert at_sparsity([(15.9, exact(1.0)), (16.1, exact(2.0)), (40.0, exact(0.0))], 16.05) == exact(2.0)


def test_seeds_are_averaged_and_their_scatter_is_the_unbiased_standard_deviation():
    mean = mean_over_seeds([exact(1.0), exact(2.0), exact(6.0)])
    assert mean.estimate == exact(3.0)
    assert mean.sd == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert math.isnan(mean_over_seeds([exact(1.0)]).sd)


def test_a_method_stands_in_every_comparison_it_belongs_to_and_says_nothing_outside_its_range():
    lines = matched(rows(), KINDS, AXIS, 8.0)
    assert list(zip(lines.matching, lines.method, strict=True)) == [
        ("features", "clt"), ("parameters", "clt"), ("features", "neurons"),
    ]  # fmt: skip
    assert lines["top-1 agreement"].tolist() == ["0.600 [0.500, 0.700]"] * 2 + ["2.000 [1.900, 2.100]"]
    assert lines.parameters.tolist() == ["100", "100", "-"]
    assert set(matched(rows(), KINDS, AXIS, 64.0)["CE increase (nats)"]) == {"-"}


def test_each_seed_is_read_at_the_sparsity_before_seeds_are_averaged():
    """Of the second seed, 4 features reach 6 MLPs: its value at 4 does not exist, so neither does a mean at 4."""
    both = join(
        [
            rows(),
            measured("clt_k4_seed1", "cross_layer_transcoder", 4, 6.0, 1.0, seed=1),
            measured("clt_k16_seed1", "cross_layer_transcoder", 16, 16.0, 0.6, seed=1),
        ]
    )
    kinds = KINDS | {name: KINDS["clt_k4_seed0"] for name in ("clt_k4_seed1", "clt_k16_seed1")}
    of_clt = {
        x0: matched(both, kinds, AXIS, x0).set_index("method").loc["clt", "top-1 agreement"] for x0 in (4.0, 16.0)
    }
    assert list(of_clt[4.0]) == ["-", "-"]
    assert list(of_clt[16.0]) == ["0.500 [0.400, 0.600] (sd 0.141)"] * 2


def test_the_figure_shows_every_mean_in_a_row_of_panels_for_each_comparison():
    drawn: Figure = figure(rows(), KINDS, AXIS)
    drawn.draw_without_rendering()
    assert len(drawn.axes) == 2 * len(METRICS)
    shown = [sorted(y for line in panel.lines for y in asarray(line.get_ydata())) for panel in drawn.axes]
    assert shown == [pytest.approx(values) for values in ([0.4, 0.8, 1.0, 3.0], [0.4, 0.8]) for _ in METRICS]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["clt", "neurons"]
    bars = drawn.axes[0].collections[0].get_segments()  # pyright: ignore[reportAttributeAccessIssue]
    assert [bar[:, 1].tolist() for bar in bars] == [pytest.approx([0.7, 0.9]), pytest.approx([0.3, 0.5])]


def test_what_was_not_measured_is_named():
    with pytest.raises(AssertionError, match="sae was not measured with live inputs"):
        matched(rows(), KINDS | {"sae_k4": [Kind("sae", "features", 1)]}, AXIS, 8.0)
