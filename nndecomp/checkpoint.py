"""A run directory: saved whole or not at all.

    <out>/config.yaml        the settings, resolved
          provenance.json    for each start of the run: overrides of the command line, commit, what differed from it, versions, device
          git.diff           what differed from the commit, at the last start at which anything did
          metrics.jsonl      training and held-out metrics
          checkpoint/        training's state, while training and after
          decompositions/    <name>/{config.json, model.safetensors}
          rows.parquet       measurements
          scores.json        written last: a run that has it is finished

Every file is written beside its place, flushed to disk, and renamed. A reader sees the old one or the new one.
Paths in these files are relative, and nothing names the machine: a run directory can be moved and published.
"""

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "datasets", "hydra-core", "transformer-lens")
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
    """Lets `fill` write into a directory beside `path`, which appears when it is whole and on the disk.

    A directory that is already there is replaced by two renames: a kill between them leaves it as <name>.old, and
    nothing in its place.
    """
    partial, old = path.with_name(path.name + PARTIAL), path.with_name(path.name + ".old")
    for left in (partial, old):
        if left.exists():
            shutil.rmtree(left)  # from a killed run
    partial.mkdir(parents=True)
    fill(partial)
    for entry in [*partial.rglob("*"), partial]:
        flush(entry)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    flush(path.parent)
    if old.exists():
        shutil.rmtree(old)


def write_scores(out: Path, scores: Mapping[str, float]) -> None:
    """Says that the run is finished, and how it came out. Nothing is written after it."""
    for name, value in scores.items():
        assert math.isfinite(value), f"score {name} is {value}"
    write_json(out / "scores.json", {name: float(value) for name, value in scores.items()})


def finished(out: Path) -> bool:
    return (out / "scores.json").exists()


def scores(out: Path) -> dict[str, float]:
    assert finished(out), f"{out} has no scores.json: the run is not finished"
    return read_json(out / "scores.json")


def write_provenance(out: Path, overrides: Sequence[str]) -> None:
    """Adds this start of the run, with `overrides` on its command line, to provenance.json, and keeps what differs from the commit in git.diff."""
    path = out / "provenance.json"
    starts = read_json(path) if path.exists() else []
    if diff := git("diff", "HEAD", "--binary") or "":
        write_text(out / "git.diff", diff)
    write_json(path, [*starts, {"overrides": list(overrides), **provenance()}])


def provenance() -> dict[str, Any]:
    """What a result came from, beside its settings; commit and changed are null where the source is no git tree."""
    import torch

    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain")
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "nndecomp": installed("nndecomp"),
        "commit": commit.strip() if commit else None,
        "changed": None if changed is None else [line[3:] for line in changed.splitlines()],
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "devices": cuda or ["cpu"],
    }


def git(*arguments: str) -> str | None:
    """Output of git in the source tree; None where the package is installed from elsewhere than a git tree."""
    if not (SOURCE / ".git").exists():
        return None
    command = ["git", "-C", str(SOURCE), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
