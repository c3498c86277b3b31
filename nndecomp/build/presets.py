"""Decompositions and worlds by the name of their file in conf/."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

from nndecomp.config.compose import compose
from nndecomp.config.schema import DecompositionConfig, RunConfig, require


def presets(
    named: Mapping[str, Sequence[str]], n_features: int, k: int | list[int] | None
) -> dict[str, DecompositionConfig]:
    """Each composed from its file of conf/decomposition, then the settings that follow it.

    All have n_features and, where they select, k, unless their own settings say otherwise.
    """
    return {name: _preset(name, words, n_features, k) for name, words in named.items()}


def _preset(name: str, words: Sequence[str], n_features: int, k: int | list[int] | None) -> DecompositionConfig:
    require(bool(words), f"presets.{name}=[] names no file of conf/decomposition; write e.g. [topk]")
    file, *settings = words
    own = {setting.partition("=")[0].lstrip("+") for setting in settings}
    sizes = [] if "n_features" in own else [f"decomposition.n_features={n_features}"]
    cfg = _composed((f"decomposition={file}", *sizes, *(f"decomposition.{setting}" for setting in settings)))
    if not cfg.selects or "k" in own:
        return cfg
    require(
        k is not None, f"decomposition.k=null, but presets.{name} selects; write k, or presets.{name}=[{file},k=...]"
    )
    return replace(cfg, k=k)


def _composed(overrides: tuple[str, ...]) -> DecompositionConfig:
    return copy.deepcopy(_compose_once(overrides))


@cache
def _compose_once(overrides: tuple[str, ...]) -> DecompositionConfig:
    """Files are read once a process: many worlds and seeds have the same presets."""
    return compose("config", ["name=presets", *overrides]).decomposition


def world(cfg: RunConfig, name: str, seed: int) -> RunConfig:
    """The run of one world of ground_truth: what conf/world/<name>.yaml says, drawn and decomposed with this seed.

    Training, where it runs and what is logged stay as in `cfg`.
    """
    own = compose("config", [f"name={cfg.name}", f"+world={name}", f"seed={seed}"])
    return replace(
        cfg,
        seed=seed,
        target=own.target,
        paired_target=own.paired_target,
        tokens=own.tokens,
        activations=own.activations,
        decomposition=own.decomposition,
        presets=own.presets,
    )
