"""LlamaSimpleMLP against slow arithmetic, against transformers, and as a directory."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_models import N_VOCAB, tiny_tokenizer, tiny_tokens
from torch import Tensor

from nndecomp.config.target import DType, TargetConfig, TargetKind
from nndecomp.errors import SettingError
from nndecomp.targets.llama_simple_mlp import (
    LlamaSimpleMLP,
    LlamaSimpleMLPConfig,
    load,
    load_tokenizer,
    read_config,
    rotary_tables,
    rotate,
    save,
)
from nndecomp.targets.load import load_target, target_shape
from nndecomp.types import Point, Site

CPU = torch.device("cpu")
CONFIG = LlamaSimpleMLPConfig(n_layers=2, d_model=32, d_mlp=48, n_heads=4, n_kv_heads=2, n_ctx=16, n_vocab=N_VOCAB)
TOKENS = tiny_tokens()
# The configuration file of a published run, word for word in its keys.
PUBLISHED = """
attn_bias: false
block_size: 16
flash_attention: false
mlp_bias: false
model_type: LlamaSimpleMLP
n_ctx: 16
n_embd: 32
n_head: 4
n_intermediate: 48
n_key_value_heads: 2
n_layer: 2
rms_norm_eps: 1.0e-06
rotary_adjacent_pairs: false
rotary_base: 10000
rotary_dim: 999
use_grouped_query_attention: true
vocab_size: 80
"""


@pytest.fixture
def model() -> LlamaSimpleMLP:
    model = LlamaSimpleMLP(CONFIG, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5).add_(0.1 * torch.randn_like(parameter))
    return model


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean() + 1e-6).sqrt()


@torch.no_grad()
def logits_by_loops(model: LlamaSimpleMLP, tokens: Tensor) -> Tensor:
    """One sequence, one position, one head at a time, in float64; pairs (i, i + d_head/2) turned as complex numbers."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    config, half = model.config, model.config.d_head // 2
    stream = [weights["wte.weight"][token] for token in tokens]

    def turned(head: Tensor, pos: int) -> Tensor:
        pairs = torch.complex(head[:half], head[half:])
        angles = torch.tensor([pos / config.rotary_base ** (i / half) for i in range(half)], dtype=torch.float64)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag])

    for layer in range(config.n_layers):
        w = {name.removeprefix(f"h.{layer}."): value for name, value in weights.items() if f"h.{layer}." in name}
        normed = [rms(x, w["rms_1.weight"]) for x in stream]
        q, k, v = (
            [(w[f"attn.{name}_proj.weight"] @ x).split(config.d_head) for x in normed] for name in ("q", "k", "v")
        )
        for pos in range(len(tokens)):
            heads = []
            for head in range(config.n_heads):
                shared = head // (config.n_heads // config.n_kv_heads)
                scores = [
                    turned(q[pos][head], pos) @ turned(k[past][shared], past) / math.sqrt(config.d_head)
                    for past in range(pos + 1)
                ]
                pattern = torch.stack(scores).softmax(0)
                heads.append(sum(weight * v[past][shared] for past, weight in enumerate(pattern)))
            stream[pos] = stream[pos] + w["attn.o_proj.weight"] @ torch.cat(heads)
        for pos, x in enumerate(stream):
            pre = w["mlp.c_fc.weight"] @ rms(x, w["rms_2.weight"])
            hidden = 0.5 * pre * (1 + torch.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)))
            stream[pos] = x + w["mlp.down_proj.weight"] @ hidden
    return torch.stack([weights["wte.weight"] @ rms(x, weights["ln_f.weight"]) for x in stream])


def test_logits_equal_slow_loops(model: LlamaSimpleMLP) -> None:
    expected = torch.stack([logits_by_loops(model, row) for row in TOKENS])
    torch.testing.assert_close(model(TOKENS).double(), expected, atol=1e-4, rtol=1e-4)


def test_attention_equals_that_of_transformers_llama(model: LlamaSimpleMLP) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16)
    config._attn_implementation = "sdpa"
    theirs, ours = LlamaAttention(config, layer_idx=0), model.h[0].attn
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 32)
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    torch.testing.assert_close(ours(x), theirs(x, position_embeddings=angles, attention_mask=None)[0])


def test_rotation_depends_on_distance_alone() -> None:
    cos, sin = rotary_tables(8, 16, 10000.0)
    q, k = torch.randn(8), torch.randn(8)
    q_turned, k_turned = (rotate(x.expand(1, 1, 16, 8), cos, sin)[0, 0] for x in (q, k))
    scores = q_turned @ k_turned.T
    for distance in range(16):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores[0, 0], q @ k)


def test_a_position_does_not_see_later_ones(model: LlamaSimpleMLP) -> None:
    changed = TOKENS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % N_VOCAB
    before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5], after[:, 5])


def test_a_sequence_longer_than_the_context_is_refused(model: LlamaSimpleMLP) -> None:
    with pytest.raises(AssertionError, match="17 tokens exceed the context of 16"):
        model(tiny_tokens(1, 17))


def test_initial_weights_come_from_the_generator_and_have_the_stated_spread() -> None:
    wide = replace(CONFIG, d_model=256, d_mlp=512, n_layers=8)
    state = torch.get_rng_state()
    first, again = (LlamaSimpleMLP(wide, torch.Generator().manual_seed(42)).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, std in {"wte": 0.02, "h.3.mlp.c_fc": 0.02, "h.3.mlp.down_proj": 0.005, "h.7.attn.o_proj": 0.005}.items():
        assert first[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.02), name
    assert (first["h.3.rms_1.weight"] == 1).all() and first["h.0.attn.q_proj.weight"].isfinite().all()


def test_the_embedding_is_the_head(model: LlamaSimpleMLP) -> None:
    assert model.lm_head.weight is model.wte.weight
    assert sum(p.numel() for p in model.parameters()) == 80 * 32 + 2 * (32 * 32 * 3 + 32 * 48 * 2 + 2 * 32) + 32


def test_saving_and_loading_gives_the_same_model(model: LlamaSimpleMLP, tmp_path: Path) -> None:
    save(model, tiny_tokenizer(), tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == CONFIG and loaded.lm_head.weight is loaded.wte.weight
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert load_tokenizer(tmp_path / "model").encode("w1 w5") == [2, 6]
    assert load_tokenizer(tmp_path / "model").eos_token_id == 0
    stored = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert stored < 4 * sum(p.numel() for p in model.parameters()) + 4000, "the tied matrix was stored twice"


@pytest.fixture
def published(model: LlamaSimpleMLP, tmp_path: Path) -> Path:
    """The files of a published training run, two checkpoints among them."""
    directory = tmp_path / "t-32d1bb3b"
    directory.mkdir()
    (directory / "model_config.yaml").write_text(PUBLISHED)
    (directory / "final_config.yaml").write_text("train_log_level: 1\n")
    tiny_tokenizer().backend_tokenizer.save(str(directory / "tokenizer.json"))
    torch.save(LlamaSimpleMLP(CONFIG, torch.Generator().manual_seed(9)).state_dict(), directory / "model_step_9.pt")
    torch.save(model.state_dict(), directory / "model_step_10000.pt")
    return directory


def test_a_published_run_loads_with_its_last_weights(model: LlamaSimpleMLP, published: Path) -> None:
    cfg = TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(published))
    target = load_target(cfg, CPU)
    assert torch.equal(target.logits(TOKENS), model(TOKENS))
    assert target.name == "t-32d1bb3b" and target.shape == target_shape(cfg)
    assert target.tokenizer.eos_token_id == 0 and target.tokenizer.encode("w1") == [2]
    assert not any(parameter.requires_grad for parameter in target.model.parameters())  # type: ignore[attr-defined]


def test_the_published_keys_survive_saving(model: LlamaSimpleMLP, published: Path, tmp_path: Path) -> None:
    save(load(published), load_tokenizer(published), tmp_path / "again")
    assert read_config(tmp_path / "again") == read_config(published) == CONFIG
    written, original = yaml.safe_load((tmp_path / "again/model_config.yaml").read_text()), yaml.safe_load(PUBLISHED)
    assert set(original) - set(written) == {"flash_attention"}


@pytest.mark.parametrize("change", ["mlp_bias: true", "rotary_adjacent_pairs: true", "model_type: LlamaSimple"])
def test_a_variant_that_is_not_built_here_is_refused(published: Path, change: str) -> None:
    key, value = change.split(": ")
    changed = {**yaml.safe_load(PUBLISHED), key: yaml.safe_load(value)}
    (published / "model_config.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(SettingError, match=f"{key}="):
        target_shape(TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(published)))


def test_a_head_that_is_not_the_embedding_is_refused(published: Path) -> None:
    weights = torch.load(published / "model_step_10000.pt", weights_only=True)
    torch.save(weights | {"lm_head.weight": weights["wte.weight"] + 1}, published / "model_step_10000.pt")
    with pytest.raises(AssertionError, match="not its embedding"):
        load(published)


def test_weights_that_are_code_are_refused(published: Path) -> None:
    from pickle import UnpicklingError

    torch.save({"wte.weight": print}, published / "model_step_20000.pt")
    with pytest.raises(UnpicklingError):
        load(published)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere", "target.path=nowhere is not there"),
        ("wandb:goodfire/spd", "wandb:<entity>/<project>/<run>"),
        ("wandb:", "wandb:<entity>/<project>/<run>"),
    ],
)
def test_a_path_that_cannot_work_is_named(path: str, sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        target_shape(TargetConfig(kind=TargetKind.llama_simple_mlp, path=path))


def test_an_incomplete_directory_is_named(tmp_path: Path, published: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SettingError, match="no model_config.yaml"):
        target_shape(TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(empty)))
    (empty / "model_config.yaml").write_text(PUBLISHED)
    with pytest.raises(SettingError, match="neither model.safetensors nor any model_step"):
        load_target(TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(empty)), CPU)


def test_a_revision_has_no_meaning_here(published: Path) -> None:
    with pytest.raises(SettingError, match="target.revision=main"):
        target_shape(TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(published), revision="main"))


def test_a_bfloat16_target_computes_nearly_the_same(published: Path) -> None:
    target = load_target(TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(published), dtype=DType.bfloat16), CPU)
    exact = load_target(TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(published)), CPU)
    site = Site(1, Point.mlp_in)
    rounded, value = (t.record(TOKENS, [site])[site] for t in (target, exact))
    assert rounded.dtype is torch.bfloat16 and (rounded - value).norm() < 0.05 * value.norm()
    loss = [
        F.cross_entropy(t.logits(TOKENS)[:, :-1].flatten(0, 1).float(), TOKENS[:, 1:].flatten())
        for t in (target, exact)
    ]
    assert abs(loss[0] - loss[1]) < 0.05
