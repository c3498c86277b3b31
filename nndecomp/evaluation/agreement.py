"""Whether the fast step is the slow one: loss curves of both, and what both select of the same weights.

deviation   max over steps of |loss - dense loss| / dense loss, each on its own weights from the same start
agreement   of the (token, feature) pairs that are active in either, the share that is in both; on the fast side's weights
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import TrainingConfig
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.evaluation.dense import DenseDictionary, active
from nndecomp.training.loop import Trainee

TOLERANCE = 1e-4  # of deviation


@dataclass(frozen=True)
class Agreement:
    rows: str  # where they come from
    activation: str
    backend: str
    losses: list[float]
    dense_losses: list[float]
    reversed_losses: list[float]  # of dense products that sum in another order
    n_both: int  # pairs active in both, over all steps
    n_either: int

    @property
    def deviation(self) -> float:
        return _deviation(self.losses, self.dense_losses)

    @property
    def rounding(self) -> float:
        """What rounding alone makes of it."""
        return _deviation(self.reversed_losses, self.dense_losses)

    @property
    def share(self) -> float:
        return self.n_both / self.n_either


def _deviation(losses: Sequence[float], dense: Sequence[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses, dense, strict=True))


def dense_losses(
    made: DictionaryObjective,
    batches: Sequence[Float[Tensor, "token width"]],
    training: TrainingConfig,
    reverse: bool = False,
) -> list[float]:
    dense = DenseDictionary(made, training, reverse)
    return [dense.step(batches[step % len(batches)], step) for step in range(training.n_steps)]


def agreement(
    made: DictionaryObjective,
    batches: Sequence[Float[Tensor, "token width"]],
    training: TrainingConfig,
    dense: tuple[list[float], list[float]],
    rows: str,
    backend: str,
) -> Agreement:
    """Trains `made`; `dense` are the losses of `dense_losses` from the same weights, forwards and in reverse."""
    trainee = Trainee("fast", made.train(), replace(training, log_every=1))
    losses, both, either = [], 0, 0
    for step in range(training.n_steps):
        batch = batches[step % len(batches)]
        fast, slow = selected(made, batch)
        both, either = both + int((fast & slow).sum()), either + int((fast | slow).sum())
        trainee.step(batch, step)
        losses.append(trainee.window.means(step + 1)["loss"])
    return Agreement(rows, made.cfg.activation.value, backend, losses, *dense, both, either)


@torch.no_grad()
def selected(made: DictionaryObjective, rows: Float[Tensor, "token width"]) -> tuple[Tensor, Tensor]:
    """[token, all features]: what the fast path takes in training, and what sorting all pre-activations takes."""
    x, _ = made.split(rows)
    assert isinstance(x, Tensor), "tokens are read one by one"
    dictionary = made.dictionary
    fast = torch.cat([codes.dense() != 0 for codes in dictionary.encode(x)], 1)
    jumps = dictionary.activation
    slow = []
    for g, bank in enumerate(dictionary.banks):
        pre = dictionary.read(x, g) @ bank.W_enc.T + bank.b_enc
        slow.append(
            active(pre, made.cfg.activation, made.cfg.k, jumps.theta(g) if isinstance(jumps, JumpRelu) else None)
        )
    return fast, torch.cat(slow, 1)
