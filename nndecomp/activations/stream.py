"""What training reads: batches of rows, without end, from the target as it runs or from a store."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.buffer import ShuffleBuffer
from nndecomp.activations.harvest import Harvester
from nndecomp.types import Layout


@runtime_checkable
class RowStream(Protocol):
    """Every row once (an epoch, for a store), in shuffled order, on the training device, in fp32.

    The state holds tensors and plain values: `torch.load(..., weights_only=True)` reads it back, and restoring it gives
    the same next batches bit for bit.
    """

    layout: Layout

    def next_batch(self) -> Float[Tensor, "token width"]:
        """`batch_tokens` rows; the batch size is the caller's, and never varies."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def live_stream(harvester: Harvester, batch_tokens: int, seed: int) -> ShuffleBuffer:
    """Rows harvested as training goes, mixed over `activations.buffer_tokens`."""
    return ShuffleBuffer(harvester, harvester.cfg.buffer_tokens, batch_tokens, seed)
