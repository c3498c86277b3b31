"""The second model that ships: the first one, trained on with prose; and the prose."""

import json
import re

import pytest
import torch

from nndecomp.config.compose import compose
from nndecomp.config.schema import TargetConfig, TargetKind, TokensConfig, TokensKind
from nndecomp.report.card import model_card
from nndecomp.targets.load import SHIPPED
from nndecomp.targets.pair import PairedTarget, load_pair
from nndecomp.tokens import heldout_tokens, open_tokens
from nndecomp.tokens.documents import stdlib_documents
from nndecomp.tokens.stdlib_docs import docstrings, stdlib_docs_documents, topics
from nndecomp.training.language_model import cross_entropy

DOCS = SHIPPED["tiny_docs"]
FACTS = json.loads((DOCS / "facts.json").read_text())
COMMAND, *OVERRIDES = FACTS["command"].removeprefix("python ").split()


@pytest.fixture(scope="module")
def pair() -> PairedTarget:
    before, after = (TargetConfig(kind=TargetKind.llama_simple_mlp, path=path) for path in ("tiny", "tiny_docs"))
    return load_pair(before, after, torch.device("cpu"))


def test_it_ships_in_at_most_8_megabytes_and_names_no_path_of_the_machine_that_trained_it():
    assert sum(file.stat().st_size for file in DOCS.iterdir()) <= 8 * 2**20
    assert {file.name for file in DOCS.iterdir()} == {file.name for file in SHIPPED["tiny"].iterdir()}
    for file in DOCS.iterdir():
        if file.suffix != ".safetensors":
            assert not re.search(r"(^|[\"'\s(])(/work|/tmp|/root|/home)/", file.read_text()), file.name


def test_the_card_is_written_from_the_facts_and_the_command_beside_it():
    cfg = compose("exp_021_pretrain_target", OVERRIDES)
    assert COMMAND.endswith("exp_021_pretrain_target/run.py") and cfg.pretrain is not None
    assert (DOCS / "README.md").read_text() == model_card(cfg, cfg.pretrain, FACTS)


def test_it_has_the_sizes_of_the_first_one_and_other_weights(pair: PairedTarget):
    assert pair.shape.of("A") == pair.shape.of("B")
    tokens = torch.arange(32)[None]
    assert not torch.allclose(pair.logits(tokens), pair.predicting("B").logits(tokens), atol=0.1)


@pytest.mark.parametrize(("kind", "name", "margin"), [("stdlib_docs", "heldout", -0.3), ("stdlib", "start_text", 0.4)])
def test_it_learnt_the_prose_and_forgot_some_code_as_its_card_says(
    pair: PairedTarget, kind: str, name: str, margin: float
):
    text = heldout_tokens(TokensConfig(kind=TokensKind[kind], path=None), pair.tokenizer, 16)
    before, after = (cross_entropy(pair.predicting(model).logits, text, 8) for model in ("A", "B"))
    assert (after - before) / margin > 1, f"{kind}: {before:.3f} before, {after:.3f} after"
    # Other rows, and perhaps another version of the standard library.
    assert abs(before - FACTS["scores"][f"ce_{name}_before"]) < 0.4 and abs(after - FACTS["scores"][f"ce_{name}"]) < 0.4


def test_prose_is_what_the_source_says_about_itself_in_its_order_without_the_code():
    source = '"""A module."""\n\ndef f():\n    """What f\n    does."""\n    return "no docstring"\n\nclass C:\n'
    source += '    "About C."\n    def m(self):\n        """About m."""\n    x = 3\n\ndef bare(): pass\n'
    assert docstrings(source) == "A module.\n\nWhat f\ndoes.\n\nAbout C.\n\nAbout m."
    assert docstrings("x = 3\n") == ""
    assert topics("# made\ntopics = {'b': 'Of b.\\n', 'a': '\\n   Of a:\\n   more\\n'}\n") == ["Of a:\nmore", "Of b."]


def test_a_module_and_its_prose_are_on_one_side_of_the_split():
    """So that a model trained on the one text has seen nothing of what is held out of the other."""
    sides = {document.key: document.heldout(0.05) for document in stdlib_documents()}
    prose = stdlib_docs_documents()
    assert {document.key for document in prose} <= sides.keys()
    assert all(document.heldout(0.05) == sides[document.key] for document in prose)
    held = [document for document in prose if document.heldout(0.05)]
    assert 5 < len(held) < len(prose) / 4
    assert not {d.body for d in held} & {d.body for d in prose if not d.heldout(0.05)}


def test_prose_is_read_as_any_text(pair: PairedTarget):
    cfg = compose("config", ["name=any", "tokens=stdlib_docs", "tokens.seq_len=64"]).tokens
    rows = open_tokens(cfg, pair.tokenizer, seed=0).next_batch(4)
    text = pair.tokenizer.decode(rows.tokens.flatten())
    assert rows.tokens.shape == (4, 64) and "def " not in text and " the " in text
