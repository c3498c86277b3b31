"""Fronts and the areas under them, on points whose answer is found by hand."""

import math

import pandas
import pytest
from test_report import drawn, made_up

from nndecomp.evaluation.bootstrap import Estimate
from nndecomp.evaluation.rows import join
from nndecomp.report import front_figures, fronts, style
from nndecomp.report.fronts import Point, areas, at, common_range, families, front, left_out, measured_inputs, table
from nndecomp.report.results import results


def point(x: float, y: float) -> Point:
    return Point(float(x), Estimate(float(y), y - 0.5, y + 1.0))


def test_the_front_has_the_points_that_no_other_beats():
    line = [point(1, 9), point(2, 4), point(4, 3), point(8, 1)]
    beaten = [point(2, 5), point(3, 4), point(8, 2), point(16, 1)]
    assert front([*beaten, *line[::-1]]) == line
    assert front([point(5, 2)]) == [point(5, 2)]


def test_a_front_is_linear_in_log_x_and_stays_where_it_ends():
    line = [point(1, 9), point(4, 5)]
    assert [at(line, float(x)).value for x in (1, 2, 4, 100)] == pytest.approx([9, 7, 5, 5])
    with pytest.raises(AssertionError, match="begins at 1"):
        at(line, 0.5)


def test_an_area_is_the_mean_height_over_log_x():
    """From 9 at 1 to 5 at 4 to 1 at 16: over 1 to 16 the mean of two trapezoids; over 2 to 8, that of 7, 5 and 3."""
    line = [point(1, 9), point(4, 5), point(16, 1)]
    whole, middle = fronts.area(line, 1.0, 16.0), fronts.area(line, 2.0, 8.0)
    assert (whole.value, middle.value) == pytest.approx((5, 5))
    assert (whole.low, whole.high) == pytest.approx((4.5, 6))
    assert fronts.area(line, 1.0, 4.0).value == pytest.approx(7)
    assert fronts.area(line, 4.0, 64.0).value == pytest.approx((3 + 1) / 2), "flat where it has ended"
    bent = [point(1, 8), point(2, 0)]
    assert fronts.area(bent, 1.0, 8.0).value == pytest.approx((4 * math.log(2) + 0) / math.log(8))


def rows_of(*points: tuple[str, int, float, float], inputs: tuple[str, ...] = ("live",)) -> pandas.DataFrame:
    """(family, seed, x, CE increase), the same x on every axis."""
    tables = [made_up(family, x, y, seed=seed) for family, seed, x, y in points]
    rows = join(tables)
    on_axis = rows.metric.isin(style.AXES)
    rows.loc[on_axis, "value"] /= 100  # made_up has 100 k
    rows.loc[(rows.metric == "ce_increase") & (rows.inputs == "live"), "value"] /= 2  # and twice the increase
    return rows[rows.inputs.isin([*inputs, "none"]) | (rows.patched == "single")].reset_index(drop=True)


TWO = [("sae", 0, 1.0, 8.0), ("sae", 0, 16.0, 4.0), ("spd", 0, 4.0, 3.0), ("spd", 0, 64.0, 1.0)]


def test_areas_are_over_the_range_in_which_all_were_measured():
    """4 to 16: SAEs fall from 6 to 4, SPD from 3 to 2."""
    found = areas(rows_of(*TWO)).query("axis == 'active_per_module'").set_index("family")
    assert set(zip(found.x_low, found.x_high, strict=True)) == {(4.0, 16.0)}
    assert found.area.to_dict() == pytest.approx({"sae": 5.0, "spd": 2.5})
    assert found.sd.isna().all() and (found.seeds == 1).all()
    assert set(areas(rows_of(*TWO)).axis) == set(style.AXES) - {"gate_parameters"}


def test_points_that_are_beaten_change_no_area():
    worse = [("sae", 0, 8.0, 8.5), ("spd", 0, 32.0, 3.5)]
    assert areas(rows_of(*TWO, *worse)).area.tolist() == pytest.approx(areas(rows_of(*TWO)).area.tolist())


def test_seeds_have_a_front_each_and_areas_a_mean_and_a_scatter():
    """A second seed 2 nats above the first one: the mean is 1 above, the standard deviation sqrt(2); its points beat none
    of the first one's, and would be beaten by them."""
    above = [("sae", 1, x, y + 2) for _, _, x, y in TWO[:2]]
    found = areas(rows_of(*TWO, *above)).query("axis == 'active_per_module'").set_index("family")
    assert found.area["sae"] == pytest.approx(6.0) and found.sd["sae"] == pytest.approx(math.sqrt(2))
    assert (found.seeds["sae"], found.area["spd"]) == (2, pytest.approx(2.5))
    assert "(sd 1.414)" in table(areas(rows_of(*TWO, *above)), "live").iloc[1, 1]


def test_a_seed_measured_in_a_smaller_range_narrows_it():
    narrow = [("sae", 1, 2.0, 9.0), ("sae", 1, 8.0, 5.0)]
    family = families(results(rows_of(*TWO, *narrow)), "active_per_module", "ce_increase", "live")[0]
    assert (family.name, family.low, family.high) == ("sae", 2.0, 8.0)


def test_a_family_that_does_not_span_the_range_of_the_others_has_no_area_and_is_named():
    far = [("molt", 0, 50.0, 3.0), ("molt", 0, 500.0, 1.0), ("crosscoder", 0, 9.0, 1.0)]
    found = areas(rows_of(*TWO, *far))
    one = found[found.axis == "active_per_module"].set_index("family")
    assert one.area.isna().to_dict() == {"sae": False, "spd": False, "molt": True, "crosscoder": True}
    assert table(found, "live").set_index("family").loc["molt"].iloc[0] == "-"
    said = left_out(found)
    assert len(said) == 2 * len(fronts.AXES)
    assert "crosscoder, live: no area over active components per module, measured from 9 to 9 with every seed, not from 4 to 16" in said  # fmt: skip


def test_an_axis_without_a_common_range_is_named():
    rows = rows_of(*TWO)
    apart = (rows.metric == "active_parameters") & (rows.architecture == "spd")
    rows.loc[apart, "value"] *= 1000
    found = areas(rows)
    assert "active_parameters" not in set(found.axis)
    assert left_out(found) == [
        "live: no areas over active parameters, since no two families were measured over a common factor of 2"
    ]


def test_the_common_range_holds_as_many_families_as_possible_and_is_then_as_wide_as_possible():
    def range_of(*ends: tuple[float, float]) -> tuple[float, float] | None:
        points = [(f"f{i}", 0, x, y) for i, (a, b) in enumerate(ends) for x, y in ((a, 2.0), (b, 1.0))]
        return common_range(families(results(rows_of(*points)), "active_per_module", "ce_increase", "live"))

    assert range_of((1, 16), (4, 64), (2, 32)) == (4, 16)
    assert range_of((1, 16), (2, 16), (15, 400)) == (2, 16), "less than a factor of 2 is none"
    assert range_of((1, 4), (8, 32)) is range_of((1, 4)) is None


def test_families_are_compared_only_for_inputs_with_which_two_were_measured():
    both = rows_of(*TWO, inputs=("clean", "live"))
    assert measured_inputs(both) == ["clean", "live"]
    assert measured_inputs(both[~((both.architecture == "spd") & (both.inputs == "clean"))]) == ["live"]
    assert measured_inputs(rows_of(*TWO[:2])) == []


def test_the_table_has_the_best_family_first_and_says_the_range():
    found = areas(rows_of(*TWO))
    lines = table(found, "live")
    assert lines.family.tolist() == ["SPD", "SAE"] and lines.seeds.tolist() == ["1", "1"]
    assert lines.columns[1] == "active components per module, 4 to 16"
    assert lines.iloc[0, 1].startswith("2.500 [")


def test_figures_of_fronts_draw_every_point_and_a_line_a_family():
    rows = rows_of(*TWO, ("sae", 0, 8.0, 7.0), inputs=("clean", "live"))
    for figure, n in ((front_figures.figure(rows), 2), (front_figures.figure_of_axes(rows, "live"), len(fronts.AXES))):
        drawn(figure)
        panels = figure.axes[:n]
        for panel in panels:
            points = [y for line in panel.lines if line.get_linestyle() == "None" for y in line.get_ydata()]
            assert sorted(points) == pytest.approx([1, 3, 4, 7, 8])
            joined = [line for line in panel.lines if line.get_linestyle() != "None"]
            assert sorted(line.get_ydata()[0] for line in joined) == pytest.approx([3, 8])
            assert panel.patches, "the range of the areas is shaded"
        labels = [text.get_text() for each in (*figure.legends, figure.axes[-1].get_legend()) if each for text in each.get_texts()]  # fmt: skip
        assert {"SAE", "SPD", "live inputs"} <= set(labels)
