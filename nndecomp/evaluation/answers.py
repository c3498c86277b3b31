"""How a replacement answers in each of the runs that are measured, whatever it replaces: activations or weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from nndecomp.config.evaluation import MasksConfig
from nndecomp.config.schema import Inputs
from nndecomp.decompositions.base import Active, Decomposition, Replacement
from nndecomp.decompositions.replacing import Witness, live
from nndecomp.decompositions.spd.adversary import Sources
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.spd.gates import GateKind
from nndecomp.evaluation.masking import Condition, masked_runs, shared_sources
from nndecomp.evaluation.patching import Batch, CleanRun, patched
from nndecomp.targets.base import Replace, Target
from nndecomp.types import Site

Rows = dict[Site, Float[Tensor, "token width"]]
Actives = Callable[[], list[Active]]


@runtime_checkable
class Answers(Protocol):
    def clean(self, batch: Batch, clean: CleanRun) -> tuple[Rows, list[Active]]:
        """Each written site's reconstruction from the undisturbed run, and what was active."""
        ...

    def inside(
        self,
        inputs: Inputs,
        batch: Batch,
        sites: Sequence[Site],
        witness: Witness | None = None,
        clean: CleanRun | None = None,
    ) -> AbstractContextManager[Actives]:
        """Within the block the target runs with `sites` replaced, from where `clean` lets it begin; afterwards what is yielded
        says what was active, and the witness has been told of every site: what arrived there, or would have been there
        undisturbed given what the part that writes it read, and what replaced it."""
        ...

    def look_ahead(self, batches: Callable[[], Iterable[Batch]], cfg: MasksConfig, seed: int) -> None:
        """Before the first batch is measured: finds what all of them have a part in."""
        ...

    def masked(self, batch: Batch, cfg: MasksConfig, seed: int) -> Iterator[Condition]:
        """Further runs in which the target is measured, by what rows call them: masks are a matter of parameters."""
        ...

    def obstacle(self, inputs: Inputs) -> str | None:
        """Why it cannot be measured so (a clause), or None."""
        ...

    def offers(self, inputs: Inputs) -> bool:
        """Whether the question makes sense: gates of the undisturbed run are a matter of parameters."""
        ...


def answers(target: Target, parts: Sequence[Replacement]) -> Answers:
    if isinstance(parts[0], GatedParameters):
        assert len(parts) == 1, "a parameter decomposition stands alone: its maps are all in it"
        return ParameterAnswers(target, parts[0])
    found = [each for each in parts if isinstance(each, Decomposition)]
    assert len(found) == len(parts), f"{', '.join(type(each).__name__ for each in parts)} cannot be measured together"
    return ActivationAnswers(target, found)


class ActivationAnswers:
    def __init__(self, target: Target, decompositions: Sequence[Decomposition]) -> None:
        self.target, self.decompositions = target, decompositions

    def clean(self, batch: Batch, clean: CleanRun) -> tuple[Rows, list[Active]]:
        rows: Rows = {}
        actives = []
        for each in self.decompositions:
            y_hat, active = each(clean.read_by(each))
            rows |= {site: y_hat[:, span] for site, span in each.write_layout.spans.items()}
            actives.append(active)
        return rows, actives

    @contextmanager
    def inside(
        self,
        inputs: Inputs,
        batch: Batch,
        sites: Sequence[Site],
        witness: Witness | None = None,
        clean: CleanRun | None = None,
    ) -> Iterator[Actives]:
        assert inputs is Inputs.live, f"activations are not decomposed with inputs={inputs.value} inside a run"
        known = {} if clean is None else clean.before(sites)
        replacements, runs = live(batch, self.decompositions, sites, witness, known)
        with self.target.patch(replacements) if clean is None else patched(self.target, clean, replacements):
            yield lambda: [run.active() for run in runs]

    def look_ahead(self, batches: Callable[[], Iterable[Batch]], cfg: MasksConfig, seed: int) -> None:
        pass

    def masked(self, batch: Batch, cfg: MasksConfig, seed: int) -> Iterator[Condition]:
        return iter(())

    def obstacle(self, inputs: Inputs) -> str | None:
        reasons = [reason for each in self.decompositions if (reason := each.live_obstacle()) is not None]
        return reasons[0] if reasons and inputs is Inputs.live else None

    def offers(self, inputs: Inputs) -> bool:
        return inputs is not Inputs.clean_gates


class ParameterAnswers:
    def __init__(self, target: Target, parameters: GatedParameters) -> None:
        self.target, self.parameters = target, parameters
        self.sources: Sources = {}  # of masks that all batches share
        gate = parameters.gate
        self.is_masked = gate.kind is GateKind.importance and not gate.delta  # once a decomposition

    def clean(self, batch: Batch, clean: CleanRun) -> tuple[Rows, list[Active]]:
        rows, active = self.parameters.answers(batch)
        return rows, [active]

    @contextmanager
    def inside(
        self,
        inputs: Inputs,
        batch: Batch,
        sites: Sequence[Site],
        witness: Witness | None = None,
        clean: CleanRun | None = None,
    ) -> Iterator[Actives]:
        parameters = self.parameters
        gates = parameters.gates(batch.tokens) if inputs is Inputs.clean_gates else None
        arrived: dict[Site, Tensor] = {}  # whole, at read sites
        written: Rows = {}

        def keep(site: Site) -> Replace:
            def record(value: Tensor) -> None:
                if site in parameters.reads:
                    arrived[site] = value
                if site in sites:
                    written[site] = batch.rows(value)

            return record

        watched = sorted({*parameters.reads, *sites}) if witness is not None else []
        with (
            parameters.inside(batch, sites, gates) as active,
            self.target.patch({site: keep(site) for site in watched}),
        ):
            yield lambda: [active()]
        if witness is not None:
            with self.target.patch({site: _held(value) for site, value in arrived.items()}):
                undisturbed = self.target.record(batch.tokens, sites)
            for site, value in undisturbed.items():
                witness(site, batch.rows(value), written[site])

    def look_ahead(self, batches: Callable[[], Iterable[Batch]], cfg: MasksConfig, seed: int) -> None:
        if self.is_masked:
            self.sources = shared_sources(self.target, self.parameters, batches, cfg, seed)

    def masked(self, batch: Batch, cfg: MasksConfig, seed: int) -> Iterator[Condition]:
        if self.is_masked:
            yield from masked_runs(self.target, self.parameters, batch, cfg, seed, self.sources)

    def obstacle(self, inputs: Inputs) -> str | None:
        return self.parameters.live_obstacle() if inputs is Inputs.live else None

    def offers(self, inputs: Inputs) -> bool:
        return True


def _held(value: Tensor) -> Replace:
    return lambda _: value
