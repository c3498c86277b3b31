"""Causal language models of the transformers library, by Hub id or local directory.

Where each point is (a module's input is written ->m, its output m->; paths are within a block):

    point       GPT-2           GPT-NeoX (Pythia)            Llama, Mistral, Qwen2/3      Gemma-2, Gemma-3
    embed       wte->           embed_in->                   embed_tokens->               embed_tokens->, sqrt(d) included
    resid_pre   ->block         ->block                      ->block                      ->block
    attn_in     ln_1->          input_layernorm->            input_layernorm->            input_layernorm->
    z           ->attn.c_proj   ->attention.dense            ->self_attn.o_proj           ->self_attn.o_proj
    attn_out    attn.c_proj->   attention.dense->            self_attn.o_proj->           post_attention_layernorm->
    resid_mid   ->ln_2          ->post_attention_layernorm   ->post_attention_layernorm   ->pre_feedforward_layernorm
    mlp_in      ->mlp           ->mlp                        ->mlp                        ->mlp
    mlp_hidden  ->mlp.c_proj    ->mlp.dense_4h_to_h          ->mlp.down_proj              ->mlp.down_proj
    mlp_out     mlp.c_proj->    mlp.dense_4h_to_h->          mlp.down_proj->              post_feedforward_layernorm->
    resid_post  block->         block->                      block->                      block->

So attn_out and mlp_out are always what is added to the residual stream: in Gemma they come after the post-norms, and a
dictionary trained on the bare output of Gemma's MLP is not one of mlp_out. attn_in and mlp_in are always after the norm
with its affine part. In gated MLPs mlp_hidden is the product of gate and up. GPT-NeoX with parallel blocks (all of Pythia) has
no resid_mid. resid_mid is written into the tensor itself, so that norm and residual skip both see it (`hooks.Side`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging as transformers_logging

from nndecomp.config.target import TargetConfig
from nndecomp.errors import SettingError
from nndecomp.targets.attention import by_head, heads
from nndecomp.targets.base import Heads, TargetShape
from nndecomp.targets.modules import ModuleTarget, Wiring
from nndecomp.types import Point, Site

_LLAMA = Wiring.of_blocks(
    embed="model.embed_tokens",
    blocks="model.layers",
    first_norm="input_layernorm",
    attn_tail=("self_attn.o_proj",),
    second_norm="post_attention_layernorm",
    mlp_tail=("mlp.down_proj",),
    neurons="mlp.gate_proj",
)
_GEMMA = Wiring.of_blocks(
    embed="model.embed_tokens",
    blocks="model.layers",
    first_norm="input_layernorm",
    attn_tail=("self_attn.o_proj", "post_attention_layernorm"),
    second_norm="pre_feedforward_layernorm",
    mlp_tail=("mlp.down_proj", "post_feedforward_layernorm"),
    neurons="mlp.gate_proj",
)
_WIRINGS = {
    "gpt2": Wiring.of_blocks(
        embed="transformer.wte",
        blocks="transformer.h",
        first_norm="ln_1",
        attn_tail=("attn.c_proj",),
        second_norm="ln_2",
        mlp_tail=("mlp.c_proj",),
        neurons="mlp.c_fc",
    ),
    "gpt_neox": Wiring.of_blocks(
        embed="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        first_norm="input_layernorm",
        attn_tail=("attention.dense",),
        second_norm="post_attention_layernorm",
        mlp_tail=("mlp.dense_4h_to_h",),
        neurons="mlp.dense_h_to_4h",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}
_UNGATED = {"gpt2", "gpt_neox"}
# A norm of queries and keys, or a cap on scores, stands between the linear maps and the softmax.
_SCORES_NOT_BILINEAR = {"qwen3", "gemma2", "gemma3_text"}
# Gemma-2 caps its attention scores, which the fused attention of torch cannot do.
_ATTENTION = {"gemma2": "eager"}


class HuggingFaceTarget(ModuleTarget):
    model: PreTrainedModel

    def _residual(self, tokens: Int[Tensor, "batch pos"]) -> object:
        return self.model.base_model(input_ids=tokens, use_cache=False)

    def _logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        return self.model(input_ids=tokens, use_cache=False).logits

    def final(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.model.base_model(input_ids=self._checked(tokens), use_cache=False).last_hidden_state

    def head(self, final: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        unembedding = self.model.get_output_embeddings()
        assert unembedding is not None, f"{self.name} has no LM head"
        logits = unembedding(final)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    def heads_of(self, site: Site) -> Heads:
        assert site.point is Point.attn_in, f"attention reads attn_in, not {site}"
        shape = self.shape.of(None)
        if self.model.config.model_type in _SCORES_NOT_BILINEAR:
            raise SettingError(
                f"decomposition.attention_start=target needs scores that are products of linear maps of {site}, but a "
                f"{self.model.config.model_type} normalises queries and keys, or caps scores; write attention_start=random"
            )
        attention, maps = _attention_maps(self._module(f"{self.wiring.blocks}.{site.layer}"), shape)
        return heads(
            maps,
            self._module(f"{self.wiring.blocks}.{site.layer}.{self.wiring.points[Point.z][0]}"),
            n_heads=shape.n_heads,
            d_model=shape.d_model,
            d_head=shape.d_head,
            scale=float(attention.scaling),
            like=next(self.model.parameters()),
        )


def _attention_maps(block: Any, shape: TargetShape) -> tuple[Any, tuple[Callable[[Tensor], Tensor], ...]]:
    """The attention module, and its maps from x [row, d_model] to queries, keys and values [row, head, d_head]."""
    if hasattr(block, "attn"):  # GPT-2: queries of all heads, then keys, then values

        def part(i: int) -> Callable[[Tensor], Tensor]:
            return lambda x: block.attn.c_attn.forward(x).chunk(3, -1)[i].unflatten(-1, (-1, shape.d_head))

        return block.attn, (part(0), part(1), part(2))
    if hasattr(block, "attention"):  # GPT-NeoX: query, key and value of a head side by side

        def of_head(i: int) -> Callable[[Tensor], Tensor]:
            return lambda x: block.attention.query_key_value.forward(x).unflatten(-1, (-1, 3, shape.d_head))[:, :, i]

        return block.attention, (of_head(0), of_head(1), of_head(2))
    own = block.self_attn
    return own, tuple(by_head(linear, shape.d_head) for linear in (own.q_proj, own.k_proj, own.v_proj))


def load(cfg: TargetConfig, device: torch.device) -> HuggingFaceTarget:
    config, tokenizer = read_config(cfg), load_tokenizer(cfg)
    with quiet_if_local(cfg.path):
        model = AutoModelForCausalLM.from_pretrained(
            local_or_hub(cfg.path),
            config=config,
            revision=cfg.revision or "main",
            dtype=getattr(torch, cfg.dtype.value),
            attn_implementation=_ATTENTION.get(config.model_type, "sdpa"),
            trust_remote_code=False,
        )
    model.to(device)  # pyright: ignore[reportArgumentType] transformers hides the signature
    return HuggingFaceTarget(target_name(cfg.path), model, shape_of(config), tokenizer, wiring_of(config))


def load_tokenizer(cfg: TargetConfig) -> PreTrainedTokenizerBase:
    tokenizer = _read(AutoTokenizer, cfg)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of missing files
        raise SettingError(f"target.path={cfg.path} gives no tokenizer: its files are missing")
    return tokenizer


def target_name(path: str) -> str:
    """A Hub id as it is, a directory by its last part."""
    return Path(path).expanduser().resolve().name if Path(path).expanduser().is_dir() else path


def local_or_hub(path: str) -> str:
    """The directory, made absolute, or else the Hub id; a path that is neither is refused."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return str(directory.resolve())
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or ":" in path:
        raise SettingError(
            f"target.path={path} is neither an existing directory nor the Hub id of a model, such as openai-community/gpt2"
        )
    return path


@contextmanager
def quiet_if_local(path: str) -> Iterator[None]:
    """No progress bars of transformers while a local model is read: it takes a moment, where a download takes long."""
    silenced = Path(path).expanduser().is_dir() and transformers_logging.is_progress_bar_enabled()
    if silenced:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if silenced:
            transformers_logging.enable_progress_bar()


def _read(auto: type, cfg: TargetConfig) -> Any:
    try:
        return auto.from_pretrained(local_or_hub(cfg.path), revision=cfg.revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as refused:
        raise SettingError(
            f"target.path={cfg.path} (target.revision={cfg.revision}) gives no {auto.__name__.removeprefix('Auto').lower()}: "
            "no such model, files missing from it, or no connection to the Hub"
        ) from refused


def read_config(cfg: TargetConfig) -> PretrainedConfig:
    config = _read(AutoConfig, cfg)
    if config.model_type not in _WIRINGS:
        raise SettingError(
            f"target.path={cfg.path} is a model of type {config.model_type}; supported are {', '.join(_WIRINGS)}"
        )
    return config


def wiring_of(config: PretrainedConfig) -> Wiring:
    wiring = _WIRINGS[config.model_type]
    return wiring.without(Point.resid_mid) if getattr(config, "use_parallel_residual", False) else wiring


def shape_of(config: PretrainedConfig) -> TargetShape:
    d_model, n_heads = config.hidden_size, config.num_attention_heads
    d_mlp = config.n_inner or 4 * d_model if config.model_type == "gpt2" else config.intermediate_size
    return TargetShape(
        n_layers=config.num_hidden_layers,
        d_model=d_model,
        d_mlp=d_mlp,
        n_heads=n_heads,
        d_head=getattr(config, "head_dim", None) or d_model // n_heads,
        n_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        points=wiring_of(config).available,
        gated=config.model_type not in _UNGATED,
        rotary=_rotary(config),
    )


def _rotary(config: PretrainedConfig) -> tuple[tuple[float, ...], ...]:
    """Of each layer; layers of different types may turn at different rates. A factor on the scores is left out."""
    if config.model_type == "gpt2":
        return ()
    layers: list[str | None] = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    typed = isinstance(next(iter(config.rope_parameters.values())), dict)
    of_type = {each: _frequencies(config, each if typed else None) for each in dict.fromkeys(layers)}
    return tuple(of_type[each] for each in layers)


def _frequencies(config: PretrainedConfig, layer_type: str | None) -> tuple[float, ...]:
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    if parameters["rope_type"] != "default":
        return tuple(ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, layer_type=layer_type)[0].tolist())
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_turned = int(d_head * parameters.get("partial_rotary_factor", 1.0))
    return tuple((parameters["rope_theta"] ** -(torch.arange(0, n_turned, 2) / n_turned)).tolist())
