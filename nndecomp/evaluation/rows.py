"""Measurements as one tidy table: one number a row, everything needed to read it beside it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.checkpoint import write_bytes
from nndecomp.errors import SettingError

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    inputs   clean | clean_gates | live | none: what the replacements were computed from (none: there were no replacements)
    patched  all | single | prefixes | none: which written sites were replaced in the run that was measured (none also of losses
             of training, which replace what their settings say)
    site     the sites or the group the number is about: "L2.mlp_out", "L0.mlp_out-L2.mlp_out", "L3", or all
    low high ends of the interval over sequences; nan where there is none
    """

    metric: str
    value: float
    unit: str
    site: str
    patched: str
    inputs: str
    n_tokens: int
    low: float = math.nan
    high: float = math.nan
    note: str = ""


@dataclass(frozen=True)
class Context:
    """What was measured, the same for all measurements of one decomposition."""

    experiment: str
    run: str
    name: str  # of the decomposition within the run
    target: str
    tokens: str
    split: str
    architecture: str
    layers: str  # "0,1,2,3"
    n_features: int  # per group
    activation: str
    k: float  # per token and group, mean over groups; nan where the activation function has none
    seed: int


_DTYPES = {str: "string", int: "int64", float: "float64"}
COLUMNS = {field.name: _DTYPES[field.type] for kind in (Context, Measurement) for field in fields(kind)}  # type: ignore[index]


def table(context: Context, measurements: Iterable[Measurement]) -> "pandas.DataFrame":
    """The measurements with their context, columns and dtypes as `COLUMNS` says."""
    import pandas

    rows = [{**vars(context), **vars(measurement)} for measurement in measurements]
    return pandas.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def join(tables: Sequence["pandas.DataFrame"]) -> "pandas.DataFrame":
    """Several tables as one."""
    import pandas

    assert tables, "there are no tables to join"
    for each in tables:
        _check(each, "a table")
    return pandas.concat(tables, ignore_index=True)


def write_rows(frame: "pandas.DataFrame", path: Path) -> None:
    """Parquet, whole or not at all."""
    _check(frame, str(path))
    write_bytes(path, frame.to_parquet(None, index=False))


def read_rows(path: Path) -> "pandas.DataFrame":
    """What `write_rows` wrote, checked."""
    import pandas

    frame = pandas.read_parquet(path)
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise SettingError(f"runs: {path} is not a table of measurements, it has no column {', '.join(missing)}")
    return frame.loc[:, list(COLUMNS)].astype(COLUMNS)


def _check(frame: "pandas.DataFrame", where: str) -> None:
    found = {column: str(dtype) for column, dtype in frame.dtypes.items()}
    assert found == COLUMNS, f"{where} has columns {found}, but measurements have {COLUMNS}"
