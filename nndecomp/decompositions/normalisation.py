"""Code normalisation: the weight c by which a feature's codes are multiplied where features are compared.

Decoder rows of a dictionary with free norms can trade size for codes, f d = (f / a)(a d); f c is the same whichever way
it was split. Codes themselves stay f. See `CodeNormalisation` for the names.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import CodeNormalisation


def decoder_scale(
    W_dec: Float[Tensor, "feature d_write"],
    widths: Sequence[int],
    kind: CodeNormalisation,
    mixed_weights: tuple[float, float],
) -> Float[Tensor, "feature"]:
    """c of each feature of a group that writes sites of these widths side by side."""
    norms = torch.stack([part.norm(dim=1) for part in W_dec.split(list(widths), 1)], 1)
    return combined_norms(norms, kind, mixed_weights)


def combined_norms(
    norms: Float[Tensor, "feature site"], kind: CodeNormalisation, mixed_weights: tuple[float, float]
) -> Float[Tensor, "feature"]:
    """c from n_s, the norms at the sites that are written."""
    match kind:
        case CodeNormalisation.none:
            return norms.new_ones(len(norms))
        # Decoupled groups write one site each, where all three are the same.
        case CodeNormalisation.sae | CodeNormalisation.decoupled:
            return norms.norm(dim=1)
        case CodeNormalisation.crosscoder:
            return norms.sum(1)
        case CodeNormalisation.mixed:
            of_sae, of_crosscoder = mixed_weights
            return of_sae * norms.norm(dim=1) + of_crosscoder * norms.sum(1)
