"""Training a language model with the common loop: the loss by hand, the stream's position, and a whole small run."""

import json
import math

import pytest
import torch

from nndecomp.config.compose import compose
from nndecomp.config.schema import LogConfig, Optimizer, TokensConfig, TokensKind, TrainingConfig, Wandb
from nndecomp.errors import SettingError
from nndecomp.evaluation.language_model import ablated_cross_entropy, continuation, target_scores, unigram_entropy
from nndecomp.report.card import loss_figure
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget
from nndecomp.tokens import TokenBatch, open_tokens
from nndecomp.tokens.batch import Row
from nndecomp.tokens.tokenizer import train_tokenizer
from nndecomp.training.language_model import NextToken, TokenBatches, cross_entropy, next_token_loss
from nndecomp.training.log import Log
from nndecomp.training.loop import train

CONFIG = LlamaSimpleMLPConfig(n_layers=2, d_model=16, d_mlp=32, n_heads=2, n_kv_heads=1, n_ctx=16, n_vocab=300)


TEXTS = [f"def f{i}(x):\n    return {i} * x + {i * i}\n" for i in range(40)]


def model(seed: int = 0) -> LlamaSimpleMLP:
    return LlamaSimpleMLP(CONFIG, torch.Generator().manual_seed(seed))


def batch(*rows: list[int]) -> TokenBatch:
    return TokenBatch.of([Row(ids, bos=False) for ids in rows], max(map(len, rows)), pad=0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300, 16)


def test_the_loss_is_minus_the_log_probability_of_what_comes_next():
    p = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]]])
    loss = next_token_loss(p.log(), batch([0, 1, 2]))
    assert math.isclose(float(loss), -(math.log(0.25) + math.log(0.8)) / 2, rel_tol=1e-6)


def test_padding_is_neither_predicted_nor_counted():
    padded, alone = batch([5, 6, 7, 8], [9, 10]), batch([9, 10])
    whole, short = batch([5, 6, 7, 8]), cross_entropy(model(), alone, 1)
    expected = (3 * cross_entropy(model(), whole, 1) + short) / 4
    assert math.isclose(cross_entropy(model(), padded, 2), expected, rel_tol=1e-5)


def test_cross_entropy_does_not_depend_on_how_the_batch_is_cut():
    rows = TokenBatch.of([Row(torch.randint(300, (n,)).tolist(), bos=False) for n in (16, 3, 9, 16, 2)], 16, pad=0)
    values = [cross_entropy(model(), rows, n) for n in (1, 2, 5)]
    assert max(values) - min(values) < 1e-5


def test_an_untrained_model_knows_nothing_and_equal_frequencies_have_the_entropy_of_their_number():
    rows = batch([1, 2, 3, 4], [3, 4, 1, 2])
    assert abs(cross_entropy(model(), rows, 2) - math.log(300)) < 0.1
    assert math.isclose(unigram_entropy(rows), math.log(4), rel_tol=1e-12)


def test_zero_ablation_is_what_a_model_without_the_weights_computes(tokenizer):
    rows, without = batch(list(range(16))), model()
    with torch.no_grad():
        without.h[1].mlp.down_proj.weight.zero_()
    expected = cross_entropy(without, rows, 1)
    target = LlamaSimpleMLPTarget("t", model(), tokenizer)
    assert math.isclose(ablated_cross_entropy(target, rows, [1], 1), expected, rel_tol=1e-6)
    scores = target_scores(target, rows, 1)
    assert math.isclose(scores["zero_L1.mlp_out"], expected - scores["ce_heldout"], abs_tol=1e-6)


def test_a_continuation_is_drawn_from_the_model_and_decided_by_the_seed(tokenizer):
    target, prompt = LlamaSimpleMLPTarget("t", model(), tokenizer), torch.arange(4)
    first, second, other = (continuation(target, prompt, 12, 1.0, seed) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    cold = continuation(target, prompt, 1, 1e-6, 0)
    assert int(cold) == int(target.logits(prompt[None])[0, -1].argmax())


def pretrain(tokenizer, out, n_steps: int, stop_after: int | None = None) -> LlamaSimpleMLP:
    (out.parent / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    text = TokensConfig(kind=TokensKind.files, path=str(out.parent / "text.jsonl"), seq_len=16)
    cfg = TrainingConfig(
        n_tokens=n_steps * 64, batch_tokens=64, optimizer=Optimizer.adamw, lr=1e-2, checkpoint_every=5, log_every=5
    )
    stream, trained = TokenBatches(open_tokens(text, tokenizer, seed=0), 4, torch.device("cpu")), model()
    if stop_after is not None:
        whole, calls = stream.next_batch, iter(range(stop_after))
        stream.next_batch = lambda: whole() if next(calls, None) is not None else pytest.fail("stopped")
    with Log(out, LogConfig(wandb=Wandb.disabled)) as log:
        train({"model": NextToken(trained)}, stream, cfg, out, log=log, description="pretrain")
    return trained


def test_training_lowers_the_loss_and_a_stopped_run_ends_with_the_same_weights(tmp_path, tokenizer):
    whole = pretrain(tokenizer, tmp_path / "whole", 30)
    losses = [json.loads(line)["ce"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 5 and losses[-1] < losses[0] - 0.5

    with pytest.raises(pytest.fail.Exception, match="stopped"):
        pretrain(tokenizer, tmp_path / "stopped", 30, stop_after=17)
    again = pretrain(tokenizer, tmp_path / "stopped", 30)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("pretrain.n_heads=3", r"pretrain\.d_model=128 must divide into pretrain\.n_heads=3"),
        ("pretrain.n_kv_heads=3", r"pretrain\.n_kv_heads=3 must divide pretrain\.n_heads=4"),
        ("pretrain.vocab_size=100", r"pretrain\.vocab_size=100 must exceed 257"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(change, sentence):
    with pytest.raises(SettingError, match=sentence):
        compose("exp_021_pretrain_target", [change])


def test_the_loss_figure_has_a_line_for_training_one_for_heldout_and_the_unigram_entropy():
    rows = [{"name": name, "tokens": n * 10**6, "ce": 6.0 - n} for n in range(3) for name in ("model", "heldout")]
    (axes,) = loss_figure(rows, 6.4).axes
    assert [line.get_label() for line in axes.lines] == ["training", "held-out", "unigram entropy"]
    assert list(axes.lines[0].get_ydata()) == [6.0, 5.0, 4.0]
