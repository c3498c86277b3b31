"""Scalars of every step since the last log point. They stay on the device until they are read, all at once.

A row holds an objective's terms, its loss, and the norm of each parameter's gradient: enough to average for the log,
and to name the first step and tensor that were not finite, without a host-device sync in between.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class NonFiniteError(ArithmeticError):
    """NaN or infinity: says in which decomposition, at which step and in which tensor."""


class Window:
    def __init__(self, objective: str, parameters: Sequence[str]) -> None:
        self.objective = objective
        self.gradients = [f"the gradient of {name}" for name in parameters]
        self.terms: list[tuple[str, ...]] = []  # of each step: an objective may have a term only now and then
        self.rows: list[Float[Tensor, " column"]] = []

    def add(self, loss: Float[Tensor, ""], terms: dict[str, Tensor], norms: Float[Tensor, " parameter"]) -> None:
        terms = {name: value for name, value in terms.items() if name != "loss"}
        for name, value in terms.items():
            assert value.ndim == 0, f"{self.objective}: term {name} has shape {tuple(value.shape)}, a scalar is logged"
        self.terms.append(tuple(terms))
        scalars = torch.stack([value.detach().float() for value in (*terms.values(), loss)])
        self.rows.append(torch.cat([scalars, norms]))

    def read(self, step: int) -> list[list[float]]:
        """The rows, of which the last is that of `step`; one sync. Raises NonFiniteError for the first one there is."""
        numbers = iter(torch.cat(self.rows).tolist())
        rows = [[next(numbers) for _ in range(len(row))] for row in self.rows]
        for ago, terms, row in zip(reversed(range(len(rows))), self.terms, rows, strict=True):
            columns = [*(f"term {name!r} of the loss" for name in terms), "the loss", *self.gradients]
            for column, value in zip(columns, row, strict=True):
                if not math.isfinite(value):
                    raise NonFiniteError(f"{self.objective}: {column} is {value} at step {step - ago}")
        return rows

    def means(self, step: int) -> dict[str, float]:
        """Means since the last log point of the loss, of each term over the steps that had it, and of the norm of the
        whole gradient before clipping. The window is empty after this.
        """
        columns: dict[str, list[float]] = {}
        for terms, row in zip(self.terms, self.read(step), strict=True):
            norm = math.hypot(*row[len(terms) + 1 :])
            for name, value in zip(("loss", "gradient_norm", *terms), (row[len(terms)], norm, *row), strict=False):
                columns.setdefault(name, []).append(value)
        self.terms, self.rows = [], []
        return {name: sum(values) / len(values) for name, values in columns.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"terms": [list(names) for names in self.terms], "rows": [row.cpu() for row in self.rows]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.terms = [tuple(names) for names in state["terms"]]
        self.rows = [row.to(device) for row in state["rows"]]


def check_parameters(objective: str, parameters: dict[str, nn.Parameter], step: int) -> None:
    """Raises NonFiniteError if a parameter has a NaN or an infinity after `step`; one sync."""
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(parameters.values()))])  # pyright: ignore[reportPrivateImportUsage]
    for name, norm in zip(parameters, norms.tolist(), strict=True):
        if not math.isfinite(norm):
            raise NonFiniteError(f"{objective}: parameter {name} has norm {norm} after step {step}")
