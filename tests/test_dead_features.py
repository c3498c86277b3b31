"""What revives features that no longer fire: aux-k, ghost gradients, resampling; and what counts as dead."""

from typing import Any

import numpy as np
import pytest
import torch
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, D, F, objective, planted, train

from nndecomp.config.schema import (
    Activation,
    Architecture,
    CodeNormalisation,
    Dead,
    Decoder,
    Encoder,
)
from nndecomp.decompositions.dead import aux_k, dead_pre_activations, ghost
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.decompositions.resampling import draw, living_norm, resample
from nndecomp.training.optimisers import forget

ONE = {"architecture": Architecture.transcoder, "layers": [1]}
SAE = ARCHITECTURES["sae"]
DECOUPLED = {
    **ARCHITECTURES["crosscoder"],
    "code_normalisation": CodeNormalisation.decoupled,
    "activation": Activation.batchtopk,
    "k": 3,
}
SLEEP = -1e6


def kill(made: DictionaryObjective, n: int = 5) -> None:
    """The first n features of each group do not fire any more, and count as dead."""
    with torch.no_grad():
        for bank in made.dictionary.banks:
            if made.cfg.activation is Activation.abs_topk:
                bank.W_enc[:n] = bank.b_enc[:n] = 0
            else:
                bank.b_enc[:n] = SLEEP
    made.loss(planted(made.layout, 100, seed=5), 0.5)
    made.after_step()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_aux_k_is_its_formula():
    """The residual is given, and decoded without bias."""
    residual, pre, W_dec = random(30, 3).requires_grad_(), random(30, 4).requires_grad_(), random(4, 3)
    fast = aux_k(residual, pre, None, W_dec, k=2)
    fast.backward()
    e, z = residual.detach().numpy(), pre.detach().numpy()
    e_hat = np.zeros_like(e)
    for token in range(30):
        for i in np.argsort(-z[token])[:2]:
            e_hat[token] += max(z[token, i], 0) * W_dec[i].numpy()
    np.testing.assert_allclose(float(fast.detach()), ((e - e_hat) ** 2).sum() / ((e - e.mean(0)) ** 2).sum())
    assert residual.grad is None and pre.grad is not None and (pre.grad != 0).any(0).all()


def test_aux_k_compares_features_by_z_c_and_adds_them_by_z():
    pre, W_dec = torch.tensor([[1.0, 2.0]]).double(), torch.eye(2).double()
    residual = torch.tensor([[3.0, 3.0], [0.0, 0.0]]).double()
    alone = aux_k(residual, pre.repeat(2, 1), torch.tensor([5.0, 1.0]), W_dec, k=1)
    # Feature 0 is chosen, since 1 * 5 > 2 * 1, and its code is 1: errors (2, 3) and (1, 0); the spread is 4 * 1.5^2.
    assert float(alone) == pytest.approx((4 + 9 + 1 + 0) / 9)


def test_aux_k_of_a_perfect_reconstruction_is_0_and_finite():
    pre = torch.randn(5, 2, requires_grad=True)
    aux = aux_k(torch.zeros(5, 3), pre, None, torch.randn(2, 3), 1)
    aux.backward()
    assert float(aux.detach()) == 0 and pre.grad is not None and pre.grad.isfinite().all()


def test_signed_codes_reconstruct_the_residual_with_their_sign():
    residual = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    pre = torch.tensor([[1.0, 0.1], [-1.0, 0.1]])
    assert float(aux_k(residual, pre, None, torch.eye(2), 1, signed=True)) == 0
    assert float(aux_k(residual, pre, None, torch.eye(2), 1)) > 0


def test_ghost_gradients_are_their_formula():
    residual, pre, W_dec = random(20, 3), random(20, 4).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    fit = torch.tensor(0.7, dtype=torch.float64)
    term = ghost(residual, pre, W_dec, fit)
    assert float(term.detach()) == pytest.approx(0.7), "as large as the reconstruction loss"
    term.backward()

    out = pre.exp() @ W_dec
    half = (residual.norm(dim=1, keepdim=True) / 2 / out.norm(dim=1, keepdim=True)).detach()
    error = (residual - half * out).square().sum(1).mean()
    ours = pre.grad.clone(), W_dec.grad.clone()
    pre.grad = W_dec.grad = None
    (0.7 / error.detach() * error).backward()
    torch.testing.assert_close(ours, (pre.grad, W_dec.grad))
    torch.testing.assert_close((half * out).norm(dim=1), residual.norm(dim=1) / 2)


def test_ghosts_of_large_pre_activations_stay_finite():
    pre = torch.tensor([[500.0, -500.0]], requires_grad=True)
    ghost(torch.ones(1, 2), pre, torch.eye(2), torch.tensor(1.0)).backward()
    assert pre.grad is not None and pre.grad.isfinite().all()
    perfect = torch.zeros(1, 2)
    assert float(ghost(perfect, pre, torch.eye(2), torch.tensor(0.0)).detach()) == 0


@pytest.mark.parametrize("kind", [Dead.aux_k, Dead.ghost])
@pytest.mark.parametrize(
    "architecture", ["sae", "centred_sae", "skip_transcoder", "cross_layer_transcoder", "crosscoder"]
)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "glu"])
def test_dead_features_learn_and_no_living_one_does(kind: Dead, architecture: str, activation: str):
    """That of dictionary_learning's TopK trainer sees codes after selection, where dead ones are 0: no encoder learns."""
    settings: dict[str, Any] = ARCHITECTURES[architecture] | ACTIVATIONS.get(activation, {"encoder": Encoder.glu})
    made = objective(**settings, dead=kind, dead_after_tokens=100, aux_coefficient=1.0)
    kill(made)
    with torch.no_grad():
        for bank in made.dictionary.banks:
            bank.b_enc[:5] = 0.5
    rows = planted(made.layout, 100, seed=1)
    made.cfg.local_coefficient = made.cfg.penalty_coefficient = made.cfg.gate_coefficient = 0.0
    loss, metrics = made.loss(rows, 0.5)
    assert float(metrics["loss/aux"]) > 0
    loss.backward()
    dead_of = (made.tokens_since_fired >= 100).split([bank.n_features for bank in made.dictionary.banks])
    for bank, dead in zip(made.dictionary.banks, dead_of, strict=True):
        assert dead[:5].all() and not dead.all()
        for parameter in (bank.W_enc, bank.W_dec):
            assert (parameter.grad[:5].abs().sum(1) > 0).all()
            assert not parameter.grad[~dead].any()
    assert made.dictionary.b_dec.grad is None or not made.dictionary.b_dec.grad.any()


def test_dead_features_explain_what_is_left_where_their_group_writes_and_nothing_else():
    """Not the residual of places that a group cannot write to."""
    made = objective(**ARCHITECTURES["cross_layer_transcoder"], dead_after_tokens=100, aux_coefficient=1.0, aux_k=3)
    kill(made)
    with torch.no_grad():
        for bank in made.dictionary.banks:
            bank.b_enc[:5] = 0.5
    rows = planted(made.layout, 100, seed=1)
    term = float(made.loss(rows, 0.5)[1]["loss/aux"])
    x = made._step.x
    residual = made._step.residual
    dead_of = made._dead_of(made.tokens_since_fired >= 100)
    slow = []
    for g, (bank, dead) in enumerate(zip(made.dictionary.banks, dead_of, strict=True)):
        pre = (x[:, bank.reads] @ bank.W_enc[dead].T + bank.b_enc[dead]).detach()
        torch.testing.assert_close(dead_pre_activations(made.dictionary, x, g, dead).detach(), pre)
        slow.append(float(aux_k(residual[:, bank.writes], pre, None, bank.W_dec[dead].detach(), 3)))
    assert term == pytest.approx(sum(slow) / 3, rel=1e-5)


def test_liveness_is_counted_in_tokens_and_only_in_training():
    """dictionary_learning counts on while it logs and validates."""
    made = objective(**ONE, dead_after_tokens=250)
    with torch.no_grad():
        made.dictionary.banks[0].b_enc[:4] = SLEEP
    for _ in range(2):
        made.loss(planted(made.layout, 100), 0.5)
        made.after_step()
        made.eval()
        made.loss(planted(made.layout, 77), 0.5)
        made.train()
    assert made.tokens_since_fired[:4].tolist() == [200] * 4


# --- resampling ---


def resampling(**settings: Any) -> DictionaryObjective:
    return objective(**({"dead": Dead.resample, "dead_after_tokens": 100, "resample_every": 100} | settings))


def drawn(made: DictionaryObjective, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual of the step that resamples."""
    torch.manual_seed(0)
    made.loss(planted(made.layout, 100, seed=seed), 0.5)
    x, residual = made._step.x, made._step.residual
    made.after_step()
    return x, residual


def test_tokens_are_drawn_by_the_square_of_their_squared_error():
    torch.manual_seed(0)
    errors = torch.tensor([1.0, 2.0, 3.0])
    counts = torch.stack([draw(errors, 1) for _ in range(6000)]).flatten().bincount(minlength=3) / 6000
    torch.testing.assert_close(counts, torch.tensor([1, 4, 9]) / 14, atol=0.02, rtol=0)
    assert sorted(draw(errors, 3).tolist()) == [0, 1, 2], "each once, while there are enough"
    assert len(draw(errors, 7)) == 7
    assert len(draw(torch.zeros(3), 2)) == 2


def test_a_resampled_feature_points_at_a_badly_reconstructed_input():
    """With a unit direction (dictionary_learning takes the raw input, six times too long), around the mean."""
    made = resampling(**SAE, resample_scale=0.2)
    kill(made)
    before = made.dictionary.banks[0].W_enc.detach().clone()
    x, _ = drawn(made)
    bank = made.dictionary.banks[0]
    mu = x.mean(0)
    directions = (x - mu) / (x - mu).norm(dim=1, keepdim=True)
    for i in range(5):
        row = bank.W_enc[i].detach()
        token = int((directions @ row).argmax())
        torch.testing.assert_close(row / row.norm(), directions[token])
        torch.testing.assert_close(bank.W_dec[i].detach() / bank.W_dec[i].detach().norm(), directions[token])
        # Its pre-activation is what its direction says of x - mu.
        torch.testing.assert_close(bank.b_enc[i].detach(), -(row @ mu))
    living = made.tokens_since_fired.new_ones(F, dtype=torch.bool)
    living[:5] = False
    torch.testing.assert_close(
        bank.W_enc[:5].detach().norm(dim=1), (0.2 * before[living].norm(dim=1).mean()).expand(5), rtol=1e-3, atol=0
    )
    assert torch.equal(bank.W_enc[5:].detach()[:1], before[5:6])


def test_a_resampled_transcoder_feature_writes_what_was_left_over():
    made = resampling(**ONE)
    kill(made)
    x, residual = drawn(made)
    bank = made.dictionary.banks[0]
    for i in range(5):
        row = bank.W_enc[i].detach()
        token = int(((x - x.mean(0)) / (x - x.mean(0)).norm(dim=1, keepdim=True) @ row).argmax())
        torch.testing.assert_close(
            bank.W_dec[i].detach() / bank.W_dec[i].detach().norm(), residual[token] / residual[token].norm()
        )
    torch.testing.assert_close(bank.W_dec[:5].detach().norm(dim=1), torch.full((5,), 0.1), rtol=1e-3, atol=0)


# Transforms have no decoder rows to write anew: their settings refuse it (test_molt).
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if "ranks" not in ARCHITECTURES[name]])
def test_resampling_changes_all_dead_rows_and_no_other(architecture: str):
    """dictionary_learning writes to a copy (chained indexing), and changes nothing at all."""
    made = resampling(**ARCHITECTURES[architecture], activation=Activation.topk, k=3)
    kill(made)
    before = {name: p.detach().clone() for name, p in made.dictionary.named_parameters()}
    with torch.no_grad():
        firings = made.dictionary.encode(made.reads(planted(made.layout, 100, seed=1)))
    quiet = [set((fired == 0).nonzero().flatten().tolist()) for fired in firings.firings()]
    drawn(made)
    still = [set(rows.tolist()) for rows in made._dead_of(made.tokens_since_fired >= 100)]
    assert not any(still), "what has just been drawn has time to live"
    for g, bank in enumerate(made.dictionary.banks):
        for name in ("W_enc", "W_dec"):
            key = next(k for k, p in made.dictionary.named_parameters() if p is getattr(bank, name))
            changed = (before[key] != getattr(bank, name).detach()).any(1).nonzero().flatten().tolist()
            assert {0, 1, 2, 3, 4} <= set(changed) <= quiet[g]
    untouched = [name for name in before if "b_dec" in name or "W_skip" in name]
    now = dict(made.dictionary.named_parameters())
    assert all(torch.equal(before[name], now[name]) for name in untouched)


def test_resampling_happens_with_the_first_batch_after_so_many_tokens():
    """So none is left untrained by a run of exactly that many."""
    made = resampling(**ONE, resample_every=250, dead_after_tokens=10)
    resampled = []
    for step in range(9):
        with torch.no_grad():
            made.dictionary.banks[0].b_enc[0] = SLEEP
        made.loss(planted(made.layout, 100, seed=step), 0.5)
        made.after_step()
        if made.take_resets():
            resampled.append(step)
    # Tokens before each batch: 0, 100, 200, 300 | 400, 500 | ...
    assert resampled == [3, 5, 8]


def test_unit_norm_decoders_stay_so_when_features_are_drawn():
    made = resampling(**ONE, decoder=Decoder.unit_norm)
    kill(made)
    drawn(made)
    torch.testing.assert_close(made.dictionary.banks[0].W_dec.detach().norm(dim=1), torch.ones(F))


def test_a_resampled_threshold_starts_again():
    made = resampling(**ONE, **ACTIVATIONS["jumprelu"])
    kill(made)
    with torch.no_grad():
        made.dictionary.activation.threshold[0].fill_(3.0)
    drawn(made)
    theta = made.dictionary.activation.threshold[0].detach()
    assert (theta[:5] == 0.5).all() and (theta == 3.0).any()


def test_a_feature_that_is_active_at_one_place_is_not_dead_at_another():
    """Groups with one encoder between them have the same features."""
    made = resampling(**DECOUPLED)
    with torch.no_grad():
        made.dictionary.banks[0].b_enc[:5] = SLEEP
        made.dictionary.banks[1].W_dec[5] = 0.0  # c = 0: never selected there
    made.loss(planted(made.layout, 100, seed=5), 0.5)
    fired = made._step.fired.view(3, F)
    made.after_step()
    since = made.tokens_since_fired.view(3, F)
    assert (since == since[0]).all() and (since[0] == 0).equal(fired.any(0))
    assert (since[0, :5] == 100).all()


def test_groups_with_one_encoder_are_resampled_together():
    made = resampling(**DECOUPLED)
    kill(made)
    x, residual = drawn(made)
    W_enc = made.dictionary.banks[0].W_enc.detach()
    for i in range(5):
        token = int(((x - x.mean(0)) / (x - x.mean(0)).norm(dim=1, keepdim=True) @ W_enc[i]).argmax())
        for bank in made.dictionary.banks:
            row, left = bank.W_dec[i].detach(), residual[token, bank.writes]
            torch.testing.assert_close(row / row.norm(), left / left.norm())


def test_a_glu_encoder_is_resampled_with_its_gate():
    made = resampling(**ONE, encoder=Encoder.glu)
    kill(made)
    x, _ = drawn(made)
    pre = made.dictionary.banks[0].pre_activations(x)[:, :5].detach()
    assert (pre.amax(0) > 0).all() and pre.isfinite().all()


def test_both_branches_of_a_gate_are_resampled_alike():
    """A feature starts with a gate that is open where, and as far as, its magnitude is positive."""
    made = resampling(**SAE, **ACTIVATIONS["gated"])
    with torch.no_grad():
        made.dictionary.activation.r[0].fill_(1.0)
        made.dictionary.activation.b_mag[0].fill_(0.3)
    kill(made)
    x, _ = drawn(made)
    (codes,), (pre,) = made.dictionary.encode(x), [made.dictionary.banks[0].pre_activations(x)]
    torch.testing.assert_close(codes.dense()[:, :5], pre[:, :5].relu())
    assert (made.dictionary.activation.r[0] == 1).any()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_the_optimiser_forgets_rows_that_were_written_anew(make: Any):
    W, b = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))
    optimiser = make([W, b])
    for _ in range(3):
        (W.square().sum() + b.square().sum()).backward()
        optimiser.step()
    for parameter in (W, b):
        forget(optimiser, parameter, torch.tensor([1, 2]))
        for remembered in optimiser.state[parameter].values():
            if isinstance(remembered, torch.Tensor) and remembered.ndim:
                assert not remembered[1:3].any() and (remembered[[0, 3]] != 0).all()


def test_resampling_revives_features():
    share = {}
    for kind in (Dead.none, Dead.resample):
        settings: dict[str, Any] = {"dead": kind, "dead_after_tokens": 2000}
        if kind is Dead.resample:
            settings["resample_every"] = 2000
        made = objective(**SAE, activation=Activation.topk, k=2, **settings)
        with torch.no_grad():
            made.dictionary.banks[0].b_enc[:12] = -20
        torch.manual_seed(0)
        train(made, 60)
        share[kind] = float((made.tokens_since_fired[:12] >= 2000).float().mean())
    assert share[Dead.none] > 0.9 and share[Dead.resample] < 0.5


def test_nothing_dead_is_nothing_changed():
    made = resampling(**ONE)
    before = made.dictionary.banks[0].W_enc.detach().clone()
    x, residual = torch.randn(10, D), torch.randn(10, D)
    assert resample(made.dictionary, [torch.zeros(0, dtype=torch.int64)], x, residual, 0.2) == []
    assert torch.equal(before, made.dictionary.banks[0].W_enc)


def test_where_none_lives_norms_are_those_of_all():
    W = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert float(living_norm(W, torch.tensor([0, 1]))) == 3 and float(living_norm(W, torch.tensor([0]))) == 1
