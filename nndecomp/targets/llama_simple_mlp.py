"""LlamaSimpleMLP: the Llama of Goodfire's SPD studies, with GPT-2's MLP in place of the gated one.

    x_0 = W_E[tokens]                                               no position embedding, no scaling
    x  <- x + attn(rms_1(x));  x <- x + mlp(rms_2(x))               per block
    logits = W_E ln_f(x)                                            tied embedding

    rms(x) = w * x / sqrt(mean(x^2) + 1e-6), in fp32                mlp(x) = W_down gelu_tanh(W_fc x)

Grouped queries, rotary positions over the whole head with the halves as pairs, no biases, no dropout. A model is a
directory of `model_config.yaml`, `tokenizer.json` and weights: `model.safetensors`, or the `model_step_<n>.pt` of a
published training run, of which the last one counts. Parameter names are the published ones.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nndecomp.errors import SettingError

_CONFIG_FILE = "model_config.yaml"
_WEIGHTS_FILE = "model.safetensors"
_TOKENIZER_FILE = "tokenizer.json"
_PUBLISHED_WEIGHTS = re.compile(r"model_step_(\d+)\.pt")
# What published tokenizers call the end of a text; a bare tokenizer.json does not say which of its tokens that is.
_END_OF_TEXT = ("<|endoftext|>", "[EOS]", "</s>", "<eos>")
# Variants of the architecture that a published configuration may name and that are not built here.
_REQUIRED = {
    "model_type": "LlamaSimpleMLP",
    "mlp_bias": False,
    "attn_bias": False,
    "rotary_adjacent_pairs": False,
    "use_grouped_query_attention": True,
}


@dataclass(frozen=True, kw_only=True)
class LlamaSimpleMLPConfig:
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int  # keys and values are shared by n_heads / n_kv_heads query heads each
    n_ctx: int
    n_vocab: int
    rotary_base: float = 10000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        assert self.d_model % self.n_heads == 0, f"d_model {self.d_model} does not divide by {self.n_heads} heads"
        assert self.d_head % 2 == 0, f"rotation needs an even d_head, not {self.d_head}"
        assert self.n_heads % self.n_kv_heads == 0, (
            f"{self.n_heads} query heads cannot share {self.n_kv_heads} key heads"
        )

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    def published(self) -> dict[str, Any]:
        """The keys under which training runs of this architecture publish it."""
        return _REQUIRED | {
            "n_layer": self.n_layers,
            "n_embd": self.d_model,
            "n_intermediate": self.d_mlp,
            "n_head": self.n_heads,
            "n_key_value_heads": self.n_kv_heads,
            "n_ctx": self.n_ctx,
            "block_size": self.n_ctx,
            "vocab_size": self.n_vocab,
            "rotary_base": self.rotary_base,
            "rotary_dim": self.d_head,
            "rms_norm_eps": self.rms_norm_eps,
        }

    @staticmethod
    def from_published(raw: dict[str, Any]) -> "LlamaSimpleMLPConfig":
        """From such keys. `rotary_dim` and `flash_attention` are not read: neither changes what is computed."""
        for key, required in _REQUIRED.items():
            if raw[key] != required:
                raise SettingError(
                    f"target.path names a model with {key}={raw[key]!r}, and only {required!r} is supported"
                )
        return LlamaSimpleMLPConfig(
            n_layers=raw["n_layer"],
            d_model=raw["n_embd"],
            d_mlp=raw["n_intermediate"],
            n_heads=raw["n_head"],
            n_kv_heads=raw["n_key_value_heads"],
            n_ctx=min(raw["n_ctx"], raw["block_size"]),
            n_vocab=raw["vocab_size"],
            rotary_base=float(raw["rotary_base"]),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        )


def _linear(d_in: int, d_out: int) -> nn.Linear:
    """With no values yet: those of torch would come from the global generator."""
    return nn.Linear(d_in, d_out, bias=False, device="meta").to_empty(device="cpu")


def rotary_frequencies(d_head: int, base: float) -> Float[Tensor, " pair"]:
    """Radians a position: base^(-i / (d_head/2)), i = 0 .. d_head/2 - 1."""
    half = d_head // 2
    return base ** -(torch.arange(half, dtype=torch.float32) / half)


def rotary_tables(
    d_head: int, n_ctx: int, base: float
) -> tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]:
    """cos and sin of pos * frequency, the same for both halves of a head."""
    angle = torch.arange(n_ctx, dtype=torch.float32)[:, None] * rotary_frequencies(d_head, base).repeat(2)
    return angle.cos(), angle.sin()


def rotate(
    x: Float[Tensor, "batch head pos d_head"],
    cos: Float[Tensor, "pos d_head"],
    sin: Float[Tensor, "pos d_head"],
) -> Float[Tensor, "batch head pos d_head"]:
    """Turn each pair (x_i, x_{i + d_head/2}) by its angle (Su et al. 2021, RoFormer, eq. 34; halves as pairs)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaSimpleMLPConfig) -> None:
        super().__init__()
        self.d_head = config.d_head
        self.queries_per_key = config.n_heads // config.n_kv_heads
        self.q_proj = _linear(config.d_model, config.d_model)
        self.k_proj = _linear(config.d_model, config.n_kv_heads * config.d_head)
        self.v_proj = _linear(config.d_model, config.n_kv_heads * config.d_head)
        self.o_proj = _linear(config.d_model, config.d_model)
        cos, sin = rotary_tables(config.d_head, config.n_ctx, config.rotary_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        n_pos = x.shape[1]
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # [batch, head, pos, d_head]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self.cos[:n_pos].to(x.dtype), self.sin[:n_pos].to(x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.queries_per_key > 1:
            k, v = (side.repeat_interleave(self.queries_per_key, dim=1) for side in (k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(z.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: LlamaSimpleMLPConfig) -> None:
        super().__init__()
        self.c_fc = _linear(config.d_model, config.d_mlp)
        self.gelu = nn.GELU(approximate="tanh")
        self.down_proj = _linear(config.d_mlp, config.d_model)

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        return self.down_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaSimpleMLPConfig) -> None:
        super().__init__()
        self.rms_1 = RMSNorm(config.d_model, config.rms_norm_eps)
        self.attn = Attention(config)
        self.rms_2 = RMSNorm(config.d_model, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        x = x + self.attn(self.rms_1(x))
        return x + self.mlp(self.rms_2(x))


class LlamaSimpleMLP(nn.Module):
    def __init__(self, config: LlamaSimpleMLPConfig, generator: torch.Generator | None = None) -> None:
        """Weights are drawn from `generator`; without one they are whatever was in memory, for a load to fill."""
        super().__init__()
        self.config = config
        # With no values yet, as in _linear.
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.n_vocab, config.d_model), freeze=False)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.lm_head = _linear(config.d_model, config.n_vocab)
        self.lm_head.weight = self.wte.weight
        if generator is not None:
            self._draw_weights(generator)

    @torch.no_grad()
    def _draw_weights(self, generator: torch.Generator) -> None:
        """N(0, 0.02^2); what writes to the residual stream is smaller by sqrt(2 n_layers) (GPT-2, section 2.3)."""
        for name, parameter in self.named_parameters():  # the tied matrix is met once, as wte
            if parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if writes else 0.02
                parameter.normal_(0.0, std, generator=generator)

    def residual(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the last block."""
        n_pos = tokens.shape[1]
        assert n_pos <= self.config.n_ctx, f"{n_pos} tokens exceed the context of {self.config.n_ctx}"
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return x

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        return self.lm_head(self.ln_f(self.residual(tokens)))


def save(model: LlamaSimpleMLP, tokenizer: Any, directory: Path) -> None:
    """Write `directory`: weights (the tied matrix once), published configuration, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, directory / _WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / _CONFIG_FILE).write_text(yaml.safe_dump(model.config.published()))
    tokenizer.save_pretrained(directory)


def read_config(directory: Path) -> LlamaSimpleMLPConfig:
    return LlamaSimpleMLPConfig.from_published(yaml.safe_load(_existing(directory, _CONFIG_FILE).read_text()))


def load(directory: Path) -> LlamaSimpleMLP:
    """The model of a directory, on the CPU, in the precision it was stored in."""
    model = LlamaSimpleMLP(read_config(directory))
    weights = _read_weights(directory)
    weights.setdefault("lm_head.weight", weights["wte.weight"])
    assert torch.equal(weights["lm_head.weight"], weights["wte.weight"]), (
        f"{directory} holds an lm_head that is not its embedding"
    )
    model.to(weights["wte.weight"].dtype).load_state_dict(weights)
    return model


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a directory, a transformers PreTrainedTokenizerFast."""
    from transformers import PreTrainedTokenizerFast

    path = _existing(directory, _TOKENIZER_FILE)
    if (directory / "tokenizer_config.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    ends = [token for token in _END_OF_TEXT if token in tokenizer.get_vocab()]
    if len(ends) != 1:
        raise SettingError(
            f"target.path: {path} has {ends or 'none'} of {', '.join(_END_OF_TEXT)}; one must mark the end of a text"
        )
    tokenizer.eos_token = ends[0]
    return tokenizer


def _read_weights(directory: Path) -> dict[str, Tensor]:
    if (directory / _WEIGHTS_FILE).exists():
        return load_file(directory / _WEIGHTS_FILE)
    steps = {int(match[1]): path for path in directory.iterdir() if (match := _PUBLISHED_WEIGHTS.fullmatch(path.name))}
    if not steps:
        raise SettingError(f"target.path: {directory} has neither {_WEIGHTS_FILE} nor any model_step_<n>.pt")
    return torch.load(steps[max(steps)], map_location="cpu", weights_only=True)


def _existing(directory: Path, name: str) -> Path:
    if not (directory / name).is_file():
        raise SettingError(f"target.path: {directory} has no {name}, so it is not the directory of a LlamaSimpleMLP")
    return directory / name
