"""The face that every decomposition shows to training, evaluation and reports.

x      [token, d_reads]    activations at `reads`, side by side; where `needs_sequences`, as `Sequences`
y_hat  [token, d_writes]   its account of the activations at `writes`, side by side
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.activations.sequences import RowsOrSequences
from nndecomp.types import Layout, Site


@dataclass(frozen=True)
class GroupCost:
    """What one active component of a group costs, for the x-axes of a Pareto plot.

    A group's component is counted at every site it writes (`n_writes`), and touches `parameters` weights when active;
    deciding which are active costs `gate_parameters` weights a token, however many are. `linear_parameters` act on every
    token beside the components.
    """

    name: str  # e.g. "L3" or "L3.c_fc": the module the components belong to
    n_components: int
    parameters: int  # read vector + write vector of one component
    n_writes: int
    gate_parameters: int
    linear_parameters: int  # the linear skip
    module: str | None = None  # of which the group is a part, beside others; null: the group is all of it


@runtime_checkable
class Active(Protocol):
    """Which components were active on each token."""

    def counts(self) -> Int[Tensor, "token group"]:
        """Active components of each group."""
        ...

    def firings(self) -> tuple[Int[Tensor, " component"], ...]:
        """For each group: on how many of these tokens each of its components was active."""
        ...


@runtime_checkable
class LiveRun(Protocol):
    """One forward pass in which the decomposition answers site by site, in model order."""

    def read(self, site: Site, value: RowsOrSequences) -> None:
        """Take in what arrives at a site of `reads`."""
        ...

    def write(self, site: Site) -> Float[Tensor, "token width"]:
        """The replacement for a site of `writes`, from what has been read so far."""
        ...

    def active(self) -> Active:
        """Codes of all groups, once every site of `reads` has been read."""
        ...


class Replacement(nn.Module, ABC):
    """What can take the place of part of a target, and be measured there: a `Decomposition` of activations, or gated
    components of its weights (`spd.gated.GatedParameters`)."""

    reads: tuple[Site, ...]  # in model order
    writes: tuple[Site, ...]  # in model order
    read_layout: Layout  # columns of x
    write_layout: Layout  # columns of y
    costs: tuple[GroupCost, ...]  # one a group

    @abstractmethod
    def live_obstacle(self) -> str | None:
        """Why it cannot be evaluated live (a clause for a sentence), or None if it can."""


class Decomposition(Replacement):
    """Of activations: what is written is a function of what is read."""

    @property
    def needs_sequences(self) -> bool:
        """Whether it explains a position by others before it. Then x, and what a live run reads, are `Sequences`: the
        values of all positions, and which of them count. Only these are explained, but all before them are attended to, as
        the target does (BOS and the first positions too; padding stands after the text, where nothing looks)."""
        return False

    @abstractmethod
    def forward(self, x: RowsOrSequences) -> tuple[Float[Tensor, "token d_writes"], Active]:
        """Reconstruction and what was active. In eval mode each token is treated on its own, or each sequence."""

    @abstractmethod
    def live_run(self) -> LiveRun:
        """A fresh pass. For all sites read and then written it equals `forward`."""
