"""A mixture of linear transforms: features that are linear maps of low rank, and a code says how much of each.

    f     = activation(pre)                       as in any dictionary
    y     = sum over t of f_t * M_t(x)            [token, d_write]
    M_t(x) = sum over the atoms a of t of (x . V_a - b_a) U_a,     rank r_t

Kamath, Ameisen et al. 2025, Sparse mixtures of linear transforms (Transformer Circuits). c of a transform is |V U|_F times
its code: how much it moves inputs of every direction, on average. b is zero while training, and takes in what folding
makes of the mean of x, since x enters the decoder too.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.activations.sequences import RowsOrSequences, rows_of
from nndecomp.config.schema import CodeNormalisation, require
from nndecomp.decompositions.base import GroupCost
from nndecomp.decompositions.codes import DenseCodes, GroupCodes
from nndecomp.decompositions.group import Group
from nndecomp.decompositions.molt_kernels import frobenius_norms, transformed
from nndecomp.decompositions.normalisation import combined_norms
from nndecomp.decompositions.spec import DictionarySpec, GroupSpec


def require_rows(groups: Sequence[nn.Module], because: str) -> None:
    """SettingError for transforms, where features must have one decoder row each."""
    require(
        not any(isinstance(group, TransformGroup) for group in groups),
        f"decomposition.architecture=molt has linear maps for features, not directions, so {because}; leave it out",
    )


class TransformGroup(Group):
    """A bank of transforms, those of one rank side by side, ranks increasing."""

    sums_rows = False
    rank: Tensor
    first: Tensor
    b_V: Tensor

    def make_decoder(self, spec: GroupSpec, whole: DictionarySpec) -> None:
        assert sum(count for _, count in spec.ranks) == spec.n_features, f"{spec.ranks} of {spec.n_features} transforms"
        self.ranks = spec.ranks
        n_atoms = sum(rank * count for rank, count in spec.ranks)
        rank = torch.cat([torch.full((count,), rank) for rank, count in spec.ranks])
        self.V = nn.Parameter(torch.zeros(n_atoms, self.d_read))
        self.U = nn.Parameter(torch.zeros(n_atoms, self.d_write))
        self.register_buffer("b_V", torch.zeros(n_atoms))
        self.register_buffer("rank", rank, persistent=False)
        self.register_buffer("first", rank.cumsum(0) - rank, persistent=False)

    @property
    def transform(self) -> Int[Tensor, "atom"]:
        """Which each atom belongs to."""
        return torch.arange(self.n_features, device=self.V.device).repeat_interleave(self.rank, output_size=len(self.V))

    def scale(self, kind: CodeNormalisation, mixed_weights: tuple[float, float]) -> Float[Tensor, "feature"]:
        if kind is CodeNormalisation.none:
            return self.V.new_ones(self.n_features)
        return combined_norms(frobenius_norms(self.V, self.U, self.ranks)[:, None], kind, mixed_weights)

    def divide_decoder(self, by: Float[Tensor, "feature"]) -> None:
        self.U.div_(by.index_select(0, self.transform)[:, None])

    def contribution(self, x: RowsOrSequences, codes: GroupCodes) -> Float[Tensor, "token d_write"]:
        """Of sparse codes the active transforms alone; dense ones have gradients everywhere, so all are computed."""
        x = rows_of(x)
        if isinstance(codes, DenseCodes):
            h = x @ self.V.T - self.b_V
            y = (codes.values.to(h.dtype).index_select(1, self.transform) * h) @ self.U
        else:
            y = transformed(x, codes.values.to(x.dtype), codes.support, self.V, self.b_V, self.U, self.rank, self.first)
        return y if self.W_skip is None else y + x @ self.W_skip

    def answers(
        self, x: RowsOrSequences, codes: Float[Tensor, "token chosen"], chosen: Int[Tensor, "chosen"]
    ) -> Float[Tensor, "token d_write"]:
        """What some transforms alone make of x, without the skip."""
        atoms = torch.isin(self.transform, chosen).nonzero()[:, 0]
        column = torch.searchsorted(chosen, self.transform.index_select(0, atoms))
        h = rows_of(x) @ self.V.index_select(0, atoms).T - self.b_V.index_select(0, atoms)
        return (codes.index_select(1, column) * h) @ self.U.index_select(0, atoms)

    def costs(self, spec: GroupSpec) -> tuple[GroupCost, ...]:
        """One of each rank: they differ in what a component costs."""
        (whole,) = super().costs(spec)
        width = self.d_read + self.d_write
        gate, linear = whole.gate_parameters, whole.linear_parameters
        return tuple(
            GroupCost(
                name=f"{self.name}.rank{rank}",
                n_components=count,
                parameters=rank * width,
                n_writes=whole.n_writes,
                gate_parameters=gate if i == 0 else 0,
                linear_parameters=linear if i == 0 else 0,
                module=self.name,
            )
            for i, (rank, count) in enumerate(self.ranks)
        )

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(count for _, count in self.ranks)

    def fold(
        self, s_read: Float[Tensor, "d_read"], s_write: Float[Tensor, "d_write"], m_read: Float[Tensor, "d_read"]
    ) -> Float[Tensor, "d_write"]:
        """(x - m) / s is what transforms see as well: V / s, b + V m / s, U * s."""
        self.V.div_(s_read)
        self.b_V.add_(self.V @ m_read)
        self.U.mul_(s_write)
        if self.W_skip is None:
            return torch.zeros_like(s_write)
        self.W_skip.mul_(s_write / s_read[:, None])
        return -m_read @ self.W_skip

    def start_decoder(self, W_V: Float[Tensor, "atom d_read"], W_U: Float[Tensor, "atom d_write"], norm: float) -> None:
        """From unit rows: every transform has norm `norm`, whatever its rank, when its atoms are orthogonal."""
        self.V.copy_(W_V)
        self.U.copy_(norm * W_U / self.rank.index_select(0, self.transform)[:, None].sqrt())
