"""Recovery of a toy -> a table, a line a map, and a figure: permuted importances, and components against the toy's weights."""

import matplotlib
import numpy as np
import pandas
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nndecomp.evaluation.toy_recovery import Directions, MapRecovery, ToyRecovery
from nndecomp.report import style

PANEL = 1.9  # inches
FOUND, KNOWN = style.COLOURS["cross_layer_transcoder"], style.GREY
BESIDE = 0.3  # columns drawn beyond those that are expected, as a share


def summary(found: ToyRecovery) -> pandas.DataFrame:
    lines = []
    for name, own in found.maps.items():
        along = own.directions
        lines.append(
            {
                "map": name,
                "MMCS": "-" if along is None else f"{along.mmcs:.4f}",
                "ML2R": "-" if along is None else f"{along.ml2r:.3f}",
                "importances off": str(own.errors),
                "of entries": str(own.importance.numel()),
                "components used": str(own.n_used),
                "known": str(own.enough or own.importance.shape[0]),
                "L0": f"{found.l0[name]:.2f}",
                "weights left over": f"{own.leftover:.1%}",
            }
        )
    return pandas.DataFrame(lines)


def figure(found: ToyRecovery) -> Figure:
    """Above, importances of each map for single features; below, directions where features have them."""
    n = len(found.maps)
    pointed = any(own.directions is not None for own in found.maps.values())
    with matplotlib.rc_context({**style.RC, "axes.grid": False}):
        drawn = Figure(figsize=(PANEL * n + 0.8, PANEL * (2 if pointed else 1) + 0.5), layout="constrained")
        axes = drawn.subplots(2 if pointed else 1, n, squeeze=False)
        images = [_importances(axes[0][i], name, own) for i, (name, own) in enumerate(found.maps.items())]
        axes[0][0].set_ylabel("feature alone")
        bar = drawn.colorbar(images[-1], ax=list(axes[0]), shrink=0.9, pad=0.01)
        bar.set_label("importance")
        legend = None
        for i, own in enumerate(found.maps.values()):
            if not pointed:
                continue
            if own.directions is None:
                axes[1][i].set_axis_off()
            elif own.directions.target.shape[1] == 2:
                _arrows(axes[1][i], own.directions)
                legend = axes[1][i].get_legend_handles_labels()
            else:
                _lengths(axes[1][i], own.directions)
        if legend is not None:
            drawn.legend(*legend, loc="outside lower center", ncols=2)
    return drawn


def _importances(panel: Axes, name: str, own: MapRecovery) -> matplotlib.image.AxesImage:  # pyright: ignore[reportAttributeAccessIssue]
    n, C = own.importance.shape
    expected = max(own.enough or n, own.n_used)
    columns = min(C, expected + max(2, round(BESIDE * expected)))
    image = panel.imshow(
        own.importance[:, :columns].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    panel.set_title(name, loc="left")
    panel.set_xlabel(f"component (first {columns} of {C})" if columns < C else "component")
    for spine in panel.spines.values():
        spine.set_visible(True)
        spine.set_color("#CCCCCC")
    return image


def _arrows(panel: Axes, along: Directions) -> None:
    """Two dimensions, drawn as they are."""
    zero = np.zeros(len(along.target))
    for vectors, colour, width, label in ((along.target, KNOWN, 0.03, "toy"), (along.part, FOUND, 0.012, "component")):
        panel.quiver(
            zero,
            zero,
            *vectors.T.numpy(),
            color=colour,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=width,
            label=label,
        )
    reach = 1.15 * float(torch.cat([along.target, along.part]).abs().max())
    panel.set_xlim(-reach, reach)
    panel.set_ylim(-reach, reach)
    panel.set_aspect("equal")
    panel.set_title("its weights, a feature each", loc="left", fontsize=8)


def _lengths(panel: Axes, along: Directions) -> None:
    panel.scatter(along.cosine.numpy(), along.l2_ratio.numpy(), s=8, color=FOUND, alpha=0.7, linewidths=0)
    panel.axhline(1, color=KNOWN, linestyle=":", linewidth=1)
    panel.axvline(1, color=KNOWN, linestyle=":", linewidth=1)
    panel.set_xlim(min(0.9, float(along.cosine.min()) - 0.02), 1.005)
    low, high = float(along.l2_ratio.min()), float(along.l2_ratio.max())
    panel.set_ylim(min(0.9, low - 0.05), max(1.1, high + 0.05))
    panel.set_xlabel("cosine with the toy's direction")
    panel.set_ylabel("length / toy's")
