"""Replacing activations inside a running target by what a decomposition makes of them.

    clean    the reconstruction computed from the undisturbed run: each error stands alone (`pasted`)
    live     the reconstruction computed from what arrives inside the patched run: errors compound (`live`)

Only kept positions are replaced: the others (padding, BOS) hold activations that no decomposition was asked to explain.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences
from nndecomp.activations.sequences import Sequences as WholeSequences
from nndecomp.decompositions.base import LiveRun
from nndecomp.targets.base import Replace
from nndecomp.types import Site


@dataclass(frozen=True)
class Sequences:
    """Whole sequences, and the positions of them that count."""

    tokens: Int[Tensor, "batch pos"]
    kept: Int[Tensor, " token"]  # positions that are replaced and reconstructed, in flattened (batch, pos)

    def rows(self, value: Float[Tensor, "batch pos width"]) -> Float[Tensor, "token width"]:
        """The kept positions, as float32 rows."""
        return value.flatten(0, 1).index_select(0, self.kept).float()

    def whole(self, value: Float[Tensor, "batch pos width"]) -> WholeSequences:
        """All positions, in float32, which of them count, and the text."""
        return WholeSequences(value.float(), self.kept, self.tokens)

    def put(
        self, value: Float[Tensor, "batch pos width"], rows: Float[Tensor, "token width"]
    ) -> Float[Tensor, "batch pos width"]:
        """`value` with its kept positions replaced by `rows`."""
        flat = value.flatten(0, 1).index_copy(0, self.kept, rows.to(value.dtype))
        return flat.view(value.shape)


@runtime_checkable
class Answering(Protocol):
    """What a live run needs of a decomposition."""

    @property
    def reads(self) -> tuple[Site, ...]: ...
    @property
    def writes(self) -> tuple[Site, ...]: ...
    @property
    def needs_sequences(self) -> bool: ...
    def live_run(self) -> LiveRun: ...


def pasted(batch: Sequences, rows: Mapping[Site, Float[Tensor, "token width"]]) -> dict[Site, Replace]:
    """Sites become given rows: reconstructions computed from the clean run."""

    def paste(site: Site) -> Replace:
        return lambda value: batch.put(value, rows[site])

    return {site: paste(site) for site in rows}


# What arrives at a site, and whether it is wanted at all positions.
Known = tuple[Site, bool]
# Told of every replacement of a live run: the site, what arrived there, what replaced it.
Witness = Callable[[Site, Tensor, Tensor], None]


def live(
    batch: Sequences,
    decompositions: Sequence[Answering],
    sites: Sequence[Site],
    witness: Witness | None = None,
    known: Mapping[Known, RowsOrSequences] = MappingProxyType({}),
) -> tuple[dict[Site, Replace], list[LiveRun]]:
    """Replacements at `sites` computed inside the patched run, and the runs that compute them.

    A decomposition reads a site before it writes it, and reads what others have written there: whatever leaves the
    site. Sites that are written but not in `sites` keep the target's own value, while features are read everywhere: at
    once where it is `known` what arrives, before the first of `sites`.
    """
    runs = [each.live_run() for each in decompositions]
    writer = {site: run for each, run in zip(decompositions, runs, strict=True) for site in each.writes}
    readers: dict[Site, list[LiveRun]] = {site: [] for site in sites}
    attending = {id(run) for each, run in zip(decompositions, runs, strict=True) if each.needs_sequences}
    for each, run in zip(decompositions, runs, strict=True):
        for site in each.reads:
            readers.setdefault(site, []).append(run)

    for site in [site for site in sorted(readers) if (site, False) in known]:
        for run in readers.pop(site):
            run.read(site, known[site, id(run) in attending])

    def visit(site: Site) -> Replace:
        def replace(value: Tensor) -> Tensor | None:
            rows = arrived = batch.rows(value)
            if site in sites:
                if writer[site] in readers[site]:
                    writer[site].read(site, arrived)
                rows = writer[site].write(site)
                if witness is not None:
                    witness(site, arrived, rows)
            leaving = batch.put(value, rows) if site in sites else value
            for run in readers[site]:
                if site not in sites or run is not writer[site]:
                    run.read(site, batch.whole(leaving) if id(run) in attending else rows)
            return leaving if site in sites else None

        return replace

    return {site: visit(site) for site in readers}, runs
