"""Random models of a few thousand weights, one of every supported family, written to a directory with a tokenizer."""

from functools import partial
from pathlib import Path

import torch

from nndecomp.targets.base import Target
from nndecomp.types import Point, Site

N_VOCAB = 80

# Two or three layers, d_model 32, an MLP of 48, heads of 8 (or 16); weights large enough for attention to matter.
_GENERIC = dict(
    vocab_size=N_VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=40,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
_GPT2 = dict(n_positions=40, n_embd=32, n_layer=3, n_head=4, vocab_size=N_VOCAB, initializer_range=0.2)
_NEOX = {name: value for name, value in _GENERIC.items() if name != "num_key_value_heads"}

FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", _GPT2 | dict(bos_token_id=0, eos_token_id=0)),
    "gpt2_narrow_mlp": ("gpt2", _GPT2 | dict(n_inner=48, bos_token_id=0, eos_token_id=0)),
    "pythia": ("gpt_neox", _NEOX),
    "neox_sequential": ("gpt_neox", _NEOX | dict(use_parallel_residual=False)),
    "llama": ("llama", _GENERIC),
    "mistral": ("mistral", _GENERIC | dict(sliding_window=6)),
    "qwen2": ("qwen2", _GENERIC),
    "qwen3": ("qwen3", _GENERIC | dict(head_dim=16)),
    "gemma2": ("gemma2", _GENERIC | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=6)),
    "gemma3": ("gemma3_text", _GENERIC | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=6)),
}


def tiny_tokenizer():
    """Words w0 to w78 and the end-of-text token, number 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<|endoftext|>": 0} | {f"w{i}": i + 1 for i in range(N_VOCAB - 1)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def save_tiny_model(family: str, directory: Path, **sizes: int) -> Path:
    """Every parameter random, norms and biases too, so that leaving one out changes the numbers.

    sizes: those of its configuration that are not as in `FAMILIES`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, usual = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **usual | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_tokens(n_seqs: int = 3, n_pos: int = 9) -> torch.Tensor:
    return torch.randint(1, N_VOCAB, (n_seqs, n_pos), generator=torch.Generator().manual_seed(1))


def _note(passed: list[int], layer: int, value: torch.Tensor) -> None:
    passed.append(layer)


def begins_at_every_layer(target: Target, tokens: torch.Tensor) -> None:
    """A pass begun at a layer has every bit of a whole one, twice, and computes nothing of the layers before."""
    shape = target.shape.of(None)
    last = shape.n_layers - 1
    changed = {Site(last, Point.mlp_out): torch.zeros_like}
    if Point.resid_mid in shape.points:
        changed[Site(last, Point.resid_mid)] = lambda value: 0.5 * value
    untouched = target.logits(tokens)
    with target.patch(changed):
        expected = target.logits(tokens)
    assert not torch.equal(untouched, expected)
    for layer in range(1, shape.n_layers):
        site = Site(layer, Point.resid_pre)
        residual = target.record(tokens, [site])[site]
        before, passed = residual.clone(), []
        watched = {Site(i, Point.mlp_out): partial(_note, passed, i) for i in range(last)}
        for _ in range(2):
            with target.begun(layer, residual), target.patch({**watched, **changed}):
                assert torch.equal(target.logits(tokens), expected), site
        assert torch.equal(residual, before)
        assert passed == 2 * list(range(layer, last))
    assert torch.equal(target.logits(tokens), untouched)
