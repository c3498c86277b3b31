"""Where documents come from, and which of them are held out.

A document is held out if the hash of its content falls below `heldout_fraction`: whatever its place, copies of it are
on the same side. The standard library is split by the hash of the file's relative path instead, so that a file of the
same name stays on its side in every version of Python; copies of a file are read once.
"""

import os
import sysconfig
import tokenize
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nndecomp.config.schema import TokensConfig, require

Body = str | list[int]  # text, or token ids where the source is tokenised already

# Directories of the standard library that are not its own source text.
_NOT_STDLIB = {"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests"}
_SUFFIXES = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # and the builder that reads them


@dataclass(frozen=True)
class Document:
    body: Body
    key: bytes  # what decides on which side of the split it is

    def heldout(self, fraction: float) -> bool:
        """A uniform draw from [0, 1) that only the key decides, below `fraction`."""
        return int.from_bytes(blake2b(self.key, digest_size=8).digest()) < fraction * 2**64

    @staticmethod
    def of(body: Body) -> "Document":
        """A document split by its content."""
        key = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else array("q", body).tobytes()
        return Document(body, key)


@runtime_checkable
class Documents(Protocol):
    """Documents that can be reached in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


def stdlib_documents(root: Path | None = None) -> list[Document]:
    """The standard library's own modules, ordered by relative path, each distinct text once."""
    return list(_running_stdlib()) if root is None else _stdlib(root)


@cache
def _running_stdlib() -> tuple[Document, ...]:
    """That of the interpreter, which does not change while it runs: read once, though both splits are of it."""
    return tuple(_stdlib(Path(sysconfig.get_path("stdlib"))))


def _stdlib(root: Path) -> list[Document]:
    documents, seen = [], set()
    for name, path in sorted(_modules(root)):
        with tokenize.open(path) as file:
            text = file.read()
        if text.strip() and text not in seen:
            seen.add(text)
            documents.append(Document(text, name.encode()))
    assert documents, f"no source text of the standard library in {root}"
    return documents


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    """Relative and full path of each module. Installed packages lie below the library and are not even listed."""
    for directory, below, files in os.walk(root):
        below[:] = set(below) - _NOT_STDLIB
        for path in (os.path.join(directory, file) for file in files if file.endswith(".py")):
            name = Path(path).relative_to(root).as_posix()
            # _sysconfigdata_* records how this one interpreter was built.
            if not name.startswith("_sysconfigdata"):
                yield name, path


@dataclass(frozen=True)
class Column:
    """One column of a data set, its cells documents."""

    path: str  # of the data set, for the message
    name: str
    tokenised: bool

    def document(self, row: dict[str, Any]) -> Document:
        cell = row[self.name]
        require(
            isinstance(cell, list if self.tokenised else str),
            f"tokens.{'tokens' if self.tokenised else 'text'}_column={self.name} of {self.path} holds "
            f"{type(cell).__name__}, not {'token ids' if self.tokenised else 'text'}; name another column",
        )
        return Document.of(cell)


@dataclass(frozen=True)
class Table:
    """A column on disk, memory-mapped."""

    rows: Any  # datasets.Dataset
    column: Column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Document:
        return self.column.document(self.rows[index])


def column_of(cfg: TokensConfig, names: Sequence[str]) -> Column:
    """The column to read, if it is there."""
    setting = "text_column" if cfg.tokens_column is None else "tokens_column"
    name = getattr(cfg, setting)
    require(
        name in names,
        f"tokens.{setting}={name} is not a column of {cfg.path}, which has {', '.join(sorted(names))}",
    )
    return Column(str(cfg.path), name, cfg.tokens_column is not None)


def files_documents(cfg: TokensConfig) -> Table:
    """Local .txt (one document a file), .jsonl or .parquet (one document a row): a file, a directory, or a glob."""
    import datasets

    assert cfg.path is not None
    path = Path(cfg.path).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix in _SUFFIXES]
    elif path.exists():
        found = [path]
    else:
        anchor = Path(path.anchor) if path.anchor else Path()
        found = list(anchor.glob(str(path.relative_to(anchor))))
    require(
        bool(found),
        f"tokens.path={cfg.path} matches no file; give a {', '.join(_SUFFIXES)} file, a directory of them or a glob",
    )
    suffixes = sorted({file.suffix for file in found})
    require(
        len(suffixes) == 1 and suffixes[0] in _SUFFIXES,
        f"tokens.path={cfg.path} matches files of kind {', '.join(suffixes)}; give one kind of {', '.join(_SUFFIXES)}",
    )
    options: dict[str, Any] = {"sample_by": "document"} if suffixes == [".txt"] else {}
    builder, data_files = _SUFFIXES[suffixes[0]], sorted(map(str, found))
    with quiet():
        return table_of(cfg, datasets.load_dataset(builder, data_files=data_files, split="train", **options))


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of datasets, whose "Downloading data" is wrong of local files."""
    import datasets

    silenced = not datasets.are_progress_bars_disabled()
    if silenced:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            datasets.enable_progress_bars()


def table_of(cfg: TokensConfig, rows: Any) -> Table:
    column = column_of(cfg, rows.column_names)
    return Table(rows.select_columns([column.name]), column)
