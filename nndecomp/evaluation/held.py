"""Replacements of MLPs whose active sets are held constant, so that they can be differentiated.

Of each layer two maps are compared, both [d_model] -> [d_model] at one token:

    the target     mlp_out as a function of mlp_in, by the model's own modules
    a replacement  what it puts at mlp_out, as a function of the same mlp_in; all that it reads elsewhere is constant

A dictionary that reads mlp_out has no map from mlp_in of its own: it stands behind the target's MLP, and is differentiated through it.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.checks import require
from nndecomp.decompositions.base import Replacement
from nndecomp.decompositions.codes import Codes
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.held import Masks, hold, masks_of
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.decompositions.replacing import Sequences, live
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.spd.gates import GateKind
from nndecomp.decompositions.spd.masks import Mask
from nndecomp.errors import SettingError
from nndecomp.targets.base import Replace, Target
from nndecomp.types import Point, Site

READABLE = (Point.mlp_in, Point.mlp_hidden, Point.mlp_out)
WRITTEN = (Point.mlp_out,)
Rows = Mapping[Site, Float[Tensor, "token width"]]


class HeldReplacement(ABC):
    """`layers`: whose MLPs it replaces. `reads`: what of the undisturbed run it wants to see."""

    layers: tuple[int, ...]
    reads: tuple[Site, ...]
    inputs: str  # what active sets are chosen from where all layers are replaced: live, or clean_gates

    @abstractmethod
    def own_masks(self, batch: Sequences, rows: Rows) -> Masks:
        """The active sets that it chooses itself in the undisturbed run, whose activations at kept positions are `rows`."""

    @abstractmethod
    def own_masks_replaced(self, batch: Sequences) -> Masks:
        """The active sets that it chooses itself where it replaces all its layers."""

    def stochastic_masks(self, batch: Sequences, draw: torch.Generator) -> Masks | None:
        """Those that training draws around the importances, at kept positions; None where training draws none."""
        return None

    @abstractmethod
    def mlp_out(
        self, layer: int, mlp_in: Float[Tensor, "token d_model"], rows: Rows, masks: Masks
    ) -> Float[Tensor, "token d_model"]:
        """Its mlp_out of a layer as a function of the same layer's mlp_in, with everything else in `rows` constant."""

    @abstractmethod
    def installed(self, batch: Sequences, masks: Masks) -> AbstractContextManager[None]:
        """Within the block the target runs with all its layers replaced, from what arrives in that run."""


class HeldDictionary(HeldReplacement):
    inputs = "live"

    def __init__(self, name: str, target: Target, dictionary: SparseDictionary) -> None:
        self.target, self.dictionary = target, dictionary
        self.held, self.activation = hold(dictionary)
        self.layers = _layers(name, dictionary)
        self.reads = dictionary.reads

    def own_masks(self, batch: Sequences, rows: Rows) -> Masks:
        return masks_of(self.dictionary.encode(torch.cat([rows[s] for s in self.dictionary.read_layout.sites], 1)))

    def own_masks_replaced(self, batch: Sequences) -> Masks:
        return masks_of(_live_codes(self.target, self.dictionary, batch))

    def mlp_out(
        self, layer: int, mlp_in: Float[Tensor, "token d_model"], rows: Rows, masks: Masks
    ) -> Float[Tensor, "token d_model"]:
        own, out = Site(layer, Point.mlp_in), Site(layer, Point.mlp_out)
        self.activation.masks = masks
        run = self.held.live_run()
        for site in self.reads:
            if site == own:
                run.read(site, mlp_in)
            elif site == out:
                run.read(site, self.target.mlp_of(own, mlp_in).float())
            elif site < out:
                run.read(site, rows[site])
        return run.write(out)

    def installed(self, batch: Sequences, masks: Masks) -> AbstractContextManager[None]:
        self.activation.masks = masks
        return self.target.patch(live(batch, [self.held], self.held.writes)[0])


class HeldNeurons(HeldReplacement):
    """The model's own modules, with mlp_hidden multiplied by the mask."""

    inputs = "live"

    def __init__(self, name: str, target: Target, baseline: NeuronBaseline) -> None:
        self.target, self.baseline = target, baseline
        self.layers = _layers(name, baseline)
        self.reads = baseline.reads

    def own_masks(self, batch: Sequences, rows: Rows) -> Masks:
        hidden = torch.cat([rows[site] for site in self.baseline.read_layout.sites], 1)
        return masks_of(self.baseline(hidden)[1])

    def own_masks_replaced(self, batch: Sequences) -> Masks:
        return masks_of(_live_codes(self.target, self.baseline, batch))

    def mlp_out(
        self, layer: int, mlp_in: Float[Tensor, "token d_model"], rows: Rows, masks: Masks
    ) -> Float[Tensor, "token d_model"]:
        site = Site(layer, Point.mlp_hidden)
        mask = masks[self.baseline.reads.index(site)]
        with self.target.patch({site: lambda hidden: hidden * mask.view_as(hidden)}):
            return self.target.mlp_of(Site(layer, Point.mlp_in), mlp_in).float()

    def installed(self, batch: Sequences, masks: Masks) -> AbstractContextManager[None]:
        def silence(mask: Tensor) -> Replace:
            return lambda hidden: batch.put(hidden, batch.rows(hidden) * mask)

        return self.target.patch({site: silence(mask) for site, mask in zip(self.reads, masks, strict=True)})


class HeldComponents(HeldReplacement):
    """The target's own MLPs with masked maps in the place of theirs. Masks are of every map, and of the undisturbed run
    everywhere, as in training. What components leave of the weights is there, whole, if the gate has it."""

    inputs = "clean_gates"

    def __init__(self, name: str, target: Target, gated: GatedParameters) -> None:
        check_mlps(name, gated.reads, gated.writes)
        self.target, self.gated = target, gated
        self.layers = tuple(site.layer for site in gated.writes)
        self.reads = gated.reads

    def own_masks(self, batch: Sequences, rows: Rows) -> Masks:
        gates = self.gated.gates(batch.tokens)
        return [gates[name][0].flatten(0, 1)[batch.kept] for name in self.gated.places]

    def own_masks_replaced(self, batch: Sequences) -> Masks:
        return self.own_masks(batch, {})

    def stochastic_masks(self, batch: Sequences, draw: torch.Generator) -> Masks | None:
        """m = g + (1 - g) rho, rho ~ U(0, 1); behind the gate whose masks are the importances g."""
        if self.gated.gate.kind is not GateKind.importance:
            return None
        rows = self.own_masks(batch, {})
        return [each + (1 - each) * torch.rand(each.shape, generator=draw).to(each.device) for each in rows]

    def mlp_out(
        self, layer: int, mlp_in: Float[Tensor, "token d_model"], rows: Rows, masks: Masks
    ) -> Float[Tensor, "token d_model"]:
        out = Site(layer, Point.mlp_out)
        own = {
            name: m[None] for name, m in zip(self.gated.places, masks, strict=True) if self.gated.places[name][1] == out
        }
        with self.gated.decomposition.installed({name: Mask(m, self._leftover(m), None) for name, m in own.items()}):
            return self.target.mlp_of(Site(layer, Point.mlp_in), mlp_in).float()

    def installed(self, batch: Sequences, masks: Masks) -> AbstractContextManager[None]:
        n = batch.tokens.numel()
        kept = torch.zeros(n, dtype=torch.bool, device=batch.tokens.device).index_fill(0, batch.kept, True)
        masking = {}
        for name, rows in zip(self.gated.places, masks, strict=True):
            m = rows.new_zeros(n, rows.shape[1]).index_copy(0, batch.kept, rows).unflatten(0, batch.tokens.shape)
            masking[name] = Mask(m, self._leftover(m), kept.view(batch.tokens.shape))
        return self.gated.decomposition.installed(masking)

    def _leftover(self, m: Float[Tensor, "batch pos C"]) -> Float[Tensor, "batch pos"] | None:
        return torch.ones_like(m[..., 0]) if self.gated.gate.delta else None


def held(name: str, target: Target, replacement: Replacement) -> HeldReplacement:
    """Raises SettingError for what does not replace MLPs, or cannot be held."""
    match replacement:
        case SparseDictionary():
            return HeldDictionary(name, target, replacement)
        case NeuronBaseline():
            return HeldNeurons(name, target, replacement)
        case GatedParameters():
            return HeldComponents(name, target, replacement)
        case other:
            raise SettingError(
                f"{name} is a {type(other).__name__}, whose active set cannot be held while it is differentiated; "
                "compare dictionaries, neurons and parameter decompositions"
            )


def check_mlps(name: str, reads: Collection[Site], writes: Collection[Site]) -> None:
    """SettingError unless it replaces MLPs by what it makes of what they read, are made of, or write."""
    elsewhere = sorted(
        {site for site in reads if site.point not in READABLE} | {s for s in writes if s.point not in WRITTEN}
    )
    models = sorted({site.model for site in (*reads, *writes) if site.model is not None})
    require(
        not elsewhere and not models,
        f"{name} reads or writes {', '.join(map(str, elsewhere)) or 'two models'}, so it does not replace the MLPs of one "
        "model; Jacobians are of what reads mlp_in, mlp_hidden or mlp_out, and writes mlp_out",
    )


def _layers(name: str, replacement: SparseDictionary | NeuronBaseline) -> tuple[int, ...]:
    """The layers whose MLPs are replaced."""
    check_mlps(name, replacement.reads, replacement.writes)
    obstacle = replacement.live_obstacle()
    require(obstacle is None, f"{name} cannot take the place of all its MLPs at once, since {obstacle}")
    return tuple(site.layer for site in replacement.writes)


def _live_codes(target: Target, replacement: SparseDictionary | NeuronBaseline, batch: Sequences) -> Codes:
    replacements, (run,) = live(batch, [replacement], replacement.writes)
    with target.patch(replacements):
        target.logits(batch.tokens)
    codes = run.active()
    assert isinstance(codes, Codes), f"{type(codes).__name__} says nothing of single units"
    return codes
