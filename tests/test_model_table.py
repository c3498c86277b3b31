"""The table of finished runs, on numbers that are counted by hand."""

import pandas
import pytest
import torch
from decomposition_parts import CPU, SHAPE, config
from torch import nn

from nndecomp.config.schema import Activation, Architecture
from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.parts import Part, Parts, parts_of_dictionary, parts_of_parameters
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.evaluation.rows import Context, Measurement, join, table
from nndecomp.report import model_table as report
from nndecomp.report.model_table import Trained, lines, shown
from nndecomp.targets.maps import find_maps


def rows_of(
    name: str, run: str = "r", architecture: str = "per_layer_transcoder", inputs: str = "live", **other: float
) -> pandas.DataFrame:
    """Two parts of 10 components: 2 of L0 are dead, none of L1; 3 and 5 are active. Replaced alone, L1 costs 0.25 nats."""
    context = Context(
        "exp",
        run,
        name,
        "toy",
        "text",
        "heldout",
        architecture,
        "0,1",
        10,
        "topk",
        other.get("k", 4.0),
        int(other.get("seed", 0)),
    )

    def row(metric: str, value: float, site: str, patched: str = "all") -> Measurement:
        return Measurement(metric, value, "unit", site, patched, inputs, 100, value - 0.125, value + 0.125)

    per_part = [
        row("dead_fraction", 0.2, "L0"),
        row("dead_fraction", 0.0, "L1"),
        row("l0", 3.0, "L0"),
        row("l0", 5.0, "L1"),
    ]
    errors = [
        row("fvu", 0.5, "L0.mlp_out"),
        row("fvu", 0.25, "L1.mlp_out"),
        row("fvu", 0.4, "all"),
        row("mse", 2.0, "all"),
    ]
    alone = [row("ce_increase", 0.25, "L1.mlp_out", "single"), row("kl", 0.75, "L1.mlp_out", "single")]
    return table(context, [*per_part, *errors, *alone, row("ce_increase", 1.0, "all"), row("kl", 2.0, "all")])


PARTS = Parts({"L0": Part(10, 100, 40), "L1": Part(10, 200, 80)}, Part(20, 310, 120))


def test_a_whole_sums_over_its_parts_what_adds_and_has_its_own_of_what_does_not():
    found = lines(rows_of("a"), {("r", "a"): Trained(PARTS, 5000)}).set_index("part")
    assert found.components.to_dict() == {"L0": 10, "L1": 10, "all": 20}
    assert found.alive.to_dict() == {"L0": 8, "L1": 10, "all": 18}
    assert found.dead_fraction.to_dict() == pytest.approx({"L0": 0.2, "L1": 0.0, "all": 0.1})
    assert found.l0.to_dict() == {"L0": 3, "L1": 5, "all": 8}
    assert found.fvu.to_dict() == {"L0": 0.5, "L1": 0.25, "all": 0.4}
    assert found.ce_increase.fillna(-1).to_dict() == {"L0": -1, "L1": 0.25, "all": 1.0}
    assert (found.kl["L1"], found.kl["all"], found.ce_increase_high["all"]) == (0.75, 2.0, 1.125)
    assert found.parameters.to_dict() == {"L0": 100, "L1": 200, "all": 310}
    assert found.gate_parameters.to_dict() == {"L0": 40, "L1": 80, "all": 120} and set(found.training_tokens) == {5000}


def test_the_readers_table_says_that_l0_is_a_sum_and_what_was_replaced():
    text = report.table(lines(rows_of("a"), {("r", "a"): Trained(PARTS, 5000)})).set_index("part")
    assert text.L0.to_dict() == {"L0": "3.0", "L1": "5.0", "all": "8.0 (sum)"}
    assert text.replaced.to_dict() == {"L0": "-", "L1": "its layer alone", "all": "layers 0 to 1"}
    assert text["CE increase (nats)"]["all"] == "1.000 [0.875, 1.125]"
    assert text["parameters"]["all"] == "310" and text["training tokens"]["all"] == "5,000"


def test_what_was_not_trained_has_no_parameters_and_the_components_that_rows_name():
    found = lines(rows_of("neurons_k4", architecture="neurons"), {("r", "neurons_k4"): Trained(None, 0)})
    assert set(found.parameters) == set(found.training_tokens) == {0}
    assert found.components.tolist() == [10, 10, 20]


def test_a_reader_is_shown_live_inputs_where_they_were_measured_and_the_csv_has_all():
    rows = join([rows_of("a"), rows_of("a", inputs="clean"), rows_of("b", inputs="clean")])
    found = lines(rows, {("r", "a"): Trained(PARTS, 1), ("r", "b"): Trained(PARTS, 1)})
    assert len(found) == 9
    assert {(r["label"], r["inputs"]) for r in shown(found)} == {("a", "live"), ("b", "clean")}


def test_decompositions_of_one_name_are_told_apart_by_what_differs():
    rows = join(
        [rows_of("a", run="x", k=4.0), rows_of("a", run="y", k=8.0), rows_of("a", run="z", k=8.0, seed=1), rows_of("b")]
    )
    found = lines(rows, {(r, n): Trained(PARTS, 1) for r, n in (("x", "a"), ("y", "a"), ("z", "a"), ("r", "b"))})
    labels = {r["run"]: r["label"] for r in shown(found)}
    assert labels == {"x": "a, k=4", "y": "a, k=8, seed 0", "z": "a, k=8, seed 1", "r": "b"}


def test_the_figure_has_a_line_a_decomposition_and_every_number_of_the_table():
    rows = join([rows_of("a"), rows_of("neurons_k4", architecture="neurons")])
    figure = report.figure(lines(rows, {("r", "a"): Trained(PARTS, 5000), ("r", "neurons_k4"): Trained(None, 0)}))
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "neurons_k4"]

    def at(panel: int, y: int) -> list[float]:
        on_line = [line for line in figure.axes[panel].lines if list(line.get_ydata())[0] == y]  # pyright: ignore
        return sorted(float(x) for line in on_line for x in line.get_xdata())  # pyright: ignore

    assert at(0, 0) == [3, 4, 5] and at(2, 0) == [1.0] and at(3, 0) == [0.25, 0.4, 0.5]
    assert at(4, 0) == [120, 310] and at(4, 1) == []


@pytest.mark.parametrize("skip", [False, True])
def test_parameters_of_a_cross_layer_transcoder_are_counted_as_by_hand(skip):
    """3 layers of width 6, 24 features: each has an encoder row of 6 and a bias, and decoder rows to 3, 2 and 1 layers."""
    cfg = config(architecture=Architecture.cross_layer_transcoder, skip=skip, activation=Activation.jumprelu, k=None)
    found = parts_of_dictionary(build_dictionary(cfg, SHAPE, 0, CPU, "toy"))
    encoder = 24 * 6 + 24
    for name, n_writes in (("L0", 3), ("L1", 2), ("L2", 1)):
        linear = 6 * 6 * n_writes if skip else 0
        assert found.parts[name] == Part(24, encoder + 24 * 6 * n_writes + linear, encoder)
    biases, thresholds = 3 * 6, 3 * 24
    parts = sum(part.parameters or 0 for part in found.parts.values())
    assert found.whole == Part(72, parts + biases + thresholds, 3 * encoder + thresholds)


@pytest.mark.parametrize("kind", [ImportanceKind.vector_mlp, ImportanceKind.global_shared_mlp])
def test_parameters_of_a_parameter_decomposition_are_those_of_its_components_and_its_gates(kind):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(False)
    made = ParameterDecomposition(find_maps(model, {"0": 5, "2": 7}), ImportanceConfig(kind=kind, hidden=[8]), seed=0)
    found = parts_of_parameters(made, ["L0.up", "L0.down"])
    components = {"L0.up": 5 * (4 + 6), "L0.down": 7 * (6 + 3)}
    assert {name: part.n_components for name, part in found.parts.items()} == {"L0.up": 5, "L0.down": 7}
    gate = found.whole.gate_parameters
    assert gate is not None and found.whole == Part(12, sum(components.values()) + gate, gate)
    of_parts = [(part.parameters, part.gate_parameters) for part in found.parts.values()]
    if kind is ImportanceKind.global_shared_mlp:
        assert of_parts == [(None, None)] * 2, "one function for all maps"
        assert gate == (4 + 6) * 8 + 8 + 8 * 12 + 12
    else:
        each = [5 * (4 * 8 + 8 + 8 + 1), 7 * (6 * 8 + 8 + 8 + 1)]
        assert of_parts == [(n + g, g) for n, g in zip(components.values(), each, strict=True)] and gate == sum(each)
    assert not any(isinstance(part, torch.Tensor) for part in of_parts)
