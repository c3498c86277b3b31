"""Sparse codes say what the dense matrix says, and selection selects what sorting would."""

import pytest
import torch
from reference.dictionary import batchtopk as slow_batchtopk
from reference.dictionary import topk as slow_topk

from nndecomp.decompositions import kernels
from nndecomp.decompositions.codes import Codes, DenseCodes, SparseCodes
from nndecomp.decompositions.selection import Above, BatchBest, topk_support
from nndecomp.decompositions.support import Support

# Three tokens, four features: token 0 has features 1 and 3, token 1 none, token 2 features 0 and 3.
MATRIX = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 3.0]])


def sparse(matrix: torch.Tensor) -> SparseCodes:
    tokens, indices = (matrix != 0).nonzero(as_tuple=True)
    return SparseCodes(matrix[tokens, indices], Support.of(tokens, indices, *matrix.shape))


def dense_of(pre: torch.Tensor, support: Support) -> torch.Tensor:
    return SparseCodes(pre[support.tokens, support.indices].relu(), support).dense()


def batchtopk_support(pre: torch.Tensor, n_slots: int) -> Support:
    best = BatchBest(len(pre), pre.shape[1], n_slots)
    best.add(0, pre, ())
    return best.found().support


def test_codes_of_a_small_matrix_read_as_one_would_write_them_down():
    codes = sparse(MATRIX)
    assert codes.values.tolist() == [2, 1, 5, 3]
    assert codes.indices.tolist() == [1, 3, 0, 3]
    assert codes.offsets.tolist() == [0, 2, 2, 4]
    assert codes.tokens.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("codes", [sparse(MATRIX), DenseCodes(MATRIX)], ids=["sparse", "dense"])
def test_both_kinds_of_codes_answer_alike(codes):
    assert torch.equal(codes.dense(), MATRIX)
    assert codes.counts().tolist() == [2, 0, 2]
    assert codes.firings().tolist() == [1, 1, 0, 2]
    assert [part.tolist() for part in codes.entries()] == [[0, 0, 2, 2], [1, 3, 0, 3], [2, 1, 5, 3]]
    assert float(codes.weighted(torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum()) == 5 + 20 + 4000
    W_dec = torch.arange(8.0).view(4, 2)
    assert torch.equal(codes.decode(W_dec), MATRIX @ W_dec)


def test_a_slot_with_value_0_is_not_active():
    codes = SparseCodes(torch.tensor([0.0, 2.0]), Support.of(torch.tensor([0, 0]), torch.tensor([0, 1]), 1, 2))
    assert codes.counts().tolist() == [1] and codes.firings().tolist() == [0, 1]
    assert codes.entries()[1].tolist() == [1]


def test_codes_of_groups_stand_side_by_side():
    codes = Codes((sparse(MATRIX), DenseCodes(MATRIX[:, :2])))
    assert codes.counts().tolist() == [[2, 1], [0, 0], [2, 1]]
    assert codes.fired().tolist() == [True, True, False, True, True, True]


def test_printed_codes_are_one_line_of_sizes():
    assert repr(sparse(MATRIX)) == "SparseCodes(3 tokens, 4 features, 1.3 active a token)"
    assert repr(DenseCodes(MATRIX)) == "DenseCodes(3 tokens, 4 features, 1.3 active a token)"
    assert repr(Codes((sparse(MATRIX),) * 2)) == "Codes(3 tokens, 2 groups of 4 features, 1.3 active a group)"
    mixed = Codes((sparse(MATRIX), DenseCodes(MATRIX[:, :2])))
    assert repr(mixed) == "Codes(3 tokens, 2 groups of 4 or 2 features, 1.0 active a group)"
    assert repr(DenseCodes(MATRIX[:0])) == "DenseCodes(0 tokens, 4 features, none active a token)"


def test_decoding_and_its_gradients_equal_the_dense_product():
    pre = torch.randn(50, 30, dtype=torch.float64)
    support = topk_support(pre, 4)
    values = pre[support.tokens, support.indices].clone().requires_grad_()
    W_dec = torch.randn(30, 7, dtype=torch.float64, requires_grad=True)
    codes = SparseCodes(values, support)
    weights = torch.randn(50, 7, dtype=torch.float64)
    fast = torch.autograd.grad((codes.decode(W_dec).sin() * weights).sum(), (values, W_dec))
    slow = torch.autograd.grad(((codes.dense() @ W_dec).sin() * weights).sum(), (values, W_dec))
    for ours, reference in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, reference)


def test_a_gradient_that_is_a_strided_view_decodes_alike():
    """Groups write spans of columns, so that is what gradients are."""
    support = topk_support(torch.randn(20, 16), 2)
    values, W_dec = torch.randn(40, requires_grad=True), torch.randn(16, 5, requires_grad=True)
    wide = torch.randn(20, 9)
    kernels.decode(values, support, W_dec).backward(wide[:, 2:7])
    expected = wide[:, 2:7].contiguous()
    assert W_dec.grad is not None and values.grad is not None
    torch.testing.assert_close(W_dec.grad, SparseCodes(values.detach(), support).dense().T @ expected)


def test_topk_keeps_the_k_largest_of_each_row_and_drops_negatives():
    pre = torch.tensor([[3.0, -1.0, 2.0, 5.0], [-4.0, -2.0, 1.0, -3.0]])
    assert dense_of(pre, topk_support(pre, 2)).tolist() == [[3, 0, 0, 5], [0, 0, 1, 0]]


@pytest.mark.parametrize(("n_features", "k"), [(64, 1), (64, 2), (64, 8), (96, 2), (50, 3), (50, 50), (256, 4)])
def test_topk_in_two_levels_equals_sorting(n_features, k):
    pre = torch.randn(30, n_features)
    assert torch.equal(dense_of(pre, topk_support(pre, k)), slow_topk(pre, k))


def test_topk_in_two_levels_is_exact_when_the_largest_share_a_block():
    """Features that are equal modulo the number of blocks are looked at together."""
    pre = -torch.rand(3, 64)
    pre[:, [0, 8, 16, 24]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert torch.equal(dense_of(pre, topk_support(pre, 3)), slow_topk(pre, 3))


@pytest.mark.parametrize("k", [1, 3, 40, 63, 64])
def test_batchtopk_equals_sorting_the_whole_batch(k):
    pre = torch.randn(37, 64)
    support = batchtopk_support(pre, k * 37)
    assert torch.equal(dense_of(pre, support), slow_batchtopk(pre, k * 37))
    assert len(support.indices) == min(k * 37, int((pre > 0).sum()))


def test_batchtopk_gives_tokens_as_much_as_they_need():
    pre = torch.tensor([[9.0, 8.0, 7.0], [1.0, 0.5, 0.1]])
    assert dense_of(pre, batchtopk_support(pre, 2)).tolist() == [[9, 8, 0], [0, 0, 0]]


def test_batchtopk_keeps_exactly_as_many_where_values_are_tied():
    pre = torch.ones(8, 16)
    assert len(batchtopk_support(pre, 24).indices) == 24
    pre[0] = 2
    kept = dense_of(pre, batchtopk_support(pre, 24))
    assert int((kept != 0).sum()) == 24 and (kept[0] == 2).all()


def test_batchtopk_keeps_only_positive_values_where_there_are_too_few():
    pre = -torch.rand(10, 20)
    pre[3, 4], pre[7, 1] = 1.0, 2.0
    support = batchtopk_support(pre, 50)
    assert support.tokens.tolist() == [3, 7] and support.indices.tolist() == [4, 1]
    assert len(batchtopk_support(-torch.rand(10, 20), 50).indices) == 0


def test_batchtopk_is_exact_when_its_sample_misleads():
    """Every sampled entry is large, all others small: the guess is too high and has to be found out."""
    pre = torch.rand(40, 51) * 0.1 + 0.01
    pre.view(-1)[::17] += 10
    assert torch.equal(dense_of(pre, batchtopk_support(pre, 600)), slow_batchtopk(pre, 600))


def test_a_threshold_keeps_what_strictly_exceeds_it():
    pre = torch.tensor([[0.5, 1.0, 1.5], [2.0, -3.0, 1.0]])
    above = Above(2, torch.ones(3))
    above.add(0, pre, ())
    assert dense_of(pre, above.found().support).tolist() == [[0, 0, 1.5], [2, 0, 0]]


def test_a_support_without_slots_decodes_to_nothing():
    support = batchtopk_support(-torch.rand(4, 8), 8)
    values = torch.zeros(0, requires_grad=True)
    W_dec = torch.randn(8, 3, requires_grad=True)
    out = kernels.decode(values, support, W_dec)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(4, 3)) and W_dec.grad is not None and not W_dec.grad.any()
