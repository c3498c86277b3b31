"""Between rows as the target makes them and rows as a dictionary trains on them:  x~ = (x - m) / s."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.activations.sequences import RowsOrSequences, beside
from nndecomp.activations.statistics import SiteScale, affine
from nndecomp.types import Layout, Site


class Columns(nn.Module):
    """The columns of some sites among those of a row, in their normalised units. m and s are saved with what is trained."""

    def __init__(self, rows: Layout, own: Layout, scales: Mapping[Site, SiteScale]) -> None:
        super().__init__()
        missing = [str(site) for site in own.sites if site not in rows.spans]
        assert not missing, f"rows hold {', '.join(map(str, rows.sites))}, but not {', '.join(missing)}"
        self.layout = own
        self.span = rows.span(own.sites)
        self.spans = [rows.spans[site] for site in own.sites]
        parts = [affine(scales[site], width) for site, width in zip(own.sites, own.widths, strict=True)]
        self.m: Tensor
        self.s: Tensor
        self.register_buffer("m", torch.cat([part.mean for part in parts]))
        self.register_buffer("s", torch.cat([part.scale for part in parts]))

    def forward(self, rows: RowsOrSequences) -> RowsOrSequences:
        """What a dictionary sees of rows, or of sequences."""
        own = rows[:, self.span] if self.span is not None else beside([rows[:, span] for span in self.spans])
        return (own - self.m) / self.s

    def normalised(self, site: Site, raw: RowsOrSequences) -> RowsOrSequences:
        """Of one site."""
        span = self.layout.spans[site]
        return (raw - self.m[span]) / self.s[span]

    def raw(self, site: Site, normalised: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        """Back to the target's units, of one site."""
        span = self.layout.spans[site]
        return normalised * self.s[span] + self.m[span]
