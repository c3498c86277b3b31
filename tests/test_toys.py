"""Toys are what they say, and recovery is full marks for their own mechanisms and for nothing else."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nndecomp import build
from nndecomp.activations.sparse_features import GatheredFeatures, SparseFeatures, gathered
from nndecomp.config.compose import compose
from nndecomp.config.spd import ImportanceConfig, ImportanceKind, Masks, ReconstructionConfig, Routing, SPDConfig
from nndecomp.config.toys import ToyConfig
from nndecomp.decompositions.spd import masks
from nndecomp.decompositions.spd.components import Components
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.errors import SettingError
from nndecomp.evaluation.toy_recovery import Features, errors, importances, of_map, permutation, scores, toy_recovery
from nndecomp.report import toys as report
from nndecomp.targets.maps import find_maps, linear_map
from nndecomp.targets.toys import TMS, ResidMLP, Toy, build_toy
from nndecomp.training.parameters import SPDObjective
from nndecomp.training.subjects import CountedVectors, Vectors
from nndecomp.training.toys import ToyObjective

CPU = torch.device("cpu")
TOYS = ["tms_5_2", "tms_5_2_id", "tms_40_10", "tms_40_10_id", "resid_mlp_1", "resid_mlp_2", "resid_mlp_3"]


@cache
def toy_config(name: str) -> ToyConfig:
    cfg = compose("exp_026_spd_toys", [f"toy={name}"]).toy
    assert cfg is not None
    return cfg


def small_toy(name: str) -> tuple[Toy, SPDConfig]:
    """Five features; frozen, its bias random."""
    own, spd = build.toy_settings(compose("exp_026_spd_toys", [f"toy={name}"]))
    toy = build_toy(replace(own, n_features=5, d_model=4), 0)
    if isinstance(toy, TMS):
        nn.init.constant_(toy.linear2.bias, 0.25)  # so that zeros are not put out as zeros
    return toy.requires_grad_(False).eval(), replace(spd, maps=dict.fromkeys(spd.maps, 6))


# --- the toys ---


@pytest.mark.parametrize("name", TOYS)
def test_every_toy_composes_and_its_settings_fit_each_other(name: str):
    cfg = compose("exp_026_spd_toys", [f"toy={name}"])
    build.check(cfg, patches=False)
    own, spd = build.toy_settings(cfg)
    n_maps = {"tms": 2 + own.n_layers, "resid_mlp": 2 * own.n_layers}[own.kind.value]
    assert len(find_maps(build_toy(own, 0), spd.maps)) == n_maps


def test_one_step_of_a_tied_toy_is_a_step_of_one_matrix():
    cfg = toy_config("tms_5_2_id")
    toy = build_toy(cfg, 0)
    assert isinstance(toy, TMS)
    W, b = toy.linear1.weight.detach().clone().requires_grad_(), torch.zeros(5, requires_grad=True)
    x = SparseFeatures(cfg, 64, 0, "toy", CPU).next_batch()
    loss = (F.relu(x @ W.T @ W + b) - x).square().mean()
    loss.backward()
    assert W.grad is not None and b.grad is not None

    objective = ToyObjective(toy)
    own, _ = objective.loss(x, 0.0)
    own.backward()
    objective.before_step()
    torch.testing.assert_close(own, loss)
    torch.testing.assert_close(toy.linear1.weight.grad, W.grad)
    torch.testing.assert_close(toy.linear2.bias.grad, b.grad)
    optimiser = torch.optim.AdamW([p for p in toy.parameters() if p.requires_grad], lr=0.1, fused=True)
    optimiser.step()
    objective.after_step()
    assert torch.equal(toy.linear2.weight, toy.linear1.weight.T)
    (identity,) = toy.hidden_layers.parameters()
    assert torch.equal(identity, torch.eye(2)), "it is not trained"


def test_a_residual_toy_is_its_formula():
    cfg = replace(toy_config("resid_mlp_2"), n_features=3, d_model=4, d_mlp=2)
    toy = build_toy(cfg, 1)
    assert isinstance(toy, ResidMLP)
    E = toy.W_E
    torch.testing.assert_close(E.norm(dim=1), torch.ones(3))
    x = torch.tensor([[1.0, -2.0, 0.5]])
    r = x @ E
    W = dict(toy.named_parameters())
    for layer in ("layers.0", "layers.1"):
        r = r + F.relu(r @ W[f"{layer}.mlp_in.weight"].T) @ W[f"{layer}.mlp_out.weight"].T
    torch.testing.assert_close(toy(x), r @ E.T)
    assert toy.wanted(x).tolist() == [[2.0, -2.0, 1.0]]
    assert "W_E" not in dict(toy.named_parameters()), "the embedding is fixed"


def test_a_residual_toy_is_the_same_function_in_the_coordinates_that_its_stream_uses():
    cfg = toy_config("resid_mlp_2")
    toy = build_toy(cfg, 0).double()
    assert isinstance(toy, ResidMLP)
    compact = toy.compact()
    assert compact.W_E.shape == (100, 100 + 2 * 25), "features, and what two times 25 neurons write"
    assert toy.W_E.shape == (100, 1000) and toy.mlps[0].mlp_in.weight.shape == (25, 1000), "the toy stays as it was"
    x = SparseFeatures(cfg, 64, 0, "toy", CPU).next_batch().double()
    torch.testing.assert_close(compact(x), toy(x))
    for own, whole in zip(compact.mlps, toy.mlps, strict=True):
        # What is known of features is scored alike: E W_in^T of each.
        torch.testing.assert_close(compact.W_E @ own.mlp_in.weight.T, toy.W_E @ whole.mlp_in.weight.T)


def test_rows_are_sparse_in_range_and_the_same_after_a_restart():
    for name, low in (("tms_40_10", 0.0), ("resid_mlp_1", -1.0)):
        cfg = toy_config(name)
        rows = SparseFeatures(cfg, 4096, 0, "toy", CPU)
        first, state, second = rows.next_batch(), rows.state_dict(), rows.next_batch()
        assert not torch.equal(first, second)
        again = SparseFeatures(cfg, 4096, 0, "toy", CPU)
        again.load_state_dict(state)
        assert torch.equal(again.next_batch(), second)
        assert not torch.equal(SparseFeatures(cfg, 4096, 0, "heldout", CPU).next_batch(), first)
        active = first[first != 0]
        assert abs(len(active) / first.numel() - cfg.feature_probability) < 3e-3
        assert low <= active.min() < low + 0.01 and 0.99 < active.max() <= 1
        assert abs(active.mean() - (low + 1) / 2) < 0.02


def test_rows_of_zeros_are_one_row_that_counts_as_many():
    x = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, -1.0]])
    rows = gathered(x)
    assert rows.x.tolist() == [[0.5, 0.0], [0.0, -1.0], [0.0, 0.0]] and rows.count.tolist() == [1, 1, 2]
    rows = gathered(x[1:2])
    assert rows.x.tolist() == [[0.5, 0.0]] and rows.count.tolist() == [1]
    cfg = toy_config("resid_mlp_1")
    some, whole = GatheredFeatures(cfg, 1024, 0, "spd", CPU), SparseFeatures(cfg, 1024, 0, "spd", CPU)
    for _ in range(2):
        batch, x = some.next_batch(), whole.next_batch()
        assert batch.count.sum() == 1024 and abs(len(batch.x) / 1024 - (1 - 0.99**100)) < 0.05
        assert torch.equal(batch.x[:-1], x[(x != 0).any(1)])
    assert some.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", ["tms_5_2_id", "resid_mlp_2"])
def test_a_toy_makes_the_same_of_zeros_whatever_stands_in_for_its_maps(name: str):
    """So that it does not matter that rows of zeros have their masks in common."""
    toy, spd = small_toy(name)
    zeros = torch.zeros(3, toy.wanted(torch.eye(5)).shape[1])
    made = ParameterDecomposition(find_maps(toy, spd.maps), spd.importance, 0, spd.tie)
    g = importances(made, toy, zeros)
    with made.installed(masks.stochastic(g, dict.fromkeys(g), spd.sampling, spd.delta)):
        masked = toy(zeros)
    torch.testing.assert_close(masked, toy(zeros))
    assert torch.equal(masked[0], masked[1])


@pytest.mark.parametrize("name", ["tms_5_2_id", "resid_mlp_2"])
def test_losses_and_gradients_of_counted_rows_are_those_of_all_rows(name: str):
    toy, spd = small_toy(name)
    # Masks that are not drawn, so that rows have the same ones in both.
    losses = {"r": ReconstructionConfig(coefficient=1.0, masks=Masks.importance, routing=Routing.layerwise)}
    spd = replace(spd, losses=losses, frequency=0.1)
    x = torch.zeros(7, 5)
    x[2, 1], x[3, 4], x[3, 0], x[6, 2] = 0.5, 1.0, 0.25, 0.75
    values = []
    for subject, batch in ((Vectors(toy), x), (CountedVectors(toy), gathered(x))):
        made = ParameterDecomposition(find_maps(toy, spd.maps), spd.importance, 0, spd.tie)
        objective = SPDObjective(made, subject, spd, (7,))
        loss, terms = objective.loss(batch, 0.5)
        loss.backward()
        assert terms["r"] > 0 and terms["minimality"] > 0
        values.append((loss.detach(), {key: p.grad for key, p in objective.named_parameters()}, terms))
    torch.testing.assert_close(values[0], values[1])


# --- scores, where the answer is known by construction ---

M = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])  # 3 features into 2 dimensions
READ = Features(torch.eye(3), read=True)


def components(V: Tensor, U: Tensor) -> Components:
    own = Components(linear_map("map", nn.Linear(V.shape[0], U.shape[1])), V.shape[1], torch.Generator())
    with torch.no_grad():
        own.V.copy_(V)
        own.U.copy_(U)
    return own


def test_a_component_for_each_feature_gets_full_marks_in_any_order_and_sign():
    order, sign = torch.tensor([2, 0, 1]), torch.tensor([1.0, -1.0, 5.0])
    V, U = (torch.eye(3) * sign)[:, order], (M / sign[:, None])[order]
    found = of_map(components(V, U), M, torch.eye(3)[:, order], None, READ)
    assert found.directions is not None
    assert found.directions.mmcs == pytest.approx(1) and found.directions.ml2r == pytest.approx(1)
    assert found.leftover == pytest.approx(0, abs=1e-6)
    assert (found.errors, found.n_used) == (0, 3)
    assert found.order.tolist() == [1, 2, 0] and torch.equal(found.importance, torch.eye(3))


def test_shrunken_components_keep_their_cosine_and_lose_their_length():
    found = of_map(components(torch.eye(3), M * torch.tensor([[1.0], [0.5], [0.0625]])), M, torch.eye(3), None, READ)
    assert found.directions is not None
    assert found.directions.mmcs == pytest.approx(1)
    assert found.directions.l2_ratio.tolist() == pytest.approx([1, 0.5, 0.0625])


def test_a_component_that_pushes_the_other_way_has_cosine_minus_one():
    found = of_map(components(-torch.eye(3), M), M, torch.eye(3), None, READ)
    assert found.directions is not None
    # Of feature 0, (2, 0): its own component gives (-2, 0), the others nothing, which points nowhere.
    assert found.directions.cosine[0] == 0
    one = of_map(components(-torch.eye(3)[:, :1], M[:1]), M, torch.ones(3, 1), None, READ)
    assert one.directions is not None and one.directions.cosine[0] == pytest.approx(-1)


def test_rank_one_pieces_that_are_no_mechanisms_do_not_pass():
    U, S, Vh = torch.linalg.svd(M)
    found = of_map(components(U[:, :2] * S, Vh), M, torch.ones(3, 2), None, READ)
    assert found.leftover == pytest.approx(0, abs=1e-6), "they are faithful all the same"
    assert found.directions is not None and found.directions.mmcs < 0.95
    # By hand: entries beyond the diagonal, 1 + 1 + 2, and the feature for which there is no column.
    assert found.errors == 5


def test_components_that_are_never_used_are_not_chosen():
    V = torch.cat([torch.eye(3), 1e-3 * torch.eye(3)], 1)
    U = torch.cat([M + 0.05, M])
    g = torch.cat([torch.eye(3), torch.full((3, 3), 0.09)], 1)
    found = of_map(components(V, U), M, g, None, READ)
    assert found.directions is not None
    assert found.directions.component.tolist() == [0, 1, 2] and found.n_used == 3
    nothing = of_map(components(V, U), M, torch.zeros(3, 6), None, READ)
    assert nothing.directions is None and nothing.errors == 3


def test_features_that_are_written_are_looked_for_in_the_other_factor():
    written = of_map(components(M.T, torch.eye(3)), M.T, torch.eye(3), None, Features(torch.eye(3), read=False))
    assert written.directions is not None
    assert written.directions.mmcs == pytest.approx(1) and written.directions.ml2r == pytest.approx(1)
    torch.testing.assert_close(written.directions.part, M)


def test_importances_are_counted_beyond_a_tolerance_from_what_is_known():
    g = torch.tensor([[0.0, 0.95, 0.0, 0.2], [0.89, 0.0, 0.05, 0.0]])
    order = permutation(g, None)
    assert order.tolist() == [1, 0, 3, 2]
    # Off: 0.89 is not 1, and 0.2 is not 0.
    assert errors(g[:, order], None) == 2
    order = permutation(g, 2)
    assert order.tolist() == [1, 0, 3, 2]
    assert errors(g[:, order], 2) == 1 and errors(g[:, order], 1) == 2 and errors(g[:, order], 3) == 0


def by_hand(toy: TMS, noise: float = 0.0) -> ParameterDecomposition:
    """Component j has row j of W^T, and matters where feature j exceeds 0.4."""
    maps = find_maps(toy, {"linear1": 5, "linear2": 5})
    own = ParameterDecomposition(maps, ImportanceConfig(kind=ImportanceKind.mlp, hidden=[1]), 0)
    W = toy.linear2.weight.detach()
    with torch.no_grad():
        own.components["linear1"].V.copy_(torch.eye(5))
        own.components["linear1"].U.copy_(W)
        own.components["linear2"].V.copy_(W.T / W.norm(dim=1).square())
        own.components["linear2"].U.copy_(torch.eye(5) * W.norm(dim=1).square())
        for bank in own.components.values():
            bank.U.add_(noise * torch.randn_like(bank.U))
        # q = gelu(50 a - 20), a = x_j in linear1; in linear2 neighbours on a pentagon add 0.31 of theirs.
        for name, value in own.importance.named_parameters():
            value.fill_({"W.0": 50.0, "b.0": -20.0, "W.1": 1.0, "b.1": 0.0}[name[-3:]])
    return own


def pentagon(cfg: ToyConfig) -> TMS:
    toy = build_toy(cfg, 0)
    assert isinstance(toy, TMS)
    angle = 2 * torch.pi * torch.arange(5) / 5
    with torch.no_grad():
        toy.linear1.weight.copy_(1.14 * torch.stack([angle.cos(), angle.sin()]))
        toy.tie()
    return toy.requires_grad_(False)


def test_a_whole_decomposition_made_by_hand_is_recovered_and_a_random_one_is_not():
    cfg = toy_config("tms_5_2")
    toy = pentagon(cfg)
    values = scores(toy_recovery(by_hand(toy), toy, cfg, 0))
    for name in ("linear1", "linear2"):
        assert values[f"mmcs/{name}"] == pytest.approx(1) and values[f"ml2r/{name}"] == pytest.approx(1)
        assert values[f"errors/{name}"] == 0 and values[f"used/{name}"] == 5
        assert values[f"leftover/{name}"] == pytest.approx(0, abs=1e-6)
        # A feature is above 0.4 on 0.05 * 0.6 of the rows.
        assert values[f"l0/{name}"] == pytest.approx(5 * 0.05 * 0.6, rel=0.15)
    noisy = scores(toy_recovery(by_hand(toy, noise=1.0), toy, cfg, 0))
    assert noisy["mmcs/linear1"] < 0.99
    random = ParameterDecomposition(
        find_maps(toy, {"linear1": 20}), ImportanceConfig(kind=ImportanceKind.mlp, hidden=[16]), 0
    )
    untrained = scores(toy_recovery(random, toy, cfg, 0))
    assert untrained["errors/linear1"] > 5 and untrained["leftover/linear1"] > 0.5


def test_the_report_says_what_was_found(tmp_path: Path):
    cfg = toy_config("tms_5_2")
    toy = pentagon(cfg)
    found = toy_recovery(by_hand(toy), toy, cfg, 0)
    table = report.summary(found)
    assert table["MMCS"].tolist() == ["1.0000"] * 2 and table["importances off"].tolist() == ["0", "0"]
    assert len(report.figure(found).axes) == 2 * 2 + 1, "importances and directions of two maps, and a colour bar"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["toy.per_feature=[linear1]"], "spd.maps has linear2, which one pattern of toy.per_feature"),
        (["spd.maps.linear1=4"], "spd.maps has 4 components for linear1, too few for one each of toy.n_features=5"),
        (["toy.d_mlp=3"], "toy.d_mlp=3, but toy.kind=tms has no MLP"),
        (["toy.feature_probability=0"], "toy.feature_probability=0.0 must be a probability above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(settings: list[str], said: str):
    with pytest.raises(SettingError, match="^" + said.replace("[", r"\[")) as refused:
        build.check(compose("exp_026_spd_toys", settings), patches=False)
    assert "\n" not in str(refused.value)


def test_a_toy_without_settings_of_its_decomposition_is_refused():
    with pytest.raises(SettingError, match="^spd=null says nothing of how the toy is decomposed"):
        build.check(replace(compose("exp_026_spd_toys"), spd=None), patches=False)


# --- the gate ---


@pytest.mark.slow
def test_superposition_is_taken_apart_into_its_features(tmp_path: Path):
    """exp_026's first toy as it is set; a minute of one CPU core."""
    cfg = compose("exp_026_spd_toys", ["device=cpu"])
    torch.manual_seed(cfg.seed)
    toy = build.trained_toy(cfg, tmp_path / "toy")
    values = scores(build.recovered_toy(cfg, toy, build.decomposed_toy(cfg, toy, tmp_path)))
    for name in ("linear1", "linear2"):
        assert values[f"mmcs/{name}"] > 0.99 and 0.98 < values[f"ml2r/{name}"] < 1.02, values
        assert values[f"errors/{name}"] == 0 and values[f"used/{name}"] == 5, values
