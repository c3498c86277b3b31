"""What every activation function does, from pre-activations to codes.

Selecting ones name the active entries of each group; pointwise ones map the matrix entry by entry.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.decompositions.codes import Codes, Scales
from nndecomp.decompositions.kernels import Support


class ActivationFunction(nn.Module):
    """Shared by all. Thresholds stay in fp32 when the module is cast to another dtype, since bf16 would freeze them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ActivationFunction":
        own = [*self.parameters(recurse=recurse), *self.buffers(recurse=recurse)]
        before = [tensor.data for tensor in own]
        super()._apply(fn, recurse)
        after = [*self.parameters(recurse=recurse), *self.buffers(recurse=recurse)]
        for tensor, exact in zip(after, before, strict=True):
            tensor.data = exact.to(tensor.device)
        return self

    def live_obstacle(self) -> str | None:
        """Why groups cannot be encoded one after the other, or None."""
        return None

    def starts(self, group: int) -> list[tuple[nn.Parameter, float]]:
        """Parameters with one entry a feature of this group, and the value at which each starts."""
        return []

    def after_step(self, codes: Codes, scales: Scales) -> None:
        """Learn from the codes of a training step, and the scales by which their features were compared."""


class Selecting(ActivationFunction, ABC):
    k: list[int]  # active features of each group, on average; annealing rewrites it

    @abstractmethod
    def supports(self, pres: Sequence[Float[Tensor, "token _"]], groups: Sequence[int]) -> list[Support]:
        """The active entries of the given groups."""


class Pointwise(ActivationFunction, ABC):
    @abstractmethod
    def forward(self, pre: Float[Tensor, "token feature"], group: int) -> Float[Tensor, "token feature"]: ...
