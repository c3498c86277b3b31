"""Names for the axes and places every other file talks about.

Axis legend, the same word in every annotation and einsum:

    batch     sequences in a batch of tokens
    pos       position in a sequence
    token     rows: (batch, pos) flattened, masked positions dropped
    width     one row of activations: several sites side by side (see `Layout`)
    d_read    what one group of features reads          d_write   what it writes
    d_reads   everything a decomposition reads          d_writes  everything it writes
    feature   features of one group
    slot      one active (token, feature) pair of sparse codes
    vocab     the target's vocabulary
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, total_ordering

from nndecomp.errors import SettingError


class Point(Enum):
    """Where in a layer, in the order in which a sequential block computes them."""

    embed = "embed"  # token embedding, before position information and before block 0
    resid_pre = "resid_pre"  # the residual stream entering the block
    attn_in = "attn_in"  # what attention's first linear maps read: after the norm, affine part included
    z = "z"  # attention output per head, side by side, before the output projection
    attn_out = "attn_out"  # what attention adds to the residual stream (after a post-norm, if any)
    resid_mid = "resid_mid"  # between attention and MLP; parallel blocks have none
    mlp_in = "mlp_in"  # what the MLP's first linear map reads: after the norm, affine part included
    mlp_hidden = "mlp_hidden"  # neurons: what the MLP's last linear map reads
    mlp_out = "mlp_out"  # what the MLP adds to the residual stream (after a post-norm, if any)
    resid_post = "resid_post"  # the residual stream leaving the block

    @cached_property
    def rank(self) -> int:
        return list(Point).index(self)


# TransformerLens names, HookedTransformer's and TransformerBridge's, of the same places.
_HOOK_POINTS = {
    "hook_resid_pre": Point.resid_pre,
    "hook_in": Point.resid_pre,
    "attn.hook_in": Point.attn_in,
    "attn.hook_z": Point.z,
    "attn.o.hook_in": Point.z,
    "hook_attn_out": Point.attn_out,
    "attn.hook_out": Point.attn_out,
    "hook_resid_mid": Point.resid_mid,
    "mlp.hook_in": Point.mlp_in,
    "mlp.hook_post": Point.mlp_hidden,
    "mlp.out.hook_in": Point.mlp_hidden,
    "hook_mlp_out": Point.mlp_out,
    "mlp.hook_out": Point.mlp_out,
    "hook_resid_post": Point.resid_post,
    "hook_out": Point.resid_post,
}
_SITE = re.compile(r"L(\d+)\.([a-z_]+)(?:\.h(\d+))?")
_MODEL = re.compile(r"([A-Z]):(.+)")
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")


@total_ordering
@dataclass(frozen=True)
class Site:
    """One place in a model: a point of a layer, or one head of `z`. `embed` belongs to layer 0.

    Of two models under study at once, `model` says which: "A" or "B".
    """

    layer: int
    point: Point
    head: int | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        assert self.layer >= 0, f"layer {self.layer} is negative"
        assert self.head is None or self.point is Point.z, f"only z has heads, not {self.point.value}"
        assert self.point is not Point.embed or self.layer == 0, f"embed has no layer {self.layer}"

    def __str__(self) -> str:
        model = "" if self.model is None else f"{self.model}:"
        if self.point is Point.embed:
            return f"{model}embed"
        head = "" if self.head is None else f".h{self.head}"
        return f"{model}L{self.layer}.{self.point.value}{head}"

    @property
    def within(self) -> "Site":
        """The same place, as the model itself knows it."""
        return replace(self, model=None)

    @property
    def order(self) -> tuple[str, int, int, int]:
        """Sorts sites in the order in which the models compute them, one after the other."""
        layer = -1 if self.point is Point.embed else self.layer
        return self.model or "", layer, self.point.rank, -1 if self.head is None else self.head

    def __lt__(self, other: "Site") -> bool:
        return self.order < other.order

    @staticmethod
    def parse(name: str) -> "Site":
        """`L3.mlp_out`, `L3.z.h5`, `embed`, or a TransformerLens name such as `blocks.3.hook_mlp_out`; `B:L3.mlp_out` in
        the second of two models."""
        if model := _MODEL.fullmatch(name):
            return replace(Site.parse(model[2]), model=model[1])
        if name in ("embed", "hook_embed", "embed.hook_out"):
            return Site(0, Point.embed)
        if hook := _HOOK.fullmatch(name):
            if hook[2] in _HOOK_POINTS:
                return Site(int(hook[1]), _HOOK_POINTS[hook[2]])
            raise SettingError(
                f"site {name!r} is a hook name that is not understood; "
                f"known after 'blocks.N.': {', '.join(_HOOK_POINTS)}"
            )
        if (site := _SITE.fullmatch(name)) and site[2] in Point.__members__:
            head = None if site[3] is None else int(site[3])
            if (head is None or site[2] == "z") and (site[2] != "embed" or int(site[1]) == 0):
                return Site(int(site[1]), Point[site[2]], head)
        raise SettingError(
            f"site {name!r} is not a site; write L<layer>.<point> with a point of "
            f"{', '.join(Point.__members__)}, L<layer>.z.h<head>, embed, or blocks.<layer>.<hook name>"
        )


@dataclass(frozen=True)
class Layout:
    """Which columns of a row of activations hold which site: sites side by side, `widths` in coordinates.

    Sites are ordered by model, then by point, then by layer, so that what a stack over adjacent layers reads (all its mlp_in) and
    what it writes (all its mlp_out) are both one contiguous span of the row: views, not copies.
    """

    sites: tuple[Site, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.sites) == len(self.widths), f"{len(self.sites)} sites, {len(self.widths)} widths"
        assert len(set(self.sites)) == len(self.sites), f"a site stands twice in {self.sites}"

    @staticmethod
    def of(widths: dict[Site, int]) -> "Layout":
        """The layout of a set of sites, in the order above."""
        sites = sorted(widths, key=lambda site: (site.model or "", site.point.rank, site.order))
        return Layout(tuple(sites), tuple(widths[site] for site in sites))

    @property
    def width(self) -> int:
        return sum(self.widths)

    @cached_property
    def spans(self) -> dict[Site, slice]:
        """Site -> its columns."""
        spans, start = {}, 0
        for site, width in zip(self.sites, self.widths, strict=True):
            spans[site] = slice(start, start + width)
            start += width
        return spans

    def width_of(self, site: Site) -> int:
        return self.widths[self.sites.index(site)]

    def span(self, sites: Sequence[Site]) -> slice | None:
        """The one contiguous span that holds `sites` in the given order, or None."""
        spans = [self.spans[site] for site in sites]
        adjacent = all(a.stop == b.start for a, b in zip(spans, spans[1:], strict=False))
        return slice(spans[0].start, spans[-1].stop) if adjacent else None
