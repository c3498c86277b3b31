"""A parameter decomposition as it takes the place of parts of the target: its components, gated.

reads    mlp_in or attn_in of each layer with a decomposed map        writes    mlp_out, attn_out, or embed

clean         importances, and what components read, from the undisturbed run: each written site's answer to clean inputs
clean_gates   importances from the undisturbed run, components read what arrives: as in training
live          importances too from what arrives, map by map
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.config.checks import require
from nndecomp.decompositions.base import GroupCost, Replacement
from nndecomp.decompositions.replacing import Sequences
from nndecomp.decompositions.spd.components import masked
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.gates import Gate
from nndecomp.decompositions.spd.importance import LayerwiseImportance
from nndecomp.decompositions.spd.masks import Mask
from nndecomp.targets.base import Target
from nndecomp.targets.hooks import Substitute, substituting
from nndecomp.targets.maps import LinearMap, MapKind
from nndecomp.types import Layout, Site


@dataclass(frozen=True)
class ActiveComponents:
    """By map: which components were active on each token."""

    masks: tuple[Bool[Tensor, "token _"], ...]

    def counts(self) -> Int[Tensor, "token group"]:
        return torch.stack([each.sum(1) for each in self.masks], 1)

    def firings(self) -> tuple[Int[Tensor, " component"], ...]:
        return tuple(each.sum(0) for each in self.masks)


class GatedParameters(Replacement):
    """`writes`: only maps that take part in these sites are gated, the others stay as they are; null: all maps."""

    def __init__(
        self, decomposition: ParameterDecomposition, target: Target, gate: Gate, writes: Sequence[Site] | None = None
    ) -> None:
        super().__init__()
        self._decomposition, self._target, self.gate = decomposition, target, gate
        places = {name: target.place_of_map(name) for name in decomposition.maps}
        self._all_sites = sorted({site for place in places.values() for site in place if site is not None})
        self.places = {n: place for n, place in places.items() if writes is None or place[1] in writes}
        assert self.places, f"no decomposed map takes part in {', '.join(map(str, writes or ()))}"
        self.reads = tuple(sorted({read for read, _ in self.places.values() if read is not None}))
        self.writes = tuple(sorted({write for _, write in self.places.values()}))
        width = target.shape.width
        self.read_layout = Layout.of({site: width(site) for site in self.reads})
        self.write_layout = Layout.of({site: width(site) for site in self.writes})
        weights = decomposition.importance.gate_weights(decomposition.sizes)  # pyright: ignore[reportCallIssue]
        self.costs = tuple(
            self._cost(each, C, gating)
            for (each, C), gating in zip(decomposition.sizes.items(), weights, strict=True)
            if each.name in self.places
        )
        self.eval()

    @property
    def decomposition(self) -> ParameterDecomposition:
        return self._decomposition

    def with_gate(self, gate: Gate) -> "GatedParameters":
        """The same components behind another gate."""
        return GatedParameters(self._decomposition, self._target, gate, self.writes)

    def _cost(self, linear: LinearMap, C: int, gate_weights: int) -> GroupCost:
        # Of an embedding only one row of V is read.
        reads = 1 if linear.kind is MapKind.embedding else linear.d_in
        layer = self.places[linear.name][1].layer
        return GroupCost(
            name=f"L{layer}.{linear.part}",
            n_components=C,
            parameters=reads + linear.d_out,
            n_writes=1,
            gate_parameters=gate_weights,
            linear_parameters=reads * linear.d_out if self.gate.delta else 0,
        )

    def live_obstacle(self) -> str | None:
        if not isinstance(self._decomposition.importance, LayerwiseImportance):
            return "its importances are made from the inputs of all maps, some of which come after what it writes"
        if not self.gate.of_one_map:
            return "components of all maps compete, and some maps come after what it writes"
        return None

    # --- the undisturbed run ---

    def gates(self, tokens: Int[Tensor, "batch pos"]) -> dict[str, tuple[Tensor, Tensor]]:
        """m [batch, pos, C] of each map, and which components count as active, from the undisturbed run."""
        return self._clean(tokens)[0]

    def _clean(self, tokens: Int[Tensor, "batch pos"]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[Site, Tensor]]:
        inputs: dict[str, Tensor] = {}
        with torch.no_grad(), self._decomposition.recording(inputs):
            values = self._target.record(tokens, self._all_sites)
            importances = self._decomposition.importances(inputs)
            return self.gate.open_all({name: importances[name] for name in self.places}), values

    def answers(self, batch: Sequences) -> tuple[dict[Site, Float[Tensor, "token width"]], ActiveComponents]:
        """What each written site's part of the model returns with masked maps, given the undisturbed run's inputs.

        One forward pass in which every read site is held at its undisturbed value.
        """
        gates, clean = self._clean(batch.tokens)
        held = {site: _hold(clean[site]) for site in self.reads}
        with self._target.patch(held), self._decomposition.installed(self._masks(batch, gates, self.writes)):
            answered = self._target.record(batch.tokens, self.writes)
        return {site: batch.rows(value) for site, value in answered.items()}, self._active(batch, gates)

    def _masks(
        self, batch: Sequences, gates: Mapping[str, tuple[Tensor, Tensor]], sites: Sequence[Site]
    ) -> dict[str, Mask]:
        """Of the maps that take part in `sites`, at kept positions."""
        kept = kept_positions(batch)
        mu = torch.ones_like(kept, dtype=torch.float32) if self.gate.delta else None
        return {name: Mask(m, mu, kept) for name, (m, _) in gates.items() if self.places[name][1] in sites}

    def _active(self, batch: Sequences, gates: Mapping[str, tuple[Tensor, Tensor]]) -> ActiveComponents:
        return ActiveComponents(tuple(gates[name][1].flatten(0, 1)[batch.kept] for name in self.places))

    # --- the patched run ---

    @contextmanager
    def inside(
        self, batch: Sequences, sites: Sequence[Site], gates: Mapping[str, tuple[Tensor, Tensor]] | None
    ) -> Iterator[Callable[[], ActiveComponents]]:
        """Within the block, masked maps stand in wherever they take part in `sites`; what is yielded says, afterwards, which
        components of these maps were active. gates: of the undisturbed run; null: made from what arrives.
        """
        if gates is not None:
            with self._decomposition.installed(self._masks(batch, gates, sites)):
                yield lambda: self._active(batch, gates)
            return
        obstacle = self.live_obstacle()
        require(obstacle is None, f"inputs=live is not possible: {obstacle}; use inputs=clean_gates")
        found: dict[str, tuple[Tensor, Tensor]] = {}
        kept, components = kept_positions(batch), self._decomposition.components
        mu = torch.ones_like(kept, dtype=torch.float32) if self.gate.delta else None

        def stand_in(name: str, bias: Tensor | None) -> Substitute:
            def substitute(x: Tensor, y: Tensor) -> Tensor:
                found[name] = self.gate.open(self._decomposition.importance_of(name, x))
                return masked(components[name], x, y, bias, found[name][0], mu, kept)

            return substitute

        maps = {n: self._decomposition.maps[n] for n, (_, write) in self.places.items() if write in sites}
        with substituting({each.tap: stand_in(name, each.bias()) for name, each in maps.items()}):
            yield lambda: self._active(batch, found)


def _hold(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def kept_positions(batch: Sequences) -> Bool[Tensor, "batch pos"]:
    flat = torch.zeros(batch.tokens.numel(), dtype=torch.bool, device=batch.tokens.device)
    return flat.index_fill(0, batch.kept, True).view(batch.tokens.shape)
