"""What every activation function does, from pre-activations to codes.

Selecting ones name the active entries of each group; pointwise ones map the matrix entry by entry. Where features are
compared with each other or with a threshold, pre-activations count times c (see `nndecomp.decompositions.normalisation`);
codes are never multiplied by it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.codes import Codes, Scales
from nndecomp.decompositions.selection import Competition
from nndecomp.decompositions.support import Selected


class ActivationFunction(nn.Module):
    """Shared by all."""

    exact = True  # its tensors stay as they are when the module is cast: bf16 would freeze thresholds

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ActivationFunction":
        if not self.exact:
            super()._apply(fn, recurse)
            return self
        own = [*self.parameters(recurse=recurse), *self.buffers(recurse=recurse)]
        before = [tensor.data for tensor in own]
        super()._apply(fn, recurse)
        after = [*self.parameters(recurse=recurse), *self.buffers(recurse=recurse)]
        for tensor, exact in zip(after, before, strict=True):
            tensor.data = exact.to(tensor.device)
        return self

    def when_active(
        self,
        pre: Float[Tensor, "*entry"],
        group: int,
        b_enc: Float[Tensor, "feature"],
        at: Int[Tensor, "slot"] | None = None,
    ) -> Float[Tensor, "*entry"]:
        """v(z): what the code of each feature is where it is active. `b_enc` is the bias that `pre` holds."""
        return pre

    def live_obstacle(self) -> str | None:
        """Why groups cannot be encoded one after the other, or None."""
        return None

    def starts(self, group: int) -> list[tuple[nn.Parameter, float]]:
        """Parameters with one entry a feature of this group, and the value at which each starts."""
        return []

    def after_step(self, codes: Codes, scales: Scales) -> None:
        """Learn from the codes of a training step, and the scales by which their features were compared."""

    def fold_bias(self, group: int, fell: Float[Tensor, "feature"]) -> None:
        """b_enc of a group fell by so much, because what it reads is no longer centred."""


class Selecting(ActivationFunction):
    k: list[int]  # active features of each group, on average; annealing rewrites it


class Ranking(Selecting, ABC):
    """Selects by the size of pre-activations."""

    signed = False  # whether negative codes are kept

    @property
    @abstractmethod
    def together(self) -> bool:
        """Whether features of all groups compete with each other."""

    @abstractmethod
    def select(self, of: Sequence[Affine], groups: Sequence[int]) -> list[Selected] | None:
        """The active entries of the given groups as the backend finds them; null where it has no such selection."""

    @abstractmethod
    def competition(self, n_tokens: int, n_features: int, groups: Sequence[int]) -> Competition:
        """For the features of the given groups side by side: of one, or of all where they compete with each other."""


class Pointwise(ActivationFunction, ABC):
    """Maps entries one by one: all of them, [token, feature], or only some, [slot], with `at` the feature of each."""

    scaled = False  # whether it compares z c, rather than z

    @abstractmethod
    def forward(
        self,
        pre: Float[Tensor, "*entry"],
        group: int,
        c: Float[Tensor, "feature"] | None,
        b_enc: Float[Tensor, "feature"],
        at: Int[Tensor, "slot"] | None = None,
    ) -> Float[Tensor, "*entry"]:
        """Codes. `c` as above, null: 1. `b_enc` is the bias that `pre` holds."""

    @abstractmethod
    def floor(self, group: int, learns: bool) -> Float[Tensor, "feature"] | None:
        """What an entry must exceed to have a code or, if it `learns`, to teach anything; null: any entry may."""

    @staticmethod
    def at(of_features: Float[Tensor, "feature"], at: Int[Tensor, "slot"] | None) -> Float[Tensor, "_"]:
        """Of the features that entries belong to."""
        return of_features if at is None else of_features.index_select(0, at)
