"""What is timed: each library's own training step at a size, on the same rows, from the same first weights.

Settings are alike by their meaning, and each library's own where it has no choice: sae-lens leaves decoder norms free, sparsify
clips nothing, dictionary-learning projects and normalises as this library does. No feature is dead, so nothing is revived.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.synthetic import World
from nndecomp.build.throughput_systems import DENSE, OURS, PAIRS, System
from nndecomp.config.schema import (
    Activation,
    Architecture,
    Decoder,
    DecompositionConfig,
    DType,
    Frequencies,
    Magnitudes,
    SizeConfig,
    SyntheticConfig,
    SyntheticShapeConfig,
    TrainingConfig,
)
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.evaluation.dense import DensePairs
from nndecomp.evaluation.peers_dictionary_learning import DictionaryLearning
from nndecomp.evaluation.peers_sae_lens import SaeLens
from nndecomp.evaluation.peers_sparsify import Sparsify
from nndecomp.targets.base import TargetShape
from nndecomp.targets.synthetic import shape_of
from nndecomp.training.loop import Trainee, metrics
from nndecomp.types import Layout, Point, Site

Rows = Float[Tensor, "token width"]
Step = Callable[[Rows, int], object]
CPU = torch.device("cpu")
N_STEPS = 100_000  # that a run would have: learning rates stand still at its start
# Sparse mixtures of more directions than coordinates, some frequent, most rare.
FEATURES_A_COORDINATE, ACTIVE, ZIPF, NOISE, BIAS = 8, 20.0, 0.6, 0.05, 0.3


def shape(size: SizeConfig) -> TargetShape:
    return shape_of(SyntheticShapeConfig(n_layers=size.n_layers, d_model=size.d_model, d_mlp=4 * size.d_model))


def sites(size: SizeConfig) -> list[Site]:
    points = (Point.mlp_in, Point.mlp_out) if size.n_layers > 1 else (Point.mlp_out,)
    return sorted(Site(layer, point) for layer in range(size.n_layers) for point in points)


def rows(size: SizeConfig, n_batches: int, seed: int) -> list[Rows]:
    """Batches of synthetic activations whose mean square is 1 in every coordinate."""
    features = SyntheticConfig(
        seed=seed,
        n_features=FEATURES_A_COORDINATE * size.d_model,
        l0=min(ACTIVE, size.d_model / 2),
        frequencies=Frequencies.zipf,
        zipf_exponent=ZIPF,
        magnitudes=Magnitudes.exponential,
        noise=NOISE,
        bias=BIAS,
    )
    world = World(features, shape(size), sites(size))
    drawn = [world.draw(size.batch_tokens, "train", seed, batch)[0] for batch in range(n_batches)]
    scale = drawn[0].square().mean().sqrt()
    return [each / scale for each in drawn]


def configured(base: DecompositionConfig, system: System, size: SizeConfig) -> DecompositionConfig:
    """`decomposition`, as the system has it at this size."""
    own: dict[str, Any] = {"n_features": size.n_features, "k": size.k, "activation": system.activation, "layers": [0]}
    if system.activation is Activation.jumprelu:
        own |= {"k": None, "penalty_warmup": 0.0}
    if size.n_layers > 1:
        own |= {"architecture": Architecture.cross_layer_transcoder, "reads": ["mlp_in"], "writes": ["mlp_out"]}
        own |= {"layers": None, "centre_input": False, "decoder": Decoder.free}
    settings = dict(system.settings)
    if "penalty_target" in settings:
        settings["penalty_target"] = float(size.l0)
    return replace(base, **own | settings)


def objective(cfg: DecompositionConfig, size: SizeConfig, first: Rows, seed: int) -> DictionaryObjective:
    """Started on rows. Thresholds of jumprelu stand where `size.l0` features are active on a token, as after training."""

    def started(cfg: DecompositionConfig) -> DictionaryObjective:
        dictionary = build_dictionary(cfg, shape(size), seed, CPU, target="synthetic")
        layout = Layout.of({site: size.d_model for site in sites(size)})
        made = DictionaryObjective(dictionary, cfg, layout, dict.fromkeys(layout.sites, 1.0))
        made.start(first)
        return made

    made = started(cfg)
    if not isinstance(made.dictionary.activation, JumpRelu):
        return made
    few = first[:256]
    with torch.no_grad():
        x, _ = made.split(few)
        pre = made.dictionary.banks[0].pre_activations(made.dictionary.read(x, 0))
    threshold = pre.flatten().topk(size.l0 * len(few)).values.min().item()
    return started(replace(cfg, jumprelu_threshold=threshold, jumprelu_bandwidth=0.1 * threshold))


def training_config(base: TrainingConfig, system: System, size: SizeConfig) -> TrainingConfig:
    return replace(
        base,
        n_tokens=N_STEPS * size.batch_tokens,
        batch_tokens=size.batch_tokens,
        lr=1e-5,  # weights hardly move, so every step is the same work
        lr_warmup=0.0,
        lr_decay=0.0,
        clip_norm=system.clip_norm,
    )


def trainer(
    system: System,
    base: DecompositionConfig,
    training: TrainingConfig,
    size: SizeConfig,
    first: Rows,
    seed: int,
    device: torch.device,
) -> Step:
    """One training step of a system, with everything its own loop does in one. `first`: rows in the CPU's memory."""
    training = training_config(training, system, size)
    if system.variant in (DENSE, PAIRS):
        return dense_pairs(size, training, device)
    cfg = configured(base, system, size)
    made = objective(cfg, size, first, seed).to(device)
    match system.library:
        case "nndecomp":
            return own_trainer(made, training)
        case "sae-lens":
            return SaeLens(made.dictionary, made.cfg, training).step
        case "dictionary-learning":
            return DictionaryLearning(made.dictionary, made.cfg, training).step
        case "eai-sparsify":
            return Sparsify(made.dictionary, made.cfg, training).step
        case other:
            raise AssertionError(f"nothing is known of {other}")


def dense_pairs(size: SizeConfig, training: TrainingConfig, device: torch.device) -> Callable[[Rows, int], Tensor]:
    """Of one layer: what it reads is what it writes."""
    pairs, layout = DensePairs(size, training.lr).to(device), Layout.of(dict.fromkeys(sites(size), size.d_model))
    x, y = (
        torch.cat(
            [torch.arange(size.d_model) + layout.spans[site].start for site in layout.sites if site.point is point]
        ).to(device)
        for point in (Point.mlp_in if size.n_layers > 1 else Point.mlp_out, Point.mlp_out)
    )
    by_layer, bf16 = (-1, size.n_layers, size.d_model), training.autocast is DType.bfloat16

    def step(batch: Rows, number: int) -> Float[Tensor, ""]:
        read, written = batch[:, x].view(by_layer), batch[:, y].view(by_layer)
        return pairs.step(read, written, torch.autocast(device.type, torch.bfloat16, enabled=bf16))

    return step


def own_trainer(made: DictionaryObjective, training: TrainingConfig) -> Step:
    """What the training loop does for one objective, reading its metrics included."""
    made.train()
    trainee = Trainee(OURS, made, training)

    def step(batch: Rows, number: int) -> None:
        trainee.step(batch, number)
        if (number + 1) % training.log_every == 0:
            metrics(trainee, number + 1, training.batch_tokens)

    return step
