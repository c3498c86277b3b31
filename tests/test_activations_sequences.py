"""Streams of whole sequences."""

from typing import Any

import pytest
import torch
from activation_parts import D_MODEL, READ, WRITE, Counting, harvester

from nndecomp.activations.sequences import SequenceBuffer, Sequences
from nndecomp.errors import SettingError

SEQ_LEN = 8


def buffer(seed: int = 0, batch_tokens: int = 24, buffer_tokens: int = 120, **source: Any) -> SequenceBuffer:
    tokens = Counting(SEQ_LEN, padded=True, bos=True)
    return SequenceBuffer(harvester(tokens, drop_bos=True, **source), buffer_tokens, batch_tokens, seed)


def sequence_ids(batch: Sequences) -> list[int]:
    """Which sequence of the text each is: its first token's id, counted in sequences."""
    return (batch.values[:, 0, 0] / SEQ_LEN).long().tolist()


def test_sequences_come_whole_and_each_once() -> None:
    shuffled = buffer()
    served = []
    for _ in range(100):
        batch = shuffled.next_batch()
        assert batch.values.shape == (3, SEQ_LEN, D_MODEL)
        assert torch.equal(batch.values[:, :, 0].diff(dim=1), torch.ones(3, SEQ_LEN - 1)), "positions stay in order"
        served += sequence_ids(batch)
    assert len(set(served)) == 300, "none is served twice"
    assert set(served) <= set(range(300 + 15)), "what is not served yet waits in a buffer of 15"
    assert served != sorted(served)


def test_what_counts_is_neither_bos_nor_padding_and_is_known_for_every_sequence() -> None:
    for batch in (buffer().next_batch() for _ in range(5)):
        keep = torch.zeros(3 * SEQ_LEN, dtype=torch.bool)
        keep[batch.kept] = True
        for i, sequence in enumerate(sequence_ids(batch)):
            length = SEQ_LEN - sequence % 3
            assert keep.view(3, SEQ_LEN)[i].tolist() == [False] + [True] * (length - 1) + [False] * (SEQ_LEN - length)
        assert len(batch) == int(keep.sum())


def test_columns_scales_and_rows_are_those_of_the_positions_that_count() -> None:
    batch = buffer(sites=[READ, WRITE]).next_batch()
    scale = torch.arange(1.0, 1 + D_MODEL)
    by_hand = batch.values.flatten(0, 1)[batch.kept][:, D_MODEL:] / scale
    assert torch.equal((batch[:, slice(D_MODEL, None)] / scale).rows(), by_hand)


def test_a_restored_stream_serves_the_same_batches_bit_for_bit() -> None:
    first = buffer()
    for _ in range(7):
        first.next_batch()
    state = torch.load(_saved(first.state_dict()), weights_only=True)
    after = [first.next_batch() for _ in range(9)]
    second = buffer(seed=5)
    second.load_state_dict(state)
    for mine in after:
        theirs = second.next_batch()
        assert torch.equal(mine.values, theirs.values) and torch.equal(mine.kept, theirs.kept)


def _saved(state: dict[str, Any]) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_batches_of_broken_sequences_are_refused() -> None:
    with pytest.raises(SettingError, match="training.batch_tokens=20 is not a multiple of tokens.seq_len=8"):
        buffer(batch_tokens=20)
    with pytest.raises(SettingError, match="activations.buffer_tokens=32 is too small"):
        buffer(buffer_tokens=32)
