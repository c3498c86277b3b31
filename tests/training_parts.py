"""Small things to train: a linear regression, and a stream of Gaussian rows."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from nndecomp.config.schema import LogConfig, LrSchedule, TrainingConfig, Wandb

N_IN, N_OUT, BATCH = 4, 3, 32
QUIET = LogConfig(wandb=Wandb.disabled)


def training(n_steps: int, **changes: Any) -> TrainingConfig:
    values = {"lr": 0.05, "lr_schedule": LrSchedule.constant, "lr_warmup": 0.0, "lr_decay": 0.0, "log_every": 10}
    return TrainingConfig(n_tokens=n_steps * BATCH, batch_tokens=BATCH, **{**values, **changes})


class Regression(nn.Module):
    """|x W + b - y|^2 where y = x A + 1 + noise. `dropout` and `after_step` make it depend on all that can be lost."""

    def __init__(self, dropout: float = 0.0, init: float = 0.0) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.full((N_IN, N_OUT), init))
        self.b = nn.Parameter(torch.zeros(N_OUT))
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.int64))
        self.dropout = dropout
        self.progress: list[float] = []

    def loss(self, batch: Tensor, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        self.progress.append(progress)
        x, y = batch[:, :N_IN], batch[:, N_IN:]
        x = nn.functional.dropout(x, self.dropout, self.training)
        squares = ((x @ self.W + self.b - y) ** 2).float()
        return squares.sum(-1).mean(), {"mse": squares.mean(), "largest": squares.max()}

    def before_step(self) -> None:
        pass

    def clipped_apart(self) -> list[tuple[list[nn.Parameter], float]]:
        return []

    def after_step(self) -> None:
        self.n_seen += 1

    def own_training(self, cfg: TrainingConfig) -> TrainingConfig:
        return cfg

    def take_resets(self) -> list[tuple[nn.Parameter, Tensor]]:
        return []

    def lr_shares(self) -> dict[str, float]:
        return {}


class Rows:
    """x and y = x A + 1 + noise, with A[i, j] = i - j."""

    def __init__(self, seed: int = 0, seconds: float = 0.0, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.A = torch.arange(N_IN)[:, None] - torch.arange(float(N_OUT))
        self.seconds, self.noise = seconds, noise

    def next_batch(self) -> Tensor:
        time.sleep(self.seconds)
        x = torch.randn(BATCH, N_IN, generator=self.generator)
        noise = self.noise * torch.randn(BATCH, N_OUT, generator=self.generator)
        return torch.cat([x, x @ self.A + 1 + noise], 1)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
