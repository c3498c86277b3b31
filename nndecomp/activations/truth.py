"""What is known about rows of activations of which everything is known."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.types import Layout, Site


@dataclass(frozen=True)
class Truth:
    """A sample of rows, and the features or rules that made them.

    classes   features that belong together, by a name: those of one layer ("L2"), of one model ("A", "shared", "B"),
              those that have children and those that are some ("parents", "children")
    parents   of each feature the one without which it never fires; -1 for none
    """

    layout: Layout
    rows: Float[Tensor, "token width"]
    codes: Float[Tensor, "token feature"]  # 0 where a feature did not fire
    directions: Mapping[Site, Float[Tensor, "feature _"]]  # strength included; zero where a feature is not
    bias: Mapping[Site, Float[Tensor, " _"]]
    parents: Int[Tensor, " feature"]
    classes: Mapping[str, Int[Tensor, " _"]]

    @property
    def n_features(self) -> int:
        return self.codes.shape[1]
