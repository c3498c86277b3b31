"""The state of training on disk: <out>/checkpoint/step_<n>/{state.pt, state.json}, and never two halves of one.

The newest whole one counts. It appears by a rename, after it is on the disk; only then its predecessor goes.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndecomp.checkpoint import flush, read_json, write_directory, write_json
from nndecomp.errors import SettingError

_STEP = re.compile(r"step_(\d+)")


def saved_steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints in a directory, oldest first."""
    names = [entry.name for entry in directory.iterdir()] if directory.exists() else []
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))


def save_state(directory: Path, step: int, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """state: tensors and plain values; facts: what has to be known before the state is read, as JSON."""

    def fill(partial: Path) -> None:
        torch.save(dict(state), partial / "state.pt")
        write_json(partial / "state.json", {"step": step, **facts})

    write_directory(directory / f"step_{step}", fill)
    tidy(directory)


def tidy(directory: Path) -> None:
    """Removes all but the newest whole checkpoint: older ones, and what killed runs left half-written."""
    keep = {f"step_{step}" for step in saved_steps(directory)[-1:]}
    left = [entry for entry in directory.iterdir() if entry.name not in keep] if directory.exists() else []
    for entry in left:
        shutil.rmtree(entry)
    if left:
        flush(directory)


def read_facts(directory: Path, step: int) -> dict[str, Any]:
    return read_json(directory / f"step_{step}" / "state.json")


def read_state(directory: Path, step: int) -> dict[str, Any]:
    return torch.load(directory / f"step_{step}" / "state.pt", map_location="cpu", weights_only=True)


def shapes(state: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Name -> shape and dtype of each tensor of a module's state: what has to agree before it can be loaded."""
    return {name: [*value.shape, str(value.dtype)] for name, value in state.items() if isinstance(value, Tensor)}


def check_facts(directory: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises SettingError, naming the first difference, if a checkpoint was made under other settings."""
    before, now = flat(saved), flat(ours)
    for name in {**before, **now}:
        if before.get(name, "absent") != now.get(name, "absent"):
            raise SettingError(
                f"the checkpoint in {directory} was made with {name}={before.get(name, 'absent')}, "
                f"not {now.get(name, 'absent')}; set it back, or use another output directory"
            )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in (
            flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        ).items()
    }
