"""A stack of MLPs made of rules that are known: where key r is present in what a layer reads, it writes value r.

    x_0 = W_E[token] = sum of the keys that the token has, each times its size in [0.75, 1.25]
    x  <- x + mlp_l(x)                                              no norm, no attention: mlp_in is the residual stream
    mlp_l(x) = W_out relu(W_in x + b)
    logits = W_E x_L / sqrt(d_model)

A rule is computed by `neurons_per_rule` neurons. A neuron of one rule is relu((<k_r, x> - theta) / (1 - theta)), which is 1 where
its key is present at size 1. With fewer neurons than rules each serves several and reads the sum of their keys (compressed
computation: Vaintrob, Mendel & Hanni 2024, arXiv 2408.05451). Output weights are those with which the neurons of each rule
write its value in the least squares: exactly, where rules have neurons of their own.

Directions are orthogonal while all keys and values fit into d_model, else pushed as far apart as that goes: interference is
then part of the computation. `chain`: key r of layer l + 1 is value r of layer l, so one key sets off a rule in every layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nndecomp.config.synthetic import Plan, PlantedConfig
from nndecomp.targets.base import TargetShape
from nndecomp.targets.hooks import Side
from nndecomp.targets.modules import ModuleTarget, Wiring
from nndecomp.types import Point

_WIRING = Wiring(
    embed="wte",
    blocks="h",
    points={
        Point.resid_pre: ("", Side.input),
        Point.mlp_in: ("mlp", Side.input),
        Point.mlp_hidden: ("mlp.down_proj", Side.input),
        Point.mlp_out: ("mlp.down_proj", Side.output),
        Point.resid_post: ("", Side.output),
    },
    mlp_tail=("mlp.down_proj",),
    neurons="mlp.c_fc",
)
N_PUSHES = 500


@dataclass(frozen=True)
class Rules:
    """What was planted: of every layer, the unit keys and values, and which neurons compute each rule."""

    plan: Plan
    keys: Float[Tensor, "layer rule d_model"]
    values: Float[Tensor, "layer rule d_model"]
    neurons: Int[Tensor, "layer rule neuron"]
    present: Bool[Tensor, "vocab key"]  # keys that each token has; key_value: those of all layers, side by side

    @property
    def n_layers(self) -> int:
        return len(self.keys)

    @property
    def n_rules(self) -> int:
        return self.keys.shape[1]

    def fires(self, layer: int) -> Bool[Tensor, "vocab rule"]:
        """The tokens whose rules of this layer have something to do."""
        match self.plan:
            case Plan.chain:
                return self.present
            case Plan.key_value:
                return self.present[:, layer * self.n_rules : (layer + 1) * self.n_rules]


class PlantedMLP(nn.Module):
    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(d_model, d_mlp)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        return self.down_proj(self.c_fc(x).relu())


class PlantedBlock(nn.Module):
    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.mlp = PlantedMLP(d_model, d_mlp)

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        return x + self.mlp(x)


class PlantedStack(nn.Module):
    def __init__(self, cfg: PlantedConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(cfg.n_vocab, cfg.d_model)
        self.h = nn.ModuleList(PlantedBlock(cfg.d_model, cfg.d_mlp) for _ in range(cfg.n_layers))

    def residual(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return x

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        return self.head(self.residual(tokens))

    def head(self, final: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        return final @ self.wte.weight.T / self.wte.weight.shape[1] ** 0.5


class Vocabulary:
    """Token ids that stand for sets of keys rather than for text."""

    name_or_path = "planted"
    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def get_vocab(self) -> dict[str, int]:
        return {f"keys{i}": i for i in range(self.n)}


class PlantedTarget(ModuleTarget):
    model: PlantedStack

    def __init__(self, name: str, cfg: PlantedConfig, device: torch.device, dtype: torch.dtype) -> None:
        model, self.rules = plant(cfg)
        self.threshold = cfg.threshold
        super().__init__(name, model.to(device, dtype), shape_of(cfg), Vocabulary(cfg.n_vocab), _WIRING)

    def _residual(self, tokens: Int[Tensor, "batch pos"]) -> object:
        return self.model.residual(tokens)

    def _logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        return self.model(tokens)

    def final(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.model.residual(self._checked(tokens))

    def head(self, final: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        return self.model.head(final)


def shape_of(cfg: PlantedConfig) -> TargetShape:
    return TargetShape(
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        d_mlp=cfg.d_mlp,
        n_heads=1,
        d_head=cfg.d_model,
        n_vocab=cfg.n_vocab,
        n_ctx=2**31,
        points=_WIRING.available,
        gated=False,
    )


@torch.no_grad()
def plant(cfg: PlantedConfig) -> tuple[PlantedStack, Rules]:
    """The stack, its weights written by hand, and the rules it was made of."""
    draw = torch.Generator().manual_seed(cfg.seed)
    rules = _rules(cfg, draw)
    stack = PlantedStack(cfg)
    tokens = rules.present * (0.75 + 0.5 * torch.rand(rules.present.shape, generator=draw))
    keys = rules.keys[0] if cfg.plan is Plan.chain else rules.keys.flatten(0, 1)
    stack.wte.weight.copy_(tokens @ keys)
    for layer, mlp in enumerate(mlps(stack)):
        serves = torch.zeros(cfg.d_mlp, cfg.n_rules).scatter_(0, rules.neurons[layer].T, 1.0)
        gain = 1 / (1 - cfg.threshold)
        mlp.c_fc.weight.copy_(gain * serves @ rules.keys[layer])
        mlp.c_fc.bias.fill_(-gain * cfg.threshold)
        # Least squares: what a rule's neurons write together is its value, as far as shared neurons can.
        mlp.down_proj.weight.copy_((torch.linalg.pinv(serves.T.double()) @ rules.values[layer].double()).T)
    return stack, rules


def mlps(stack: PlantedStack) -> Iterator[PlantedMLP]:
    for block in stack.h:
        assert isinstance(block, PlantedBlock), f"a planted stack has a {type(block).__name__}"
        yield block.mlp


def _rules(cfg: PlantedConfig, draw: torch.Generator) -> Rules:
    n_layers, n = cfg.n_layers, cfg.n_rules
    match cfg.plan:
        case Plan.chain:
            every = spread((n_layers + 1) * n, cfg.d_model, draw).unflatten(0, (n_layers + 1, n))
            keys, values, n_keys = every[:-1], every[1:], n
        case Plan.key_value:
            every = spread(2 * n_layers * n, cfg.d_model, draw).unflatten(0, (2, n_layers, n))
            keys, values, n_keys = every[0], every[1], n_layers * n
    present = torch.rand(cfg.n_vocab, n_keys, generator=draw) < cfg.keys_per_token / n_keys
    # Neurons are dealt evenly: rules take the next ones of a shuffled deck, so that none serves two before all serve one.
    dealt = []
    for _ in range(n_layers):
        rounds = -(-n * cfg.neurons_per_rule // cfg.d_mlp) + 1
        deck = torch.cat([torch.randperm(cfg.d_mlp, generator=draw) for _ in range(rounds)])
        dealt.append(_hands(deck, n, cfg.neurons_per_rule))
    return Rules(cfg.plan, keys, values, torch.stack(dealt), present)


def _hands(deck: Int[Tensor, "card"], n_hands: int, size: int) -> Int[Tensor, "hand size"]:
    """Hands of different cards each, dealt in order; a card that the hand holds already goes to the next one."""
    waiting, hands = deck.tolist(), []
    for _ in range(n_hands):
        hand: list[int] = []
        while len(hand) < size:
            hand.append(waiting.pop(next(i for i, card in enumerate(waiting) if card not in hand)))
        hands.append(hand)
    return torch.tensor(hands)


def spread(n: int, d: int, draw: torch.Generator) -> Float[Tensor, "n d"]:
    """n unit rows: orthogonal if they fit, else pushed apart as far as N_PUSHES steps go."""
    rows = torch.randn(n, d, generator=draw, dtype=torch.float64)
    if n <= d:
        q, r = torch.linalg.qr(rows.T)
        return (q * r.diagonal().sign()).T.float()
    rows /= rows.norm(dim=1, keepdim=True)
    bound = ((n - d) / (d * (n - 1))) ** 0.5  # Welch 1974
    for _ in range(N_PUSHES):
        cosine = (rows @ rows.T).fill_diagonal_(0)
        rows -= 0.5 * ((cosine.abs() - bound).clamp(min=0) * cosine.sign()) @ rows
        rows /= rows.norm(dim=1, keepdim=True)
    return rows.float()
