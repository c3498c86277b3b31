"""Laws of comparing two sets of directions, on directions one can see."""

from itertools import permutations

import pytest
import torch

from nndecomp.evaluation.matching import cosines, match, null_cosines, uniqueness


def test_cosines_do_not_depend_on_length_and_keep_their_sign():
    a = torch.tensor([[2.0, 0.0], [0.0, -3.0], [0.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    half = 0.5**0.5
    expected = torch.tensor([[1.0, half], [0.0, -half], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(cosines(a, b), expected)
    torch.testing.assert_close(cosines(a, b, absolute=True), expected.abs())


def test_a_permuted_dictionary_is_matched_row_by_row():
    b = torch.randn(20, 8)
    order = torch.randperm(20)
    matching = match(cosines(3 * b[order], b))
    assert matching.second.tolist() == order.tolist() and matching.first.tolist() == list(range(20))
    assert matching.mean == pytest.approx(1) and matching.share_above(0.999) == 1


@pytest.mark.parametrize("shape", [(5, 5), (3, 5), (5, 3)])
def test_no_assignment_has_a_larger_sum(shape: tuple[int, int]):
    cosine = torch.rand(shape, dtype=torch.float64)
    small = cosine if shape[0] <= shape[1] else cosine.T
    best = max(
        sum(small[i, j].item() for i, j in enumerate(order)) for order in permutations(range(max(shape)), min(shape))
    )
    matching = match(cosine)
    assert matching.cosine.sum().item() == pytest.approx(best)
    assert len(set(matching.first.tolist())) == len(set(matching.second.tolist())) == min(shape)


def test_best_cosines_hide_copies_and_assignments_do_not():
    b = torch.eye(3)
    copies = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]])
    cosine = cosines(copies, b)
    assert cosine.amax(1).min() > 0.99, "every row resembles something"
    assert uniqueness(cosine) == pytest.approx(2 / 3) and match(cosine).cosine.min() < 0.2


def test_a_row_of_zeros_is_not_unique():
    assert uniqueness(cosines(torch.zeros(2, 3), torch.eye(3))) == 0


def test_chance_reaches_as_far_in_the_span_of_the_rows_as_they_would_if_drawn_anew():
    # All rows lie in 2 of 32 coordinates: isotropic directions would say that chance reaches almost nothing.
    flat = torch.cat([torch.randn(24, 2), torch.zeros(24, 30)], 1)
    null = null_cosines(flat, torch.cat([torch.randn(24, 2), torch.zeros(24, 30)], 1), n_draws=4, seed=0)
    assert null.shape == (4, 24) and null.mean() > 0.8
    wide = null_cosines(torch.randn(24, 32), torch.randn(24, 32), n_draws=4, seed=0)
    assert 0.15 < wide.mean() < 0.5


def test_the_null_is_the_same_for_the_same_seed_and_another_for_another():
    a, b = torch.randn(6, 4), torch.randn(9, 4)
    assert torch.equal(null_cosines(a, b, 3, seed=1), null_cosines(a, b, 3, seed=1))
    assert not torch.equal(null_cosines(a, b, 3, seed=1), null_cosines(a, b, 3, seed=2))
