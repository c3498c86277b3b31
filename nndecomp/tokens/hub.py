"""A Hugging Face data set: streamed from the Hub, or a local copy of it."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nndecomp.config.schema import TokensConfig, require
from nndecomp.errors import SettingError
from nndecomp.tokens.documents import column_of, quiet, table_of
from nndecomp.tokens.readers import IndexedReader, Reader, Side, StreamedReader


def hub_reader(
    cfg: TokensConfig, side: Side, name: str, split: str, *, window: int, seed: int, rank: int, world_size: int
) -> Reader:
    """Documents of one split of the data set at tokens.path.

    A directory written by `save_to_disk` is read in any order. Everything else is streamed: the order of its files is
    shuffled every epoch, and `window` documents at a time.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    assert cfg.path is not None
    saved = Path(cfg.path).expanduser()
    if (saved / "state.json").exists() or (saved / "dataset_dict.json").exists():
        with quiet():
            found = datasets.load_from_disk(saved)
        rows = chosen(cfg, found, split) if isinstance(found, datasets.DatasetDict) else found
        if not isinstance(found, datasets.DatasetDict):
            require(
                cfg.heldout_split is None,
                f"tokens.heldout_split={cfg.heldout_split}, but {cfg.path} was saved as one split; leave it null",
            )
        table = table_of(cfg, rows)
        return IndexedReader(table, side, name, shuffle=window > 1, seed=seed, rank=rank, world_size=world_size)
    rows = chosen(cfg, _streamed(cfg), split)
    column = column_of(cfg, rows.column_names or list(next(iter(rows.take(1)), {})))
    rows = rows.select_columns([column.name])
    if window > 1:
        # The files alone: a buffer of one row holds nothing back, so that the position can be restored exactly.
        rows = rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
    rows = split_dataset_by_node(rows, rank, world_size)
    return StreamedReader(rows, column.document, side, name, window=window, seed=seed, rank=rank)


def _streamed(cfg: TokensConfig) -> Any:
    """All splits of the data set, by name, nothing of them read yet."""
    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    path = os.path.expanduser(str(cfg.path))
    try:
        with quiet() if os.path.isdir(path) else nullcontext():
            return datasets.load_dataset(path, cfg.subset, streaming=True)
    except (DatasetNotFoundError, DataFilesNotFoundError) as error:
        raise SettingError(
            f"tokens.path={cfg.path} is neither a data set on the Hub nor a copy of one: {error}"
        ) from error
    except ConnectionError as error:
        raise SettingError(
            f"tokens.path={cfg.path} cannot be reached on the Hub; give the directory of a local copy, "
            f"or use tokens=stdlib ({error})"
        ) from error
    except ValueError as error:
        raise SettingError(f"tokens.subset={cfg.subset} does not open {cfg.path}: {error}") from error


def chosen(cfg: TokensConfig, splits: Any, split: str) -> Any:
    setting = "split" if split == cfg.split else "heldout_split"
    require(
        split in splits,
        f"tokens.{setting}={split} is not a split of {cfg.path}, which has {', '.join(sorted(splits))}",
    )
    return splits[split]
