"""Every kind of source, from real files: the standard library, text, JSONL, parquet, tokens, saved and streamed data sets."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import zstandard
from test_tokens import BOS, N_DOCUMENTS, TEXTS, word_tokenizer

from nndecomp.config.schema import Packing, TokensConfig, TokensKind
from nndecomp.errors import SettingError
from nndecomp.tokens import heldout_tokens, open_tokens, training_documents
from nndecomp.tokens.documents import stdlib_documents
from nndecomp.tokens.encoding import prepends_bos
from nndecomp.tokens.stream import open_reader
from nndecomp.tokens.tokenizer import END, train_tokenizer

HELD_OUT = ["held out 0", "held out 1"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(prepends=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(N_DOCUMENTS))})


def hub_layout(directory: Path, n_files: int = 4) -> None:
    """A data set as it lies on the Hub: files of the training split, and one of another split."""
    (directory / "data").mkdir(parents=True)
    for i in range(n_files):
        rows().shard(n_files, i).to_parquet(directory / "data" / f"train-{i:05}-of-{n_files:05}.parquet")
    datasets.Dataset.from_dict({"text": HELD_OUT}).to_parquet(directory / "data" / "test-00000-of-00001.parquet")


def write(directory: Path, kind: str) -> TokensConfig:
    path, source = directory / "source", TokensKind.files
    match kind:
        case "txt":
            path.mkdir()
            for i, text in enumerate(TEXTS):
                (path / f"{i}.txt").write_text(text)
        case "jsonl":
            path = directory / "source.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        case "glob":
            path.mkdir()
            (path / "a.txt").write_text("another kind beside them")
            for i in range(3):
                rows().shard(3, i).to_parquet(path / f"{i}.parquet")
            path = path / "*.parquet"
        case "saved":
            rows().save_to_disk(path)
            source = TokensKind.hub
        case "saved splits":
            datasets.DatasetDict(train=rows()).save_to_disk(path)
            source = TokensKind.hub
        case "compressed":  # as the Pile lies on the Hub
            (path / "train").mkdir(parents=True)
            for i in range(3):
                lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[i::3])
                (path / "train" / f"{i:02}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
            source = TokensKind.hub
        case "streamed":
            hub_layout(path)
            source = TokensKind.hub
    return TokensConfig(
        kind=source,
        path=str(path),
        seq_len=16,
        heldout_fraction=0.25,
        shuffle_documents=7 if kind in ("streamed", "compressed") else 1000,
    )


KINDS = ["txt", "jsonl", "glob", "saved", "saved splits", "streamed", "compressed"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_documents_on_the_same_sides(tmp_path, kind):
    cfg = write(tmp_path, kind)
    (tmp_path / "other").mkdir()
    expected = write(tmp_path / "other", "jsonl")
    for heldout in (False, True):
        found = list(open_reader(cfg, heldout=heldout, seed=0).one_pass())
        assert sorted(found) == sorted(open_reader(expected, heldout=heldout, seed=0).one_pass())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_before", [3, 90])
def test_every_source_goes_on_where_it_was_saved(tmp_path, tokenizer, kind, n_before):
    cfg = write(tmp_path, kind)
    stream = open_tokens(cfg, tokenizer, seed=1)
    stream.next_batch(n_before)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [stream.next_batch(8).tokens for _ in range(15)]  # over the end of an epoch
    fresh = open_tokens(cfg, tokenizer, seed=1)
    fresh.load_state_dict(state)
    assert all(torch.equal(fresh.next_batch(8).tokens, tokens) for tokens in expected)


@pytest.mark.parametrize("n_files", [1, 4])
@pytest.mark.parametrize("world_size", [2, 3])
def test_streaming_ranks_read_disjoint_documents_that_together_are_all(tmp_path, n_files, world_size):
    hub_layout(tmp_path / "d", n_files)
    cfg = TokensConfig(kind=TokensKind.hub, path=str(tmp_path / "d"), heldout_fraction=0.25, shuffle_documents=7)
    readers = [open_reader(cfg, heldout=False, seed=0, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(2):  # files change hands between epochs, and still none is read twice
        parts = [list(reader.one_pass()) for reader in readers]
        assert sorted(sum(parts, [])) == sorted(open_reader(cfg, heldout=False, seed=0).one_pass())


def test_streaming_shuffles_documents_anew_every_epoch(tmp_path):
    cfg = write(tmp_path, "streamed")
    reader = open_reader(cfg, heldout=False, seed=0)
    first, second = list(reader.one_pass()), list(reader.one_pass())
    assert sorted(first) == sorted(second) and first != second
    assert first == list(open_reader(cfg, heldout=False, seed=0).one_pass())
    assert first != list(open_reader(cfg, heldout=False, seed=1).one_pass())


def test_a_named_heldout_split_is_all_that_is_held_out(tmp_path):
    hub_layout(tmp_path / "d")
    cfg = TokensConfig(kind=TokensKind.hub, path=str(tmp_path / "d"), heldout_split="test")
    assert sorted(open_reader(cfg, heldout=True, seed=0).one_pass()) == HELD_OUT
    assert sorted(open_reader(cfg, heldout=False, seed=0).one_pass()) == sorted(TEXTS)


@pytest.mark.parametrize("kind", [TokensKind.files, TokensKind.hub])
def test_rows_that_are_tokens_already_are_used_as_they_are(tmp_path, tokenizer, kind):
    ids = [[BOS, *range(2, 12)], list(range(2, 40)), *([i] * 16 for i in range(5, 60))]
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict({"input_ids": ids}).to_parquet(tmp_path / "d" / "train.parquet")
    cfg = TokensConfig(kind=kind, path=str(tmp_path / "d"), tokens_column="input_ids", seq_len=16, shuffle_documents=1)
    batch = open_tokens(cfg, tokenizer, seed=0).next_batch(len(ids) - 10)
    found = {tuple(t[m].tolist()): b for t, m, b in zip(batch.tokens, batch.mask, batch.is_bos, strict=True)}
    assert found.keys() <= {tuple(row[:16]) for row in ids}
    assert all(is_bos.tolist() == [row[0] == BOS, *[False] * 15] for row, is_bos in found.items())
    assert not found.keys() & {tuple(row.tolist()) for row in heldout_tokens(cfg, tokenizer, 1).tokens}


def test_tokens_of_another_tokenizer_are_refused(tmp_path, tokenizer):
    datasets.Dataset.from_dict({"ids": [[5, 10**6]] * 3}).to_parquet(tmp_path / "a.parquet")
    cfg = TokensConfig(kind=TokensKind.files, path=str(tmp_path), tokens_column="ids")
    with pytest.raises(SettingError, match=r"tokens\.tokens_column=ids holds token 1000000, .* another tokenizer"):
        open_tokens(cfg, tokenizer, seed=0)


WRONG = {
    "no such path": (dict(path="{d}/nowhere"), r"tokens\.path=.*nowhere matches no file"),
    "no such column": (dict(path="{d}/a.jsonl", text_column="story"), r"tokens\.text_column=story .* has text"),
    "no such tokens": (dict(path="{d}/a.jsonl", tokens_column="ids"), r"tokens\.tokens_column=ids .* has text"),
    "mixed": (dict(path="{d}"), r"tokens\.path=.* kind \.jsonl, \.txt; give one kind"),
    "other kind": (dict(path="{d}/b.csv"), r"tokens\.path=.* kind \.csv"),
    "split of files": (dict(path="{d}/a.jsonl", heldout_split="test"), r"tokens\.heldout_split=test needs tokens\.kind=hub"),
    "one split": (dict(kind="hub", path="{d}/hub", heldout_split="train"), r"tokens\.heldout_split=train is the training"),
    "no such split": (dict(kind="hub", path="{d}/hub", split="dev"), r"tokens\.split=dev .* has test, train"),
    "no such heldout": (dict(kind="hub", path="{d}/hub", heldout_split="dev"), r"tokens\.heldout_split=dev .* has test, train"),
    "not text": (dict(path="{d}/n.parquet", text_column="number"), r"tokens\.text_column=number .* holds int, not text"),
    "no such data set": (dict(kind="hub", path="nobody/nothing"), r"tokens\.path=nobody/nothing"),
    "no such subset": (dict(kind="hub", path="{d}/hub", subset="none"), r"tokens\.subset=none"),
    "lowercase tokens": (dict(path="{d}/a.jsonl", tokens_column="ids", lowercase=True), r"tokens\.lowercase=True cannot"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_source_that_cannot_be_read_is_refused_in_a_sentence(tmp_path, tokenizer, case):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "words"}) + "\n")
    (tmp_path / "c.txt").write_text("words")
    (tmp_path / "b.csv").write_text("words")
    hub_layout(tmp_path / "hub")
    settings, sentence = WRONG[case]
    if "n.parquet" in settings["path"]:
        rows().to_parquet(tmp_path / "n.parquet")
    settings = settings | {
        "path": settings["path"].format(d=tmp_path),
        "kind": TokensKind[settings.get("kind", "files")],
    }
    if case == "mixed":
        for file in (tmp_path / "hub" / "data").iterdir():
            file.unlink()
    with pytest.raises(SettingError, match=sentence):
        if settings.get("heldout_split") is not None:
            heldout_tokens(TokensConfig(**settings), tokenizer, 2)
        else:
            open_tokens(TokensConfig(**settings), tokenizer, seed=0)


def test_the_standard_library_is_split_by_file_and_no_text_is_on_both_sides():
    cfg = TokensConfig(kind=TokensKind.stdlib, path=None)
    train, heldout = (list(open_reader(cfg, heldout=side, seed=0).one_pass()) for side in (False, True))
    assert len(train) + len(heldout) == len(set(train) | set(heldout)) == len(stdlib_documents()) > 300
    assert 0.02 < len(heldout) / len(train) < 0.09
    assert sorted(training_documents(cfg, seed=5)) == sorted(train)


def test_the_standard_library_leaves_out_tests_and_what_is_not_its_own(tmp_path):
    for name in (
        "os.py",
        "json/decoder.py",
        "test/test_os.py",
        "json/tests/x.py",
        "site-packages/a/b.py",
        "lib2to3/p.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "copy.py").write_text("# os.py\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "_sysconfigdata__linux_.py").write_text("built = 'here'\n")
    documents = stdlib_documents(tmp_path)
    assert [document.key.decode() for document in documents] == ["copy.py", "json/decoder.py"]
    assert [document.body for document in documents] == ["# os.py\n", "# json/decoder.py\n"]


def test_a_file_stays_on_its_side_when_its_text_changes(tmp_path):
    def sides() -> list[bool]:
        return [document.heldout(0.5) for document in stdlib_documents(tmp_path)]

    for i in range(30):
        (tmp_path / f"{i}.py").write_text(f"a = {i}\n")
    before = sides()
    for i in range(30):
        (tmp_path / f"{i}.py").write_text(f"b = {i}\n")
    assert sides() == before and 5 < sum(before) < 25


def test_a_trained_tokenizer_is_lossless_deterministic_and_loads_again(tmp_path):
    from transformers import AutoTokenizer

    texts = [document.body for document in stdlib_documents()[:40]]
    first, second = (train_tokenizer(texts, 600, 64) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return 'häßlich \u2028 \U0001f600'\t# \x00\n"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded) == 600 and loaded.eos_token == END and loaded.eos_token_id == 0
    assert not prepends_bos(loaded)


@pytest.mark.parametrize("packing", Packing)
def test_a_document_longer_than_the_context_is_read_without_a_warning(packing, recwarn):
    cfg = TokensConfig(kind=TokensKind.stdlib, path=None, packing=packing, seq_len=32)
    texts = [document.body for document in stdlib_documents()[:10]]
    tokenizer = train_tokenizer(texts, 300, 32)
    assert open_tokens(cfg, tokenizer, seed=0).next_batch(2).mask.all()
    assert not recwarn.list
