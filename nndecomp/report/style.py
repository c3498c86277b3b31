"""How figures look: one colour a method everywhere, told apart also by colour-blind readers and in grey print."""

import logging
from pathlib import Path
from typing import Any

import matplotlib
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
# Okabe and Ito's palette, in the order of the architectures' names here. Anything else draws from OTHER in turn.
COLOURS = {
    "per_layer_transcoder": "#0072B2",
    "transcoder": "#56B4E9",
    "cross_layer_transcoder": "#D55E00",
    "sae": "#009E73",
    "per_layer_sae": "#009E73",
    "crosscoder": "#CC79A7",
    "neurons": GREY,
}
OTHER = ("#E69F00", "#000000", "#F0E442")
NAMES = {
    "per_layer_transcoder": "per-layer transcoders",
    "cross_layer_transcoder": "cross-layer transcoder",
    "sae": "SAE",
    "per_layer_sae": "per-layer SAEs",
    "neurons": "neurons",
}
AXES = {
    "active_per_module": "active components per module",
    "active_per_reconstruction": "active components per written site",
    "active_parameters": "active parameters",
    "active_parameters_with_gate": "active parameters, encoder included",
    "description_length": "description length (bits per token)",
}


def colour(architecture: str, all_architectures: list[str]) -> str:
    others = [each for each in all_architectures if each not in COLOURS]
    return COLOURS.get(architecture) or OTHER[others.index(architecture) % len(OTHER)]


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
