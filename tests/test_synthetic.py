"""Laws of synthetic features: they fire as often, together, and where they are said to."""

import pytest
import torch
from truth_parts import CPU, IN, OUT, pair, settings, shape, world

from nndecomp.activations.synthetic import SyntheticStream, World, pushed_apart
from nndecomp.activations.synthetic_codes import Firing, generator
from nndecomp.config.schema import Correlation, Frequencies, Magnitudes
from nndecomp.errors import SettingError
from nndecomp.types import Site

N = 40_000


def codes(**changes: object) -> torch.Tensor:
    return Firing(settings(**changes)).draw(N, generator("test"))


@pytest.mark.parametrize("frequencies", list(Frequencies))
@pytest.mark.parametrize("correlation", list(Correlation))
def test_features_fire_as_often_as_they_are_said_to(frequencies: Frequencies, correlation: Correlation):
    cfg = settings(frequencies=frequencies, correlation=correlation, zipf_exponent=0.5)
    firing = Firing(cfg)
    rate = (firing.draw(N, generator("test")) != 0).double().mean(0)
    assert firing.frequencies.sum().item() == pytest.approx(cfg.l0)
    torch.testing.assert_close(rate, firing.frequencies, atol=0.01, rtol=0)


@pytest.mark.parametrize("magnitudes", list(Magnitudes))
def test_what_fires_is_worth_1_on_average(magnitudes: Magnitudes):
    drawn = codes(magnitudes=magnitudes)
    assert drawn.min() >= 0 and drawn[drawn > 0].mean().item() == pytest.approx(1, abs=0.02)


def correlations(drawn: torch.Tensor) -> torch.Tensor:
    return torch.corrcoef((drawn != 0).double().T)


def test_blocks_fire_together_and_apart_from_other_blocks():
    same = torch.arange(20)[:, None] // 5 == torch.arange(20) // 5
    related = correlations(codes(correlation=Correlation.blocks, correlation_rank=4, correlation_strength=0.7))
    others = ~torch.eye(20, dtype=torch.bool)
    assert related[same & others].min() > 0.2 and related[~same].abs().max() < 0.05


def test_low_rank_features_are_correlated_and_independent_ones_are_not():
    others = ~torch.eye(20, dtype=torch.bool)
    low_rank = correlations(codes(correlation=Correlation.low_rank, correlation_rank=2, correlation_strength=0.9))
    assert low_rank[others].abs().max() > 0.3 > 0.05 > correlations(codes())[others].abs().max()


def test_children_fire_only_with_their_parent_and_one_at_a_time():
    firing = Firing(settings(n_features=30, l0=4.0, trees=2, children=3, depth=2, child_share=0.3))
    assert firing.parents.tolist() == [-1, -1, *[0] * 3, *[1] * 3, *(2 + i // 3 for i in range(18)), *[-1] * 4]
    active = firing.active(N, generator("test"))
    for child, parent in enumerate(firing.parents.tolist()):
        if parent >= 0:
            assert not (active[:, child] & ~active[:, parent]).any()
            share = active[:, child].sum() / active[:, parent].sum()
            assert share.item() == pytest.approx(0.3, abs=0.1)
    assert active[:, 2:5].sum(1).max() == 1 and active[:, 5:8].sum(1).max() == 1
    torch.testing.assert_close(active.double().mean(0), firing.frequencies, atol=0.01, rtol=0)


def test_parents_and_children_are_classes():
    of = world(n_features=30, trees=2, children=3, depth=2, l0=4.0).classes
    assert of["parents"].tolist() == list(range(8)) and of["children"].tolist() == list(range(2, 26))


def test_siblings_that_do_not_exclude_each_other_meet():
    free = Firing(settings(trees=2, children=3, child_share=0.5, siblings_exclusive=False))
    assert free.active(N, generator("test"))[:, 2:5].sum(1).max() == 3


def test_rows_are_codes_times_directions_and_a_bias():
    flat = world((IN, OUT), bias=2.0)
    truth = flat.heldout(64)
    for site, span in truth.layout.spans.items():
        assert truth.bias[site].norm().item() == pytest.approx(2)
        torch.testing.assert_close(truth.rows[:, span], truth.codes @ truth.directions[site] + truth.bias[site])
    assert not torch.equal(truth.directions[IN], truth.directions[OUT]), "what is read is not what is written"


def test_noise_has_the_size_that_is_asked_for():
    noisy, quiet = world(noise=0.5).heldout(2000), world().heldout(2000)
    assert (noisy.rows - quiet.rows).std().item() == pytest.approx(0.5, abs=0.02)


def test_a_site_holds_the_same_features_whatever_stands_beside_it():
    alone, beside = world((OUT,)).heldout(16), world((IN, OUT)).heldout(16)
    assert torch.equal(alone.directions[OUT], beside.directions[OUT]) and torch.equal(alone.codes, beside.codes)


@pytest.mark.parametrize(("n", "d", "coherence"), [(16, 16, 0.0), (40, 32, 0.3), (128, 64, 0.3)])
def test_directions_are_no_closer_than_they_may_be(n: int, d: int, coherence: float):
    rows = pushed_apart(torch.nn.functional.normalize(torch.randn(n, d), dim=1), coherence)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(n))
    assert (rows @ rows.T).fill_diagonal_(0).abs().max() <= coherence + 1e-5


def test_a_coherence_that_no_directions_have_is_refused():
    with pytest.raises(
        SettingError, match=r"activations.synthetic.coherence=0.05 is out of reach for 20 directions in 8"
    ):
        World(settings(coherence=0.05), shape(d_model=8), (OUT,))


def test_layers_are_independent_or_turn_slowly():
    sites = [Site.parse(f"L{layer}.resid_post") for layer in range(3)]
    free, slow = world(sites), world(sites, persistence=0.9)
    turn = lambda world, i: (world.directions[sites[0]] * world.directions[sites[i]]).sum(1).mean().item()  # noqa: E731
    assert abs(turn(free, 1)) < 0.15
    assert turn(slow, 1) == pytest.approx(0.9, abs=0.07) and turn(slow, 2) == pytest.approx(0.81, abs=0.1)


def test_features_are_born_once_and_fade_from_there():
    sites = [Site.parse(f"L{layer}.resid_post") for layer in range(3)]
    strengths = torch.stack([world(sites, births=True, fade=0.5).directions[site].norm(dim=1) for site in sites], 1)
    histories = {(1.0, 0.5, 0.25), (0.0, 1.0, 0.5), (0.0, 0.0, 1.0)}
    assert {tuple(round(value, 4) for value in row) for row in strengths.tolist()} == histories


def test_exclusive_features_are_in_one_model_alone():
    a, b = Site.parse("A:L0.resid_post"), Site.parse("B:L0.resid_post")
    both = World(settings(exclusive=[4, 6]), pair(), (a, b))
    assert {name: len(own) for name, own in both.classes.items()} == {"shared": 10, "A": 4, "B": 6}
    in_a, in_b = (both.directions[site].norm(dim=1).round(decimals=4) for site in (a, b))
    assert in_a[both.classes["A"]].eq(1).all() and in_b[both.classes["A"]].eq(0).all()
    assert in_b[both.classes["B"]].eq(1).all() and in_a[both.classes["B"]].eq(0).all()
    assert in_a[both.classes["shared"]].eq(1).all() and in_b[both.classes["shared"]].eq(1).all()
    assert both.directions[b].shape == (20, 24), "the models' widths differ"


def test_exclusive_features_need_two_models():
    with pytest.raises(SettingError, match="exclusive=.* needs two models"):
        world(exclusive=[1, 1])


def stream(seed: int = 0) -> SyntheticStream:
    return SyntheticStream(world(noise=0.1), 8, seed, CPU)


def test_a_restored_stream_goes_on_bit_for_bit():
    first, again = stream(), stream()
    for _ in range(3):
        first.next_batch()
    again.load_state_dict(first.state_dict())
    assert all(torch.equal(first.next_batch(), again.next_batch()) for _ in range(3))


def test_streams_differ_by_seed_by_batch_and_from_what_is_held_out():
    rows = [stream().next_batch(), stream(1).next_batch(), world(noise=0.1).heldout(8).rows]
    one = stream()
    one.next_batch()
    rows.append(one.next_batch())
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert torch.equal(rows[0], stream().next_batch())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"l0": 20.0}, "l0=20.0 must be fewer than the 20 features"),
        ({"l0": 19.0, "frequencies": Frequencies.zipf}, "would have a feature fire on"),
        ({"trees": 2, "children": 4, "child_share": 0.3}, "child_share=0.3 of 4 children"),
        ({"trees": 6, "children": 3}, "n_features=20 is fewer than the 24 features of trees"),
        ({"exclusive": [3]}, "exclusive=.* must be two whole numbers"),
        ({"coherence": 1.5}, "coherence=1.5 must lie between 0 and 1"),
    ],
)
def test_worlds_that_cannot_be_are_refused_in_one_sentence(changes: dict[str, object], said: str):
    with pytest.raises(SettingError, match=said):
        Firing(settings(**changes))
