"""Small models to decompose, and decompositions of them whose every number is random."""

from typing import Any

import torch
from tiny_models import N_VOCAB, tiny_tokenizer, tiny_tokens
from torch import Tensor, nn

from nndecomp.config.spd import (
    ImportanceConfig,
    ImportanceKind,
    Masks,
    ReconstructionConfig,
    SPDConfig,
)
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget
from nndecomp.targets.maps import find_maps
from nndecomp.tokens.batch import TokenBatch
from nndecomp.training.parameters import SPDObjective
from nndecomp.training.subjects import LanguageModel, Vectors

SHARED = ImportanceConfig(kind=ImportanceKind.shared_mlp, hidden=[6])


def chain(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear, ReLU, Linear, ... ; frozen, in eval mode; the same weights each time."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for n, (d_in, d_out) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.ReLU()] * (n > 0) + [nn.Linear(d_in, d_out, bias=bias)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def decomposed(
    model: nn.Module, maps: dict[str, int], importance: ImportanceConfig = SHARED, seed: int = 0
) -> ParameterDecomposition:
    return ParameterDecomposition(find_maps(model, maps), importance, seed)


def small_language_model(n_layers: int = 2) -> LlamaSimpleMLPTarget:
    config = LlamaSimpleMLPConfig(
        n_layers=n_layers, d_model=16, d_mlp=24, n_heads=2, n_kv_heads=2, n_ctx=16, n_vocab=N_VOCAB
    )
    model = LlamaSimpleMLP(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)  # so that attention and MLPs matter
    return LlamaSimpleMLPTarget("small", model, tiny_tokenizer())


def text(n_seqs: int = 4, n_pos: int = 6, padding: int = 0) -> TokenBatch:
    """The last sequence ends `padding` positions early."""
    tokens = tiny_tokens(n_seqs, n_pos)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[-1, n_pos - padding :] = False
    return TokenBatch(tokens, real, torch.zeros_like(real))


def loss_term(masks: Masks, **changes: Any) -> ReconstructionConfig:
    return ReconstructionConfig(coefficient=1.0, masks=masks, **changes)


def settings(losses: dict[str, ReconstructionConfig], **changes: Any) -> SPDConfig:
    values: dict[str, Any] = {
        "maps": {"*": 5},
        "importance": SHARED,
        "faithfulness": 1.0,
        "minimality": 1e-3,
        "warmup_steps": 0,
    }
    return SPDConfig(losses=losses, **{**values, **changes})


def objective_on_vectors(model: nn.Module, losses: dict[str, ReconstructionConfig], **changes: Any) -> SPDObjective:
    """Of a `chain`: its even layers are linear."""
    cfg = settings(losses, **{"maps": {"[02468]": 5}, **changes})
    decomposition = decomposed(model, cfg.maps, cfg.importance)
    return SPDObjective(decomposition, Vectors(model), cfg, rows=(8,))


def objective_on_text(
    target: LlamaSimpleMLPTarget, losses: dict[str, ReconstructionConfig], chunk_values: int = 2**26, **changes: Any
) -> SPDObjective:
    cfg = settings(losses, **{"maps": {"h.*.mlp.c_fc": 5, "h.*.mlp.down_proj": 4}, **changes})
    decomposition = decomposed(target.module(), cfg.maps, cfg.importance)
    return SPDObjective(decomposition, LanguageModel(target, chunk_values), cfg, rows=(4, 6))


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, zeros where the loss does not come; .grad is not touched."""
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}
