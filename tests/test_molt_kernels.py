"""Sparse mixtures of linear maps against d x d matrices."""

import pytest
import torch
from torch import Tensor

from nndecomp.decompositions.molt_kernels import atoms_of, frobenius_norms, transformed
from nndecomp.decompositions.support import Support

RANKS = [(1, 4), (2, 3), (4, 2)]  # nine transforms, 18 atoms
RANK = torch.tensor([1, 1, 1, 1, 2, 2, 2, 4, 4])
FIRST = RANK.cumsum(0) - RANK
N_ATOMS, N_TOKENS, D_READ, D_WRITE = 18, 6, 5, 7


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices(V: Tensor, U: Tensor) -> Tensor:
    """[transform, d_read, d_write], the products that are never formed."""
    return torch.stack([V[f : f + r].T @ U[f : f + r] for f, r in zip(FIRST.tolist(), RANK.tolist(), strict=True)])


def some_active() -> Support:
    """Token 2 has none active; token 3 has all."""
    active = [[0, 8], [4], [], [8, 7, 6, 5, 4, 3, 2, 1, 0], [5, 1], [2, 7]]
    tokens = torch.tensor([t for t, each in enumerate(active) for _ in each])
    return Support.of(tokens, torch.tensor([i for each in active for i in each]), N_TOKENS, len(RANK))


def test_an_active_transform_is_its_atoms_side_by_side() -> None:
    atoms, slots = atoms_of(some_active(), RANK, FIRST, N_ATOMS)
    assert atoms.indices[:5].tolist() == [0, 14, 15, 16, 17], "transform 0 is atom 0, transform 8 atoms 14 to 17"
    assert slots[:5].tolist() == [0, 1, 1, 1, 1]
    assert atoms.offsets.diff().tolist() == [5, 2, 0, 18, 3, 5]


def test_active_transforms_and_all_gradients_equal_sums_of_matrices() -> None:
    support = some_active()
    leaves = [
        drawn(N_TOKENS, D_READ, seed=1),
        drawn(len(support.indices), seed=2),
        drawn(N_ATOMS, D_READ, seed=3),
        drawn(N_ATOMS, seed=4),
        drawn(N_ATOMS, D_WRITE, seed=5),
    ]
    fast = [leaf.clone().requires_grad_() for leaf in leaves]
    slow = [leaf.clone().requires_grad_() for leaf in leaves]
    x, f, V, b, U = fast
    y = transformed(x, f, support, V, b, U, RANK, FIRST)
    x, f, V, b, U = slow
    M, shift = matrices(V, U), torch.stack([b[s : s + r] @ U[s : s + r] for s, r in zip(FIRST, RANK, strict=True)])
    rows = [torch.zeros(D_WRITE, dtype=torch.float64) for _ in range(N_TOKENS)]
    for slot, (t, i) in enumerate(zip(support.tokens.tolist(), support.indices.tolist(), strict=True)):
        rows[t] = rows[t] + f[slot] * (x[t] @ M[i] - shift[i])
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected)
    weights = drawn(N_TOKENS, D_WRITE, seed=6)
    (y.square() * weights).sum().backward()
    (expected.square() * weights).sum().backward()
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_atoms_of_transforms_that_are_not_active_get_no_gradient() -> None:
    support = Support.of(torch.tensor([0]), torch.tensor([4]), 1, len(RANK))
    V, U = drawn(N_ATOMS, D_READ, seed=1).requires_grad_(), drawn(N_ATOMS, D_WRITE, seed=2).requires_grad_()
    zeros = torch.zeros(N_ATOMS, dtype=torch.float64)
    transformed(drawn(1, D_READ, seed=3), drawn(1, seed=4), support, V, zeros, U, RANK, FIRST).sum().backward()
    for grad in (V.grad, U.grad):
        assert grad is not None and grad.abs().sum(1).nonzero().flatten().tolist() == [4, 5]


def test_norms_are_those_of_the_products_that_are_never_formed() -> None:
    """Llamascopium forms every d x d product to get them."""
    V, U = drawn(N_ATOMS, D_READ, seed=1).requires_grad_(), drawn(N_ATOMS, D_WRITE, seed=2).requires_grad_()
    norms = frobenius_norms(V, U, RANKS)
    torch.testing.assert_close(norms, matrices(V, U).flatten(1).norm(dim=1))
    assert torch.autograd.gradcheck(lambda V, U: frobenius_norms(V, U, RANKS), (V, U))


@pytest.mark.parametrize("rank", [1, 2])
def test_the_norm_of_a_transform_of_nothing_is_nothing_with_finite_gradients(rank: int) -> None:
    V, U = torch.zeros(rank, D_READ, requires_grad=True), torch.zeros(rank, D_WRITE, requires_grad=True)
    norm = frobenius_norms(V, U, [(rank, 1)])
    norm.sum().backward()
    assert norm.item() < 1e-15 and V.grad is not None and V.grad.isfinite().all()
