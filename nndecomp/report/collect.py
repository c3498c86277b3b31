"""Finished runs, as one table of measurements."""

from collections.abc import Sequence
from pathlib import Path

import pandas

from nndecomp.errors import SettingError
from nndecomp.evaluation.rows import join, read_rows


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories at or below `paths`, each once; all of them must be finished."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise SettingError(
                f"runs: {path} is not a directory; give a run's output directory, or one that holds some"
            )
        runs = sorted(each.parent for each in path.rglob("provenance.json"))
        if not runs:
            raise SettingError(f"runs: {path} holds no run; give a run's output directory, or one that holds some")
        found += runs
    for run in found:
        if not (run / "scores.json").exists():
            raise SettingError(f"runs: {run} is not finished, it has no scores.json; start it again and it will resume")
    return list(dict.fromkeys(found))


def collect(paths: Sequence[Path]) -> pandas.DataFrame:
    """The rows of all finished runs at or below `paths`."""
    return join([read_rows(run / "rows.parquet") for run in find_runs(paths)])
