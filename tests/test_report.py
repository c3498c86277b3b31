"""Laws of tables and figures, on rows made up so that the right answer is known."""

import io
import json
import math
from pathlib import Path

import pandas
import pytest
from matplotlib.figure import Figure

from nndecomp.errors import SettingError
from nndecomp.evaluation.rows import Context, Measurement, join, table, write_rows
from nndecomp.report import figures, presets, style
from nndecomp.report.collect import collect, find_runs
from nndecomp.report.tables import comma_separated, markdown, notices, summary, terminal, wide


def made_up(
    architecture: str = "per_layer_transcoder",
    k: float = 8.0,
    increase: float = 1.0,
    zero: float = 4.0,
    live: bool = True,
    seed: int = 0,
    target: str = "toy",
    clean_gates: bool = False,
) -> pandas.DataFrame:
    context = Context(
        experiment="exp", run="run", name=f"{architecture} k={k:g} s={seed}", target=target, tokens="text",
        split="heldout", architecture=architecture, layers="0,1", n_features=64, activation="topk", k=float(k), seed=seed,
    )  # fmt: skip

    def row(metric: str, value: float, inputs: str = "none", patched: str = "all", half: float = 0.1) -> Measurement:
        return Measurement(metric, value, "nats", "all", patched, inputs, 100, value - half, value + half)

    rows = [row("ce_clean", 2.0), row("ce_increase_zero", zero), row("ce_increase_mean", 2.0)]
    for inputs, patched in (("clean", "none"), ("live", "all"))[: 1 + live]:
        rows += [row("ce_increase", increase * (1 + (inputs == "live")), inputs)]
        rows += [row(axis, 100.0 * k, inputs, patched) for axis in style.AXES]
        rows += [row("fvu", 0.5, inputs, patched), row("dead_fraction", 0.25, inputs, patched)]
    if clean_gates:
        rows += [row(metric, 1.5 * increase, "clean_gates") for metric in ("ce_increase", "fvu")]
        rows += [row(axis, 100.0 * k, "clean_gates") for axis in style.AXES]
    rows += [Measurement("ce_increase", 9.0, "nats", "L0.mlp_out", "single", "clean", 100)]
    if not live:
        rows += [
            Measurement(
                "live_obstacle", 1.0, "none", "all", "all", "live", 100, note="not evaluated live: it looks ahead"
            )
        ]
    return table(context, rows)


def test_ratios_are_made_from_raw_numbers_when_reporting():
    lines = wide(made_up(increase=1.0, zero=4.0)).set_index("inputs")
    assert lines.ce_recovered_zero.to_dict() == {"clean": 0.75, "live": 0.5}
    assert lines.ce_recovered_mean.to_dict() == {"clean": 0.5, "live": 0.0}
    assert lines.ce_increase.to_dict() == {"clean": 1.0, "live": 2.0}


def test_a_ratio_to_an_ablation_that_costs_nothing_is_refused():
    lines = wide(made_up(increase=0.01, zero=0.05))
    assert lines.ce_recovered_zero.isna().all() and lines.ce_recovered_mean.notna().all()
    assert set(summary(made_up(increase=0.01, zero=0.05))["CE recovered clean"]) == {"-"}


def test_the_table_has_one_line_a_decomposition():
    rows = join([made_up(k=8), made_up(k=16, increase=0.5), made_up("sae", math.nan), made_up("neurons", 8, 3.0)])
    lines = summary(rows)
    assert len(lines) == 4
    first = lines[lines.decomposition == "per_layer_transcoder k=16 s=0"].iloc[0]
    assert first["CE increase clean (nats)"] == "0.500 [0.400, 0.600]"
    assert first["CE increase live (nats)"] == "1.000 [0.900, 1.100]"
    assert (first["dead"], first["fvu live"]) == ("25.0%", "0.500")


def test_what_was_not_measured_live_shows_no_number_and_says_why():
    rows = join([made_up(k=8), made_up("crosscoder", 16, live=False)])
    line = summary(rows).set_index("decomposition").loc["crosscoder k=16 s=0"]
    assert line["CE increase live (nats)"] == line["fvu live"] == "-"
    assert notices(rows) == ["crosscoder k=16 s=0: not evaluated live: it looks ahead"]
    figures.pareto(rows)


def test_a_share_that_does_not_exist_is_explained():
    rows = made_up(increase=0.01, zero=0.05)
    assert notices(rows) == [
        "per_layer_transcoder k=8 s=0: CE recovered is '-', because zero-ablation raises CE by "
        "0.050 [-0.050, 0.150] nats, which is not above 0 beyond its interval"
    ]
    assert notices(made_up()) == []


def test_value_and_interval_have_the_same_decimals_and_no_negative_zero():
    line = summary(made_up(increase=-0.0004)).iloc[0]
    assert line["CE increase clean (nats)"] == "0.000 [-0.100, 0.100]"
    assert line["CE increase live (nats)"] == "-0.001 [-0.101, 0.099]"


def test_active_components_are_labelled_with_the_inputs_they_were_counted_on():
    rows = made_up(k=8)
    rows.loc[rows.metric.isin(style.AXES) & (rows.inputs == "live"), "value"] = 790.0
    clean, live = summary(rows).iloc[0], summary(rows[rows.inputs != "clean"]).iloc[0]
    assert clean["active per site clean"] == clean["active per module clean"] == "800.0"
    assert live["active per site live"] == live["active per module live"] == "790.0"


def test_measuring_twice_is_refused():
    with pytest.raises(AssertionError, match="measured twice"):
        wide(join([made_up(), made_up()]))


def test_terminal_and_markdown_are_rectangular():
    lines = summary(join([made_up(k=8), made_up(k=16)]))
    printed = terminal(lines).splitlines()
    assert len({len(line) for line in printed[-3:]}) == 1 and max(map(len, printed)) < 140
    assert {line.count("|") for line in markdown(lines).splitlines()} == {len(lines.columns) + 1}


def test_titles_say_which_layers():
    def title(layers: str) -> str:
        return figures.pareto(made_up().assign(layers=layers).astype({"layers": "string"})).get_suptitle()

    assert title("2") == "toy, layer 2 replaced (target CE 2.000 nats)"
    assert "layers 0 to 3 replaced" in title("0,1,2,3") and "layers 0,2 replaced" in title("0,2")


def test_csv_keeps_the_raw_numbers():
    lines = wide(made_up(increase=1 / 3))
    back = pandas.read_csv(io.StringIO(comma_separated(lines)))
    assert back.ce_increase.tolist() == lines.ce_increase.tolist()


def grid() -> pandas.DataFrame:
    return join(
        [
            made_up(a, float(k), increase / k)
            for a, increase in (("per_layer_transcoder", 8.0), ("neurons", 30.0))
            for k in (8, 16)
        ]
    )


def drawn(figure: Figure) -> None:
    figure.draw_without_rendering()


@pytest.mark.parametrize("draw", [figures.pareto, figures.pareto_axes, figures.fvu_against_l0])
def test_figures_show_every_point_and_nothing_leaves_the_canvas(draw):
    figure = draw(grid())
    drawn(figure)
    panel = figure.axes[0]
    shown = sorted(y for line in panel.lines for y in line.get_ydata() if line.get_linestyle() == "None")
    column = "fvu" if draw is figures.fvu_against_l0 else "ce_increase"
    assert shown == pytest.approx(sorted(wide(grid())[column]))
    low, high = panel.get_ylim()
    assert low <= min(shown) and max(shown) <= high
    canvas = figure.bbox
    for text in [*panel.texts, *(text for legend in figure.legends for text in legend.get_texts())]:
        box = text.get_window_extent()
        assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1, f"{text.get_text()!r} leaves the figure"


def test_presets_are_shown_by_their_names():
    rows = grid()
    rows["name"] = rows.architecture.str.cat(rows.k.map(str), sep=" ")
    figure = presets.figure(rows)
    drawn(figure)
    names, clean = list(dict.fromkeys(rows.name)), wide(rows).query("inputs == 'clean'")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    assert figure.get_suptitle() == f"{rows.target[0]}, {figures.layers_in_words(rows.layers[0])}, clean"
    for panel, column in zip(figure.axes, presets.METRICS, strict=True):
        shown = [y for line in panel.lines for y in line.get_ydata()]
        assert shown == pytest.approx(clean[column].tolist())
        assert len({(line.get_color(), line.get_marker()) for line in panel.lines}) == len(names)


def test_presets_that_were_measured_live_alone_are_drawn_live():
    rows = grid()
    figure = presets.figure(rows[rows.inputs != "clean"])
    assert figure.get_suptitle().endswith(", live")
    shown = [y for line in figure.axes[1].lines for y in line.get_ydata()]
    assert shown == pytest.approx(wide(rows).query("inputs == 'live'").ce_increase.tolist())


def test_gates_of_the_clean_run_are_drawn_where_they_were_measured_with_a_line_of_their_own():
    without = figures.pareto(grid())
    figure = figures.pareto(join([grid(), *(made_up("spd", k, 6.0 / k, clean_gates=True) for k in (8.0, 16.0))]))
    orange = [line for line in figure.axes[0].lines if line.get_color() == style.COLOURS["spd"]]
    joined = [list(line.get_ydata()) for line in orange if line.get_linestyle() != "None"]
    assert sorted(joined) == [pytest.approx([6 * x / 8, 6 * x / 16]) for x in (1.0, 1.5, 2.0)]
    assert len(set(figures.LINES.values())) == len(figures.LINES) == len(style.INPUTS)
    entry = "clean gates, live components"
    assert [entry in [text.get_text() for text in each.legends[0].get_texts()] for each in (without, figure)] == [0, 1]
    assert "SPD" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_legend_and_data_do_not_overlap():
    figure = figures.pareto(grid())
    drawn(figure)
    assert not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_window_extent())


def test_the_vertical_axis_is_chosen_by_the_data():
    def scale(*increases: float) -> str:
        return figures.pareto(join([made_up(k=k, increase=i) for k, i in enumerate(increases, 1)])).axes[0].get_yscale()

    assert scale(1.0, 0.01) == scale(0.2) == "log"
    assert scale(1.0, -0.01) == "symlog"
    assert scale(3.0, 2.0) == "linear"
    assert figures.fvu_against_l0(grid()).axes[0].get_yscale() == "linear"


def test_one_figure_compares_on_one_target():
    with pytest.raises(AssertionError, match="one target"):
        figures.pareto(join([made_up(target="a"), made_up(target="b")]))


def test_seeds_are_points_around_one_line():
    figure = figures.pareto(join([made_up(k=k, increase=i, seed=s) for k in (8, 16) for s, i in ((0, 1.0), (1, 3.0))]))
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in lines] == [[2.0, 2.0]]


def test_figures_are_written_as_vectors_and_pixels_and_reproduce(tmp_path: Path):
    a, b = (style.save(figures.pareto(grid()), tmp_path / name, "pareto") for name in "ab")
    assert [path.name for path in a] == ["pareto.pdf", "pareto.svg", "pareto.png"]
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(a, b, strict=True))


def finished_run(where: Path, rows: pandas.DataFrame) -> Path:
    where.mkdir(parents=True)
    (where / "provenance.json").write_text("{}")
    write_rows(rows, where / "rows.parquet")
    (where / "scores.json").write_text(json.dumps({}))
    return where


def test_finished_runs_are_collected_from_runs_and_from_directories_of_them(tmp_path: Path):
    first = finished_run(tmp_path / "sweep" / "k=8", made_up(k=8))
    finished_run(tmp_path / "sweep" / "k=16", made_up(k=16))
    assert len(wide(collect([tmp_path / "sweep"]))) == 4
    assert len(find_runs([first, tmp_path])) == 2
    assert collect([first]).equals(made_up(k=8))


def test_unfinished_and_missing_runs_are_refused_naming_the_setting(tmp_path: Path):
    run = finished_run(tmp_path / "k=8", made_up())
    (run / "scores.json").unlink()
    with pytest.raises(SettingError, match=r"^runs: .*k=8 is not finished"):
        collect([tmp_path])
    with pytest.raises(SettingError, match=r"^runs: .*absent is not a directory"):
        collect([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=r"^runs: .*empty holds no run"):
        collect([tmp_path / "empty"])
