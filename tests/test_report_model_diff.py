"""The report of what differs between two models, on a handful of features one can count."""

import math

import numpy as np
import pandas
import pytest
from matplotlib.collections import PathCollection
from tiny_models import tiny_tokenizer

from nndecomp.evaluation.decoder_pairs import kind_of
from nndecomp.evaluation.model_diff import ModelDiff
from nndecomp.evaluation.top_tokens import Moment
from nndecomp.report import model_diff as report

# Relative norm, nu error, nu reconstruction, frequency.
FEATURES = [
    (0.02, 0.1, -0.1, 0.2),  # A's, and truly
    (0.05, 0.9, 0.1, 0.2),  # looks so by shrinkage
    (0.95, 0.1, 0.8, 0.2),  # B's, but the other model's other features have it
    (0.97, 0.2, 0.2, 0.2),  # B's, and truly
    (0.5, 0.0, 1.0, 0.2),
    (0.52, 5.0, 0.9, 0.2),  # beyond what is drawn
    (0.7, 0.1, 0.6, 0.2),
    (0.99, math.nan, math.nan, 0.0),  # never active
]


def made() -> ModelDiff:
    lines = [
        {"group": "shared", "feature": i, "kind": kind_of(r), "relative_norm": r, "cosine": 0.9}
        | {"nu_error": e, "nu_reconstruction": x, "frequency": f}
        for i, (r, e, x, f) in enumerate(FEATURES)
    ]
    return ModelDiff(pandas.DataFrame(lines), pandas.DataFrame(), 1000)


def test_features_are_counted_by_kind_and_those_that_scaling_confirms_apart():
    (line,) = report.kinds_table({"made": made()}).to_dict("records")
    assert {name: line[name] for name in ("features", "active", "A alone", "shared", "B alone", "between")} == {
        "features": "8",
        "active": "7",
        "A alone": "2",
        "shared": "2",
        "B alone": "2",
        "between": "1",
    }
    assert (line["A alone, by scaling too"], line["B alone, by scaling too"]) == ("1", "1")
    assert line["cosine of shared (median)"] == "0.90" and line["nu reconstruction (median)"] == "0.60"


def test_the_figure_shows_each_active_feature_once_in_the_colour_of_its_kind():
    left, right = report.figure(made(), "made").axes
    points = [each for each in right.collections if isinstance(each, PathCollection)]
    drawn = [xy for each in points for xy in map(tuple, np.asarray(each.get_offsets()))]
    assert len(drawn) == 7 and max(y for _, y in drawn) == 1.5, "what lies beyond is drawn at the edge"
    (x0, x1), (y0, y1) = right.get_xlim(), right.get_ylim()
    assert all(x0 < x < x1 and y0 < y < y1 for x, y in drawn)
    assert left.get_yscale() == "log" and left.get_ylim()[0] < 1, "a single feature is seen"


class Pieces:
    """Tokens with their spaces, as tokenizers of bytes have them."""

    words = ("a*", " b", "\n", "  ", "|c")

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)


def test_spaces_stand_where_they_are_in_the_text_and_outside_the_bold():
    moments = {0: [Moment(1.0, (1, 0), 1), Moment(0.5, (0, 2), 4), Moment(0.2, (0,), 3), Moment(0.1, (0,), 2)]}
    (line,) = (each for each in report.examples("made", made(), moments, Pieces()).splitlines() if "shared/0" in each)
    assert line.endswith("| ba∗ **b** · a∗⏎**¦c** · a∗  **␣** · a∗**⏎** |")


def test_examples_show_the_tokens_and_what_is_before():
    moments = {0: [Moment(2.0, (6, 7), 8)], 6: [Moment(1.0, (), 9)]}
    text = report.examples("made", made(), moments, tiny_tokenizer())
    lines = [line for line in text.splitlines() if line.startswith("| shared/")]
    assert lines[0].startswith("| shared/0 | A alone | 0.02 |") and lines[0].endswith("| w5 w6**w7** |")
    assert lines[1].startswith("| shared/6 | between | 0.70 |") and lines[1].endswith("| **w8** |")


@pytest.mark.parametrize("relative", [0.0, 0.5, 1.0])
def test_a_dictionary_of_one_kind_is_reported_too(relative: float):
    only = made()
    only.features.loc[:, "relative_norm"] = relative
    only.features.loc[:, "kind"] = kind_of(relative)
    (line,) = report.kinds_table({"made": only}).to_dict("records")
    assert line["active"] == "7" and [line[name] for name in ("A alone", "shared", "B alone")].count("7") == 1
    assert len(report.figure(only, "made").axes) == 2
