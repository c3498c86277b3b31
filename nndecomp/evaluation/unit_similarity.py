"""How alike the units of two decompositions are, by weights and by activity; and the same with what they share taken out.

    weights     cos(read_i, read_j) * cos(write_i, write_j), the cosine of the two rank-one maps (write x read), over the
                spaces that both read and that both write; where only one of them is common, the cosine there
    activity    correlation of |value| over the tokens of one text (Pearson; what is rarely active has few tokens to agree on)

Chance has the same numbers without what they have in common:

    weights     directions turned by a random rotation that leaves their second moment as it is: angles within one
                decomposition stay, and so does which directions are common in the model
    activity    the text of one side shifted, as a circle (`Activity.shifted`)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.evaluation.matching import cosines
from nndecomp.evaluation.units import Activity, Directions, Units

if TYPE_CHECKING:
    from numpy import ndarray

BLOCK = 0.9  # eigenvalues of a second moment that are this near to each other count as one

Similarity = Float[Tensor, "a b"]


def weight_similarity(a: Units, b: Units) -> Similarity | None:
    """None where they have no space in common."""
    sides = [
        cosines(_beside(own, common), _beside(other, common))
        for own, other in ((a.reads, b.reads), (a.writes, b.writes))
        if (common := [space for space in own if space in other])
    ]
    if not sides:
        return None
    whole = torch.stack(sides).prod(0)
    # One direction of a rank-one matrix alone has no sign.
    return whole if len(sides) == 2 or (a.signed and b.signed) else whole.abs()


def _beside(directions: Directions, spaces: Sequence[str]) -> Float[Tensor, "unit _"]:
    return torch.cat([directions[space] for space in spaces], 1)


class Turning:
    """Units with directions that are chance: in every space, all are turned by the same random rotation."""

    def __init__(self, units: Units) -> None:
        self.units = units
        sides = units.reads, units.writes
        self._spectra = {
            space: Spectrum.of([side[space] for side in sides if space in side])
            for space in dict.fromkeys([*units.reads, *units.writes])
        }

    def drawn(self, draw: torch.Generator) -> Units:
        turn = {space: spectrum.rotation(draw) for space, spectrum in self._spectra.items()}
        reads, writes = (
            {space: rows.double() @ turn[space] for space, rows in side.items()}
            for side in (self.units.reads, self.units.writes)
        )
        return replace(self.units, reads=reads, writes=writes)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvectors of a second moment, and which of them, side by side, have eigenvalues that count as one."""

    vectors: Float[Tensor, "d d"]
    blocks: tuple[slice, ...]

    @staticmethod
    def of(rows: Sequence[Float[Tensor, "_ d"]]) -> "Spectrum":
        """Of the second moment of all rows, each scaled to norm 1."""
        unit = torch.nn.functional.normalize(torch.cat(list(rows)).double(), dim=1, eps=1e-30)
        values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
        blocks, start = [], 0
        while start < len(values):
            # Eigenvalues increase. Those of what the rows do not reach are 0 up to rounding: one block.
            near = values[start:] <= max(values[start].item() / BLOCK, 1e-9)
            blocks.append(slice(start, start + int(near.sum())))
            start = blocks[-1].stop
        return Spectrum(vectors, tuple(blocks))

    def rotation(self, draw: torch.Generator) -> Float[Tensor, "d d"]:
        """A random orthogonal map that leaves the second moment as it is, as far as eigenvalues of a block are equal: any one
        within each block's space, which of a single eigenvector leaves a random sign."""
        within = torch.zeros_like(self.vectors)
        for block in self.blocks:
            n = block.stop - block.start
            q, r = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))
            within[block, block] = q * r.diagonal().sign()  # uniform over all of them (Mezzadri 2007)
        return self.vectors @ within @ self.vectors.T


def activity_similarity(a: Activity, b: Activity) -> Similarity:
    """Correlation of how much each is active; 0 for what is active never, or always alike."""
    assert a.n_tokens == b.n_tokens, f"activity on {a.n_tokens} and on {b.n_tokens} tokens cannot be compared"
    n = a.n_tokens
    both = torch.from_numpy(_product(a, b)) / n
    mean, spread = zip(*(_moments(each) for each in (a, b)), strict=True)
    scale = spread[0][:, None] * spread[1]
    return torch.where(scale > 0, (both - mean[0][:, None] * mean[1]) / scale, 0.0).clamp(-1, 1)


def _product(a: Activity, b: Activity) -> "ndarray":
    """sum over tokens of what both are worth [a, b]."""
    if a.is_dense and b.is_dense:
        return a.amounts.toarray().T @ b.amounts.toarray()
    return (a.amounts.T @ b.amounts).toarray()


def _moments(of: Activity) -> tuple[Float[Tensor, " unit"], Float[Tensor, " unit"]]:
    values = of.values.double().abs()
    blank = torch.zeros(of.n_units, dtype=torch.float64)
    mean = blank.index_add(0, of.units, values) / of.n_tokens
    square = blank.index_add(0, of.units, values.square()) / of.n_tokens
    variance = square - mean.square()
    return mean, torch.where(variance > 1e-12 * square, variance, 0.0).sqrt()
