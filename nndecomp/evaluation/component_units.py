"""Components of weight matrices as units: component c of a map reads along V_c, writes along U_c, and is worth g_c (x V_c).

g are the importances of the undisturbed run; a component is active where g > 0. What a map takes in or returns may be a site
of the model, and then lives in that site's space, as features do that read or write there; else it has a space of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from nndecomp.config.checks import require
from nndecomp.decompositions.codes import DenseCodes
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.evaluation.units import Activity, Units, nothing
from nndecomp.targets.base import Target
from nndecomp.targets.maps import MapKind
from nndecomp.tokens.batch import TokenBatch
from nndecomp.types import Point, Site

# What linear maps of a layer read or write.
POINTS = (Point.attn_in, Point.z, Point.attn_out, Point.mlp_in, Point.mlp_hidden, Point.mlp_out)


@torch.no_grad()
def component_units(
    target: Target,
    decomposition: ParameterDecomposition,
    text: TokenBatch,
    keep: Bool[Tensor, "batch pos"],
    batch_seqs: int,
) -> list[Units]:
    """One group a map, in the order of the maps; `part` is the map's name within its layer."""
    described: dict[str, Units] = {}
    codes: dict[str, list[DenseCodes]] = {name: [] for name in decomposition.maps}
    for part, kept in zip(text.split(batch_seqs), keep.split(batch_seqs), strict=True):
        tokens = part.tokens.to(target.device)
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        with decomposition.recording(inputs, outputs):
            target.final(tokens)
        described = described or _described(target, decomposition, tokens, inputs, outputs)
        importances = decomposition.importances(inputs)
        for name, own in decomposition.components.items():
            value = importances[name].g * own.read(inputs[name])
            codes[name].append(DenseCodes(value[kept.to(value.device)].float()))
    return [replace(each, activity=Activity.of_batches(codes[name])) for name, each in described.items()]


def _described(
    target: Target,
    decomposition: ParameterDecomposition,
    tokens: Tensor,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
) -> dict[str, Units]:
    """Maps before anything was active. A site is where a map reads or writes if it has the very same values."""
    found = {}
    for name, linear in decomposition.maps.items():
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
        require(
            len(numbers) == 1 and linear.kind is not MapKind.embedding,
            f"spd.maps has {name}, which belongs to no one layer, so its components cannot be matched with the units of one; "
            "leave it out",
        )
        layer = int(numbers[0])
        sites = [Site(layer, point) for point in POINTS if point in target.shape.of(None).points]
        there = target.record(tokens, sites)
        own = decomposition.components[name]
        reads = {_space(inputs[name], there, f"{name}:in"): own.V.T.float().cpu()}
        writes = {_space(outputs[name], there, f"{name}:out"): own.U.float().cpu()}
        part = linear.part
        found[name] = Units(f"L{layer}.{part}", part, layer, reads, writes, False, nothing(own.n_components))
    return found


def _space(value: Tensor, sites: Mapping[Site, Tensor], own: str) -> str:
    return next((str(site) for site, there in sites.items() if torch.equal(value, there)), own)
