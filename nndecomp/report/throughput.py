"""How long a training step is, of this library and of others -> a table, a figure and scores."""

from collections.abc import Sequence

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from nndecomp.evaluation.agreement import TOLERANCE, Agreement
from nndecomp.evaluation.timing import Floor, Times, dense_flops, encoder_flops, middle, number, ratio, sparse_flops
from nndecomp.report import style

OURS = "nndecomp"
COLOURS = {
    OURS: "#0072B2",
    "sae-lens": "#E69F00",
    "dictionary-learning": "#CC79A7",
    "eai-sparsify": "#009E73",
    "torch": style.GREY,
}


def at_size(times: Sequence[Times], size: str) -> list[Times]:
    """What does the same stands together."""
    activations = list(dict.fromkeys(each.subject.activation for each in times))
    return sorted(
        (each for each in times if each.size == size), key=lambda each: activations.index(each.subject.activation)
    )


def own_backends(times: Sequence[Times]) -> list[str]:
    found = [each.subject.backend for each in times if each.subject.library == OURS]
    return list(dict.fromkeys(backend for backend in found if backend is not None))


def ours(times: Sequence[Times], other: Times, backend: str) -> Times | None:
    """What this library takes for the same: the same size and activation function."""
    own = [
        each
        for each in at_size(times, other.size)
        if (each.subject.library, each.subject.backend) == (OURS, backend)
        and each.subject.activation == other.subject.activation
    ]
    return own[0] if own else None


def table(times: Sequence[Times], floors: Sequence[Floor]) -> pandas.DataFrame:
    """One line a system and size, as text: medians over rounds, intervals in brackets."""
    lines = []
    for floor in floors:
        for each in at_size(times, floor.name):
            milliseconds = middle([1000 * seconds for seconds in each.wall])
            line = {
                "size": floor.name if each is at_size(times, floor.name)[0] else "",
                "system": str(each.subject),
                "ms a step": str(milliseconds),
                "ms of CPU": number(1000 * middle(each.cpu).value),
                "tokens/s": f"{1000 * floor.size.batch_tokens / milliseconds.value:,.0f}",
            }
            for backend in own_backends(times):
                own = ours(times, each, backend)
                line[f"times ours, {backend}"] = (
                    str(ratio(each.wall, own.wall)) if own is not None and own is not each else "-"
                )
            line["floor / step"] = f"{ratio(each.floor, each.wall).value:.0%}"
            if each.roofline is not None:
                line["roofline / step"] = f"{ratio(each.roofline, each.wall).value:.0%}"
            line["memory (MiB)"] = f"{each.peak_bytes / 2**20:,.0f}"
            lines.append(line)
    return pandas.DataFrame(lines)


def raw(times: Sequence[Times], floors: Sequence[Floor]) -> pandas.DataFrame:
    """Every step that was timed."""
    steps = [
        (each.size, str(each.subject), each.subject.version, number, wall, cpu)
        for each in times
        for number, (wall, cpu) in enumerate(zip(each.wall, each.cpu, strict=True))
    ]
    steps += [
        (floor.name, f"floor: {part}", "", number, wall, None)
        for floor in floors
        for part in ("encoder", "optimiser", "copy", "cache", "product")
        for number, wall in enumerate(getattr(floor, part))
    ]
    return pandas.DataFrame(steps, columns=["size", "system", "version", "round", "wall_seconds", "cpu_seconds"])


def notes(times: Sequence[Times], floors: Sequence[Floor]) -> list[str]:
    """What the table leaves unsaid: sizes, the floor, versions."""
    said = []
    for floor in floors:
        flops = sparse_flops(floor.size)
        said.append(
            f"{floor.name}: {floor.size}; {floor.on}, products of {floor.bits} bits. Floor {number(1000 * middle(floor.wall).value)} ms: encoder "
            f"{number(1000 * middle(floor.encoder).value)} ms ({floor.encoder_rate / 1e9:.0f} GFLOP/s), fused Adam "
            f"{number(1000 * middle(floor.optimiser).value)} ms ({floor.optimiser_rate / 1e9:.1f} GB/s); a copy runs at "
            f"{floor.copy_rate / 1e9:.1f} GB/s. A step with k active features needs {flops / 1e9:.3g} GFLOP, "
            f"{encoder_flops(floor.size) / flops:.0%} of it in the encoder; a dense one {dense_flops(floor.size) / 1e9:.3g}."
        )
        if any(each.roofline is not None for each in at_size(times, floor.name)):
            said.append(
                f"{floor.name}: roofline {number(1000 * middle(floor.roofline).value)} ms, of what was measured in the same rounds: "
                f"a square product at {floor.product_rate / 1e12:.3g} TFLOP/s, a copy at {floor.copy_rate / 1e12:.3g} TB/s, "
                f"one in the cache at {floor.cache_rate / 1e12:.3g} TB/s."
            )
    return [*said, method(times)]


def method(times: Sequence[Times]) -> str:
    versions = dict.fromkeys(f"{each.subject.library} {each.subject.version}" for each in times)
    n_rounds = len(times[0].wall)
    return (
        f"Medians over {n_rounds} rounds with intervals (see `nndecomp/evaluation/timing.py`); ratios are taken within rounds; memory is "
        f"the most a process had at any time, beyond what it had before its system was made. {', '.join(versions)}."
    )


def scores(times: Sequence[Times]) -> dict[str, float]:
    """Milliseconds of each, how often ours goes into another's, and the floor's share of ours."""
    found: dict[str, float] = {}
    for each in times:
        name = f"{each.size}/{str(each.subject).replace(' ', '_')}"
        found[f"{name}/ms"] = 1000 * middle(each.wall).value
        if each.subject.library == OURS:
            found[f"{name}/floor_share"] = ratio(each.floor, each.wall).value
            found[f"{name}/peak_bytes"] = each.peak_bytes
            if each.roofline is not None:
                found[f"{name}/roofline_share"] = ratio(each.roofline, each.wall).value
            continue
        for backend in own_backends(times):
            if (own := ours(times, each, backend)) is not None:
                found[f"{name}/times_{backend}"] = ratio(each.wall, own.wall).value
                found[f"{name}/times_memory_{backend}"] = each.peak_bytes / own.peak_bytes if own.peak_bytes else 0.0
    return found


def figure(times: Sequence[Times], floors: Sequence[Floor]) -> Figure:
    """A panel a size: milliseconds a step on a logarithmic axis, and the floor as a line."""
    most = max(len(at_size(times, floor.name)) for floor in floors)
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(2.2 + 2.6 * len(floors), 0.9 + 0.2 * most), layout="constrained")
        panels = drawn.subplots(1, len(floors), sharey=True, squeeze=False)[0]
        for panel, floor in zip(panels, floors, strict=True):
            _bars(panel, at_size(times, floor.name), floor)
        panels[0].set_yticks(range(most), [str(each.subject) for each in at_size(times, floors[0].name)])
        panels[0].invert_yaxis()
    return drawn


def _bars(panel: Axes, times: Sequence[Times], floor: Floor) -> None:
    least = 1000 * middle(floor.wall).value
    for y, each in enumerate(times):
        found = middle([1000 * seconds for seconds in each.wall])
        panel.barh(y, found.value, color=COLOURS[each.subject.library], height=0.7)
        panel.plot([found.low, found.high], [y, y], color="black", linewidth=0.8)
        panel.annotate(  # in a column of their own: beside its bar a number would stand on the floor's line
            number(found.value),
            (1, y),
            (4, 0),
            xycoords=panel.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    panel.axvline(least, color="black", linestyle="--", linewidth=1.0)
    panel.annotate(
        "floor", (least, 1), (2, 1), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7
    )
    panel.set_xscale("log")
    panel.set_xlim(least / 3, None)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(axis="y", visible=False)
    panel.set_title(f"{floor.name}: {floor.size}", loc="left", fontsize=8, pad=12)
    panel.set_xlabel("ms a training step")


def agreed(found: Sequence[Agreement]) -> pandas.DataFrame:
    """One line for each origin of rows, activation function and backend."""
    return pandas.DataFrame(
        [
            {
                "rows": each.rows,
                "system": f"{OURS} {each.backend} {each.activation}",
                "steps": len(each.losses),
                "first loss": f"{each.losses[0]:.4f}",
                "last loss": f"{each.losses[-1]:.4f}",
                "largest deviation from dense": f"{each.deviation:.1e}",
                "dense, summed in another order": f"{each.rounding:.1e}",
                f"within {TOLERANCE:.0e}": "yes" if each.deviation <= TOLERANCE else "no",
                "selection agrees": f"{each.share:.7f}",
                "pairs that differ": f"{each.n_either - each.n_both:,} of {each.n_either:,}",
            }
            for each in found
        ]
    )


def curves(found: Sequence[Agreement]) -> pandas.DataFrame:
    """All losses at every step."""
    steps = [
        (each.rows, each.activation, each.backend, step, *losses)
        for each in found
        for step, losses in enumerate(zip(each.losses, each.dense_losses, each.reversed_losses, strict=True))
    ]
    return pandas.DataFrame(
        steps, columns=["rows", "activation", "backend", "step", "loss", "dense_loss", "reversed_loss"]
    )


def agreement_scores(found: Sequence[Agreement]) -> dict[str, float]:
    named = {f"{each.rows}/{each.backend}_{each.activation}".replace(" ", "_"): each for each in found}
    deviations = {f"{name}/deviation": each.deviation for name, each in named.items()}
    return deviations | {f"{name}/agreement": each.share for name, each in named.items()}
