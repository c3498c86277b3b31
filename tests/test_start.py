"""What training starts from: middles and directions of data, and the target's own weights."""

import pytest
import torch

from nndecomp.decompositions.geometry import geometric_median, principal_directions, unit


def mean_distance(points: torch.Tensor, guess: torch.Tensor) -> float:
    return float((points - guess).double().norm(dim=1).mean())


def test_the_geometric_median_is_nearer_to_the_points_than_anything_around_it():
    points = torch.randn(400, 3).exp()
    found = geometric_median(points)
    nearest = mean_distance(points, found)
    assert nearest < mean_distance(points, points.mean(0))
    for step in (1e-1, 1e-2, 1e-3):
        around = found + step * unit(torch.randn(50, 3))
        assert min(mean_distance(points, guess) for guess in around) > nearest


def test_one_far_point_moves_the_mean_and_not_the_median():
    points = torch.randn(101, 2) * 0.1
    points[0] = torch.tensor([1e4, 0.0])
    assert points.mean(0).norm() > 50 and geometric_median(points).norm() < 0.1


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[2.0, 3.0]] * 5, [2.0, 3.0]),
        ([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0.0, 0.0]),  # the mean is a point, and right
        ([[0.0], [0.0], [0.0], [1.0], [9.0]], [0.0]),
    ],
)
def test_a_point_at_the_guess_is_no_division_by_zero(points: list, expected: list):
    """A fault of dictionary_learning: its weights 1 / |x - g| are not guarded, so that constant data give NaN."""
    torch.testing.assert_close(geometric_median(torch.tensor(points)), torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_iteration_leaves_a_point_that_is_not_the_median():
    """The mean of these is their first point, where the guarded sum must not stay."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-3.0, 0.0]])
    torch.testing.assert_close(points.mean(0), points[0])
    assert geometric_median(points)[0] > 0.9


def test_principal_directions_are_those_in_which_points_vary_whatever_their_mean():
    basis = torch.linalg.qr(torch.randn(6, 6)).Q
    spread = torch.tensor([5.0, 3.0, 0.1, 0.1, 0.1, 0.1])
    points = (torch.randn(3000, 6) * spread) @ basis.T + 100 * basis[:, 5]
    found = principal_directions(points, 2)
    torch.testing.assert_close(found.T @ found, torch.eye(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found @ found.T, basis[:, :2] @ basis[:, :2].T, atol=2e-2, rtol=0)
