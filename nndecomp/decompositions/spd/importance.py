"""Causal-importance functions: inputs of the decomposed maps, in the undisturbed run -> logits q [..., C] of each map.

    mlp                        q_c = MLP_c(x V_c), MLP_c: 1 -> hidden -> 1; gradients reach V
    vector_mlp                 q_c = MLP_c(x), MLP_c: d_in -> hidden -> 1
    shared_mlp                 q = MLP(x), d_in -> hidden -> C
    global_shared_mlp          all q = MLP(inputs of all maps side by side)
    global_shared_transformer  all q = transformer(inputs of all maps, each at RMS 1, side by side), over positions

Hidden layers are GELU; weights N(0, g^2 / fan_in), g = sqrt 2 of hidden layers and 1 of the last; biases 0. Global ones see
maps in the order of their sorted names. Bushnaq, Braun and Sharkey 2025 (arXiv 2506.20790, section 2).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.decompositions.spd.components import Components
from nndecomp.decompositions.spd.scalar_mlps import scalar_mlps
from nndecomp.targets.llama_simple_mlp import rotary_tables, rotate
from nndecomp.targets.maps import LinearMap

Input = Float[Tensor, "*rows d_in"] | Int[Tensor, "*rows"]


def _drawn(shape: Sequence[int], fan_in: int, last: bool, draw: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=draw) * ((1.0 if last else 2.0) / fan_in) ** 0.5)


class ParallelMLP(nn.Module):
    """C MLPs side by side, each d_in -> hidden -> 1; `per_component`: each has an input of its own, of one number."""

    def __init__(self, C: int, d_in: int, hidden: Sequence[int], per_component: bool, draw: torch.Generator) -> None:
        super().__init__()
        self.per_component = per_component
        widths = [1 if per_component else d_in, *hidden, 1]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.W = nn.ParameterList(_drawn((C, i, o), i, n == len(pairs) - 1, draw) for n, (i, o) in enumerate(pairs))
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(C, o)) for _, o in pairs)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows C"]:
        if self.per_component and len(self.W) == 2:
            (w, v), (b, k) = self.W, self.b
            return scalar_mlps(x, w[:, 0], b, v[:, :, 0], k)
        value = x.unsqueeze(-1) if self.per_component else x
        for n, (W, b) in enumerate(zip(self.W, self.b, strict=True)):
            value = F.gelu(value) if n else value
            if n == 0 and not self.per_component:
                value = torch.einsum("...i,cio->...co", value, W) + b
            elif W.shape[1] == 1:
                value = value * W[:, 0] + b
            elif W.shape[2] == 1:  # like the case above: C products of a few numbers each are half as fast as matrices
                value = (value * W[:, :, 0]).sum(-1, keepdim=True) + b
            else:
                value = torch.einsum("...ci,cio->...co", value, W) + b
        return value.squeeze(-1)

    @property
    def n_weights(self) -> int:
        return sum(W.numel() for W in self.W)


class SharedMLP(nn.Module):
    """d_in -> hidden -> d_out."""

    def __init__(self, d_in: int, hidden: Sequence[int], d_out: int, draw: torch.Generator) -> None:
        super().__init__()
        pairs = list(zip([d_in, *hidden], [*hidden, d_out], strict=True))
        self.W = nn.ParameterList(_drawn((i, o), i, n == len(pairs) - 1, draw) for n, (i, o) in enumerate(pairs))
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(o)) for _, o in pairs)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        for n, (W, b) in enumerate(zip(self.W, self.b, strict=True)):
            x = (F.gelu(x) if n else x) @ W + b
        return x

    @property
    def n_weights(self) -> int:
        return sum(W.numel() for W in self.W)


def rms_normed(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """RMS 1, without a learned scale."""
    return F.rms_norm(x, x.shape[-1:])


class TransformerBlock(nn.Module):
    """x += attention(rms x); x += MLP(rms x). Rotary positions with halves as pairs; no bias in attention."""

    def __init__(self, cfg: ImportanceConfig, draw: torch.Generator) -> None:
        super().__init__()
        d = cfg.d_model
        self.d_head, self.causal, self.base = d // cfg.n_heads, cfg.causal, cfg.rotary_base
        self.W_QKV = _drawn((d, 3 * d), d, True, draw)
        self.W_O = _drawn((d, d), d, True, draw)
        self.mlp = SharedMLP(d, [cfg.d_mlp], d, draw)

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        q, k, v = (
            each.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for each in (rms_normed(x) @ self.W_QKV).chunk(3, -1)
        )
        cos, sin = (each.to(x) for each in rotary_tables(self.d_head, x.shape[1], self.base))
        z = F.scaled_dot_product_attention(
            rotate(q, cos, sin).to(v), rotate(k, cos, sin).to(v), v, is_causal=self.causal
        )
        x = x + z.transpose(1, 2).flatten(-2) @ self.W_O
        return x + self.mlp(rms_normed(x))

    @property
    def n_weights(self) -> int:
        return self.W_QKV.numel() + self.W_O.numel() + self.mlp.n_weights


class GlobalTransformer(nn.Module):
    def __init__(self, d_in: int, C: int, cfg: ImportanceConfig, draw: torch.Generator) -> None:
        super().__init__()
        self.W_in, self.b_in = _drawn((d_in, cfg.d_model), d_in, True, draw), nn.Parameter(torch.zeros(cfg.d_model))
        self.blocks = nn.ModuleList(TransformerBlock(cfg, draw) for _ in range(cfg.n_blocks))
        self.W_out, self.b_out = _drawn((cfg.d_model, C), cfg.d_model, True, draw), nn.Parameter(torch.zeros(C))

    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos C"]:
        x = x @ self.W_in + self.b_in
        for block in self.blocks:
            x = block(x)
        return x @ self.W_out + self.b_out

    @property
    def n_weights(self) -> int:
        blocks = sum(block.n_weights for block in self.blocks if isinstance(block, TransformerBlock))
        return self.W_in.numel() + self.W_out.numel() + blocks


class LayerwiseImportance(nn.Module):
    """Of each map from its own input."""

    def __init__(self, maps: Mapping[LinearMap, int], cfg: ImportanceConfig, draw: torch.Generator) -> None:
        super().__init__()
        self.kind, self.names = cfg.kind, [each.name for each in maps]
        self.functions = nn.ModuleList(_function(each, C, cfg, draw) for each, C in maps.items())

    def of(
        self, name: str, x: Input, components: Components
    ) -> tuple[Float[Tensor, "*rows C"], Float[Tensor, "*rows C"] | None]:
        """q, and what the components read of x; null where importances do not see it."""
        a = components.read(x) if self.kind is ImportanceKind.mlp else None
        return self.functions[self.names.index(name)]((x if a is None else a).float()), a

    def gate_weights(self, maps: Mapping[LinearMap, int]) -> list[int]:
        """Weights that one token's importances take, by map; where components' own reads are seen, V with them."""
        own = [int(function.n_weights) for function in self.functions]  # pyright: ignore[reportArgumentType]
        V = [m.d_in * C if self.kind is ImportanceKind.mlp else 0 for m, C in maps.items()]
        return [a + b for a, b in zip(own, V, strict=True)]


def _function(linear: LinearMap, C: int, cfg: ImportanceConfig, draw: torch.Generator) -> nn.Module:
    match cfg.kind:
        case ImportanceKind.mlp:
            made = ParallelMLP(C, 1, cfg.hidden, True, draw)
        case ImportanceKind.vector_mlp:
            made = ParallelMLP(C, linear.d_in, cfg.hidden, False, draw)
        case ImportanceKind.shared_mlp:
            made = SharedMLP(linear.d_in, cfg.hidden, C, draw)
        case other:
            raise AssertionError(f"{other.value} is of all maps together")
    return made.to(linear.weight.device)


class GlobalImportance(nn.Module):
    """Of all maps together, from all their inputs."""

    def __init__(self, maps: Mapping[LinearMap, int], cfg: ImportanceConfig, draw: torch.Generator) -> None:
        super().__init__()
        self.normalises = cfg.kind is ImportanceKind.global_shared_transformer
        ordered = sorted(maps, key=lambda each: each.name)
        self.names, self.sizes = [each.name for each in ordered], [maps[each] for each in ordered]
        d_in, C = sum(each.d_in for each in ordered), sum(self.sizes)
        make = GlobalTransformer(d_in, C, cfg, draw) if self.normalises else SharedMLP(d_in, cfg.hidden, C, draw)
        self.function = make.to(ordered[0].weight.device)

    def forward(self, inputs: Mapping[str, Input]) -> dict[str, Float[Tensor, "*rows C"]]:
        values = [inputs[name].float() for name in self.names]
        q = self.function(torch.cat([rms_normed(each) for each in values] if self.normalises else values, -1))
        return dict(zip(self.names, q.split(self.sizes, -1), strict=True))

    def gate_weights(self, maps: Mapping[LinearMap, int]) -> list[int]:
        """As of layerwise importances: all of them with the first map, for no share of them is any map's own."""
        return [int(self.function.n_weights) if n == 0 else 0 for n in range(len(maps))]  # pyright: ignore[reportArgumentType]
