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
        self.parameters = tuple(parameters)
        self.terms: tuple[str, ...] = ()
        self.rows: list[Float[Tensor, " column"]] = []

    def add(
        self, loss: Float[Tensor, ""], terms: dict[str, Tensor], gradient_norms: Float[Tensor, " parameter"]
    ) -> None:
        names = tuple(terms)
        assert self.rows == [] or names == self.terms, (
            f"{self.objective}: the terms of the loss changed from {self.terms} to {names}"
        )
        for name, value in (*terms.items(), ("loss", loss)):
            assert value.ndim == 0, f"{self.objective}: {name} has shape {tuple(value.shape)}, a scalar is logged"
        self.terms = names
        scalars = torch.stack([value.detach().float() for value in (*terms.values(), loss)])
        self.rows.append(torch.cat([scalars, gradient_norms]))

    @property
    def columns(self) -> list[str]:
        gradients = [f"the gradient of {name}" for name in self.parameters]
        return [*(f"term {name!r} of the loss" for name in self.terms), "the loss", *gradients]

    def read(self, step: int) -> list[list[float]]:
        """The rows, of which the last is that of `step`; one sync. Raises NonFiniteError."""
        rows = torch.stack(self.rows).tolist()
        for ago, row in zip(reversed(range(len(rows))), rows, strict=True):
            for column, value in zip(self.columns, row, strict=True):
                if not math.isfinite(value):
                    raise NonFiniteError(f"{self.objective}: {column} is {value} at step {step - ago}")
        return rows

    def means(self, step: int) -> dict[str, float]:
        """Means over the window of the terms, the loss, and the norm of the whole gradient; then the window is empty."""
        rows = self.read(step)
        n_terms = len(self.terms)
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        norms = [math.hypot(*row[n_terms + 1 :]) for row in rows]
        self.rows = []
        return {
            "loss": means[n_terms],
            **dict(zip(self.terms, means, strict=False)),
            "gradient_norm": sum(norms) / len(norms),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"terms": list(self.terms), "rows": [row.cpu() for row in self.rows]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.terms = tuple(state["terms"])
        self.rows = [row.to(device) for row in state["rows"]]


def check_parameters(objective: str, parameters: dict[str, nn.Parameter], step: int) -> None:
    """Raises NonFiniteError if a parameter has a NaN or an infinity after `step`; one sync."""
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(parameters.values()))])
    for name, norm in zip(parameters, norms.tolist(), strict=True):
        if not math.isfinite(norm):
            raise NonFiniteError(f"{objective}: parameter {name} has norm {norm} after step {step}")
