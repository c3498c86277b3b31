"""How figures look: one colour a method everywhere, told apart also by colour-blind readers and in grey print."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure

RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "nndecomp",  # the same figure gives the same file
}
GREY = "#7F7F7F"
# Okabe and Ito's palette, in the order of the architectures' names here; baselines in greys and browns, told apart by their
# markers. Anything else draws from OTHER in turn.
COLOURS = {
    "per_layer_transcoder": "#0072B2",
    "transcoder": "#56B4E9",
    "cross_layer_transcoder": "#D55E00",
    "sae": "#009E73",
    "per_layer_sae": "#009E73",
    "crosscoder": "#CC79A7",
    "spd": "#E69F00",
    "spd_with_delta": "#882255",
    "skip_per_layer_transcoder": "#56B4E9",
    "skip_transcoder": "#0072B2",
    "skip_cross_layer_transcoder": "#CC79A7",
    "neurons": GREY,
    "neurons_by_output_norm": "#3F3F3F",
    "neurons_by_attribution": "#ABABAB",
    "principal_directions": "#8C564B",
    "random_directions": "#C9A08D",
}
OTHER = ("#000000", "#F0E442", "#332288")
# Never trained; they stand last in legends and tables.
BASELINES = (
    *("neurons", "neurons_by_output_norm", "neurons_by_attribution"),
    *("principal_directions", "random_directions"),
)
NAMES = {
    "per_layer_transcoder": "per-layer transcoders",
    "cross_layer_transcoder": "cross-layer transcoder",
    "sae": "SAE",
    "per_layer_sae": "per-layer SAEs",
    "spd": "SPD",
    "spd_with_delta": "SPD with delta",
    "neurons": "neurons",
    "neurons_by_output_norm": "neurons by output norm",
    "neurons_by_attribution": "neurons by attribution",
}
# What replacements were computed from, where it was measured: in words, in this order.
INPUTS = {"clean": "clean", "live": "live", "clean_gates": "clean gates"}
AXES = {
    "active_per_module": "active components per module",
    "active_per_reconstruction": "active components per written site",
    "active_parameters": "active parameters",
    "active_parameters_with_gate": "active parameters, gate included",
    "gate_parameters": "parameters of the gate (encoder)",
    "description_length": "description length (bits per token)",
}


def colour(architecture: str, all_architectures: list[str]) -> str:
    others = [each for each in all_architectures if each not in COLOURS]
    return COLOURS.get(architecture) or OTHER[others.index(architecture) % len(OTHER)]


def name(architecture: str) -> str:
    plain = architecture.removeprefix("skip_")
    words = NAMES.get(plain, plain.replace("_", " "))
    return words if plain == architecture else f"{words} with a skip"


def in_order(architectures: Iterable[str]) -> list[str]:
    """Each once, the baselines last."""
    last = {each: i for i, each in enumerate(BASELINES, 1)}
    return sorted(set(architectures), key=lambda each: (last.get(each, 0), each))


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """In as many columns as the figure is wide enough for."""
    for n_columns in range(len(handles), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=n_columns)
        if legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()
    raise AssertionError(f"{', '.join(labels)}: one of these is wider than {figure.get_figwidth()} inches")


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """As pdf and svg for papers, png for looking at."""
    directory.mkdir(parents=True, exist_ok=True)
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells every glyph it embeds
    paths = [directory / f"{name}.{kind}" for kind in ("pdf", "svg", "png")]
    with matplotlib.rc_context(RC):
        for path in paths:
            metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": None}[path.suffix[1:]]
            figure.savefig(path, dpi=200, metadata=metadata)
    return paths
