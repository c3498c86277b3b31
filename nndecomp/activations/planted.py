"""Rows of a planted target, with the rules that were at work on each token."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.activations.truth import Truth
from nndecomp.config.schema import Plan, require
from nndecomp.targets.planted import PlantedTarget
from nndecomp.types import Layout, Point, Site


@torch.no_grad()
def planted_truth(
    target: PlantedTarget, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site], chains: bool
) -> Truth:
    """What happens on these tokens. The features are the rules of the layers that have a site, or whole chains over all.

    A rule's direction is its key where it is read (mlp_in) and what it makes the layer write (mlp_out); a chain has those of
    all its rules. A rule's code is what its layer's neurons make of its key alone: relu((<k, x> - theta) / (1 - theta)) where the
    key is present.
    """
    rules = target.rules
    require(
        not chains or rules.plan is Plan.chain,
        "target.planted.plan=key_value has no chains over layers; write target.planted.plan=chain",
    )
    for site in sites:
        require(
            site.point in (Point.mlp_in, Point.mlp_out),
            f"{site} has no planted directions: the rules of target.kind=planted read mlp_in and write mlp_out",
        )
    layout = Layout.of({site: target.shape.width(site) for site in sites})
    recorded = target.record(tokens, layout.sites)
    flat = tokens.flatten().cpu()
    n = rules.n_rules
    layers = sorted({site.layer for site in layout.sites})
    codes = torch.stack([_codes(target, layer, flat) for layer in layers], 1)  # [token, layer, rule]
    zero = torch.zeros(n, layout.widths[0])
    directions = {}
    for site in layout.sites:
        own = rules.keys[site.layer] if site.point is Point.mlp_in else written(target, site.layer)
        # Of rules: their own layer's rows alone. Of chains: one row that goes through all layers.
        directions[site] = own if chains else torch.cat([own if layer == site.layer else zero for layer in layers])
    return Truth(
        layout=layout,
        rows=torch.cat([recorded[site].flatten(0, 1).float().cpu() for site in layout.sites], 1),
        codes=codes[:, 0] if chains else codes.flatten(1),
        directions=directions,
        bias={site: torch.zeros(layout.width_of(site)) for site in layout.sites},
        parents=torch.full((n if chains else len(layers) * n,), -1),
        classes={} if chains else {f"L{layer}": i * n + torch.arange(n) for i, layer in enumerate(layers)},
    )


def _codes(target: PlantedTarget, layer: int, tokens: Int[Tensor, "token"]) -> Float[Tensor, "token rule"]:
    rules = target.rules
    site = Site(layer, Point.mlp_in)
    x = target.record(tokens[None], [site])[site][0].float().cpu()
    pre = (x @ rules.keys[layer].T - target.threshold) / (1 - target.threshold)
    return pre.clamp(min=1e-6) * rules.fires(layer)[tokens]


def written(target: PlantedTarget, layer: int) -> Float[Tensor, "rule d_model"]:
    """What each rule makes its layer write when its key alone is present: a function of the weights.

    The value itself where the rule has neurons of its own; with shared neurons also shares of other rules' values.
    """
    keys = target.rules.keys[layer].to(target.device)
    return target.mlp_of(Site(layer, Point.mlp_in), keys).float().cpu()
