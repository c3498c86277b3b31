"""The second backend: the same models in a TransformerLens TransformerBridge, which unlike HookedTransformer is in 3 and 4.

    embed       embed.hook_out
    resid_pre   blocks.N.hook_in           attn_in     blocks.N.attn.hook_in
    z           blocks.N.attn.o.hook_in    mlp_in      blocks.N.mlp.hook_in
    attn_out    blocks.N.attn.hook_out     mlp_hidden  blocks.N.mlp.out.hook_in
    resid_mid   blocks.N.ln2               mlp_out     blocks.N.mlp.hook_out
    resid_post  blocks.N.hook_out          Gemma: attn_out is blocks.N.ln1_post.hook_out, mlp_out blocks.N.ln2_post.hook_out

The places of `huggingface.py`, and the weights as they are stored: no layer norm folded, nothing centred. attn_in and
mlp_in are not ln1.hook_normalized and ln2.hook_normalized, which come before the norm's affine part. Replacing
ln2.hook_in would leave the residual skip as it was, so resid_mid is written into the tensor that enters ln2. The bridge
computes attention step by step, for its hooks; numbers differ from the fused attention of `huggingface.py` in the last bits.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from nndecomp.config.target import TargetConfig
from nndecomp.targets import huggingface
from nndecomp.targets.hooks import Side
from nndecomp.targets.modules import ModuleTarget, Wiring
from nndecomp.types import Point

_WIRING = Wiring(
    embed="embed.hook_out",
    blocks="blocks",
    points={
        Point.resid_pre: ("hook_in", Side.output),
        Point.attn_in: ("attn.hook_in", Side.output),
        Point.z: ("attn.o.hook_in", Side.output),
        Point.attn_out: ("attn.hook_out", Side.output),
        Point.resid_mid: ("ln2", Side.stream),
        Point.mlp_in: ("mlp.hook_in", Side.output),
        Point.mlp_hidden: ("mlp.out.hook_in", Side.output),
        Point.mlp_out: ("mlp.hook_out", Side.output),
        Point.resid_post: ("hook_out", Side.output),
    },
    mlp_tail=("mlp.out",),
    neurons="mlp.in",
)
_POST_NORMS = replace(
    _WIRING,
    points={
        **_WIRING.points,
        Point.attn_out: ("ln1_post.hook_out", Side.output),
        Point.mlp_out: ("ln2_post.hook_out", Side.output),
    },
    mlp_tail=("mlp.out", "ln2_post"),
)


class TransformerLensTarget(ModuleTarget):
    def _residual(self, tokens: Int[Tensor, "batch pos"]) -> object:
        return self.model(tokens, return_type="logits")  # never reaches the LM head: the last site ends it

    def _logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        return self.model(tokens, return_type="logits")


def load(cfg: TargetConfig, device: torch.device) -> TransformerLensTarget:
    config = huggingface.read_config(cfg)
    tokenizer = huggingface.load_tokenizer(cfg)
    shape = huggingface.shape_of(config)
    with huggingface.quiet_if_local(cfg.path):
        bridge = TransformerBridge.boot_transformers(
            huggingface.local_or_hub(cfg.path),
            revision=cfg.revision,
            device=device,
            dtype=getattr(torch, cfg.dtype.value),
            tokenizer=tokenizer,
        )
    wiring = _POST_NORMS if config.model_type in ("gemma2", "gemma3_text") else _WIRING
    wiring = replace(wiring, neurons="mlp.gate") if shape.gated else wiring
    wiring = wiring if Point.resid_mid in shape.points else wiring.without(Point.resid_mid)
    return TransformerLensTarget(huggingface.target_name(cfg.path), bridge, shape, tokenizer, wiring)
