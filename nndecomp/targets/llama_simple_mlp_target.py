"""LlamaSimpleMLP as a target: attn_in leaves rms_1, resid_mid enters rms_2, mlp_hidden enters down_proj, and what the MLP returns is mlp_out."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.targets.attention import by_head, heads
from nndecomp.targets.base import Heads, TargetShape
from nndecomp.targets.llama_simple_mlp import Block, LlamaSimpleMLP, LlamaSimpleMLPConfig, rotary_frequencies
from nndecomp.targets.modules import ModuleTarget, Wiring
from nndecomp.types import Point, Site

_WIRING = Wiring.of_blocks(
    embed="wte",
    blocks="h",
    first_norm="rms_1",
    attn_tail=("attn.o_proj",),
    second_norm="rms_2",
    mlp_tail=("mlp.down_proj",),
    neurons="mlp.c_fc",
)


class LlamaSimpleMLPTarget(ModuleTarget):
    model: LlamaSimpleMLP

    def __init__(self, name: str, model: LlamaSimpleMLP, tokenizer: Any) -> None:
        super().__init__(name, model, shape_of(model.config), tokenizer, _WIRING)

    def _residual(self, tokens: Int[Tensor, "batch pos"]) -> object:
        return self.model.residual(tokens)

    def _logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        return self.model(tokens)

    def final(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.model.ln_f(self.model.residual(self._checked(tokens)))

    def head(self, final: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        return self.model.lm_head(final)

    def heads_of(self, site: Site) -> Heads:
        assert site.point is Point.attn_in, f"attention reads attn_in, not {site}"
        block = self.model.h[site.layer]
        assert isinstance(block, Block), f"layer {site.layer} is a {type(block).__name__}"
        attention, config = block.attn, self.model.config
        return heads(
            tuple(by_head(p, config.d_head) for p in (attention.q_proj, attention.k_proj, attention.v_proj)),
            attention.o_proj,
            n_heads=config.n_heads,
            d_model=config.d_model,
            d_head=config.d_head,
            scale=config.d_head**-0.5,
            like=self.model.wte.weight,
        )


def shape_of(config: LlamaSimpleMLPConfig) -> TargetShape:
    return TargetShape(
        n_layers=config.n_layers,
        d_model=config.d_model,
        d_mlp=config.d_mlp,
        n_heads=config.n_heads,
        d_head=config.d_head,
        n_vocab=config.n_vocab,
        n_ctx=config.n_ctx,
        points=_WIRING.available,
        gated=False,
        rotary=(tuple(rotary_frequencies(config.d_head, config.rotary_base).tolist()),) * config.n_layers,
    )
