"""Absorption and splitting of features that have children, with the planted parent direction as the probe.

Chanin et al. 2024 (A is for Absorption, arXiv 2409.14507) as SAEBench 0.6 computes it, with a direction that is known in
place of one that is learned. For a parent with unit direction w, on the tokens where it fires:

    contribution  p_i = z_i <w, d_i>        p = <x - bias, w>        d_i not of unit norm: z_i |d_i| cos(w, d_i)
    main latents  S: the best k <= 10 latents of k-sparse probes for "the parent fires", as long as F1 rises by > 0.03
    full          all z_i of S are 0, p >= 0, the largest p_i has cos(w, d_i) >= 0.025 and p_i / p >= 0.4
    fraction      A = sum of the 3 largest positive p_i outside S with cos >= 0.1;  m = sum of p_i in S
                  0 if m >= p or A / p < 0.4;  1 if m <= 0;  else a / (a + m) with a = min(A, p - m)
    split         |S|
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.activations.truth import Truth

MAX_SPLIT, F1_GAIN = 10, 0.03
FULL_COSINE, FRACTION_COSINE, SHARE, N_ABSORBING = 0.025, 0.1, 0.4, 3
L1_DECAY, EPOCHS = 0.01, 50
RIDGE, NEWTON_STEPS = 1e-3, 15


@dataclass(frozen=True)
class Absorption:
    """Means over parents."""

    fraction: float
    full: float
    split: float


@torch.no_grad()
def absorption(
    truth: Truth,
    y: Float[Tensor, "token d"],
    codes: Float[Tensor, "token feature"],
    decoder: Float[Tensor, "feature d"],
    directions: Float[Tensor, "true d"],
    bias: Float[Tensor, "d"],
) -> Absorption | None:
    """None where no feature has children."""
    parents = truth.parents[truth.parents >= 0].unique().tolist()
    if not parents:
        return None
    of_parents = []
    for parent in parents:
        fires = truth.codes[:, parent] != 0
        w = directions[parent] / directions[parent].norm()
        main = main_latents(codes, fires)
        p = (y[fires] - bias) @ w
        of_parents.append((*absorbed(codes[fires], decoder, w, p, main), len(main)))
    fraction, full, split = torch.tensor(of_parents, dtype=torch.float64).mean(0).tolist()
    return Absorption(fraction, full, split)


def absorbed(
    z: Float[Tensor, "token feature"],
    decoder: Float[Tensor, "feature d"],
    w: Float[Tensor, "d"],
    p: Float[Tensor, "token"],
    main: Int[Tensor, "split"],
) -> tuple[float, float]:
    """Mean absorption fraction and share of full absorption over tokens on which the parent fires."""
    along = decoder @ w
    cosine = along / decoder.norm(dim=1).clamp(min=1e-30)
    contribution = z * along
    is_main = torch.zeros(len(along), dtype=torch.bool)
    is_main[main] = True

    largest = contribution.argmax(1)
    best = contribution.gather(1, largest[:, None])[:, 0]
    silent = (z[:, main] == 0).all(1)
    full = silent & (p > 0) & (cosine[largest] >= FULL_COSINE) & (best >= SHARE * p)

    others = contribution.clamp(min=0) * (~is_main & (cosine >= FRACTION_COSINE))
    a = others.topk(min(N_ABSORBING, others.shape[1]), 1).values.sum(1)
    m = contribution[:, main].sum(1)
    part = torch.minimum(a, p - m)
    fraction = torch.where(m <= 0, 1.0, part / (part + m))
    fraction = torch.where((m >= p) | (a < SHARE * p), 0.0, fraction)
    return fraction.double().mean().item(), full.double().mean().item()


def main_latents(codes: Float[Tensor, "token feature"], fires: Bool[Tensor, "token"]) -> Int[Tensor, "split"]:
    """The latents that k-sparse probes for `fires` use: up to the last k at which F1 rises by more than F1_GAIN."""
    ranked = l1_probe(codes, fires).topk(min(MAX_SPLIT, codes.shape[1])).indices
    best, n_main = f1_of_probe(codes[:, ranked[:1]], fires), 1
    for k in range(2, len(ranked) + 1):
        f1 = f1_of_probe(codes[:, ranked[:k]], fires)
        if f1 > best + F1_GAIN:
            best, n_main = f1, k
    return ranked[:n_main]


def l1_probe(codes: Float[Tensor, "token feature"], fires: Bool[Tensor, "token"]) -> Float[Tensor, "feature"]:
    """Weights of a logistic probe with an L1 penalty, on latents scaled to a largest value of 1 (proximal gradient)."""
    x = codes / codes.amax(0).clamp(min=1e-30)
    weight, bias = torch.zeros(x.shape[1]), torch.zeros(())
    balance = torch.where(fires, 0.5 / fires.double().mean(), 0.5 / (~fires).double().mean()).float() / len(x)
    # Steps of 1 / L with L = |x|^2 / 4 of the weighted rows, the smoothness of the logistic loss (Beck & Teboulle 2009).
    step = 4 / torch.linalg.matrix_norm(torch.cat([x, torch.ones(len(x), 1)], 1) * balance.sqrt()[:, None], 2).square()
    for _ in range(EPOCHS):
        residual = balance * ((x @ weight + bias).sigmoid() - fires.float())
        weight = weight - step * (x.T @ residual)
        weight = weight.sign() * (weight.abs() - step * L1_DECAY).clamp(min=0)
        bias = bias - step * residual.sum()
    return weight


def f1_of_probe(x: Float[Tensor, "token k"], fires: Bool[Tensor, "token"]) -> float:
    """F1 of a balanced logistic regression on a few latents (Newton's method, a little ridge)."""
    design = torch.cat([x / x.amax(0).clamp(min=1e-30), torch.ones(len(x), 1)], 1).double()
    balance = torch.where(fires, 0.5 / fires.double().mean(), 0.5 / (~fires).double().mean()) / len(x)
    theta = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        chance = (design @ theta).sigmoid()
        gradient = design.T @ (balance * (chance - fires.double())) + RIDGE * theta
        curvature = (design * (balance * chance * (1 - chance))[:, None]).T @ design
        theta = theta - torch.linalg.solve(curvature + RIDGE * torch.eye(len(theta), dtype=torch.float64), gradient)
    guess = design @ theta > 0
    both = (guess & fires).sum().item()
    return 2 * both / max(1, (guess.sum() + fires.sum()).item())
