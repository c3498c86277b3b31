"""Laws of comparing units of decompositions, on units whose likeness is known."""

from collections.abc import Sequence

import numpy
import pytest
import torch
from decomposition_parts import CPU, config
from evaluation_parts import ToyTarget, text
from torch import Tensor

from nndecomp.config.schema import Architecture
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.evaluation.unit_graph import connected, graph
from nndecomp.evaluation.unit_matching import Compared, by_activity, by_weights
from nndecomp.evaluation.unit_similarity import Spectrum, Turning, activity_similarity, weight_similarity
from nndecomp.evaluation.unit_splitting import absorption_across, cover
from nndecomp.evaluation.units import Activity, Units, units_of

D, N_TOKENS = 16, 400


def activity(codes: Tensor) -> Activity:
    """Of dense codes [token, unit]."""
    tokens, units = (codes != 0).nonzero(as_tuple=True)
    return Activity(tokens, units, codes[tokens, units], *codes.shape)


def sets(*of: Sequence[int], n_tokens: int = N_TOKENS) -> Activity:
    """Of units that are 1 on these tokens."""
    codes = torch.zeros(n_tokens, len(of))
    for unit, tokens in enumerate(of):
        codes[list(tokens), unit] = 1
    return activity(codes)


def drawn(n: int, seed: int, n_tokens: int = N_TOKENS, layer: int = 0) -> Units:
    """Units that have nothing to do with any of another seed."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.rand(n_tokens, n, generator=draw) * (torch.rand(n_tokens, n, generator=draw) < 0.1)
    read, write = torch.randn(2, n, D, generator=draw)
    name = f"L{layer}"
    return Units(name, "", layer, {f"{name}.mlp_in": read}, {f"{name}.mlp_out": write}, True, activity(codes))


def compared(a: Sequence[Units], b: Sequence[Units]) -> dict[str, Compared]:
    weights = by_weights(a, b, 2000, seed=0)
    assert weights is not None
    return {"weights": weights, "activity": by_activity(a, b, 2000, seed=0, min_shift=20)}


@pytest.mark.parametrize("by", ["weights", "activity"])
def test_the_same_units_in_another_order_are_all_found_with_their_own_partners(by: str):
    a = [drawn(30, 0), drawn(20, 1, layer=1)]
    orders = [torch.randperm(each.n) for each in a]
    found = compared(a, [each.of(order) for each, order in zip(a, orders, strict=True)])[by]
    assert found.best.similarity.tolist() == pytest.approx([1.0] * 50)
    assert found.matched.similarity.tolist() == pytest.approx([1.0] * 50)
    assert found.nearest().tolist() == torch.cat([order.argsort() for order in orders]).tolist()
    assert found.best.p().max() <= 0.001


@pytest.mark.parametrize("by", ["weights", "activity"])
def test_units_that_have_nothing_in_common_are_found_as_often_as_chance_says(by: str):
    p = torch.cat([compared([drawn(60, seed)], [drawn(60, seed + 100)])[by].best.p() for seed in range(6)])
    assert 0.4 < p.mean() < 0.6 and 0.05 < (p <= 0.1).double().mean() < 0.16
    assert (p <= 0.001).double().mean() < 0.02


def test_the_smallest_p_is_one_in_all_draws():
    found = compared([drawn(30, 0)], [drawn(30, 0)])["weights"].best
    n = found.null.numel() // len(found.stratum.unique())
    assert found.p().min().item() == pytest.approx(1 / (1 + n), rel=0.2)
    assert (found.similarity > found.threshold(0.001)).all()


def test_likeness_of_weights_is_the_cosine_of_the_rank_one_maps():
    a, b = drawn(5, 0), drawn(7, 1)
    maps = [
        torch.einsum("uo,ui->uoi", each.writes["L0.mlp_out"], each.reads["L0.mlp_in"]).flatten(1) for each in (a, b)
    ]
    slow = torch.nn.functional.cosine_similarity(maps[0][:, None], maps[1], dim=-1).double()
    torch.testing.assert_close(weight_similarity(a, b), slow, atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["per_layer_sae", "per_layer_transcoder", "cross_layer_transcoder"])
def test_units_write_together_all_that_a_dictionary_writes_but_its_bias(architecture: str):
    target = ToyTarget(2)
    cfg = config(architecture=Architecture[architecture], reads=["mlp_out" if "sae" in architecture else "mlp_in"])
    dictionary = build_dictionary(cfg, target.shape, 0, CPU, "toy").eval()
    with torch.no_grad():
        for each in dictionary.parameters():
            each.copy_(torch.randn_like(each))
    batch, keep = text()
    units = units_of(target, dictionary, batch, keep, batch_seqs=2)
    found = target.record(batch.tokens, [*dictionary.reads, *dictionary.writes])
    x = torch.cat([found[site][keep] for site in dictionary.read_layout.sites], 1)
    y_hat, _ = dictionary(x)
    y = dictionary.b_dec.detach().double().repeat(len(x), 1)
    for each in units:
        for site, span in dictionary.write_layout.spans.items():
            if str(site) in each.writes:
                y[:, span] += torch.from_numpy(each.activity.codes.toarray()) @ each.writes[str(site)].double()
    torch.testing.assert_close(y.float(), y_hat.detach(), atol=1e-4, rtol=1e-4)
    assert [each.layer for each in units] == [0, 1] and set(units[1].reads) == {f"L1.{cfg.reads[0]}"}


def test_where_only_one_side_is_common_the_cosine_there_counts_and_without_a_common_space_none():
    a, b = drawn(5, 0), drawn(7, 1)
    elsewhere = Units("", "", 0, {"L0.mlp_hidden": torch.randn(7, 9)}, b.writes, False, b.activity)
    cosine = torch.nn.functional.cosine_similarity(
        a.writes["L0.mlp_out"][:, None], b.writes["L0.mlp_out"], dim=-1
    ).double()
    torch.testing.assert_close(weight_similarity(a, elsewhere), cosine.abs(), atol=1e-6, rtol=0)
    nothing = Units("", "", 0, {}, {}, True, b.activity)
    assert weight_similarity(a, nothing) is None and by_weights([a], [nothing], 1000, 0) is None


def test_a_rank_one_map_has_no_sign_of_its_own():
    a = drawn(5, 0)
    other = Units(
        "", "", 0, {s: -x for s, x in a.reads.items()}, {s: -x for s, x in a.writes.items()}, False, a.activity
    )
    assert weight_similarity(a, other).diagonal().tolist() == pytest.approx([1.0] * 5)  # type: ignore[union-attr]


@pytest.mark.parametrize("written_out", [False, True])
def test_likeness_of_activity_is_the_correlation_of_amounts(written_out: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nndecomp.evaluation.units.DENSE", 0.0 if written_out else 1.0)
    a, b = drawn(5, 0).activity, drawn(7, 1).activity
    dense = [numpy.abs(each.codes.toarray()) for each in (a, b)]
    slow = numpy.corrcoef(dense[0].T, dense[1].T)[:5, 5:]
    numpy.testing.assert_allclose(activity_similarity(a, b).numpy(), slow, atol=1e-9)
    always = activity(torch.full((N_TOKENS, 2), 3.0))
    assert activity_similarity(a, always).tolist() == [[0.0, 0.0]] * 5


def test_shifted_activity_is_as_frequent_and_has_the_same_company():
    a = drawn(5, 0).activity
    moved = a.shifted(37)
    assert moved.firings.tolist() == a.firings.tolist()
    torch.testing.assert_close(activity_similarity(moved, moved), activity_similarity(a, a))
    assert activity_similarity(a, moved).diagonal().abs().max() < 0.3


def test_turned_directions_keep_their_angles_and_what_is_common_in_the_model():
    units = drawn(200, 0)
    stretch = torch.logspace(0, 2, D)
    units = Units("", "", 0, {}, {"s": units.writes["L0.mlp_out"] * stretch}, True, units.activity)
    other = Turning(units).drawn(torch.Generator().manual_seed(0))
    before, after = (torch.nn.functional.normalize(each.writes["s"].double(), dim=1) for each in (units, other))
    torch.testing.assert_close(after @ after.T, before @ before.T, atol=1e-5, rtol=0)
    moments = [each.T @ each / len(each) for each in (before, after)]
    assert (moments[0] - moments[1]).norm() < 0.05 * moments[0].norm()


def test_directions_that_have_no_preferred_axes_are_turned_into_any_others():
    turn = Spectrum.of([torch.eye(D)]).rotation(torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn @ turn.T, torch.eye(D, dtype=torch.float64))
    assert turn.abs().max() < 0.95, "a change of signs would leave each direction in its place"


def test_a_unit_split_in_two_has_two_children_that_cover_it():
    parents = sets(range(0, 100), range(200, 240))
    children = sets(range(0, 60), range(300, 330), range(60, 100), range(200, 240))
    found = cover(parents, children)
    assert found.n_children.tolist() == [2, 1]
    assert found.recall.tolist() == [1, 1] and found.precision.tolist() == [1, 1]
    assert found.parts.tolist() == [2, 1], "the second is kept"


def test_a_unit_that_nothing_is_like_is_lost():
    found = cover(sets(range(10)), sets(range(100, 200), range(5, 105)))
    assert found.parts.tolist() == [0] and found.f1.item() < 0.2


@pytest.mark.parametrize("written_out", [False, True])
def test_covers_are_what_trying_every_child_in_turn_finds(written_out: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nndecomp.evaluation.units.DENSE", 0.0 if written_out else 1.0)
    a, b = drawn(4, 0, 60).activity, drawn(9, 1, 60).activity
    assert a.is_dense == b.is_dense == written_out
    parents, children = (each.codes.toarray() != 0 for each in (a, b))
    for i, (n, recall, precision) in enumerate(zip(*vars(cover(a, b)).values(), strict=True)):
        own, union, chosen, f1 = parents[:, i], numpy.zeros(60, dtype=bool), 0, 0.0
        while True:
            scores = [2 * (own & (union | c)).sum() / (own.sum() + (union | c).sum()) for c in children.T]
            if max(scores) <= f1 + 0.03:
                break
            f1, chosen, union = max(scores), chosen + 1, union | children.T[int(numpy.argmax(scores))]
        expected = (chosen, (own & union).sum() / own.sum(), (own & union).sum() / max(1, union.sum()))
        assert (n.item(), recall.item(), precision.item()) == pytest.approx(expected)


def test_a_parent_that_is_silent_where_its_child_writes_its_direction_is_absorbed_there():
    """On 30 of 100 tokens the larger one has a child, of parent and own direction, and no parent."""
    w, own = torch.eye(D)[:2]
    small = Units("", "", 0, {}, {"s": torch.stack([w, -w])}, True, sets(range(100), range(200, 210)))
    both = torch.stack([2 * w, w + own])
    large = Units("", "", 0, {}, {"s": both}, True, sets(range(30, 100), range(30)))
    found = absorption_across(small, large, cutoff=0.9)
    assert found.fraction.tolist() == pytest.approx([0.3]), "the second parent has no like, so nothing can absorb it"
    assert found.full.tolist() == pytest.approx([0.3])
    whole = Units("", "", 0, {}, {"s": both}, True, sets(range(100), range(30)))
    assert absorption_across(small, whole, cutoff=0.9).fraction.tolist() == [0]


def test_a_graph_joins_what_is_active_together_and_nothing_else():
    """Unit 0 is in the other as two halves, 1 and 2 are there as one, 3 as itself, 4 not at all."""
    parts = [list(range(i, N_TOKENS, 8)) for i in range(8)]
    a = sets(parts[0] + parts[1], parts[2], parts[3], parts[4], parts[5])
    b = sets(parts[0], parts[1], parts[2] + parts[3], parts[4])
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(N_TOKENS, generator=draw)
    pairs = [
        Units("", "", 0, {}, {}, True, Activity(order[x.tokens], x.units, x.values, N_TOKENS, x.n_units))
        for x in (a, b)
    ]
    found = graph(by_activity([pairs[0]], [pairs[1]], 1000, seed=0, min_shift=1), cutoff=0.3)
    assert found.degree.tolist() == [2, 1, 1, 1, 0] and found.degree_back.tolist() == [1, 1, 2, 1]
    assert found.components.tolist() == [3, 3, 2]
    assert found.n_edges == 5 and found.share_one_to_one() == 0.2


def test_connected_components_are_counted_with_both_their_sides():
    edges = torch.zeros(3, 4, dtype=torch.bool)
    edges[0, 0] = edges[0, 1] = edges[1, 1] = True
    assert connected(edges).tolist() == [4]
