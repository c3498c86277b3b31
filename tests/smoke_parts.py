"""The smoke matrix: which combinations there are, which of them make no sense, and what they are trained on.

A cell is an architecture, an activation function and a loss: all of these are tried. What else can be chosen is drawn for
each cell, so that any two choices meet somewhere in the matrix.
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, BOTH_MODELS, PURSUIT, F, K, fits

from nndecomp.build.end_to_end import check_wiring
from nndecomp.build.members import Member
from nndecomp.config.schema import (
    Architecture,
    AttentionStart,
    CodeNormalisation,
    Dead,
    Decoder,
    DecompositionConfig,
    Directions,
    Encoder,
    EndToEnd,
    InitialBias,
    JumpReluGradient,
    Optimizer,
    Penalty,
    PreActivationLoss,
    Reconstruction,
    Scope,
    Together,
)
from nndecomp.decompositions.wiring import wire
from nndecomp.errors import SettingError
from nndecomp.targets.base import Shape
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, save
from nndecomp.tokens.tokenizer import train_tokenizer

N_LAYERS, N_STEPS, CUT = 3, 30, 20  # layers of the target; steps; the step at which runs are cut off
ALL_ARCHITECTURES: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "skip_per_layer_transcoder": {"architecture": Architecture.per_layer_transcoder, "skip": True},
    "crosscoder_of_two_models": {"architecture": Architecture.crosscoder, **BOTH_MODELS},
    "lorsa": {"architecture": Architecture.lorsa, "reads": ["attn_in"], "writes": ["attn_out"]},
}
_LIKE = {"skip_per_layer_transcoder": "per_layer_transcoder", "crosscoder_of_two_models": "crosscoder"}
# A threshold that random starts reach whatever the code normalisation: behind one that nothing passes, nothing is learnt.
REACHED = {"jumprelu": ACTIVATIONS["jumprelu"] | {"jumprelu_threshold": 0.02}}
ALL_ACTIVATIONS = ACTIVATIONS | REACHED | PURSUIT


def _penalty(kind: Penalty, coefficient: float, **more: Any) -> dict[str, Any]:
    of_codes = {} if kind in (Penalty.l0, Penalty.l0_target) else {"penalty_normalisation": CodeNormalisation.sae}
    return {"penalty": kind, "penalty_coefficient": coefficient, "penalty_warmup": 0.1, **of_codes, **more}


def _end_to_end(kind: EndToEnd, sites: Together) -> dict[str, Any]:
    # Of few tokens, the cross-entropy depends more on which they are than on the dictionary.
    coefficient = {EndToEnd.kl: 1.0, EndToEnd.ce: 0.1}[kind]
    return {"end_to_end": kind, "end_to_end_coefficient": coefficient, "end_to_end_sites": sites}


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "l1": _penalty(Penalty.l1, 1e-3),
    "tanh": _penalty(Penalty.tanh, 1e-3),
    "tanh_quadratic": _penalty(Penalty.tanh_quadratic, 1e-4, penalty_frequency=0.1),
    "lp": _penalty(Penalty.lp, 1e-3, p_anneal=[0.2, 0.8], p_steps=4),
    "l0": _penalty(Penalty.l0, 1e-3),
    "l0_target": _penalty(Penalty.l0_target, 1e-2, penalty_target=3.0),
    "matryoshka": {"matryoshka": [0.25, 0.25, 0.5], "matryoshka_weights": [0.25, 0.5, 0.25]},
    "pre_activation": {"pre_activation_loss": PreActivationLoss.threshold, "pre_activation_coefficient": 1e-3},
    "pre_activation_of_dead": {"pre_activation_loss": PreActivationLoss.dead, "pre_activation_coefficient": 1e-3},
}
THROUGH: dict[str, dict[str, Any]] = {
    f"{kind.value}_{sites.value}": _end_to_end(kind, sites)
    for kind, sites in product((EndToEnd.kl, EndToEnd.ce), Together)
}
# What else can be chosen, one of each for every cell.
CHOICES: dict[str, list[dict[str, Any]]] = {
    "reconstruction": [{"reconstruction": each} for each in Reconstruction],
    "encoder": [{"encoder": each} for each in Encoder],
    "scope": [{"scope": each} for each in Scope],
    "code_normalisation": [{"code_normalisation": each} for each in CodeNormalisation],
    "penalty_normalisation": [{"penalty_normalisation": each} for each in CodeNormalisation],
    "jumprelu": [
        {"jumprelu_gradient": gradient, "jumprelu_log_threshold": log, "threshold_lr": 0.3}
        for gradient, log in zip(JumpReluGradient, (False, True, True), strict=True)
    ],
    "k": [{}, {"k_start": 6, "k_anneal": 0.2}],
    "dead": [
        {"dead": Dead.none},
        {"dead": Dead.aux_k, "aux_k": 4},
        {"dead": Dead.ghost},
        {"dead": Dead.resample, "resample_every": 3000},
    ],
    "decoder": [
        {"decoder": Decoder.free},
        {"decoder": Decoder.unit_norm},
        {"decoder": Decoder.archetypal, "archetypes": 32, "archetypal_slack": 0.5},
    ],
    "directions": [{"directions": each} for each in Directions],
    "patterns": [{}, {"n_qk_heads": 4}, {"attention_start": AttentionStart.random, "d_qk": 6, "rotary": False}],
    "tied": [{"tied": each} for each in (None, True, False)],
    "initial_bias": [{"initial_bias": each} for each in InitialBias],
    "centred": [{}, {"centre_input": True}, {"centre_pre_activations": True}],
    "norm": [{}, {"decoder_norm": 0.5}, {"decoder_norm_search": True}],
    "optimizer": [
        {"optimizer": Optimizer.adam},
        {"optimizer": Optimizer.adamw},
        {"optimizer": Optimizer.sign, "lr": 6e-3},
        {"optimizer": Optimizer.muon},
    ],
}


@dataclass(frozen=True)
class Cell:
    architecture: str
    activation: str
    loss: str

    def __str__(self) -> str:
        return "-".join((self.architecture, self.activation, self.loss))

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the cell what it is."""
        loss = (LOSSES | THROUGH)[self.loss]
        return ALL_ARCHITECTURES[self.architecture] | ALL_ACTIVATIONS[self.activation] | loss


@dataclass(frozen=True)
class Planned:
    """A cell with what was drawn for it."""

    config: DecompositionConfig
    drawn: dict[str, int]  # which of its values each choice has
    refused: list[str]  # what was said to choices that do not go with the rest


def cells(losses: Iterable[str], *architectures: str) -> Iterator[Cell]:
    """Of all architectures, or of some."""
    return (Cell(*names) for names in product(architectures or ALL_ARCHITECTURES, ALL_ACTIVATIONS, losses))


def sensible(cell: Cell) -> bool:
    """Whether a cell can be trained, by what its words mean."""
    selects = cell.activation in ("topk", "abs_topk", "batchtopk", "matching_pursuit")
    wiring = ALL_ARCHITECTURES[cell.architecture]
    # Features that are read at all sites before the first is written, or whose groups must agree, are not known in time.
    whole = wiring["architecture"] in (Architecture.crosscoder, Architecture.dedicated_feature_crosscoder)
    joint = cell.activation == "matching_pursuit" and wiring["architecture"] is Architecture.causal_crosscoder
    at_once = cell.loss in ("kl_all", "ce_all")
    # Transforms are not rows of a decoder; a prefix of heads would be those of a few attention patterns.
    whole_alone = wiring["architecture"] in (Architecture.molt, Architecture.lorsa)
    attends = wiring["architecture"] is Architecture.lorsa
    return (
        (attends or fits(_LIKE.get(cell.architecture, cell.architecture), cell.activation))
        and not (cell.loss in ("l0", "l0_target") and cell.activation != "jumprelu")
        and not (cell.loss.startswith("pre_activation") and selects)
        and not (at_once and (whole or joint))
        and not (whole_alone and cell.loss == "matryoshka")
        and not (attends and cell.activation in ("gated", "matching_pursuit"))
    )


def config(cell: Cell, shape: Shape, **more: Any) -> DecompositionConfig:
    """Raises SettingError as a run would that is checked before it starts."""
    sites = {"reads": ["mlp_in"], "writes": ["mlp_out"]}
    sizes = {"n_features": F, "initial_tokens": 256, "dead_after_tokens": 2048, "k": K}
    # What a cell is goes before what is drawn for it.
    made = DecompositionConfig(**(sites | sizes | more | cell.settings))
    wire(made, shape)
    check_wiring(str(cell), made, shape)
    return made


def planned(cell: Cell, shape: Shape) -> Planned:
    """Choices drawn one after the other, in an order of the cell's own: each stays if it goes with those before it. What is
    drawn for one does not depend on which others there are."""
    of = {name: random.Random(f"{cell} {name}") for name in CHOICES}
    order = sorted(CHOICES, key=lambda name: of[name].random())
    settings: dict[str, Any] = {}
    drawn: dict[str, int] = {}
    refused = []
    for name in order:
        i = of[name].randrange(len(CHOICES[name]))
        try:
            config(cell, shape, **settings, **CHOICES[name][i])
        except SettingError as said:
            refused.append(str(said))
            continue
        settings |= CHOICES[name][i]
        drawn[name] = i
    return Planned(config(cell, shape, **settings), drawn, refused)


def member(cell: Cell, shape: Shape) -> Member:
    return Member(planned(cell, shape).config, seed=0)


def small_model(directory: Path, d_model: int, n_layers: int, seed: int) -> Path:
    """A random model of a few thousand weights; all have the same tokenizer."""
    tokenizer = train_tokenizer(["def f(x): return x + 1\n"] * 8, vocab_size=264, n_ctx=32)
    sizes = LlamaSimpleMLPConfig(
        n_layers=n_layers, d_model=d_model, d_mlp=20, n_heads=2, n_kv_heads=2, n_ctx=32, n_vocab=len(tokenizer)
    )
    model = LlamaSimpleMLP(sizes, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # so that what MLPs and attention write is as large as what they read, and counts
                parameter.mul_(2 / (parameter.std() * parameter.shape[1] ** 0.5))
    save(model, tokenizer, directory)
    return directory


def short_texts(path: Path, n: int = 400) -> Path:
    """Documents shorter than a row of tokens, so that rows are padded."""
    draw = random.Random(0)
    words = ["def f(x):", "return", "x + 1", "f(x)", "1 + 1", "\n"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 4))) + str(i) for i in range(n)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
