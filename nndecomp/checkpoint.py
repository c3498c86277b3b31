"""A run directory: saved whole or not at all.

    <out>/config.yaml        the settings, resolved
          provenance.json    commit, whether the tree differed from it, package versions; git.diff if it differed
          metrics.jsonl      training and held-out metrics
          checkpoint/        training's state, while training and after
          decompositions/    <name>/{config.json, model.safetensors}
          rows.parquet       measurements
          scores.json        written last: a run that has it is finished

Every file is written beside its place, flushed to disk, and renamed. A reader sees the old one or the new one.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # suffix of what is being written


def flush(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(content)
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Keys in the order given; NaN and infinity are refused, for they are not JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write into a directory beside `path`, which appears, or takes the place of the old one, when whole."""
    partial = path.with_name(path.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)  # left behind by a killed run
    partial.mkdir(parents=True)
    fill(partial)
    for file in partial.rglob("*"):
        flush(file)
    flush(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    flush(path.parent)
