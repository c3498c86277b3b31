"""What trains components and importances, on numbers that can be followed by hand or against loops."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from spd_parts import (
    chain,
    decomposed,
    gradients,
    loss_term,
    objective_on_text,
    objective_on_vectors,
    settings,
    small_language_model,
    text,
)
from tiny_models import N_VOCAB
from torch import Tensor, nn
from torch.testing import assert_close

from nndecomp.config.compose import compose
from nndecomp.config.registry import CONF
from nndecomp.config.spd import (
    ImportanceConfig,
    ImportanceKind,
    Masks,
    Reconstructed,
    ReconstructionConfig,
    Routing,
    Sampling,
)
from nndecomp.decompositions.spd import masks
from nndecomp.decompositions.spd.components import Components
from nndecomp.decompositions.spd.losses import faithfulness, minimality, minimality_at, p_at
from nndecomp.decompositions.spd.sigmoids import LEAK, lower_leaky, upper_leaky
from nndecomp.errors import SettingError
from nndecomp.targets.maps import linear_map
from nndecomp.tokens.batch import TokenBatch
from nndecomp.training.parameters import SPDObjective
from nndecomp.training.subjects import LanguageModel

# --- sigmoids ---


def slope(function: Callable[[Tensor], Tensor], q: float, delta: float) -> float:
    """What arrives at q when the gradient delta arrives at function(q)."""
    leaf = torch.tensor(q, requires_grad=True)
    return torch.autograd.grad(function(leaf), leaf, torch.tensor(delta))[0].item()


def test_the_two_sigmoids_by_hand():
    q = torch.tensor([-3.0, 0.0, 0.25, 1.0, 3.0])
    assert lower_leaky(q).tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert upper_leaky(q).tolist() == pytest.approx([0.0, 0.0, 0.25, 1.0, 1.02])


@pytest.mark.parametrize(
    ("q", "from_above", "from_below"),
    # delta = 2: the loss wants g smaller; delta = -2: larger
    [(-3.0, 0.0, -2 * LEAK), (0.0, 0.0, -2 * LEAK), (0.5, 2.0, -2.0), (1.0, 2.0, -2.0), (1.5, 0.0, 0.0)],
)
def test_the_gradient_of_masks_leaks_below_zero_one_way(q: float, from_above: float, from_below: float):
    """The faults: a leak that pushes components that are off further off, or the logit itself for the mask."""
    assert slope(lower_leaky, q, 2.0) == pytest.approx(from_above)
    assert slope(lower_leaky, q, -2.0) == pytest.approx(from_below)


@pytest.mark.parametrize(("q", "share"), [(-3.0, 0.0), (0.0, 0.0), (0.5, 1.0), (1.0, 1.0), (1.5, LEAK)])
def test_the_gradient_of_minimality_leaks_above_one_both_ways(q: float, share: float):
    for delta in (2.0, -2.0):
        assert slope(upper_leaky, q, delta) == pytest.approx(share * delta)


def test_masks_get_the_lower_and_minimality_the_upper_of_one_logit():
    """The fault: lower and upper exchanged. At q = 2 masks are 1 and the penalty sees 1 + LEAK; both are what is reported of one q."""
    from nndecomp.decompositions.spd.decomposition import Importances

    importances = Importances(torch.tensor([2.0, -1.0]))
    assert importances.g.tolist() == [1.0, 0.0]
    assert importances.h.tolist() == pytest.approx([1.01, 0.0])


# --- masks ---

GATES = {"a": torch.tensor([[0.0, 0.3, 1.0]]).expand(20_000, 3), "b": torch.zeros(20_000, 2)}
EVERYWHERE = dict.fromkeys(GATES)


def test_stochastic_masks_are_even_between_the_importance_and_one():
    drawn = masks.stochastic(GATES, EVERYWHERE, Sampling.continuous, delta=True)["a"]
    for c, g in enumerate([0.0, 0.3, 1.0]):
        m = drawn.m[:, c]
        assert float(m.min()) >= g and float(m.max()) <= 1
        rho = (m - g) / (1 - g) if g < 1 else None
        if rho is not None:
            counts = torch.histc(rho, bins=10, min=0, max=1) / len(rho)
            assert_close(counts, torch.full((10,), 0.1), atol=0.01, rtol=0)
    assert drawn.mu is not None
    assert_close(torch.histc(drawn.mu, bins=10, min=0, max=1) / 20_000, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_every_map_position_component_and_leftover_has_a_draw_of_its_own():
    drawn = masks.stochastic(GATES, EVERYWHERE, Sampling.continuous, delta=True)
    a, b = drawn["a"], drawn["b"]
    assert a.mu is not None and b.mu is not None
    columns = torch.stack([a.m[:, 0], (a.m[:, 1] - 0.3) / 0.7, b.m[:, 0], b.m[:, 1], a.mu, b.mu])
    assert_close(torch.corrcoef(columns), torch.eye(6), atol=0.03, rtol=0)
    lagged = torch.corrcoef(torch.stack([a.m[1:, 0], a.m[:-1, 0]]))[0, 1]
    assert abs(float(lagged)) < 0.03


def test_masks_of_two_values_are_the_importance_or_one_with_even_chances():
    drawn = masks.stochastic(GATES, EVERYWHERE, Sampling.binomial, delta=False)["a"]
    assert drawn.mu is None
    values, counts = drawn.m[:, 1].unique(return_counts=True)
    assert_close(values, torch.tensor([0.3, 1.0]))
    assert_close(counts / 20_000, torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)


def test_a_mask_follows_the_importance_by_one_minus_rho():
    g = torch.rand(50, 4, requires_grad=True)
    drawn = masks.stochastic({"a": g}, {"a": None}, Sampling.continuous, delta=False)["a"]
    rho = ((drawn.m - g) / (1 - g)).detach()
    (found,) = torch.autograd.grad(drawn.m.sum(), g)
    assert_close(found, 1 - rho)


def test_the_gate_of_two_valued_masks_is_blurred_downwards():
    """1.05 q - 0.05 U(0, 1): even between 1.05 q - 0.05 and 1.05 q, then the lower-leaky sigmoid."""
    q = torch.tensor([[0.5, 0.0, 1.1]]).expand(20_000, 3)
    assert torch.equal(masks.gate(q, Sampling.continuous), lower_leaky(q))
    g = masks.gate(q, Sampling.binomial)
    assert 0.475 <= float(g[:, 0].min()) < 0.4755 and 0.5245 < float(g[:, 0].max()) <= 0.525
    assert float(g[:, 0].mean()) == pytest.approx(0.5, abs=1e-3)
    assert not g[:, 1].any() and bool((g[:, 2] == 1).all())


def test_importances_and_ones_as_masks_leave_nothing_over():
    """The fault: what the components leave over taken along where the components alone are judged."""
    assert torch.equal(masks.important(GATES, EVERYWHERE)["a"].m, GATES["a"])
    assert bool((masks.ones(GATES, EVERYWHERE)["a"].m == 1).all())
    for drawn in (masks.important(GATES, EVERYWHERE), masks.ones(GATES, EVERYWHERE)):
        assert list(drawn) == ["a", "b"] and all(each.mu is None for each in drawn.values())


# --- routing ---


def test_each_number_of_maps_is_as_likely_and_each_set_of_that_many():
    """The fault: a coin for each map, which makes few-map and all-map runs rare."""
    n = 60_000
    chosen = masks.subset(3, (n // 10, 10), torch.device("cpu"))
    assert chosen.shape == (3, n // 10, 10)
    counts = Counter(tuple(each) for each in chosen.flatten(1).T.tolist())
    assert len(counts) == 7 and (False, False, False) not in counts
    for maps, count in counts.items():
        expected = 1 / 3 / math.comb(3, sum(maps))
        assert count / n == pytest.approx(expected, abs=0.01)


def test_positions_are_routed_independently():
    chosen = masks.subset(4, (20_000, 2), torch.device("cpu")).float()
    for one in range(4):
        across = torch.corrcoef(torch.stack([chosen[one, :, 0], chosen[one, :, 1]]))[0, 1]
        assert abs(float(across)) < 0.03


def routes(routing: Routing, **changes: Any) -> list[masks.Routes]:
    return masks.routes_of(GATES, loss_term(Masks.stochastic, routing=routing, **changes))


def test_runs_of_each_routing():
    assert routes(Routing.all) == [{"a": None, "b": None}]
    assert routes(Routing.layerwise) == [{"a": None}, {"b": None}]
    (subset,) = routes(Routing.subset)
    a, b = subset["a"], subset["b"]
    assert a is not None and b is not None and bool((a | b).all())
    assert float(a.float().mean()) == pytest.approx(0.75, abs=0.02)
    (share,) = routes(Routing.share, routed_share=0.2)
    assert share["a"] is not None and float(share["a"].float().mean()) == pytest.approx(0.2, abs=0.02)


# --- faithfulness ---


def bank(M: Tensor, V: Tensor, U: Tensor) -> Components:
    module = nn.Linear(*M.shape, bias=False).requires_grad_(False)
    own = Components(linear_map("m", module), V.shape[1], torch.Generator())
    own.V.data, own.U.data = V, U
    return own


def test_faithfulness_is_one_mean_over_all_entries_of_all_maps():
    """The fault: a mean of the maps' means, in which entries of small maps weigh more."""
    small, large = torch.full((1, 1), 3.0), torch.full((2, 4), 1.0)
    own = [
        bank(small, torch.zeros(1, 1), torch.zeros(1, 1)),  # 1 entry, error 9
        bank(large, torch.ones(2, 1), torch.full((1, 4), 0.5)),  # 8 entries, errors 0.25
    ]
    assert faithfulness([small, large], own).item() == pytest.approx((9 + 8 * 0.25) / 9)


def test_faithfulness_is_zero_for_components_that_are_exact_and_teaches_V_and_U():
    M = torch.randn(3, 4)
    own = bank(M, torch.eye(3), M.clone())
    assert faithfulness([M], [own]).item() == 0
    own.U.data = own.U.data + 1
    found = torch.autograd.grad(faithfulness([M], [own]), [own.V, own.U])
    error = torch.ones(3, 4)
    assert_close(found[0], 2 / 12 * error @ own.U.detach().T)
    assert_close(found[1], 2 / 12 * own.V.detach().T @ error)


# --- minimality ---


def test_minimality_sums_over_components_and_maps_and_averages_over_positions():
    """The fault: a mean over components or maps, by which coefficients would be off by their number."""
    upper = {"a": torch.tensor([[[0.5, 1.0], [0.0, 1.01]]]), "b": torch.tensor([[[0.2], [0.4]]])}
    expected = (0.25 + 1 + 0 + 1.01**2) / 2 + (0.04 + 0.16) / 2
    assert minimality(upper, None, 2.0, 0.0).item() == pytest.approx(expected)


def test_minimality_makes_frequent_components_cost_more():
    """mean (1 + beta log2(1 + sum)), the sum over the batch: by hand, and so the loss depends on the batch's size."""
    h = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    expected = 1 * (1 + 0.5 * math.log2(1 + 3)) + 1 / 3 * (1 + 0.5 * math.log2(1 + 1))
    assert minimality({"a": h}, None, 1.0, 0.5).item() == pytest.approx(expected)
    assert minimality({"a": h.repeat(2, 1)}, None, 1.0, 0.5).item() > expected
    assert minimality({"a": h.repeat(2, 1)}, None, 1.0, 0.0).item() == pytest.approx(4 / 3)


@pytest.mark.parametrize("frequency", [0.0, 0.5])
def test_padding_costs_nothing(frequency: float):
    h, real = torch.rand(2, 3, 4), torch.tensor([[True, True, True], [True, False, False]])
    assert_close(
        minimality({"a": h}, real, 0.7, frequency), minimality({"a": h[real]}, None, 0.7, frequency), rtol=1e-5, atol=0
    )


def test_below_a_power_of_one_what_is_off_costs_and_moves_nothing_and_nothing_is_nan():
    """The fault: p h^(p-1) at h = 0 is infinite, and infinite times the sigmoid's 0 is no number."""
    q = torch.tensor([[-1.0, 0.0, 1e-9, 0.5, 2.0]], requires_grad=True)
    loss = minimality({"a": upper_leaky(q)}, None, 0.3, 0.1)
    (found,) = torch.autograd.grad(loss, q)
    assert bool(found.isfinite().all()) and found[0, :2].tolist() == [0.0, 0.0]
    assert bool((found[0, 2:] > 0).all())
    off = torch.zeros(3, 5, requires_grad=True)
    loss = minimality({"a": off}, None, 0.3, 0.0)
    assert loss.item() == pytest.approx(5 * 1e-12**0.3)
    (found,) = torch.autograd.grad(loss, off)
    assert_close(found, torch.full((3, 5), 0.3 * 1e-12**-0.7 / 3), rtol=1e-4, atol=0)


def test_powers_are_taken_in_float32():
    h = torch.tensor([[0.01, 1.0]], dtype=torch.bfloat16)
    assert minimality({"a": h}, None, 0.4, 0.0).dtype == torch.float32


def test_the_power_moves_straight_from_start_to_end():
    """The fault: annealed upwards, or in steps counted anew."""
    cfg = settings({"r": loss_term(Masks.ones)}, p_start=2.0, p_end=0.4, p_anneal=[0.25, 0.75])
    found = [p_at(progress, cfg) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([2.0, 2.0, 1.2, 0.4, 0.4])
    still = settings({"r": loss_term(Masks.ones)}, p_start=2.0, p_end=None)
    assert [p_at(progress, still) for progress in (0.0, 0.5, 1.0)] == [2.0, 2.0, 2.0]


def test_the_coefficient_of_minimality_moves_by_equal_factors_and_weighs_the_loss():
    anneal = {"minimality": 0.16, "minimality_end": 0.01, "minimality_anneal": [0.25, 0.75]}
    cfg = settings({"r": loss_term(Masks.ones)}, **anneal)
    found = [minimality_at(progress, cfg) for progress in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([0.16, 0.16, 0.08, 0.04, 0.01, 0.01])
    assert minimality_at(0.5, settings({"r": loss_term(Masks.ones)}, minimality=0.16)) == 0.16
    made = objective_on_vectors(chain(4, 6, 3), {"r": loss_term(Masks.importance)}, faithfulness=0.0, **anneal)
    for progress, coefficient in ((0.0, 0.16), (0.5, 0.04)):
        total, terms = made.loss(X, progress)
        assert_close(total, terms["r"] + coefficient * terms["minimality"])


# --- divergence ---


def rows_of(target: Any, batch: TokenBatch, seed: int = 0) -> Tensor:
    final = target.final(batch.tokens)
    return final + torch.randn(final.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk_values", [2**26, 5 * N_VOCAB, 7 * N_VOCAB])
def test_the_divergence_is_from_the_undisturbed_run_summed_over_words_averaged_over_real_positions(chunk_values: int):
    """The fault: KL(Q || P), or a mean over the vocabulary. Chunks of 5 and 7 of 24 positions are the same to rounding."""
    target, batch = small_language_model(), text(padding=2)
    subject = LanguageModel(target, chunk_values)
    masked = rows_of(target, batch).requires_grad_()
    found = subject.divergence(subject.reference(target.final(batch.tokens)), masked, batch)
    P, Q = target.logits(batch.tokens).softmax(-1), target.head(masked).softmax(-1)
    each = (P * (P / Q).log()).sum(-1)
    expected = each[batch.mask].sum() / 22
    assert_close(found, expected)
    (ours,), (theirs,) = torch.autograd.grad(found * 3, masked), torch.autograd.grad(expected * 3, masked)
    assert_close(ours, theirs, atol=1e-7, rtol=1e-4)
    assert not ours[~batch.mask].any() and bool(ours[batch.mask].any())
    other_way = (Q * (Q / P).log()).sum(-1)[batch.mask].mean()
    assert not torch.allclose(found, other_way, rtol=1e-2)


def test_the_divergence_without_gradients_is_the_same_number():
    target, batch = small_language_model(), text()
    subject = LanguageModel(target, 5 * N_VOCAB)
    masked, reference = rows_of(target, batch), subject.reference(target.final(batch.tokens))
    with torch.no_grad():
        without = subject.divergence(reference, masked, batch)
    assert torch.equal(without, subject.divergence(reference, masked.requires_grad_(), batch).detach())


def test_no_gradient_reaches_the_undisturbed_run():
    """The fault: a reference that moves towards what is trained."""
    target, batch = small_language_model(), text()
    subject = LanguageModel(target)
    clean = target.final(batch.tokens).requires_grad_()
    assert not subject.reference(clean).requires_grad


# --- reconstruction ---


def one_loss(model: nn.Module, term: ReconstructionConfig, x: Tensor, **changes: Any) -> tuple[Tensor, SPDObjective]:
    """The unweighted loss `r` alone, drawn from seed 7, with its graph; beside it what it is of."""
    made = objective_on_vectors(model, {"r": term}, faithfulness=0.0, minimality=0.0, **changes)
    torch.manual_seed(7)
    return made.loss(x, 0.0)[0], made


def gates_of(made: SPDObjective, x: Tensor) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    with torch.no_grad(), made.decomposition.recording(inputs):
        made.subject.run(x)
    return {name: each.g for name, each in made.decomposition.importances(inputs).items()}


def forward_by_hand(
    made: SPDObjective, x: Tensor, drawn: Mapping[str, tuple[Tensor, Tensor | None]], route: Mapping[str, Tensor | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The chain with dense leftovers; what each map returns beside the output."""
    outputs = {}
    for name, layer in made.subject.model.named_children():
        if not isinstance(layer, nn.Linear):
            x = layer(x)
            continue
        plain = x @ layer.weight.T + layer.bias
        if name in drawn:
            own, (m, mu), where = made.decomposition.components[name], drawn[name], route[name]
            z = (x @ own.V * m) @ own.U + layer.bias
            if mu is not None:
                z = z + mu[:, None] * (x @ (layer.weight.T - own.V @ own.U))
            plain = z if where is None else torch.where(where[:, None], z, plain)
            outputs[name] = plain
        x = plain
    return x, outputs


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
# What components read is known before the masked runs where importances see it, and not where they see x.
IMPORTANCES = [
    ImportanceConfig(kind=ImportanceKind.mlp, hidden=[6]),
    ImportanceConfig(kind=ImportanceKind.shared_mlp, hidden=[6]),
]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("routing", [Routing.all, Routing.subset, Routing.share])
def test_stochastic_reconstruction_is_by_the_masks_that_the_generator_gives(
    routing: Routing, delta: bool, importance: ImportanceConfig
):
    """Importances of the undisturbed run, components on what arrives. The faults: importances of the masked run, and
    components on undisturbed inputs."""
    model, term = chain(4, 6, 6, 3), loss_term(Masks.stochastic, routing=routing)
    found, made = one_loss(model, term, X, delta=delta, importance=importance)
    gates = gates_of(made, X)
    torch.manual_seed(7)
    (route,) = masks.routes_of(gates, term)
    drawn = masks.stochastic(gates, route, Sampling.continuous, delta)
    y, _ = forward_by_hand(made, X, {name: (each.m, each.mu) for name, each in drawn.items()}, route)
    expected = (y - model(X)).square().mean()
    assert_close(found, expected)
    assert_close(gradients(found, made), gradients(expected, made), atol=1e-7, rtol=1e-4)
    assert all(bool(g.any()) for g in gradients(found, made).values()), "everything that is trained is reached"


def test_reconstruction_by_importances_is_what_the_components_do_alone():
    """The fault: what is left over, taken along with mask 1 or 0.5."""
    model = chain(4, 6, 6, 3)
    found, made = one_loss(model, loss_term(Masks.importance), X)
    drawn = {name: (g, None) for name, g in gates_of(made, X).items()}
    y, _ = forward_by_hand(made, X, drawn, dict.fromkeys(drawn))
    assert_close(found, (y - model(X)).square().mean())


def test_unmasked_reconstruction_is_of_V_U_alone():
    model = chain(4, 6, 3)
    found, made = one_loss(model, loss_term(Masks.ones), X)
    (W0, b0), (W2, b2) = ((layer.weight, layer.bias) for layer in model if isinstance(layer, nn.Linear))
    first, last = (each.product() for each in made.decomposition.components.values())
    y = torch.relu(X @ first + b0) @ last + b2
    clean = torch.relu(X @ W0.T + b0) @ W2.T + b2
    assert_close(found, (y - clean).square().sum() / clean.numel())


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_layerwise_reconstruction_is_the_mean_over_maps_of_runs_with_one_map_replaced(importance: ImportanceConfig):
    model = chain(4, 6, 6, 3)
    found, made = one_loss(model, loss_term(Masks.importance, routing=Routing.layerwise), X, importance=importance)
    gates = gates_of(made, X)
    each = []
    for name, g in gates.items():
        y, _ = forward_by_hand(made, X, {name: (g, None)}, {name: None})
        each.append((y - model(X)).square().mean())
    assert len(each) == 3
    expected = torch.stack(each).mean()
    assert_close(found, expected)
    assert_close(gradients(found, made), gradients(expected, made), atol=1e-7, rtol=1e-4)


def test_samples_have_masks_and_routes_of_their_own_and_are_averaged():
    """The fault: routes drawn once for all samples."""
    model, term = chain(4, 6, 3), loss_term(Masks.stochastic, routing=Routing.subset, n_samples=3)
    found, made = one_loss(model, term, X)
    gates = gates_of(made, X)
    torch.manual_seed(7)
    drawn_routes = [masks.routes_of(gates, term)[0] for _ in range(3)]
    each = []
    for route in drawn_routes:
        drawn = masks.stochastic(gates, route, Sampling.continuous, True)
        y, _ = forward_by_hand(made, X, {name: (mask.m, mask.mu) for name, mask in drawn.items()}, route)
        each.append((y - model(X)).square().mean())
    assert_close(found, torch.stack(each).mean())


def test_hidden_reconstruction_compares_what_the_maps_return():
    """Mean over entries of each map's output, then over maps."""
    model = chain(4, 6, 3)
    found, made = one_loss(model, loss_term(Masks.importance, reconstructed=Reconstructed.hidden), X)
    drawn = {name: (g, None) for name, g in gates_of(made, X).items()}
    _, outputs = forward_by_hand(made, X, drawn, dict.fromkeys(drawn))
    clean = {"0": model[0](X), "2": model(X)}
    expected = torch.stack([(outputs[name] - clean[name]).square().mean() for name in outputs]).mean()
    assert_close(found, expected)


@pytest.mark.parametrize("reconstructed", Reconstructed)
def test_padding_does_not_matter_to_any_loss(reconstructed: Reconstructed):
    """What stands in padded places changes no term and no gradient."""
    target = small_language_model()
    losses = {"r": loss_term(Masks.importance, reconstructed=reconstructed)}
    made = objective_on_text(target, losses, frequency=0.1)
    a = text(padding=3)
    other = TokenBatch(a.tokens.where(a.mask, torch.tensor(7)), a.mask, a.is_bos)
    assert not torch.equal(a.tokens, other.tokens)
    (one, terms), (two, again) = made.loss(a, 0.0), made.loss(other, 0.0)
    assert_close(terms, again)
    assert_close(gradients(one, made), gradients(two, made))


def test_the_loss_is_the_weighted_sum_of_its_terms():
    model = chain(4, 6, 3)
    losses = {
        "a": ReconstructionConfig(coefficient=0.5, masks=Masks.importance),
        "b": ReconstructionConfig(coefficient=2.0, masks=Masks.ones),
    }
    made = objective_on_vectors(model, losses, faithfulness=10.0, minimality=0.1)
    loss, terms = made.loss(X, 0.0)
    expected = 10 * terms["faithfulness"] + 0.1 * terms["minimality"] + 0.5 * terms["a"] + 2 * terms["b"]
    assert_close(loss.detach(), expected)
    assert torch.equal(loss.detach(), terms["loss"])


def test_active_components_are_those_strictly_above_zero_and_minimality_sees_how_far_above_one():
    """The faults: components at exactly 0 counted, which are all that are off; the penalty of what masks are made of."""
    model = chain(4, 6)
    made = objective_on_vectors(model, {"r": loss_term(Masks.ones)})
    importance = made.decomposition.importance
    with torch.no_grad():
        for parameter in importance.parameters():
            parameter.zero_()
        dict(importance.named_parameters())["functions.0.b.1"].copy_(torch.tensor([0.0, -1.0, 1e-6, 0.5, 2.0]))
    terms = made.loss(X, 0.0)[1]
    assert terms["l0/0"].item() == 3.0
    assert terms["minimality"].item() == pytest.approx(0.25 + 1.01**2)


def test_a_language_model_reconstructed_by_everything_has_no_loss():
    """All ones and the whole leftover, on a real architecture: zero KL, whatever V and U are."""
    target, batch, scalar = small_language_model(), text(), ImportanceConfig(kind=ImportanceKind.mlp)
    decomposition = decomposed(target.module(), {"h.*.mlp.*_*": 5, "h.*.attn.*_proj": 3, "wte": 4}, scalar)
    subject = LanguageModel(target)
    clean = target.final(batch.tokens)
    rows = tuple(batch.tokens.shape)
    whole = {
        name: masks.Mask(torch.ones(*rows, own.n_components), torch.ones(rows), None)
        for name, own in decomposition.components.items()
    }
    assert len(whole) == 2 * 6 + 1
    with decomposition.installed(whole):
        masked = subject.run(batch)
    assert torch.equal(masked, clean)
    assert subject.divergence(subject.reference(clean), masked, batch).item() == pytest.approx(0, abs=1e-7)


def test_zero_masks_keep_the_biases():
    """The fault: a baseline without components that loses the biases too."""
    model = chain(4, 6, 3)
    made = objective_on_vectors(model, {"r": loss_term(Masks.ones)})
    nothing = {name: masks.Mask(torch.zeros(8, 5), None, None) for name in ("0", "2")}
    with made.decomposition.installed(nothing):
        y = model(X)
    last = model[2]
    assert isinstance(last, nn.Linear)
    assert_close(y, last.bias.expand(8, 3))


# --- settings ---


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"losses": {}}, "spd.losses={} reconstructs nothing"),
        ({"losses": {"minimality": loss_term(Masks.ones)}}, "a loss called minimality"),
        ({"losses": {"a b": loss_term(Masks.ones)}}, "a loss called a b"),
        ({"maps": {}}, "spd.maps={} names no map"),
        ({"maps": {"h": 0}}, "spd.maps has 0 components for h"),
        ({"p_anneal": [0.5, 0.5]}, r"spd.p_anneal=\[0.5, 0.5\] must be two increasing shares"),
        ({"minimality_anneal": [0.0, 1.5]}, r"spd.minimality_anneal=\[0.0, 1.5\] must be two increasing shares"),
        ({"minimality": 0.0, "minimality_end": 0.1}, "spd.minimality_end=0.1 is approached by factors"),
        ({"minimality_end": 0.0}, "both must be positive; null keeps the first"),
        ({"p_start": 0.0}, "spd.p_start=0.0 must be positive"),
        ({"faithfulness": -1.0}, "spd.faithfulness=-1.0 must not be negative"),
        ({"clip_components": 0.0}, "spd.clip_components=0.0 must be positive; null clips nothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str):
    losses = changes.pop("losses", {"r": loss_term(Masks.ones)})
    with pytest.raises(SettingError, match=sentence):
        settings(losses, **changes)


@pytest.mark.parametrize(
    ("setting", "maps", "losses"),
    [
        ("~spd.losses.stochastic_subset +spd.losses={pgd: {coefficient: 0.5, masks: pgd}}", 2, {"pgd": 0.5}),
        ("+spd.losses={pgd: {coefficient: 0.5, masks: pgd}}", 2, {"stochastic_subset": 1.0, "pgd": 0.5}),
        ("spd.losses.stochastic_subset.coefficient=0.5", 2, {"stochastic_subset": 0.5}),
        ("+spd.maps={h.*.attn.o_proj: 64}", 3, {"stochastic_subset": 1.0}),
        ("spd.maps={h.*.mlp.c_fc: 64}", 2, {"stochastic_subset": 1.0}),
        ("+spd.maps={h.*.mlp.c_fc.pre_identity: 64}", 3, {"stochastic_subset": 1.0}),
    ],
)
def test_the_command_lines_of_the_presets_readme_do_what_it_says(setting: str, maps: int, losses: dict[str, float]):
    asked = re.split(r" (?=[+~])", setting)
    text = (CONF / "spd" / "README.md").read_text()
    assert all(each in text for each in asked)
    spd = compose("exp_023_train_spd_pile", ["+scale=tiny", *asked]).spd
    assert spd is not None and len(spd.maps) == maps
    assert {name: each.coefficient for name, each in spd.losses.items()} == losses
