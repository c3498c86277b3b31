"""Adversarial masks: ascent on sources, on each batch anew or carried along, against slow code."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from spd_parts import chain, gradients, loss_term, objective_on_text, objective_on_vectors, small_language_model, text
from torch import Tensor, nn
from torch.testing import assert_close

from nndecomp.config.spd import Masks, Routing, SourceOptimizer, SourceScope, SourceStart
from nndecomp.decompositions.spd import masks
from nndecomp.decompositions.spd.adversary import PersistentSources, leading, pgd, spread, started
from nndecomp.errors import SettingError
from nndecomp.training.parameters import SPDObjective

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
SIZES = {"0": 5, "2": 5}


def made(**changes: Any) -> SPDObjective:
    """One adversarial loss `r`, alone, on a chain of two maps."""
    settings = {"masks": Masks.pgd, "source_start": SourceStart.zeros, **changes}
    losses = {"r": loss_term(settings.pop("masks"), **settings)}
    return objective_on_vectors(chain(4, 6, 3), losses, faithfulness=0.0, minimality=0.0, clip_components=None)


def gates_of(objective: SPDObjective) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    with objective.decomposition.recording(inputs), torch.no_grad():
        objective.subject.run(X)
    return {name: each.g for name, each in objective.decomposition.importances(inputs).items()}


def damage_by_hand(
    objective: SPDObjective, s: Mapping[str, Tensor], routes: Mapping[str, Tensor | None] | None = None
) -> Tensor:
    """m = g + (1 - g) s, mu = the last source, with a dense leftover."""
    x, gates = X, gates_of(objective)
    for name, layer in objective.subject.model.named_children():
        if not isinstance(layer, nn.Linear):
            x = layer(x)
            continue
        own, g = objective.decomposition.components[name], gates[name]
        m, mu = g + (1 - g) * s[name][..., :-1], s[name][..., -1:]
        D = layer.weight.T - own.V @ own.U
        z = (x @ own.V * m) @ own.U + mu * (x @ D) + layer.bias
        route = None if routes is None else routes[name]
        x = z if route is None else torch.where(route[:, None], z, layer(x))
    return (x - objective.subject.model(X)).square().mean()


def ascent_by_hand(
    objective: SPDObjective,
    s: dict[str, Tensor],
    n_steps: int,
    step_size: float,
    routes: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    for _ in range(n_steps):
        leaves = {name: each.clone().requires_grad_() for name, each in s.items()}
        found = torch.autograd.grad(damage_by_hand(objective, leaves, routes), list(leaves.values()))
        s = {name: (each + step_size * g.sign()).clamp(0, 1) for (name, each), g in zip(s.items(), found, strict=True)}
    return s


@pytest.mark.parametrize("scope", [SourceScope.single, SourceScope.each])
@pytest.mark.parametrize(("n_steps", "step_size"), [(1, 1.0), (4, 0.3)])
def test_the_loss_and_its_gradients_are_those_at_sources_that_ascent_found(
    scope: SourceScope, n_steps: int, step_size: float
):
    """Gradients of V, U and importances with the found sources held constant; each loss is one run more."""
    objective = made(source_scope=scope, n_steps=n_steps, step_size=step_size)
    n = 8 if scope is SourceScope.each else 1
    s = ascent_by_hand(objective, {name: torch.zeros(n, C + 1) for name, C in SIZES.items()}, n_steps, step_size)
    expected = damage_by_hand(objective, s)
    found, _ = objective.loss(X, 0.0)
    assert_close(found, expected)
    assert_close(gradients(found, objective), gradients(expected, objective), atol=1e-7, rtol=1e-4)
    assert float(found.detach()) > float(damage_by_hand(objective, {n: 0 * each for n, each in s.items()}).detach())


def test_routes_are_drawn_once_and_kept_while_sources_climb():
    """The fault: routes drawn anew at each step, so that what was climbed is not what is trained on."""
    objective = made(routing=Routing.subset, n_steps=3, step_size=0.4)
    torch.manual_seed(7)
    (routes,) = masks.routes_of(gates_of(objective), objective.cfg.losses["r"])
    start = {name: torch.zeros(1, C + 1) for name, C in SIZES.items()}
    s = ascent_by_hand(objective, start, 3, 0.4, routes)
    torch.manual_seed(7)
    assert_close(objective.loss(X, 0.0)[0], damage_by_hand(objective, s, routes))


def test_layerwise_attacks_are_on_one_map_each():
    objective = made(routing=Routing.layerwise, step_size=0.4)
    each = []
    for name in SIZES:
        only = {other: torch.zeros(8, dtype=torch.bool) if other != name else None for other in SIZES}
        start = {other: torch.zeros(1, C + 1) for other, C in SIZES.items()}
        each.append(damage_by_hand(objective, ascent_by_hand(objective, start, 1, 0.4, only), only))
    assert_close(objective.loss(X, 0.0)[0], torch.stack(each).mean())


def test_more_steps_do_more_damage():
    damages = [float(made(n_steps=n, step_size=0.1).loss(X, 0.0)[0].detach()) for n in (1, 3, 9)]
    assert damages == sorted(damages) and damages[0] < damages[-1]


def test_sources_stay_between_zero_and_one_and_carry_no_gradient():
    start = {"a": torch.tensor([[0.2, 0.9, 0.5]])}
    found = pgd(lambda s: (s["a"] * torch.tensor([1.0, 1.0, -1.0])).sum(), start, 3, 0.3)["a"]
    assert found.tolist() == [[1.0, 1.0, 0.0]] and not found.requires_grad
    assert start["a"].tolist() == [[pytest.approx(0.2), pytest.approx(0.9), 0.5]], "the start is left as it was"


@pytest.mark.parametrize("kind", [Masks.pgd, Masks.persistent_pgd])
def test_ascent_leaves_the_gradients_of_what_is_trained_alone(kind: Masks):
    """The fault: the ascent's backward passes adding to the gradients of V, U and importances."""
    objective = made(masks=kind, n_steps=3)
    marks = {name: torch.full_like(p, 3.0) for name, p in objective.named_parameters()}
    for name, p in objective.named_parameters():
        p.grad = marks[name].clone()
    objective.loss(X, 0.0)
    assert all(p.grad is not None and torch.equal(p.grad, marks[name]) for name, p in objective.named_parameters())
    assert all(p.grad is None for p in objective.subject.model.parameters())


def test_ascent_climbs_what_is_trained_on_a_language_model_too():
    target, batch = small_language_model(), text()
    damages = []
    for n_steps in (1, 6):
        term = loss_term(Masks.pgd, source_start=SourceStart.zeros, n_steps=n_steps, step_size=0.2)
        objective = objective_on_text(target, {"r": term}, chunk_values=400, faithfulness=0.0, minimality=0.0)
        damages.append(objective.loss(batch, 0.0)[0].item())
    assert 0 < damages[0] < damages[1]


# --- shapes ---


@pytest.mark.parametrize(
    ("scope", "of_text", "of_vectors"),
    [
        (SourceScope.single, (1, 1), (1,)),
        (SourceScope.across_batch, (1, 6), (1,)),
        (SourceScope.repeated, (2, 6), (2,)),
        (SourceScope.each, (4, 6), (4,)),
    ],
)
def test_how_many_sources_there_are(scope: SourceScope, of_text: tuple[int, ...], of_vectors: tuple[int, ...]):
    assert leading(scope, (4, 6), 2) == of_text
    assert leading(scope, (4,), 2) == of_vectors
    target = small_language_model()
    term = loss_term(Masks.persistent_pgd, source_scope=scope, source_repeats=2)
    objective = objective_on_text(target, {"r": term})
    shapes = {name: tuple(s.shape) for name, s in adversary_of(objective).raw().items()}
    assert shapes == {
        f"h.{layer}.mlp.{name}": (*of_text, C + 1) for name, C in (("c_fc", 5), ("down_proj", 4)) for layer in (0, 1)
    }
    assert objective.loss(text(), 0.0)[0].isfinite()


def test_repeated_sources_take_turns_over_the_sequences():
    s = torch.tensor([[[0.0]], [[1.0]]])
    assert spread(s, 6).flatten().tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.equal(spread(s, 2), s) and torch.equal(spread(s[:1], 6), s[:1])


def test_repeats_that_do_not_divide_the_batch_are_refused_before_training():
    term = loss_term(Masks.pgd, source_scope=SourceScope.repeated, source_repeats=3)
    with pytest.raises(SettingError, match="source_repeats=3 must divide the 4 sequences of a batch"):
        objective_on_text(small_language_model(), {"r": term})


def test_sources_start_as_they_are_told_to():
    def start(how: SourceStart) -> Tensor:
        return started((2, 3000), loss_term(Masks.pgd, source_start=how), torch.device("cpu"))

    assert not start(SourceStart.zeros).any() and bool((start(SourceStart.ones) == 1).all())
    drawn = start(SourceStart.random)
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1 and float(drawn.mean()) == pytest.approx(0.5, abs=0.02)


def test_the_last_source_is_of_what_the_components_leave_over():
    g, s = torch.tensor([[0.2, 0.6]]), torch.tensor([[0.5, 1.0, 0.25]])
    mask = masks.adversarial({"a": g}, {"a": None}, {"a": s}, delta=True)["a"]
    assert_close(mask.m, torch.tensor([[0.6, 1.0]]))
    assert mask.mu is not None and mask.mu.tolist() == [0.25]
    assert masks.adversarial({"a": g}, {"a": None}, {"a": s}, delta=False)["a"].mu is None


# --- persistent ---


def adversary_of(objective: SPDObjective) -> PersistentSources:
    adversary = objective.adversaries["r"]
    assert isinstance(adversary, PersistentSources)
    return adversary


def persistent(**changes: Any) -> SPDObjective:
    return made(
        masks=Masks.persistent_pgd, **{"n_steps": 0, "source_lr": 0.1, "source_start": SourceStart.random, **changes}
    )


def values(sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: s.clone() for name, s in sources.items()}


def gradient_by_hand(objective: SPDObjective, s: Mapping[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: each.clone().requires_grad_() for name, each in s.items()}
    found = torch.autograd.grad(damage_by_hand(objective, leaves), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_sources_climb_by_the_gradient_of_the_loss_that_trained_after_it_trained(coefficient: float):
    """The faults: a gradient at weights that have moved, one scaled by the coefficient, or one that other losses add to."""
    objective = persistent(source_optimizer=SourceOptimizer.adam)
    cfg = objective.cfg.losses["r"]
    cfg.coefficient = coefficient
    before = values(adversary_of(objective).raw())
    g = gradient_by_hand(objective, before)
    expected = damage_by_hand(objective, before)
    loss, terms = objective.loss(X, 0.0)
    assert_close(terms["r"], expected.detach())
    assert_close(values(adversary_of(objective).raw()), before, atol=0, rtol=0)
    loss.backward()
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(1.0)  # the optimiser's step comes between
    objective.after_step()
    # Adam's first step is lr * g / (|g| + epsilon), whatever the betas.
    for name, s in adversary_of(objective).raw().items():
        assert_close(s, (before[name] + 0.1 * g[name] / (g[name].abs() + 1e-8)).clamp(0, 1), atol=1e-4, rtol=0)
    mean = adversary_of(objective).get_buffer("mean_0")
    assert_close(mean, 0.1 * g["0"], atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("optimizer", SourceOptimizer)
@pytest.mark.parametrize("sigmoid", [True, False])
def test_several_updates_are_those_of_a_textbook(optimizer: SourceOptimizer, sigmoid: bool):
    term = loss_term(
        Masks.persistent_pgd, source_optimizer=optimizer, source_sigmoid=sigmoid, source_betas=[0.5, 0.9], source_lr=0.1
    )
    sources = PersistentSources({"a": 2}, (1,), term, torch.device("cpu"))
    raw = sources.raw()["a"].clone()
    m = v = torch.zeros(1, 3)
    for t in range(1, 6):
        g = torch.tensor([[1.0, -2.0, 0.01]]) * (-1) ** (t // 3) * t
        sources.update({"a": g}, 0.1)
        m, v = 0.5 * m + 0.5 * g, 0.9 * v + 0.1 * g * g
        adam = (m / (1 - 0.5**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        raw = raw + 0.1 * (g.sign() if optimizer is SourceOptimizer.sign else adam)
        raw = raw if sigmoid else raw.clamp(0, 1)
        assert_close(sources.raw()["a"], raw)


def test_adam_agrees_with_torchs():
    term = loss_term(Masks.persistent_pgd, source_sigmoid=True, source_betas=[0.5, 0.99])
    sources = PersistentSources({"a": 4}, (1,), term, torch.device("cpu"))
    theirs = nn.Parameter(sources.raw()["a"].clone())
    optimiser = torch.optim.Adam([theirs], lr=0.05, betas=(0.5, 0.99), maximize=True)
    for _ in range(10):
        g = torch.randn(1, 5)
        theirs.grad = g.clone()
        optimiser.step()
        sources.update({"a": g}, 0.05)
    assert_close(sources.raw()["a"], theirs.detach())


def test_steps_before_the_loss_are_on_its_batch_with_its_routes():
    objective = persistent(n_steps=2, source_optimizer=SourceOptimizer.sign, source_lr=0.2, routing=Routing.subset)
    before = values(adversary_of(objective).raw())
    torch.manual_seed(7)
    (routes,) = masks.routes_of(gates_of(objective), objective.cfg.losses["r"])
    s = ascent_by_hand(objective, before, 2, 0.2, routes)
    torch.manual_seed(7)
    _, terms = objective.loss(X, 0.0)
    assert_close(terms["r"], damage_by_hand(objective, s, routes).detach())
    assert_close(values(adversary_of(objective).raw()), s)


def test_sources_behind_a_sigmoid_start_as_the_others_and_need_no_clamp():
    torch.manual_seed(3)
    plain = adversary_of(persistent())
    torch.manual_seed(3)
    behind = adversary_of(persistent(source_sigmoid=True))
    for name, s in plain.values(plain.raw()).items():
        assert_close(behind.values(behind.raw())[name], s.clamp(1e-3, 1 - 1e-3))
    behind.update({name: torch.ones_like(s) for name, s in behind.raw().items()}, 50.0)
    assert all(bool((s <= 1).all()) for s in behind.values(behind.raw()).values())
    assert all(float(s.max()) > 2 for s in behind.raw().values())


def test_the_sources_rate_warms_up_over_its_share_of_training():
    objective = persistent(source_optimizer=SourceOptimizer.sign, source_lr_warmup=0.5)
    for progress, lr in [(0.0, 0.0), (0.25, 0.05), (0.5, 0.1), (0.9, 0.1)]:
        for s in adversary_of(objective).raw().values():
            s.fill_(0.5)
        objective.loss(X, progress)[0].backward()
        objective.after_step()
        moved = torch.cat([(s - 0.5).abs().flatten() for s in adversary_of(objective).raw().values()])
        assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], lr) if lr else moved[moved > 0])
        assert bool((moved > 0).any()) is (lr > 0)


def test_looking_moves_no_source():
    objective = persistent(n_steps=2)
    objective.loss(X, 0.25)[0].backward()
    objective.after_step()
    objective.eval()
    before, n_updates = values(adversary_of(objective).raw()), int(adversary_of(objective).n_updates)
    assert n_updates == 2 + 1
    with torch.no_grad():
        loss, terms = objective.loss(X, 0.5)
    objective.after_step()
    assert_close(values(adversary_of(objective).raw()), before, atol=0, rtol=0)
    assert_close(terms["r"], damage_by_hand(objective, before).detach())
    assert int(adversary_of(objective).n_updates) == n_updates and loss.isfinite()


def test_what_is_carried_survives_saving_bit_for_bit():
    objective = persistent(n_steps=2)
    for progress in (0.0, 0.1):
        objective.loss(X, progress)[0].backward()
        objective.after_step()
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    torch.manual_seed(99)
    other = persistent(n_steps=2)
    assert not torch.equal(adversary_of(other).raw()["0"], adversary_of(objective).raw()["0"])
    other.load_state_dict(state)
    for each in (objective, other):
        torch.manual_seed(5)
        each.loss(X, 0.2)[0].backward()
        each.after_step()
    ours, theirs = objective.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert int(adversary_of(other).n_updates) == 3 * 3


def test_carried_sources_of_runs_of_one_map_each_are_refused():
    with pytest.raises(SettingError, match="routing=layerwise has one run a map"):
        loss_term(Masks.persistent_pgd, routing=Routing.layerwise)
