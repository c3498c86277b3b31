"""A target that is not there: sizes alone, so that sites have widths, for rows that are drawn rather than harvested."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.config.synthetic import SyntheticShapeConfig
from nndecomp.errors import SettingError
from nndecomp.targets.base import Replace, Target, TargetShape
from nndecomp.types import Point, Site


def shape_of(cfg: SyntheticShapeConfig) -> TargetShape:
    """One head, no vocabulary."""
    return TargetShape(
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        d_mlp=cfg.d_mlp,
        n_heads=1,
        d_head=cfg.d_model,
        n_vocab=0,
        n_ctx=2**31,
        points=frozenset(Point),
        gated=False,
    )


class SyntheticTarget(Target):
    tokenizer = None

    def __init__(self, name: str, cfg: SyntheticShapeConfig, device: torch.device) -> None:
        self.name, self.shape, self.device = name, shape_of(cfg), device

    def _refuse(self) -> NoReturn:
        raise SettingError(
            "target.kind=synthetic computes nothing, so it can be neither run nor patched; measure recovery, as "
            "exp_019_ground_truth does, or write target=planted"
        )

    def record(
        self, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "batch pos width"]]:
        self._refuse()

    def patch(self, replacements: Mapping[Site, Replace]) -> AbstractContextManager[None]:
        self._refuse()

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        self._refuse()

    def mlp_out_of(self, layer: int, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows d"]:
        self._refuse()
