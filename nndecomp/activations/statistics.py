"""Mean, variance and scale of each site, streamed in float64 over the rows that count."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.buffer import RowSource
from nndecomp.config.schema import Normalisation
from nndecomp.types import Layout, Site

# Numbers cast to float64 at a time: on a CPU they stay in the cache, on a GPU they are few launches.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**26


class RunningStatistics:
    """Count, mean and M2 = sum of (x - mean)^2 per column, in float64 whatever the rows are stored in.

    Merging two sets of rows (Chan, Golub & LeVeque 1979, equation 2.1), with delta = mean_b - mean_a:

        mean = mean_a + delta n_b / n
        M2   = M2_a + M2_b + delta^2 n_a n_b / n
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.m2 = torch.zeros(width, dtype=torch.float64)

    def update(self, rows: Float[Tensor, "token width"]) -> None:
        # MPS has no float64.
        rows = rows.cpu() if rows.device.type == "mps" else rows
        at_a_time = (CPU_CHUNK if rows.device.type == "cpu" else GPU_CHUNK) // rows.shape[1]
        for chunk in rows.split(max(1, at_a_time)):
            exact = chunk.to(torch.float64, copy=True)
            mean = exact.mean(0)
            self.merge(len(chunk), mean, exact.sub_(mean).square_().sum(0))

    def merge(self, count: int, mean: Float[Tensor, "width"], m2: Float[Tensor, "width"]) -> None:
        """Take in the statistics of `count` further rows."""
        if count == 0:
            return
        # The sums stay on the device of the rows: no transfer, and no wait, for each chunk.
        self.mean, self.m2 = self.mean.to(mean.device), self.m2.to(mean.device)
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total

    @property
    def variance(self) -> Float[Tensor, "width"]:
        """Around the mean, divided by the count (population variance)."""
        assert self.count > 0, "no rows were counted"
        return self.m2 / self.count

    @property
    def mean_square(self) -> Float[Tensor, "width"]:
        return self.variance + self.mean.square()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["mean"].shape == self.mean.shape, f"{state['mean'].shape} columns saved, not {self.mean.shape}"
        self.count, self.mean, self.m2 = state["count"], state["mean"].clone(), state["m2"].clone()


def measure(source: RowSource, n_rows: int) -> RunningStatistics:
    """Statistics of the next rows of a source, at least `n_rows` of them (whole forward passes)."""
    statistics = RunningStatistics(source.layout.width)
    while statistics.count < n_rows:
        statistics.update(source.next_rows())
    return statistics


@dataclass(frozen=True)
class Affine:
    """x~ = (x - mean) / scale, of the columns of one site."""

    mean: Float[Tensor, "width"]
    scale: Float[Tensor, "width"]


# One number: x~ = x / scale.
SiteScale = float | Affine


def affine(scale: SiteScale, width: int) -> Affine:
    match scale:
        case Affine():
            assert scale.mean.shape == scale.scale.shape == (width,), f"scales {scale.scale.shape} of {width} columns"
            return scale
        case _:
            return Affine(torch.zeros(width), torch.full((width,), scale))


def normalisation(statistics: RunningStatistics, layout: Layout, kind: Normalisation) -> dict[Site, SiteScale]:
    """What makes rows of these statistics into the rows that a decomposition is trained on; see `Normalisation`."""
    match kind:
        case Normalisation.none:
            return dict.fromkeys(layout.sites, 1.0)
        case Normalisation.dataset:
            return {**site_scales(statistics, layout)}
        case Normalisation.shared:
            scale = statistics.mean_square.mean().sqrt().item()
            assert scale > 0, f"the activations at {', '.join(map(str, layout.sites))} are all zero"
            return dict.fromkeys(layout.sites, scale)
        case Normalisation.centred:
            one = {site: statistics.variance[span].mean().sqrt() for site, span in layout.spans.items()}
            assert all(scale > 0 for scale in one.values()), f"activations that never change: {one}"
            std = torch.cat([one[site].repeat(width) for site, width in zip(layout.sites, layout.widths, strict=True)])
        case Normalisation.coordinate:
            std = statistics.variance.sqrt()
            # A coordinate that never changes is 0 once its mean is taken away, whatever it is divided by.
            std = torch.where(std > 0, std, 1.0)
    mean, std = statistics.mean.float().cpu(), std.float().cpu()
    return {site: Affine(mean[span], std[span]) for site, span in layout.spans.items()}


def site_scales(statistics: RunningStatistics, layout: Layout) -> dict[Site, float]:
    """s for each site such that E|x|^2 = s^2 width: rows divided by s have mean square 1."""
    scales = {site: statistics.mean_square[span].mean().sqrt().item() for site, span in layout.spans.items()}
    for site, scale in scales.items():
        assert scale > 0, f"the activations at {site} are all zero"
    return scales


def site_means(statistics: RunningStatistics, layout: Layout) -> dict[Site, Float[Tensor, "width"]]:
    """The mean activation of each site, in fp32: what mean ablation puts there."""
    return {site: statistics.mean[span].float() for site, span in layout.spans.items()}
