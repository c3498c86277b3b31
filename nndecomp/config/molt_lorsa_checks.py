"""What goes together where features are not rows of a decoder (molt), or see more than one position (lorsa)."""

from enum import Enum
from typing import Any

from nndecomp.config.checks import require
from nndecomp.config.kinds import (
    Activation,
    Architecture,
    AttentionStart,
    Dead,
    Decoder,
    Directions,
    Encoder,
)

# A DecompositionConfig, which cannot be named here: its file imports this one.
Settings = Any

# (rank, how many of that rank in a period): half as many, twice as large, so that every rank has about as many weights.
RANKS = ((1, 8), (2, 4), (4, 2), (8, 1), (16, 1))

_SELECTING_OR_POINTWISE = (
    *(Activation.relu, Activation.jumprelu, Activation.topk, Activation.abs_topk, Activation.batchtopk),
)
_BOTH: dict[str, tuple[Any, ...]] = {
    "activation": _SELECTING_OR_POINTWISE,
    "dead": (Dead.none, Dead.aux_k),
    "tied": (None,),
    "centre_input": (False,),
    "decoder_norm_search": (False,),
}
# Settings whose other values speak of a decoder row, or of tokens one by one.
_ALLOWED: dict[Architecture, dict[str, tuple[Any, ...]]] = {
    Architecture.molt: _BOTH | {"decoder": (Decoder.free,), "matryoshka": (None,), "directions": (Directions.random,)},
    Architecture.lorsa: _BOTH
    | {
        "decoder": (Decoder.free, Decoder.unit_norm),
        "directions": (Directions.random, Directions.active_subspace, Directions.heads),
        "matryoshka": (None,),  # a prefix would be the features of a few patterns
        "encoder": (Encoder.linear,),
        "skip": (False,),
        "centre_pre_activations": (False,),
    },
}


def check_molt_and_lorsa(cfg: Settings) -> None:
    """Refuses what has no meaning for transforms or for heads of attention."""
    for name, values in _ALLOWED.get(cfg.architecture, {}).items():
        value = getattr(cfg, name)
        require(
            value in values,
            f"decomposition.{name}={_plain(value)} has no meaning for decomposition.architecture="
            f"{cfg.architecture.value}; write {' or '.join(map(_plain, values))}",
        )
    _check_ranks(cfg)
    for name in ("n_qk_heads", "d_qk"):
        value = getattr(cfg, name)
        require(value is None or value > 0, f"decomposition.{name}={value} must be positive, or null: as the target's")
    lorsa = cfg.architecture is Architecture.lorsa
    require(
        cfg.directions is not Directions.heads or (lorsa and cfg.attention_start is AttentionStart.target),
        "decomposition.directions=heads takes features from the target's heads of attention; it needs "
        "decomposition.architecture=lorsa and decomposition.attention_start=target",
    )
    for name, default in (("n_qk_heads", None), ("d_qk", None), ("rotary", True)):
        value = getattr(cfg, name)
        require(
            lorsa or value == default,
            f"decomposition.{name}={value} has no effect without decomposition.architecture=lorsa",
        )
    require(
        lorsa or cfg.attention_start is AttentionStart.target,
        f"decomposition.attention_start={cfg.attention_start.value} has no effect without "
        "decomposition.architecture=lorsa",
    )


def _check_ranks(cfg: Settings) -> None:
    molt, ranks = cfg.architecture is Architecture.molt, cfg.ranks
    require(
        molt or ranks == [list(pair) for pair in RANKS],
        f"decomposition.ranks={ranks} has no effect without decomposition.architecture=molt",
    )
    require(
        len(ranks) > 0
        and all(len(pair) == 2 and min(pair) > 0 for pair in ranks)
        and [rank for rank, _ in ranks] == sorted({rank for rank, _ in ranks}),
        f"decomposition.ranks={ranks} must be pairs of a rank and how many transforms have it, ranks increasing, "
        "e.g. [[1,8],[4,2]]",
    )
    period = sum(count for _, count in ranks)
    require(
        not molt or cfg.n_features % period == 0,
        f"decomposition.n_features={cfg.n_features} is not a multiple of the {period} transforms of "
        f"decomposition.ranks={ranks}, which stand there as often as they fit",
    )


def _plain(value: Any) -> str:
    match value:
        case Enum():
            return str(value.value)
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case _:
            return str(value)
