"""Laws of the store on disk: it holds what was harvested, to the byte, and nothing else passes for it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from activation_parts import READ, WRITE, Counting, TokenIds, harvester, ids
from torch import Tensor

from nndecomp.activations.manifest import BLOCK_ROWS, Manifest, Settings, row_settings
from nndecomp.activations.store import Store, open_store, verify
from nndecomp.activations.store_writer import write_store
from nndecomp.activations.stream import StoreStream
from nndecomp.config.schema import DType, TargetConfig, TargetKind, TokensConfig, TokensKind
from nndecomp.errors import SettingError

N_ROWS, SHARD_ROWS = 1300, 512  # two shards and a rest; five blocks and a rest
SITES = (READ, WRITE)


def settings_of(writer: Any, **tokens: Any) -> Settings:
    target = TargetConfig(kind=TargetKind.llama_simple_mlp, path="token-ids")
    text = TokensConfig(**{"kind": TokensKind.files, "path": "counting", "seq_len": 8} | tokens)
    return row_settings(target, None, text, writer.cfg, writer.target.tokenizer)


def written(directory: Path, n_rows: int = N_ROWS, **changes: Any) -> Path:
    writer = harvester(Counting(padded=True), SITES, **changes)
    write_store(writer, directory, settings_of(writer), n_rows=n_rows, seed=3, shard_rows=SHARD_ROWS)
    return directory


def harvested(n_rows: int = N_ROWS, **changes: Any) -> Tensor:
    source, rows = harvester(Counting(padded=True), SITES, **changes), []
    while sum(map(len, rows)) < n_rows:
        rows.append(source.next_rows())
    return torch.cat(rows)[:n_rows]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("dtype", list(DType))
def test_reading_in_order_gives_what_was_harvested_bit_for_bit(tmp_path: Path, dtype: DType) -> None:
    store = open_store(written(tmp_path, dtype=dtype))
    verify(store)
    assert torch.equal(store.rows(0, N_ROWS), harvested(dtype=dtype))
    assert torch.equal(store.rows(500, 530), harvested(dtype=dtype)[500:530]), "across a shard's end"


def test_a_shard_is_a_safetensors_file_whose_rows_start_at_a_page(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    directory = written(tmp_path, dtype=DType.bfloat16)
    shards = [load_file(directory / f"rows-0000{i}.safetensors")["rows"] for i in range(3)]
    assert [len(shard) for shard in shards] == [512, 512, 276]
    assert torch.equal(torch.cat(shards), harvested(dtype=DType.bfloat16))
    assert Manifest.read(directory).rows_offset % 4096 == 0


@pytest.mark.parametrize("dtype", list(DType))
def test_statistics_are_those_of_numpy_in_float64_over_all_rows(tmp_path: Path, dtype: DType) -> None:
    statistics = open_store(written(tmp_path, dtype=dtype)).statistics
    exact = harvested(dtype=dtype).double().numpy()
    assert statistics.count == N_ROWS
    np.testing.assert_allclose(statistics.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.variance, exact.var(0), rtol=1e-10)


def test_some_sites_are_the_same_columns_and_statistics(tmp_path: Path) -> None:
    whole = open_store(written(tmp_path))
    for site in SITES:
        part, columns = open_store(tmp_path, [site]), whole.layout.spans[site]
        assert part.layout.sites == (site,)
        assert torch.equal(part.rows(0, N_ROWS), whole.rows(0, N_ROWS)[:, columns])
        assert torch.equal(part.statistics.mean, whole.statistics.mean[columns])


WRITE_SLOWLY = """
import sys, time
from pathlib import Path
import test_store
from activation_parts import Counting, harvester

class Slow(Counting):
    def next_batch(self, batch_seqs):
        time.sleep(0.0005)
        return super().next_batch(batch_seqs)

writer = harvester(Slow(padded=True), test_store.SITES)
print("start", flush=True)
test_store.write_store(
    writer, Path(sys.argv[1]), test_store.settings_of(writer), n_rows=test_store.N_ROWS, seed=3,
    shard_rows=test_store.SHARD_ROWS, progress=lambda n: print(n, flush=True),
)
"""


def test_killed_at_any_moment_writing_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    directory, interrupted = tmp_path / "store", []
    for lines, delay in [(1, 0.01), (2, 0.0), (1, 0.02), (2, 0.01), (99, 0.0)]:
        child = subprocess.Popen(
            [sys.executable, "-c", WRITE_SLOWLY, str(directory)], stdout=subprocess.PIPE, cwd=Path(__file__).parent
        )
        assert child.stdout is not None
        for _, _line in zip(range(lines), child.stdout, strict=False):
            pass
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        begun = Manifest.read(directory).n_written if (directory / "manifest.json").exists() else 0
        interrupted.append(begun)
    assert 0 in interrupted[:1] and 512 in interrupted, f"killed with {interrupted} rows on disk"
    write_store(
        writer := harvester(Counting(padded=True), SITES),
        directory,
        settings_of(writer),
        n_rows=N_ROWS,
        seed=3,
        shard_rows=SHARD_ROWS,
    )
    assert content(directory) == content(written(tmp_path / "uninterrupted"))


def test_a_complete_store_is_not_written_again(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written(tmp_path).iterdir()}
    assert before == {path: path.stat().st_mtime_ns for path in written(tmp_path).iterdir()}


def test_writing_goes_on_only_with_the_settings_it_was_begun_with(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(SettingError, match=r"begun with other settings: n_rows is 1300 there and 1301 here"):
        written(tmp_path, n_rows=1301)
    with pytest.raises(SettingError, match=r"activations.dtype is 'float32' there and 'bfloat16' here"):
        written(tmp_path, dtype=DType.bfloat16)


def test_a_directory_of_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SettingError, match="is not a store and not empty .it holds thesis.tex."):
        written(tmp_path)


def test_a_store_of_other_rows_is_refused_by_the_setting_that_differs(tmp_path: Path) -> None:
    writer = harvester(Counting(padded=True), SITES)
    written(tmp_path)
    assert open_store(tmp_path, SITES, settings_of(writer)).n_rows == N_ROWS
    with pytest.raises(SettingError, match="holds other rows: tokens.path is 'counting' there and 'other' here"):
        open_store(tmp_path, SITES, settings_of(writer, path="other"))
    with pytest.raises(SettingError, match="target.path is 'token-ids' there and 'tiny' here"):
        open_store(tmp_path, SITES, settings_of(writer) | {"target.path": "tiny"})
    with pytest.raises(SettingError, match="activations.drop_first is 0 there and 1 here"):
        open_store(tmp_path, SITES, settings_of(harvester(drop_first=1)))
    with pytest.raises(SettingError, match="has no site L7.mlp_in; it holds L0.mlp_in, L1.mlp_out"):
        open_store(tmp_path, [type(READ)(7, READ.point)])


def test_a_store_of_other_weights_is_refused(tmp_path: Path) -> None:
    store = open_store(written(tmp_path), [WRITE])
    store.check_target(TokenIds())
    with pytest.raises(SettingError, match="activations of other weights than target.path=token-ids has now"):
        store.check_target(TokenIds(shift=0.5))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damage_is_found(tmp_path: Path) -> None:
    damaged = lambda name: written(tmp_path / name) / "rows-00001.safetensors"  # noqa: E731
    for name, position in {"rows": -1, "statistics": 4096 - 8, "middle": 6000}.items():
        flip(path := damaged(name), position)
        store = open_store(path.parent)
        with pytest.raises(SettingError, match="is damaged: the checksum of rows-00001.safetensors is wrong"):
            verify(store)
    flip(path := damaged("header"), 20)
    with pytest.raises(SettingError, match="is damaged: rows-00001.safetensors is not shard 1 of this store"):
        open_store(path.parent)
    path = damaged("short")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SettingError, match="is damaged: rows-00001.safetensors has 20479 bytes, not 20480"):
        open_store(path.parent)
    (path := damaged("gone")).unlink()
    with pytest.raises(SettingError, match="is damaged: rows-00001.safetensors has 0 bytes"):
        open_store(path.parent)


def test_neither_manifest_nor_shard_of_another_store_passes(tmp_path: Path) -> None:
    mine, other = written(tmp_path / "mine"), written(tmp_path / "other", drop_first=1)
    (mine / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    with pytest.raises(SettingError, match="is damaged: rows-00000.safetensors is not shard 0 of this store"):
        open_store(mine)
    swapped = written(tmp_path / "swapped")
    (swapped / "rows-00000.safetensors").write_bytes((swapped / "rows-00001.safetensors").read_bytes())
    with pytest.raises(SettingError, match="is damaged: rows-00000.safetensors is not shard 0"):
        open_store(swapped)


def test_a_manifest_that_was_changed_or_cut_is_refused(tmp_path: Path) -> None:
    manifest = written(tmp_path) / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(SettingError, match="is damaged: manifest.json was changed"):
        open_store(tmp_path)
    manifest.write_text(text[:-40])
    with pytest.raises(SettingError, match="is damaged: manifest.json is not JSON"):
        open_store(tmp_path)
    manifest.write_text(json.dumps({"n_rows": 3}))
    with pytest.raises(SettingError, match="manifest.json does not say 'nndecomp activation store 1'"):
        open_store(tmp_path)
    manifest.unlink()
    with pytest.raises(SettingError, match="is not a store: there is no manifest.json in it"):
        open_store(tmp_path)


class Interrupted(Exception):
    pass


def test_an_incomplete_store_is_refused(tmp_path: Path) -> None:
    def stop(n_written: int) -> None:
        raise Interrupted

    writer = harvester(Counting(padded=True), SITES)
    with pytest.raises(Interrupted):
        write_store(writer, tmp_path, settings_of(writer), n_rows=N_ROWS, seed=3, shard_rows=SHARD_ROWS, progress=stop)
    with pytest.raises(SettingError, match="is incomplete, 512 of 1300 rows"):
        open_store(tmp_path)


def stream(store: Store, batch_tokens: int = 100, seed: int = 0, window_rows: int = 512) -> StoreStream:
    return StoreStream(store, batch_tokens, seed, window_rows, torch.device("cpu"))


def test_an_epoch_serves_every_row_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    reader = stream(open_store(written(tmp_path)))
    first, second = ([ids(reader.next_batch()) for _ in range(13)] for _ in range(2))
    everything = ids(harvested())
    for epoch in (first, second):
        assert sorted(sum(epoch, [])) == everything
    assert [sorted(batch) for batch in first] != [sorted(batch) for batch in second]


def test_batches_have_one_size_across_windows_and_epochs(tmp_path: Path) -> None:
    reader = stream(open_store(written(tmp_path, dtype=DType.float16)), batch_tokens=333)
    batches = [reader.next_batch() for _ in range(20)]
    assert {(tuple(batch.shape), batch.dtype) for batch in batches} == {((333, 8), torch.float32)}
    larger = stream(open_store(tmp_path), batch_tokens=3000)
    assert len(larger.next_batch()) == 3000, "a batch may be larger than the store"


def test_rows_of_a_sequence_spread_over_the_batches_of_a_window(tmp_path: Path) -> None:
    directory = written(tmp_path, n_rows=16 * BLOCK_ROWS)
    reader = stream(open_store(directory), batch_tokens=64, window_rows=8 * BLOCK_ROWS)
    batch_of = {i: n for n in range(64) for i in ids(reader.next_batch())}
    whole = [[batch_of[i] for i in range(s * 8, s * 8 + 8)] for s in range(0, 500, 3)]
    assert sum(len(set(batches)) for batches in whole) / len(whole) > 6.5


def test_two_readers_at_once_read_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    directory = written(tmp_path)
    first, second, other = (stream(open_store(directory), seed=seed) for seed in (1, 1, 2))
    batches = [(first.next_batch(), second.next_batch(), other.next_batch()) for _ in range(20)]
    assert all(torch.equal(a, b) for a, b, _ in batches)
    assert not any(torch.equal(a, c) for a, _, c in batches)
    before = content(directory)
    first.next_batch().zero_()
    first.store.shards[0].zero_()
    assert content(directory) == before, "a reader can change the store"


@pytest.mark.parametrize("n_before", [0, 1, 5, 14, 27])
def test_a_restored_reader_goes_on_bit_for_bit(tmp_path: Path, n_before: int) -> None:
    store = open_store(written(tmp_path))
    reader, restored = stream(store), stream(store)
    for _ in range(n_before):
        reader.next_batch()
    restored.load_state_dict(json.loads(json.dumps(reader.state_dict())))
    assert all(torch.equal(restored.next_batch(), reader.next_batch()) for _ in range(30))
