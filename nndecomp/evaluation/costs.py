"""The x-axes of a Pareto plot: what a decomposition spends on one token.

With l_g the mean number of active components of group g, each axis is linear in l:

    active_per_module           mean over modules of l_m, the sum of l_g over the groups of a module (usually one)
    active_per_reconstruction   sum_g l_g n_writes_g / n_writes             components that write to one site
    active_parameters           sum_g l_g parameters_g + linear_parameters_g    weights of the active components, and
                                                                                of linear maps beside them
    active_parameters_with_gate active_parameters + sum_g gate_parameters_g     and those that decide which are active
    gate_parameters             sum_g gate_parameters_g                         those alone: the same at every sparsity
    description_length          sum_g l_g (log2 n_components of its module + VALUE_BITS)

n_writes is the number of different sites written (one a layer, when MLPs are replaced). The second axis is fair to
methods whose components write to several layers or share the work of one layer between two weight matrices; the last
counts the bits that name the active components and their values, one at a time, without entropy coding.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.decompositions.base import GroupCost

# Bits that hold one activation value. A convention, not a measurement: the same for every method.
VALUE_BITS = 8


@dataclass(frozen=True)
class Axis:
    """One x-axis: `weights` . l + `constant`, in `unit`, for l the mean active components of each group."""

    name: str
    unit: str
    weights: Float[Tensor, " group"]
    constant: float = 0.0

    def of(self, active: Float[Tensor, "*rows group"]) -> Float[Tensor, "*rows"]:
        return active @ self.weights + self.constant


def axes(costs: Sequence[GroupCost], n_writes: int) -> tuple[Axis, ...]:
    """All axes of decompositions with groups `costs` that together write `n_writes` sites."""
    assert costs and n_writes > 0, f"{len(costs)} groups that write {n_writes} sites reconstruct nothing"

    def each(values: Sequence[int | float]) -> Float[Tensor, " group"]:
        return torch.tensor(values, dtype=torch.float64)

    modules = Counter[str]()
    for cost in costs:
        modules[cost.module or cost.name] += cost.n_components
    parameters = each([cost.parameters for cost in costs])
    linear = float(sum(cost.linear_parameters for cost in costs))
    gate = float(sum(cost.gate_parameters for cost in costs))
    return (
        Axis("active_per_module", "components/token", each([1 / len(modules)] * len(costs))),
        Axis("active_per_reconstruction", "components/token", each([cost.n_writes / n_writes for cost in costs])),
        Axis("active_parameters", "weights/token", parameters, linear),
        Axis("active_parameters_with_gate", "weights/token", parameters, linear + gate),
        Axis("gate_parameters", "weights/token", torch.zeros_like(parameters), gate),
        Axis(
            "description_length",
            "bits/token",
            each([math.log2(modules[c.module or c.name]) + VALUE_BITS for c in costs]),
        ),
    )
