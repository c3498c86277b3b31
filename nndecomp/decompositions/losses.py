"""How badly a reconstruction fits: pure functions of what is written. Every one is a mean over tokens."""

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import Reconstruction
from nndecomp.types import Layout


def reconstruction(
    residual: Float[Tensor, "token d_writes"],
    y: Float[Tensor, "token d_writes"],
    kind: Reconstruction,
    layout: Layout,
) -> Float[Tensor, ""]:
    """Of residual = y - y_hat. The four kinds differ in scale and are never mixed; see `Reconstruction`."""
    match kind:
        case Reconstruction.sum_of_squares:
            return residual.square().sum(-1).mean()
        case Reconstruction.mean_of_squares:
            return residual.square().mean()
        case Reconstruction.norm:
            return torch.stack([residual[:, span].norm(dim=1).mean() for span in layout.spans.values()]).mean()
        case Reconstruction.normalised:
            return fvu(residual, y, layout)


def fvu(
    residual: Float[Tensor, "token d_writes"], y: Float[Tensor, "token d_writes"], layout: Layout
) -> Float[Tensor, ""]:
    """Mean over written sites of sum |y - y_hat|^2 / sum |y - mean y|^2, the mean taken per coordinate over the batch."""
    columns = residual.square().sum(0)
    spread = (y - y.mean(0)).square().sum(0)
    return torch.stack([columns[span].sum() / spread[span].sum() for span in layout.spans.values()]).mean()
