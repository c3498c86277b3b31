"""Adam whose gradients may come as `RowGradients`: what is saved is memory, in size and in traffic."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.decompositions import backends
from nndecomp.decompositions.backends.interface import AdamNumbers
from nndecomp.decompositions.row_gradients import RowGradients


class RowAdam(torch.optim.Adam):
    """torch's Adam or AdamW, state and all. Parameters that `rows` has gradients of are updated without any being written down."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], decoupled: bool) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True, decoupled_weight_decay=decoupled)

    @torch.no_grad()
    def step_rows(self, rows: RowGradients, clip: Float[Tensor, ""]) -> None:
        """Of these alone; `step` makes that of the others, whose gradients have been clipped where they stand."""
        for group in self.param_groups:
            for p in group["params"]:
                if p not in rows:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                keep = 1 - group["lr"] * group["weight_decay"]
                numbers = AdamNumbers(keep, group["lr"], group["betas"], group["eps"])
                rows.adam(p, state["exp_avg"], state["exp_avg_sq"], state["step"], clip, numbers)


def by_rows(optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """The parameters whose gradients may come as rows: with weight decay as Adam has it, that adds to the gradient, none."""
    if not isinstance(optimiser, RowAdam):
        return []
    able = {p for p in parameters.values() if p.ndim == 2 and backends.row_updates(p) is not None}
    decays = {p for group in optimiser.param_groups if group["weight_decay"] != 0 for p in group["params"]}
    return list(able if optimiser.defaults["decoupled_weight_decay"] else able - decays)
