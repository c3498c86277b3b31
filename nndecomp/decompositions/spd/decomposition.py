"""Components of several linear maps of one model, and the importances that say which of them matter.

The model itself is not part of it: its maps are known by their modules, which substitution reaches.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.checks import require
from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.decompositions.spd.components import Components, TransposedComponents, masked
from nndecomp.decompositions.spd.importance import GlobalImportance, Input, LayerwiseImportance
from nndecomp.decompositions.spd.masks import Mask, Masking
from nndecomp.decompositions.spd.sigmoids import lower_leaky, upper_leaky
from nndecomp.targets.hooks import Substitute, Tap, substituting
from nndecomp.targets.maps import LinearMap, MapKind


@dataclass(frozen=True)
class Importances:
    """Of one map, from its logits q."""

    q: Float[Tensor, "*rows C"]
    a: Float[Tensor, "*rows C"] | None = None  # what the components read, where that is what they are made from

    @cached_property
    def g(self) -> Float[Tensor, "*rows C"]:
        """Lower-leaky, in [0, 1]: what masks are made of, and what is reported."""
        return lower_leaky(self.q)

    @cached_property
    def h(self) -> Float[Tensor, "*rows C"]:
        """Upper-leaky: what the minimality loss sees, and nothing else."""
        return upper_leaky(self.q)


class ParameterDecomposition(nn.Module):
    """`maps`: each decomposed map and its number of components. `tie`: maps whose components are those of another, transposed."""

    def __init__(
        self,
        maps: Mapping[LinearMap, int],
        importance: ImportanceConfig,
        seed: int,
        tie: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        assert maps, "there is no map to decompose"
        embeddings = [each.name for each in maps if each.kind is MapKind.embedding]
        require(
            not embeddings or importance.kind is ImportanceKind.mlp,
            f"spd.importance.kind={importance.kind.value} sees the inputs of maps, but spd.maps has {', '.join(embeddings)}, whose "
            "input is a token; write spd.importance.kind=mlp",
        )
        trained = [each.name for each in maps if each.weight.requires_grad]
        assert not trained, f"{', '.join(trained)} would be trained: freeze the model that is decomposed"
        draw = torch.Generator().manual_seed(seed)
        self.sizes, self.cfg = dict(maps), importance
        self.maps = {each.name: each for each in maps}
        self.tie = dict(tie or {})
        check_tied(maps, self.tie)
        drawn = {each.name: Components(each, C, draw) for each, C in maps.items() if each.name not in self.tie}
        self.banks = nn.ModuleList(
            TransposedComponents(each, drawn[self.tie[name]]) if name in self.tie else drawn[name]
            for name, each in self.maps.items()
        )
        build = GlobalImportance if importance.is_global else LayerwiseImportance
        self.importance = build(maps, importance, draw)
        self._biases = {each.name: each.bias() for each in maps}

    @property
    def components(self) -> dict[str, Components]:
        """By map."""
        return {name: bank for name, bank in zip(self.maps, self.banks, strict=True) if isinstance(bank, Components)}

    def importances(self, inputs: Mapping[str, Input]) -> dict[str, Importances]:
        """From the inputs of all maps, by map, in the undisturbed run."""
        if isinstance(self.importance, GlobalImportance):
            q = self.importance(inputs)
            return {name: Importances(q[name]) for name in self.maps}
        return {name: self.importance_of(name, inputs[name]) for name in self.maps}

    def importance_of(self, name: str, x: Input) -> Importances:
        """Of one map from its own input."""
        assert isinstance(self.importance, LayerwiseImportance), "importances of all maps are made together"
        return Importances(*self.importance.of(name, x, self.components[name]))

    def leftover(self) -> dict[str, Float[Tensor, "d_in d_out"]]:
        """D = M - V U of each map."""
        return {name: self.maps[name].matrix() - own.product() for name, own in self.components.items()}

    @contextmanager
    def recording(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Within the block, one run of the model keeps what the maps take in in `inputs`, and what they return in `outputs`."""
        with substituting({each.tap: partial(_keep, name, inputs, outputs) for name, each in self.maps.items()}):
            yield
        require(
            inputs.keys() == self.maps.keys(),
            f"spd.maps names {', '.join(sorted(self.maps.keys() - inputs.keys()))}, which the model does not run before its LM head",
        )

    @contextmanager
    def installed(
        self,
        masking: Masking,
        outputs: dict[str, Tensor] | None = None,
        reads: Mapping[str, Float[Tensor, "*rows C"]] | None = None,
    ) -> Iterator[None]:
        """Within the block, masked components stand in for the maps that `masking` names; what they return is kept in `outputs`.

        reads: what components of some maps read, where it is known beforehand.
        """
        own, known = self.components, reads or {}
        substitutes: dict[Tap, Substitute] = {
            self.maps[name].tap: partial(_stand_in, name, own[name], self._biases[name], mask, known.get(name), outputs)
            for name, mask in masking.items()
        }
        with substituting(substitutes):
            yield


def check_tied(maps: Mapping[LinearMap, int], tie: Mapping[str, str]) -> None:
    """SettingError unless each tied map has the transposed matrix of the other, and as many components."""
    named = {each.name: each for each in maps}
    for name, other in tie.items():
        missing = [each for each in (name, other) if each not in named]
        require(
            not missing, f"spd.tie={{{name}: {other}}} names {', '.join(missing)}, but spd.maps has {', '.join(named)}"
        )
        own, theirs = named[name], named[other]
        require(
            (own.d_in, own.d_out) == (theirs.d_out, theirs.d_in),
            f"spd.tie={{{name}: {other}}} wants a map with the other's transposed matrix, but {name} is {own.d_in} to {own.d_out} "
            f"and {other} {theirs.d_in} to {theirs.d_out}",
        )
        require(
            torch.equal(own.matrix(), theirs.matrix().T),
            f"spd.tie={{{name}: {other}}} wants a map with the other's transposed matrix, but the model has other numbers in "
            f"{name} than in {other}",
        )
        require(
            maps[own] == maps[theirs],
            f"spd.tie={{{name}: {other}}} shares components, but spd.maps has {maps[own]} for {name} and {maps[theirs]} for {other}",
        )


def _keep(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor] | None, x: Tensor, y: Tensor) -> None:
    assert name not in inputs, f"{name} runs more than once in a run of the model: which is its input?"
    inputs[name] = x
    if outputs is not None:
        outputs[name] = y


def _stand_in(
    name: str,
    own: Components,
    bias: Tensor | None,
    mask: Mask,
    a: Tensor | None,
    outputs: dict[str, Tensor] | None,
    x: Tensor,
    y: Tensor,
) -> Tensor:
    z = masked(own, x, y, bias, mask.m, mask.mu, mask.route, a)
    if outputs is not None:
        outputs[name] = z
    return z
