"""Laws of finding features again, on rows whose answer is known."""

import pytest
import torch
from decomposition_parts import CPU, config
from evaluation_parts import D, ToyTarget, text
from torch import Tensor

from nndecomp.config.schema import Activation, Architecture
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.evaluation.stability import (
    contained,
    decoder_rows,
    found_again,
    random_rows,
    share_above,
    splitting,
    written_rows,
)

DRAW = torch.Generator().manual_seed(0)
ROWS = [torch.randn(20, 64, generator=DRAW), torch.randn(30, 64, generator=DRAW)]


def shuffled(rows: list[Tensor], noise: float = 0.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    noisy = [each + noise * torch.randn(each.shape, generator=draw) for each in rows]
    return [3 * each[torch.randperm(len(each), generator=draw)] for each in noisy]


def test_the_same_features_in_another_order_and_size_are_all_found_again():
    assert found_again(ROWS, shuffled(ROWS)).tolist() == pytest.approx([1.0] * 50)
    noisy = found_again(ROWS, shuffled(ROWS, 0.3))
    assert 0.9 < noisy.mean() < 0.99 and share_above(noisy, 0.9) > 0.9


def test_a_feature_is_found_only_once():
    """Ten copies of one feature are one feature and nine that nobody has."""
    copies = [ROWS[0][:1].expand(10, -1)]
    assert share_above(found_again(copies, [ROWS[0]]), 0.99) == 0.1
    assert share_above(contained(copies, [ROWS[0]]), 0.99) == 1.0


def test_features_of_one_group_are_not_looked_for_in_another():
    swapped = [ROWS[1][:20], torch.cat([ROWS[0], ROWS[1][20:]])]
    assert share_above(found_again(ROWS, swapped), 0.99) == 10 / 50


def test_chance_finds_nothing_in_many_dimensions_and_much_along_few():
    """The null is about the data: where it varies in two directions, anything random resembles a feature."""
    isotropic = [torch.randn(500, 64, generator=DRAW) for _ in ROWS]
    plane = [torch.randn(500, 2, generator=DRAW) @ torch.randn(2, 64, generator=DRAW) for _ in ROWS]
    in_plane = [y[:20] for y in plane]
    assert share_above(found_again(random_rows(isotropic, ROWS, 0), ROWS), 0.7) == 0.0
    assert share_above(found_again(random_rows(plane, in_plane, 0), in_plane), 0.7) > 0.8


def test_random_directions_have_the_covariance_of_the_data_around_its_mean():
    y = torch.randn(4000, 3, generator=DRAW) * torch.tensor([3.0, 1.0, 0.1]) + 100
    (drawn,) = random_rows([y], [torch.zeros(4000, 3)], 0)
    assert drawn.std(0).tolist() == pytest.approx([3.0, 1.0, 0.1], rel=0.1)
    assert drawn.mean(0).abs().max() < 0.5


def test_a_feature_that_splits_counts_its_parts_and_one_that_is_lost_counts_none():
    e = torch.eye(4)
    small = [e[:3]]
    large = [torch.stack([e[0] + 0.2 * e[3], e[0] - 0.2 * e[3], e[1], e[3]])]
    assert splitting(small, large, 0.7).tolist() == [2, 1, 0]
    assert contained(small, large).tolist() == pytest.approx([0.9806, 1, 0], abs=1e-4)


def test_features_that_never_fire_do_not_count():
    target = ToyTarget(3)
    made, n = always_on(target), 24
    heldout, keep = text()
    alive, written = written_rows(target, made, heldout, keep, batch_seqs=4)
    assert [len(y) for y in written] == [int(keep.sum())] * 3
    assert [y.shape[1] for y in written] == [3 * D, 2 * D, D]
    assert [int(each.sum()) for each in alive] == [n - 1, n, n] and not alive[0][5]
    assert [len(rows) for rows in decoder_rows(made, alive)] == [n - 1, n, n]


def always_on(target: ToyTarget) -> SparseDictionary:
    """Codes are always positive, but for one feature that never is."""
    cfg = config(architecture=Architecture.cross_layer_transcoder, activation=Activation.relu, k=None)
    made = build_dictionary(cfg, target.shape, 0, CPU, "toy").eval()
    with torch.no_grad():
        for bank in made.banks:
            bank.b_enc.fill_(10.0)
        made.banks[0].b_enc[5] = -100.0
    return made
