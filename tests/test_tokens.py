"""Rows of tokens: packing, splits, order, position, ranks. The laws hold for every kind of source (test_tokens_sources)."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nndecomp.config.schema import Packing, TokensConfig, TokensKind
from nndecomp.errors import SettingError
from nndecomp.tokens import TokenBatch, heldout_tokens, open_tokens
from nndecomp.tokens.stream import open_reader

N_DOCUMENTS = 60
LENGTHS = [3 + (7 * i) % 40 for i in range(N_DOCUMENTS)]
# Document i is "i:0 i:1 ...": every word says where it belongs.
TEXTS = [" ".join(f"{i}:{j}" for j in range(LENGTHS[i])) for i in range(N_DOCUMENTS)]
WORDS = ["<eos>", "<bos>", *(word for text in TEXTS for word in text.split())]
EOS, BOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word; no BOS in front by itself."""
    return word_tokenizer(prepends=False)


def word_tokenizer(prepends: bool) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if prepends:
        words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", bos_token="<bos>")


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return lambda **settings: TokensConfig(
        **{"kind": TokensKind.files, "path": str(tmp_path), "seq_len": 16, "heldout_fraction": 0.25} | settings
    )


def document_of(token: int) -> int:
    return int(WORDS[token].split(":")[0])


def documents_of(batch: TokenBatch) -> set[int]:
    return {document_of(t) for t in batch.tokens[batch.mask].tolist() if t not in (EOS, BOS)}


def one_epoch(cfg: TokensConfig, heldout: bool, **place: int) -> list[str]:
    return list(open_reader(cfg, heldout=heldout, **{"seed": 0, **place}).one_pass())


def test_training_and_heldout_documents_are_disjoint_and_together_all(cfg):
    train, heldout = one_epoch(cfg(), heldout=False), one_epoch(cfg(), heldout=True)
    assert len(heldout) > 5
    assert sorted(train + heldout) == sorted(TEXTS)


def test_copies_of_a_document_are_on_one_side(cfg, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3))
    train, heldout = one_epoch(cfg(), heldout=False), one_epoch(cfg(), heldout=True)
    assert len(train) + len(heldout) == 3 * N_DOCUMENTS
    assert not set(train) & set(heldout)


def test_a_document_stays_on_its_side_when_others_come_and_go(cfg, tmp_path):
    before = set(one_epoch(cfg(), heldout=True))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[10:]))
    assert set(one_epoch(cfg(), heldout=True)) == before & set(TEXTS[10:])


def test_the_heldout_share_of_many_documents_is_the_fraction_asked_for():
    from nndecomp.tokens.documents import Document

    held = sum(Document.of(f"document {i}").heldout(0.05) for i in range(20_000))
    assert abs(held - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5


def test_rows_never_mix_training_and_heldout(cfg, tokenizer):
    heldout = documents_of(heldout_tokens(cfg(), tokenizer, 8))
    train = documents_of(open_tokens(cfg(), tokenizer, seed=0).next_batch(400))
    assert heldout and train and not heldout & train


def test_concatenated_rows_are_the_documents_joined_by_eos(cfg, tokenizer):
    in_order = cfg(shuffle_documents=1)
    rows = open_tokens(in_order, tokenizer, seed=0).next_batch(50)
    texts = one_epoch(in_order, heldout=False)
    joined = [id for text in texts for id in [*tokenizer(text)["input_ids"], EOS]]
    flat = rows.tokens.flatten().tolist()
    twice = (joined + joined)[: len(flat)]  # the second epoch follows the first without a gap
    assert len(flat) < 2 * len(joined)
    assert flat == twice
    assert rows.mask.all() and not rows.is_bos.any()


def test_lanes_keep_documents_whole_and_read_each_once_an_epoch(cfg, tokenizer):
    stream = open_tokens(cfg(shuffle_documents=4), tokenizer, seed=0)
    texts = one_epoch(cfg(), heldout=False)
    rows = stream.next_batch(4 * 20).tokens
    words = [rows[lane::4].flatten().tolist() for lane in range(4)]
    for lane in words:
        ends = [i for i, token in enumerate(lane) if token == EOS]
        for start, end in zip([-1, *ends], ends, strict=False):
            document = lane[start + 1 : end]
            assert document == tokenizer(TEXTS[document_of(document[0])])["input_ids"]
    firsts = [t for lane in words for t in lane if t > BOS and WORDS[t].endswith(":0")]
    assert len(set(firsts)) == len(texts)


def test_a_batch_holds_many_documents(cfg, tokenizer):
    assert len(documents_of(open_tokens(cfg(), tokenizer, seed=0).next_batch(32))) >= 20


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("n_before", [0, 1, 7, 100])
def test_a_restored_stream_goes_on_bit_for_bit(cfg, tokenizer, packing, n_before):
    stream = open_tokens(cfg(packing=packing), tokenizer, seed=3)
    stream.next_batch(n_before)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [stream.next_batch(5) for _ in range(20)]

    fresh = open_tokens(cfg(packing=packing), tokenizer, seed=3)
    fresh.next_batch(13)  # wherever it stood
    fresh.load_state_dict(state)
    for batch in expected:
        again = fresh.next_batch(5)
        assert torch.equal(again.tokens, batch.tokens) and torch.equal(again.mask, batch.mask)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_disjoint_documents_that_together_are_all(cfg, world_size):
    parts = [one_epoch(cfg(), heldout=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(parts)
    assert sorted(sum(parts, [])) == sorted(one_epoch(cfg(), heldout=False))


def test_the_order_depends_on_seed_and_epoch_alone(cfg):
    def epochs(seed: int) -> list[list[str]]:
        reader = open_reader(cfg(), heldout=False, seed=seed)
        return [list(reader.one_pass()) for _ in range(2)]

    first, second = epochs(0)
    assert epochs(0) == [first, second]
    assert first != second and sorted(first) == sorted(second)
    assert epochs(1)[0] != first


def test_heldout_rows_do_not_depend_on_the_seed_and_more_begin_with_fewer(cfg, tokenizer):
    few, more = heldout_tokens(cfg(), tokenizer, 5), heldout_tokens(cfg(), tokenizer, 12)
    assert torch.equal(more.tokens[:5], few.tokens)


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize(("by_itself", "asked", "expected"), [(True, None, 1), (False, None, 0), (True, False, 0), (True, True, 1), (False, True, 1)])  # fmt: skip
def test_bos_stands_once_in_front_of_a_row_or_nowhere(cfg, packing, by_itself, asked, expected):
    settings = cfg(packing=packing, prepend_bos=asked)
    tokenizer = word_tokenizer(prepends=by_itself)
    for batch in (open_tokens(settings, tokenizer, seed=0).next_batch(40), heldout_tokens(settings, tokenizer, 6)):
        assert ((batch.tokens == BOS).sum(dim=1) == expected).all()
        assert torch.equal(batch.is_bos, batch.tokens == BOS)
        assert not batch.is_bos[:, 1:].any()


def test_one_document_a_row_is_cut_or_padded_and_padding_is_masked(cfg, tokenizer):
    rows = open_tokens(cfg(packing=Packing.documents), tokenizer, seed=0).next_batch(30)
    for tokens, mask in zip(rows.tokens.tolist(), rows.mask, strict=True):
        document = document_of(tokens[0])
        n_real = min(16, LENGTHS[document])
        assert mask.tolist() == [True] * n_real + [False] * (16 - n_real)
        assert tokens[:n_real] == tokenizer(TEXTS[document])["input_ids"][:n_real]


def test_lowercase_changes_the_text_before_it_is_tokenised(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"WORD {i}"}) + "\n" for i in range(40)))
    words = Tokenizer(models.WordLevel({"<eos>": 0, "word": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lower = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    cfg = TokensConfig(kind=TokensKind.files, path=str(tmp_path), seq_len=6, lowercase=True, shuffle_documents=1)
    assert open_tokens(cfg, lower, seed=0).next_batch(1).tokens.tolist() == [[1, 2, 0, 1, 2, 0]]


def test_batches_split_into_the_same_rows():
    batch = TokenBatch(torch.arange(10).reshape(5, 2), torch.ones(5, 2, dtype=torch.bool), torch.zeros(5, 2).bool())
    parts = list(batch.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)


def test_too_few_heldout_rows_are_refused_with_their_number(cfg, tokenizer):
    with pytest.raises(SettingError, match=r"evaluation\.n_seqs=9999: .* has \d+ rows of tokens\.seq_len=16"):
        heldout_tokens(cfg(), tokenizer, 9999)


def test_files_too_few_to_hold_any_out_are_refused_with_their_number(tmp_path, tokenizer, capfd):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(TEXTS[i])
    few = TokensConfig(kind=TokensKind.files, path=str(tmp_path), seq_len=16, heldout_fraction=1e-9)
    with pytest.raises(SettingError, match=r"has 0 rows .* 3 documents were found .*\.jsonl .*raise tokens\.heldout_f"):
        heldout_tokens(few, tokenizer, 1)
    assert "Generating" not in capfd.readouterr().err, "no progress bars for local files"


def test_an_empty_training_split_is_refused(cfg, tokenizer, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    with pytest.raises(SettingError, match=r"tokens\.path: .*training split.* none to read"):
        open_tokens(cfg(heldout_fraction=1 - 1e-12), tokenizer, seed=0)


def test_packing_needs_an_eos_and_bos_needs_a_bos(cfg):
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(SettingError, match=r"tokens\.packing=packed .*EOS"):
        open_tokens(cfg(), plain, seed=0)
    with pytest.raises(SettingError, match=r"tokens\.prepend_bos=True needs a BOS"):
        open_tokens(cfg(packing=Packing.documents, prepend_bos=True), plain, seed=0)
