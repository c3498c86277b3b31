"""Reads a store of activations: mapped into memory read-only, by any number of runs at once."""

import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.activations.manifest import BLOCK_ROWS, Manifest, Settings, first_difference
from nndecomp.activations.statistics import RunningStatistics
from nndecomp.config.schema import require
from nndecomp.targets.base import Target
from nndecomp.types import Layout, Site


def _map(path: Path) -> mmap.mmap:
    """Copy-on-write, for torch wants writable memory; nothing is written, so the pages are the file's own, shared."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class Store:
    """The rows of a complete store, restricted to the sites asked for.

    Sizes and heads of all shards are checked on opening; `verify` reads every byte.
    """

    def __init__(self, directory: Path, manifest: Manifest, sites: Sequence[Site]) -> None:
        self.directory, self.manifest = directory, manifest
        self.n_rows, self.dtype = manifest.n_rows, getattr(torch, manifest.dtype)
        spans = dict(zip(manifest.layout.sites, manifest.layout.widths, strict=True))
        self.layout = Layout.of({site: spans[site] for site in sites})
        # Columns of the store that are wanted, where they lie side by side as one slice: (stored, wanted).
        self.columns: list[tuple[slice, slice]] = []
        for site, wanted in self.layout.spans.items():
            stored = manifest.layout.spans[site]
            if self.columns and self.columns[-1][0].stop == stored.start:
                before = self.columns.pop()
                stored, wanted = slice(before[0].start, stored.stop), slice(before[1].start, wanted.stop)
            self.columns.append((stored, wanted))
        self.maps = [_map(directory / shard.file) for shard in manifest.shards]
        self.shards = [
            torch.frombuffer(memory, dtype=self.dtype, offset=manifest.rows_offset).view(shard.rows, -1)
            for memory, shard in zip(self.maps, manifest.shards, strict=True)
        ]
        self.starts = torch.tensor([i * manifest.shard_rows for i in range(len(self.shards) + 1)])

    @property
    def statistics(self) -> RunningStatistics:
        """Count, mean and variance of all rows of the store."""
        merged, width = RunningStatistics(self.layout.width), self.manifest.layout.width
        for shard, memory in zip(self.manifest.shards, self.maps, strict=True):
            offset = self.manifest.rows_offset - 16 * width
            stored = torch.frombuffer(memory, dtype=torch.float64, count=2 * width, offset=offset)
            mean, m2 = (torch.cat([part[src] for src, _ in self.columns]) for part in stored.split(width))
            merged.merge(shard.rows, mean, m2)
        return merged

    def gather(self, index: Int[Tensor, "token"], *, pinned: bool = False) -> Float[Tensor, "token width"]:
        """The rows at increasing positions `index`, in the store's dtype."""
        rows = torch.empty(len(index), self.layout.width, dtype=self.dtype, pin_memory=pinned)
        ends = torch.searchsorted(index, self.starts).tolist()
        for shard, start, a, b in zip(self.shards, self.starts.tolist(), ends, ends[1:], strict=False):
            if a < b:
                for stored, wanted in self.columns:
                    torch.index_select(shard[:, stored], 0, index[a:b] - start, out=rows[a:b, wanted])
        return rows

    def rows(self, start: int, stop: int) -> Float[Tensor, "token width"]:
        """Rows `start` up to `stop` in the order in which they were harvested, in the store's dtype."""
        assert 0 <= start <= stop <= self.n_rows, f"rows {start} to {stop} of {self.n_rows}"
        return self.gather(torch.arange(start, stop))

    def will_need(self, blocks: Int[Tensor, "block"]) -> None:
        """Have the kernel read blocks from the disk, without waiting for them."""
        per_shard, n_bytes = self.manifest.shard_rows // BLOCK_ROWS, BLOCK_ROWS * self.manifest.row_bytes
        for block in blocks.tolist():
            memory = self.maps[block // per_shard]
            start = self.manifest.rows_offset + block % per_shard * n_bytes
            stop = min(start + n_bytes, len(memory))
            start -= start % mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def check_target(self, target: Target) -> None:
        """Refuse the store if the target's activations on its first sequence are others than the stored ones."""
        tokens = torch.tensor([self.manifest.first_tokens], device=target.device)
        keep = torch.tensor(self.manifest.first_kept, device=target.device)
        recorded = target.record(tokens, self.layout.sites)
        here = torch.cat([recorded[site][0, keep] for site in self.layout.sites], dim=-1).double().cpu()[: self.n_rows]
        there = self.rows(0, len(here)).double()
        error = ((here - there).norm() / there.norm()).item() if len(here) else 0.0
        settings = self.manifest.settings
        dtypes = {value for key, value in settings.items() if key in ("target.dtype", "paired_target.dtype")}
        paths = [f"{key}={settings[key]}" for key in ("target.path", "paired_target.path") if key in settings]
        exact = self.dtype is torch.float32 and dtypes == {"float32"}
        require(
            error < (0.01 if exact else 0.05),
            f"activations.store={self.directory} holds activations of other weights than "
            f"{' and '.join(paths)} {'have' if len(paths) > 1 else 'has'} now (they differ by {error:.1%}); write the store again",
        )


def open_store(directory: Path, sites: Sequence[Site] | None = None, settings: Settings | None = None) -> Store:
    """Open a complete store, for `sites` (null: all of them), of rows as `settings` describe them (null: any).

    Raises SettingError if it is missing, incomplete, damaged, or one of other rows. Damage inside a file of the right
    size is found by `verify`.
    """
    named = f"activations.store={directory}"
    manifest = Manifest.read(directory)
    require(
        manifest.complete,
        f"{named} is incomplete, {manifest.n_written} of {manifest.n_rows} rows; write it to the end first",
    )
    difference = None if settings is None else first_difference(manifest.settings, settings)
    require(difference is None, f"{named} holds other rows: {difference}; write a store with these settings")
    held = manifest.layout.sites
    missing = [str(site) for site in sites or () if site not in held]
    require(not missing, f"{named} has no site {', '.join(missing)}; it holds {', '.join(manifest.sites)}")
    for index, shard in enumerate(manifest.shards):
        path = directory / shard.file
        size = path.stat().st_size if path.is_file() else 0
        expected = manifest.shard_bytes(shard.rows)
        require(
            size == shard.bytes == expected,
            f"{named} is damaged: {shard.file} has {size} bytes, not {expected}; write it again",
        )
        header = manifest.header(index, shard.rows)
        with open(path, "rb") as file:
            require(
                file.read(len(header)) == header,
                f"{named} is damaged: {shard.file} is not shard {index} of this store; write it again",
            )
    return Store(directory, manifest, sites or held)


def verify(store: Store) -> None:
    """Read every byte and compare checksums. Raises SettingError naming the shard that is damaged."""
    offset = store.manifest.rows_offset
    for shard, memory in zip(store.manifest.shards, store.maps, strict=True):
        content = memoryview(memory)
        require(
            zlib.crc32(content[:offset], zlib.crc32(content[offset:])) == shard.crc32,
            f"activations.store={store.directory} is damaged: the checksum of {shard.file} is wrong; write it again",
        )
