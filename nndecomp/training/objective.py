"""What the loop trains, and what it trains on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from nndecomp.config.schema import TrainingConfig


@runtime_checkable
class Objective(Protocol):
    """Anything with a loss: an `nn.Module` whose parameters are trained and whose buffers are saved with them.

    One step calls `loss`, backward, `before_step`, `clipped_apart`, the optimiser, `after_step`, `take_resets`, in this order.
    Everything that has to survive a restart lives in parameters and buffers.
    """

    def loss(self, batch: Any, progress: float, /) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and scalar terms to log, by name; all stay on the device.

        progress: share of the steps already made, from 0 up to but not including 1; it drives the objective's schedules.
        """
        ...

    def before_step(self) -> None:
        """Changes gradients before they are clipped, e.g. removes those along unit-norm decoder rows."""
        ...

    def clipped_apart(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """Parameters whose gradients have a largest norm of their own, and that norm. They are clipped after norms are logged,
        before all gradients are clipped together."""
        ...

    def after_step(self) -> None:
        """Restores constraints on parameters and updates what is counted or averaged over batches."""
        ...

    def take_resets(self) -> Sequence[tuple[nn.Parameter, Tensor]]:
        """Rows (indices of the first axis) of parameters that `after_step` wrote anew, each said once: the optimiser forgets
        what it remembers of them.
        """
        ...

    def own_training(self, cfg: TrainingConfig, /) -> TrainingConfig:
        """The settings it trains by, where `cfg` is what the run says for all; steps and batches are the run's."""
        ...

    def lr_shares(self) -> Mapping[str, float]:
        """Parameters, by name, whose learning rate is a share of the others'."""
        ...

    # What `nn.Module` brings along.
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...


@runtime_checkable
class Stream(Protocol):
    """Endless batches. The state holds tensors and plain values; restoring it gives the same next batches, bit for bit."""

    def next_batch(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
