"""Baselines that any dictionary has to beat: a site's own directions, of which each token keeps the largest coefficients.

    c = D (y - m),   y_hat = m + sum over the k largest |c_i| of c_i d_i      D [d, d] has orthonormal rows d_i, m is the mean

    principal_directions   the eigenvectors of the covariance of y, the one with the largest eigenvalue first
    random_directions      uniformly random

Both are dictionaries that write what they read, as SAEs are: encoder D, biases -D m and m, decoder D, activation abs_topk.
With k = d they are the model. Mean and covariance are of rows of training text.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import Activation, Architecture, DecompositionConfig
from nndecomp.decompositions.geometry import principal_directions
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.spec import ActivationSpec, DictionarySpec
from nndecomp.decompositions.wiring import wire
from nndecomp.targets.base import Shape


@torch.no_grad()
def build_directions(
    cfg: DecompositionConfig, shape: Shape, rows: Float[Tensor, "token d_writes"], seed: int, target: str
) -> SparseDictionary:
    """Of each site, by `rows` of all of them in the order of its layout. `target` is the name of the model.

    Raises SettingError as `wire` does.
    """
    wiring = wire(cfg, shape)
    made = SparseDictionary(
        DictionarySpec(
            architecture=cfg.architecture.value,
            target=target,
            widths=wiring.widths,
            groups=wiring.groups,
            activation=ActivationSpec(Activation.abs_topk, k=wiring.k),
        )
    ).to(rows.device)
    draw = torch.Generator().manual_seed(seed)
    assert rows.shape[1] == made.write_layout.width, (
        f"{rows.shape[1]} columns, but {made.write_layout.width} are written"
    )
    made.b_dec.copy_(rows.double().mean(0))
    for bank in made.banks:
        D = _directions(cfg.architecture, rows[:, bank.writes], draw)
        bank.W_enc.copy_(D)
        bank.W_dec.copy_(D)
        bank.b_enc.copy_(-(D.double() @ made.b_dec[bank.writes].double()))
    return made.eval()


def _directions(kind: Architecture, y: Float[Tensor, "token d"], draw: torch.Generator) -> Float[Tensor, "direction d"]:
    d = y.shape[1]
    match kind:
        case Architecture.principal_directions:
            return principal_directions(y, d).T.flip(0)
        case Architecture.random_directions:
            # Columns of Q are uniformly random once the signs of R's diagonal, which are a convention, are taken out.
            Q, R = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))
            return (Q * R.diagonal().sign()).T.to(y)
        case other:
            raise AssertionError(f"{other.value} are no directions")
