"""Laws of masking, harvesting and shuffling, on activations that one can read by eye."""

import io
from typing import Any

import pytest
import torch
from activation_parts import D_MODEL, READ, WRITE, Counting, harvester, ids, settings

from nndecomp.activations.buffer import ShuffleBuffer
from nndecomp.activations.harvest import kept
from nndecomp.config.schema import DType
from nndecomp.errors import SettingError


def test_padding_bos_and_first_positions_are_dropped() -> None:
    batch = Counting(padded=True, bos=True).next_batch(3)
    lengths = [8, 7, 6]
    assert kept(batch, settings()).sum(1).tolist() == lengths
    assert kept(batch, settings(drop_bos=True)).sum(1).tolist() == [n - 1 for n in lengths]
    assert kept(batch, settings(drop_first=3)).sum(1).tolist() == [n - 3 for n in lengths]
    assert kept(batch, settings(drop_bos=True, drop_first=3)).tolist()[2] == [False] * 3 + [True] * 3 + [False] * 2
    assert batch.mask.sum(1).tolist() == lengths, "the batch's own mask was changed"


def test_rows_come_in_token_order_without_masked_positions() -> None:
    rows = harvester(Counting(padded=True, bos=True), drop_bos=True).next_rows()
    assert ids(rows) == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14]


def test_sites_stand_side_by_side_in_layout_order_whatever_order_they_are_asked_in() -> None:
    both = harvester(sites=(WRITE, READ))
    rows = both.next_rows()
    assert both.layout.sites == (READ, WRITE)
    assert rows[5].tolist() == [5.0] * 4 + [5.25] * 4


@pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float16])
@pytest.mark.parametrize("bos", [True, False])
def test_rows_are_kept_at_the_chosen_dtype(dtype: DType, bos: bool) -> None:
    make = lambda **changes: harvester(Counting(bos=bos), (READ, WRITE), drop_bos=True, **changes)  # noqa: E731
    rows, exact = make(dtype=dtype).next_rows(), make().next_rows()
    assert rows.dtype is getattr(torch, dtype.value)
    assert torch.equal(rows, exact.to(rows.dtype))


def test_masking_every_position_is_refused() -> None:
    with pytest.raises(SettingError, match="activations.drop_first=8 leaves nothing of tokens.seq_len=8"):
        harvester(drop_first=8)


def buffer(capacity: int = 200, batch_tokens: int = 20, seed: int = 0, **source: Any) -> ShuffleBuffer:
    return ShuffleBuffer(harvester(**source), capacity, batch_tokens, seed)


def test_every_row_is_served_exactly_once() -> None:
    shuffled = buffer(tokens=Counting(padded=True, bos=True), drop_bos=True)
    served = [i for _ in range(500) for i in ids(shuffled.next_batch())]
    slots = shuffled.slots
    free = slots.order[slots.filled : slots.cursor].tolist()
    waiting = [id for slot, id in enumerate(ids(shuffled.rows)) if slot not in free]
    replay = harvester(Counting(padded=True, bos=True), drop_bos=True)
    harvested = [i for _ in range(shuffled.source.tokens.n_read // 2) for i in ids(replay.next_rows())]  # pyright: ignore
    assert sorted(served + waiting) == harvested


def test_batches_have_one_size_and_are_fp32() -> None:
    shuffled = buffer(tokens=Counting(padded=True), dtype=DType.bfloat16)
    batches = [shuffled.next_batch() for _ in range(50)]
    assert {(tuple(b.shape), b.dtype) for b in batches} == {((20, D_MODEL), torch.float32)}


def test_the_same_seed_gives_the_same_batches_and_another_seed_others() -> None:
    first, again, other = (
        torch.stack([shuffled.next_batch() for _ in range(30)])
        for shuffled in (buffer(seed=1), buffer(seed=1), buffer(seed=2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_of_a_sequence_spread_over_batches_and_mix_across_refills() -> None:
    # 512 rows held, 16 served at a time: half of the buffer lasts 16 batches.
    shuffled = buffer(capacity=512, batch_tokens=16)
    n_batches = 2000
    batch_of = {i: n for n in range(n_batches) for i in ids(shuffled.next_batch())}
    whole = [
        [batch_of[i] for i in range(s * 8, s * 8 + 8)]
        for s in range(3000)
        if all(i in batch_of for i in range(s * 8, s * 8 + 8))
    ]
    assert len(whole) > 2500
    distinct = sum(len(set(batches)) for batches in whole) / len(whole)
    spread = sum(max(batches) - min(batches) for batches in whole) / len(whole)
    assert distinct > 7, f"8 rows of a sequence meet in {distinct:.2f} batches"
    assert spread > 32, f"8 rows of a sequence come within {spread:.1f} batches, the time to serve the buffer once"


def test_refilling_is_spread_evenly_over_batches() -> None:
    shuffled = buffer(capacity=512, batch_tokens=16)
    shuffled.next_batch()
    read = []
    for _ in range(100):
        before = shuffled.source.tokens.n_read  # pyright: ignore
        shuffled.next_batch()
        read.append(shuffled.source.tokens.n_read - before)  # pyright: ignore
    assert set(read) == {2}, "a batch of 16 rows costs one forward pass of 2 sequences of 8, each time"


@pytest.mark.parametrize("n_before", [0, 1, 7, 33])
def test_a_restored_buffer_goes_on_bit_for_bit(n_before: int) -> None:
    make = lambda: buffer(tokens=Counting(padded=True), dtype=DType.bfloat16)  # noqa: E731
    shuffled, restored, saved = make(), make(), io.BytesIO()
    for _ in range(n_before):
        shuffled.next_batch()
    torch.save(shuffled.state_dict(), saved)
    expected = [shuffled.next_batch() for _ in range(60)]
    saved.seek(0)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    assert all(torch.equal(restored.next_batch(), batch) for batch in expected)


def test_a_buffer_too_small_is_refused_in_one_sentence() -> None:
    with pytest.raises(SettingError, match="activations.buffer_tokens=35 is too small; .* 36 or more"):
        buffer(capacity=35)
    tight = buffer(capacity=36)
    assert len({i for _ in range(100) for i in ids(tight.next_batch())}) == 2000
