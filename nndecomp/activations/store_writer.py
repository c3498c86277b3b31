"""Writes a store of activations, shard by shard; killed at any instant, it goes on where it stopped."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.harvest import Harvester, kept
from nndecomp.activations.manifest import BLOCK_ROWS, MANIFEST, Manifest, Settings, Shard, first_difference
from nndecomp.activations.statistics import RunningStatistics
from nndecomp.checkpoint import PARTIAL, flush, write_text
from nndecomp.config.schema import require

SHARD_BYTES = 2**30


def _shard_file(index: int) -> str:
    return f"rows-{index:05d}.safetensors"


def shard_rows_for(row_bytes: int) -> int:
    """Rows of a shard of about 1 GiB, in whole blocks."""
    return max(1, SHARD_BYTES // (row_bytes * BLOCK_ROWS)) * BLOCK_ROWS


def as_bytes(tensor: Tensor) -> memoryview:
    """The content of a tensor, whatever its dtype and device."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


class _Rows:
    """Rows of a harvester in order, in any number, with the state from which the next of them can be had again."""

    def __init__(self, harvester: Harvester, skip: int) -> None:
        self.harvester = harvester
        self.state = harvester.state_dict()
        self.rows = harvester.next_rows()
        self.used = skip

    def take(self, n: int) -> Iterator[Float[Tensor, "token width"]]:
        """`n` rows, in pieces of one forward pass."""
        while n > 0:
            if self.used == len(self.rows):
                self.state = self.harvester.state_dict()
                self.rows, self.used = self.harvester.next_rows(), 0
            piece = self.rows[self.used : self.used + n]
            self.used += len(piece)
            n -= len(piece)
            yield piece


def _write_shard(directory: Path, manifest: Manifest, rows: _Rows) -> Shard:
    index = len(manifest.shards)
    n_rows = min(manifest.shard_rows, manifest.n_rows - manifest.n_written)
    name = _shard_file(index)
    statistics = RunningStatistics(manifest.layout.width)
    header = manifest.header(index, n_rows)
    crc = 0

    partial = directory / f"{name}{PARTIAL}"
    with open(partial, "wb") as file:
        file.seek(manifest.rows_offset)
        for piece in rows.take(n_rows):
            statistics.update(piece)
            content = as_bytes(piece)
            crc = zlib.crc32(content, crc)
            file.write(content)
        head = header + as_bytes(statistics.mean) + as_bytes(statistics.m2)
        crc = zlib.crc32(head, crc)
        file.seek(0)
        file.write(head)
    flush(partial)
    partial.replace(directory / name)
    flush(directory)
    return Shard(name, n_rows, manifest.shard_bytes(n_rows), crc)


def _begun(directory: Path, fresh: Manifest) -> Manifest:
    """The manifest of a store that was begun in `directory` with the same settings, or `fresh` for an empty one."""
    if not (directory / MANIFEST).exists():
        # What writing leaves when it is killed before there is a manifest.
        strangers = {p.name for p in directory.iterdir()} - {
            _shard_file(0),
            f"{_shard_file(0)}{PARTIAL}",
            f"{MANIFEST}{PARTIAL}",
        }
        require(
            not strangers,
            f"activations.store={directory} is not a store and not empty (it holds {min(strangers, default='')}); "
            "name a new directory",
        )
        return fresh
    begun = Manifest.read(directory)
    sizes = {"n_rows", "shard_rows", "seed", "batch_seqs", "sites", "widths"}
    there, here = ({k: v for k, v in asdict(m).items() if k in sizes} | m.settings for m in (begun, fresh))
    difference = first_difference(there, here)
    require(
        difference is None,
        f"activations.store={directory} was begun with other settings: {difference}; name a new directory",
    )
    return begun


def write_store(
    harvester: Harvester,
    directory: Path,
    settings: Settings,
    *,
    n_rows: int,
    seed: int,
    shard_rows: int | None = None,
    progress: Callable[[int], None] = lambda n_written: None,
) -> Manifest:
    """Write the next `n_rows` rows of `harvester` into `directory`, or go on writing them there.

    `settings` are those of `row_settings`; `seed` is the token stream's. Interrupted and called again with the same
    arguments and a fresh harvester, it ends with the same bytes as if it had never stopped. `shard_rows` defaults to
    1 GiB. `progress` hears of every shard.

    Raises SettingError if the directory holds something else, or a store begun with other settings.
    """
    assert settings["activations.dtype"] == harvester.cfg.dtype.value, f"{settings} is not of this harvester"
    layout = harvester.layout
    shard_rows = shard_rows or shard_rows_for(layout.width * harvester.dtype.itemsize)
    assert shard_rows % BLOCK_ROWS == 0, f"a shard of {shard_rows} rows does not hold whole blocks of {BLOCK_ROWS}"
    assert n_rows > 0, f"{n_rows} rows to write"
    directory.mkdir(parents=True, exist_ok=True)
    fresh = Manifest(
        settings=settings,
        target=harvester.target.name,
        seed=seed,
        batch_seqs=harvester.cfg.batch_seqs,
        sites=tuple(map(str, layout.sites)),
        widths=layout.widths,
        n_rows=n_rows,
        shard_rows=shard_rows,
        first_tokens=(),
        first_kept=(),
        shards=(),
        next_tokens=None,
        next_skip=0,
    )
    manifest = _begun(directory, fresh)
    if manifest.complete:
        return manifest
    if manifest.shards:
        assert manifest.next_tokens is not None, "an incomplete store says where to go on"
        harvester.load_state_dict(manifest.next_tokens)
    else:
        start = harvester.state_dict()
        first = harvester.tokens.next_batch(harvester.cfg.batch_seqs)
        harvester.load_state_dict(start)
        manifest = replace(
            manifest,
            first_tokens=tuple(first.tokens[0].tolist()),
            first_kept=tuple(kept(first, harvester.cfg)[0].tolist()),
        )
    rows = _Rows(harvester, manifest.next_skip)
    while not manifest.complete:
        shard = _write_shard(directory, manifest, rows)
        manifest = replace(manifest, shards=(*manifest.shards, shard), next_tokens=rows.state, next_skip=rows.used)
        if manifest.complete:
            manifest = replace(manifest, next_tokens=None, next_skip=0)
        write_text(directory / MANIFEST, manifest.dumps())
        progress(manifest.n_written)
    return manifest
