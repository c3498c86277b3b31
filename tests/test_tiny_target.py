"""The model that ships is what its card says, and good enough for an evaluation to mean something."""

import json
import re
from pathlib import Path

import pytest
import torch

from nndecomp.config.compose import compose
from nndecomp.config.schema import TargetConfig, TargetKind, TokensConfig, TokensKind
from nndecomp.evaluation.language_model import ablated_cross_entropy, unigram_entropy
from nndecomp.report.card import model_card
from nndecomp.targets.load import TINY, load_target
from nndecomp.tokens import heldout_tokens
from nndecomp.training.language_model import cross_entropy

FACTS = json.loads((TINY / "facts.json").read_text())
N_SEQS = 24  # of 256 tokens


@pytest.fixture(scope="module")
def tiny():
    return load_target(TargetConfig(kind=TargetKind.llama_simple_mlp, path="tiny"), torch.device("cpu"))


@pytest.fixture(scope="module")
def heldout(tiny):
    return heldout_tokens(TokensConfig(kind=TokensKind.stdlib, path=None), tiny.tokenizer, N_SEQS)


@pytest.fixture(scope="module")
def ce(tiny, heldout):
    return cross_entropy(tiny.logits, heldout, 8)


def test_it_ships_in_at_most_8_megabytes_and_nothing_in_it_is_code():
    files = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sum(files.values()) <= 8 * 2**20
    assert files.keys() == {
        *(
            "README.md",
            "facts.json",
            "model.safetensors",
            "model_config.yaml",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }


def test_it_is_the_model_that_the_experiments_settings_describe(tiny):
    size = compose("exp_021_pretrain_target").pretrain
    assert size is not None
    shape = tiny.shape
    assert (shape.n_layers, shape.d_model, shape.d_mlp, shape.n_heads) == (4, 128, 512, 4)
    assert (shape.n_layers, shape.d_model, shape.d_mlp) == (size.n_layers, size.d_model, size.d_mlp)
    assert (shape.n_vocab, shape.n_ctx, len(tiny.tokenizer)) == (size.vocab_size, size.n_ctx, size.vocab_size)
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())


def test_its_heldout_cross_entropy_is_far_below_the_unigram_entropy(heldout, ce):
    assert ce < 3.5
    assert ce < unigram_entropy(heldout) - 2.0


def test_zero_ablating_all_mlps_costs_more_than_a_nat(tiny, heldout, ce):
    assert ablated_cross_entropy(tiny, heldout, range(4), 8) > ce + 1.0


@pytest.mark.parametrize("layer", range(4))
def test_zero_ablating_any_one_mlp_costs_at_least_a_twentieth_of_a_nat(tiny, heldout, ce, layer):
    assert ablated_cross_entropy(tiny, heldout, [layer], 8) > ce + 0.05


def test_the_card_is_written_from_the_facts_beside_it():
    cfg = compose("exp_021_pretrain_target")
    assert cfg.pretrain is not None
    assert (TINY / "README.md").read_text() == model_card(cfg, cfg.pretrain, FACTS)


def test_the_card_names_the_command_the_tokens_and_the_losses():
    card = (TINY / "README.md").read_text()
    settings = compose("exp_021_pretrain_target")
    assert FACTS["command"] == "python experiments/exp_021_pretrain_target/run.py" and FACTS["command"] in card
    assert FACTS["n_tokens"] == settings.training.n_steps * settings.training.batch_tokens
    for number in (
        f"{FACTS['n_tokens']:,}",
        *(f"{FACTS['scores'][name]:.3f}" for name in ("ce_training", "ce_heldout")),
    ):
        assert number in card
    assert FACTS["sample"]["continuation"] in card


def test_the_facts_agree_with_a_measurement_made_now(heldout, ce):
    # Other rows, and perhaps another version of the standard library.
    assert abs(ce - FACTS["scores"]["ce_heldout"]) < 0.4
    assert abs(unigram_entropy(heldout) - FACTS["scores"]["unigram_entropy"]) < 0.6


def test_no_path_of_the_machine_that_trained_it_ships(tiny):
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            assert not re.search(r"(^|[\"'\s(])(/work|/tmp|/root|/home)/", file.read_text()), file.name
    assert Path(tiny.tokenizer.name_or_path).name == "tiny"
