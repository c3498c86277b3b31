"""What differs between two models: tables, a figure, and the features to look at. Nothing is read or written here."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas
from matplotlib.figure import Figure

from nndecomp.evaluation.decoder_pairs import EXCLUSIVE, SHARED
from nndecomp.evaluation.model_diff import ModelDiff
from nndecomp.evaluation.top_tokens import Moment
from nndecomp.report import style

COLOURS = {"exclusive_A": "#0072B2", "shared": "#009E73", "exclusive_B": "#D55E00", "other": "#BBBBBB"}
LABELS = {"exclusive_A": "A alone", "shared": "shared", "exclusive_B": "B alone", "other": "between"}
DRAWN = ("shared", "other", "exclusive_A", "exclusive_B")  # what there is much of lies below
SEEN = (-0.25, 1.5)  # nu beyond it is drawn at its edge
MARKS = {"\n": "⏎", "|": "¦", "*": "∗", "`": "'"}  # what a table in markdown would take for its own
GENUINE = 0.3  # an exclusive feature with both ratios below it is not seen in the other model by any other name


def kinds_table(found: Mapping[str, ModelDiff]) -> pandas.DataFrame:
    """One line a dictionary: how many of its active features are of which kind, and how many pass latent scaling."""
    lines = []
    for name, diff in found.items():
        active = _of(diff.features, diff.features.frequency > 0)
        line = {"decomposition": name, "features": str(len(diff.features)), "active": str(len(active))}
        line |= {LABELS[kind]: str(int((active.kind == kind).sum())) for kind in LABELS}
        for model in ("A", "B"):
            own = _of(active, active.kind == f"exclusive_{model}")
            low = (own.nu_error.abs() < GENUINE) & (own.nu_reconstruction.abs() < GENUINE)
            line[f"{model} alone, by scaling too"] = str(int(low.sum()))
        shared = _of(active, active.kind == "shared")
        line["cosine of shared (median)"] = "-" if len(shared) == 0 else f"{shared.cosine.median():.2f}"
        for what in ("error", "reconstruction"):
            line[f"nu {what} (median)"] = f"{active[f'nu_{what}'].median():z.2f}" if len(active) else "-"
        lines.append(line)
    return pandas.DataFrame(lines)


def groups_table(found: Mapping[str, ModelDiff]) -> pandas.DataFrame:
    """One line a group of features of each dictionary."""
    lines = []
    for name, diff in found.items():
        for row in diff.groups.to_dict("records"):
            line = {
                "decomposition": f"{name} {row['group']}",
                "features": str(row["n_features"]),
                "alive": f"{row['alive']:.1%}",
                "firing rate": f"{row['firing_rate']:.2%}",
                "l0": f"{row['l0']:.2f}",
                "share of size": f"{row['share_of_size']:.1%}",
            }
            whole = row["group"] == "all"
            line |= {
                f"fvu {m}{'' if whole else ' without'}": f"{row[f'fvu_{m}' if whole else f'fvu_without_{m}']:.3f}"
                for m in ("A", "B")
            }
            lines.append(line)
    return pandas.DataFrame(lines).fillna("")


def figure(diff: ModelDiff, name: str) -> Figure:
    """Left: relative norms of the active features, those that never fired in outline. Right: latent scaling of the active
    ones. Both coloured by kind."""
    active, dead = (_of(diff.features, which) for which in (diff.features.frequency > 0, diff.features.frequency == 0))
    kinds = [kind for kind in LABELS if (active.kind == kind).any()]
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(7.2, 3.2), layout="constrained")
        left, right = drawn.subplots(1, 2)
        bins = list(np.linspace(0, 1, 41))
        left.hist(
            [active.relative_norm[active.kind == kind] for kind in kinds],
            bins=bins,
            stacked=True,
            color=[COLOURS[kind] for kind in kinds],
            label=[LABELS[kind] for kind in kinds],
        )
        if len(dead):
            norms = dead.relative_norm.dropna()
            left.hist(norms, bins=bins, histtype="step", color="black", linewidth=0.8, label="never active")
        left.set_yscale("log")
        left.set_ylim(bottom=0.7)
        left.set_xlabel("relative decoder norm  |d_B| / (|d_A| + |d_B|)")
        left.set_ylabel("features")
        for kind in sorted(kinds, key=DRAWN.index):
            own = _of(active, active.kind == kind)
            x, y = (own[f"nu_{what}"].clip(*SEEN) for what in ("reconstruction", "error"))
            right.scatter(x, y, s=9, alpha=0.3 if kind == "shared" else 0.8, color=COLOURS[kind], linewidths=0)
        right.axvline(0, color=style.GREY, linewidth=0.6)
        right.axhline(0, color=style.GREY, linewidth=0.6)
        right.set_xlim(SEEN[0] - 0.05, SEEN[1] + 0.05)
        right.set_ylim(SEEN[0] - 0.05, SEEN[1] + 0.05)
        right.set_xlabel("nu reconstruction (other model / owner)")
        right.set_ylabel("nu error (other model / owner)")
        drawn.legend(loc="outside lower center", ncols=len(LABELS) + 1)
        title = f"{name}: {len(active)} of {len(diff.features)} features active on {diff.n_tokens} tokens"
        drawn.suptitle(title, fontsize=9, x=0.01, ha="left")
    return drawn


def examples(name: str, diff: ModelDiff, moments: Mapping[int, Sequence[Moment]], tokenizer: Any) -> str:
    """The features that are most of one model, each with the tokens on which it is most active (in bold) and what is before."""
    lines = [
        f"## {name}: the features that are most of A, and most of B",
        "",
        f"A alone: relative norm below {EXCLUSIVE}; B alone: above {1 - EXCLUSIVE}; shared: {SHARED[0]} to {SHARED[1]}.",
        "",
        "| feature | kind | relative norm | cosine | frequency | nu error | nu reconstruction | most active on |",
        "| :-- | :-- | --: | --: | --: | --: | --: | :-- |",
    ]
    for row, shown in moments.items():
        f = diff.features.iloc[row]
        text = " · ".join(_in_context(moment, tokenizer) for moment in shown)
        lines.append(
            f"| {f.group}/{f.feature} | {LABELS[f.kind]} | {f.relative_norm:.2f} | {f.cosine:.2f} | {f.frequency:.2%} | {f.nu_error:.2f} | "
            f"{f.nu_reconstruction:.2f} | {text} |"
        )
    return "\n".join(lines) + "\n"


def _of(features: pandas.DataFrame, which: pandas.Series) -> pandas.DataFrame:
    """The rows for which it holds."""
    return features.loc[which]


def _in_context(moment: Moment, tokenizer: Any) -> str:
    """The token in bold, behind what is before it. A space that belongs to it stands before the bold."""
    before, token = (_shown(ids, tokenizer) for ids in (moment.before, (moment.token,)))
    word = token.lstrip()
    return (before + " " * (len(token) - len(word))).lstrip() + f"**{word or '␣'}**"


def _shown(ids: Sequence[int], tokenizer: Any) -> str:
    text = tokenizer.decode(list(ids))
    for mark, shown in MARKS.items():
        text = text.replace(mark, shown)
    return text
