"""Middles and directions of clouds of points, in float64."""

import torch
from jaxtyping import Float
from torch import Tensor

_STEPS, _TOLERANCE = 200, 1e-9


def unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Rows of norm 1; those of zero stay."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def geometric_median(points: Float[Tensor, "token d"]) -> Float[Tensor, "d"]:
    """argmin over g of the mean of |x_i - g|, by Weiszfeld's iteration from the mean.

    At a guess that is one of the points the plain iteration divides by zero. With T the weighted mean of the other points,
    r = |sum over the others of (x_i - g) / |x_i - g|| and n of them at g, the next guess is (Vardi & Zhang 2000, eq. 2.6)

        max(0, 1 - n / r) T + min(1, n / r) g
    """
    x = points.double()
    guess = x.mean(0)
    spread = (x - guess).norm(dim=1).mean()
    for _ in range(_STEPS):
        offset = x - guess
        distance = offset.norm(dim=1)
        apart = distance > 1e-12 * spread
        weight = torch.where(apart, 1 / distance.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        if not bool(apart.any()):
            break  # all points are one
        elsewhere = (weight[:, None] * x).sum(0) / weight.sum()
        pull = (weight[:, None] * offset).sum(0).norm()
        stays = ((~apart).sum() / pull.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)
        moved = (1 - stays) * elsewhere + stays * guess
        step, guess = (moved - guess).norm(), moved
        if step <= _TOLERANCE * spread:
            break
    return guess.to(points.dtype)


def principal_directions(points: Float[Tensor, "token d"], n: int) -> Float[Tensor, "d n"]:
    """The n orthonormal directions along which points vary most around their mean."""
    assert 0 < n <= points.shape[1], f"{n} directions of {points.shape[1]}"
    x = points.double() - points.double().mean(0)
    return torch.linalg.eigh(x.T @ x).eigenvectors[:, -n:].to(points.dtype)
