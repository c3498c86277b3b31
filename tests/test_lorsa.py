"""Low-rank sparse attention: what a dictionary of it computes, and that it trains, folds, saves and runs live."""

import copy
from typing import Any

import pytest
import torch
from decomposition_parts import ACTIVATIONS, config
from decomposition_parts import dictionary as any_dictionary
from lorsa_parts import (
    CASES,
    LORSA,
    N_POS,
    N_SEQS,
    TURNING,
    banks,
    inputs,
    lorsa,
    objective,
    planted,
    row_layout,
    settled,
    slow_z,
    train,
)

from nndecomp.activations.sequences import Sequences, beside
from nndecomp.activations.statistics import Affine
from nndecomp.config.schema import (
    Activation,
    Architecture,
    AttentionStart,
    Dead,
    Decoder,
    Directions,
    Penalty,
    PreActivationLoss,
)
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.conversion import to_jumprelu
from nndecomp.decompositions.dead import dead_pre_activations
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.sizes import n_parameters
from nndecomp.decompositions.stack import stack
from nndecomp.errors import SettingError
from nndecomp.evaluation.costs import axes

EVERY_ONE: dict[str, Any] = LORSA | {"activation": Activation.abs_topk, "k": 24}  # no activation function, all heads


@pytest.fixture(params=CASES, ids=list(CASES))
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


@pytest.mark.parametrize("turning", [True, False])
def test_with_all_heads_it_equals_loops_over_positions_and_heads(turning: bool) -> None:
    made = settled(**EVERY_ONE, layers=[1], rotary=turning)
    x = inputs(made)
    y_hat, codes = made(x)
    z = slow_z(banks(made)[0], x.values, (0.9,) if turning else ())
    slow = x.at_kept(z)
    torch.testing.assert_close(codes[0].dense(), slow)
    torch.testing.assert_close(y_hat, slow @ banks(made)[0].W_dec + made.b_dec)


def test_heads_are_chosen_by_the_activation_function_as_features_are(settings: dict[str, Any]) -> None:
    """In training and at inference: z where they are active, which are those above all others, or their own threshold."""
    for training in (True, False):
        made = settled(**settings).train(training)
        x = inputs(made)
        codes = made.encode(x)
        plain = {name: value for name, value in settings.items() if not name.startswith("jumprelu")}
        every = settled(**(plain | {"activation": Activation.abs_topk, "k": 24}))
        z = [group.dense() for group in every.encode(x)]
        for g, (group, own) in enumerate(zip(codes, z, strict=True)):
            dense = group.dense()
            active = dense != 0
            torch.testing.assert_close(dense[active], own[active])
            c = made.scale(g)
            score = own if c is None else own * c
            score = score.abs() if settings["activation"] is Activation.abs_topk else score
            least, most = score[active].min(), score[~active].max()
            match settings["activation"]:
                case Activation.relu | Activation.batchtopk:
                    assert least > most, "one threshold for all"
                case Activation.jumprelu:
                    assert isinstance(made.activation, JumpRelu)
                    assert torch.equal(active, score > made.activation.theta(g))
                case _:
                    assert int(active.gather(1, score.topk(3).indices).sum()) == int(active.sum()), (
                        "the best of each position"
                    )


def test_gradients_of_sparse_heads_are_those_of_dense_ones() -> None:
    made = settled(**LORSA, activation=Activation.abs_topk, k=3, layers=[1]).train()
    slow = copy.deepcopy(made)
    x = inputs(made)
    weights = torch.randn(len(x), 6, dtype=torch.float64)
    (made(x)[0].square() * weights).sum().backward()
    (bank,) = banks(slow)
    z = bank.pre_activations(bank.seen(x))
    chosen = torch.zeros_like(z).scatter(1, z.detach().abs().topk(3).indices, 1.0)
    (((chosen * z) @ bank.W_dec + slow.b_dec).square() * weights).sum().backward()
    for (name, own), (_, other) in zip(made.named_parameters(), slow.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_no_code_knows_of_later_positions(settings: dict[str, Any]) -> None:
    """Of a batch that competes as a whole only inference can promise so."""
    made = settled(**settings)
    x = inputs(made)
    changed = x.values.clone()
    changed[:, 4:] += 1
    before, after = (made.encode(Sequences(values, x.kept)) for values in (x.values, changed))
    early = x.kept % N_POS < 4
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.dense()[early], b.dense()[early])
        assert not torch.equal(a.dense()[~early], b.dense()[~early])


def test_positions_that_do_not_count_are_attended_to_but_not_explained() -> None:
    """As the target does: it looks at BOS and the first positions, whose activations are what they are. Padding stands right of
    the text, where nothing looks."""
    made = settled(**EVERY_ONE)
    x = inputs(made)
    assert len(made.encode(x).counts()) == len(x.kept) == N_SEQS * (N_POS - 1) - 2
    everything = Sequences(x.values, torch.arange(N_SEQS * N_POS))
    all_codes = [group.dense()[x.kept] for group in made.encode(everything)]
    for own, of_all in zip(made.encode(x), all_codes, strict=True):
        torch.testing.assert_close(own.dense(), of_all, msg="which positions count changes no code")
    first, padding = x.values.clone(), x.values.clone()
    first[:, 0] += 1
    padding[1, -2:] += 1
    assert not torch.allclose(made(Sequences(first, x.kept))[0], made(x)[0])
    assert torch.equal(made(Sequences(padding, x.kept))[0], made(x)[0])


def test_folding_changes_units_and_nothing_else(settings: dict[str, Any]) -> None:
    """Llamascopium's fold is off by 0.57 with jumprelu, whose thresholds it leaves behind."""
    made = settled(**settings)
    folded = copy.deepcopy(made)
    raw = inputs(made)
    widths = {site: made.spec.widths[site] for site in row_layout(made).sites}
    s = {site: 0.25 * 3.0**i * (1 + torch.arange(width) / width) for i, (site, width) in enumerate(widths.items())}
    m = {site: torch.linspace(-1, 2, width) + i for i, (site, width) in enumerate(widths.items())}
    of = lambda each, layout: torch.cat([each[site] for site in layout.sites]).double()  # noqa: E731
    s_read, s_write = of(s, made.read_layout), of(s, made.write_layout)
    m_read, m_write = of(m, made.read_layout), of(m, made.write_layout)
    folded.fold(s_read, s_write, m_read, m_write)
    y_hat, codes = made((raw - m_read) / s_read)
    y_raw, codes_raw = folded(raw)
    torch.testing.assert_close(y_raw, y_hat * s_write + m_write)
    for group, group_raw in zip(codes, codes_raw, strict=True):
        torch.testing.assert_close(group_raw.dense(), group.dense())


def test_what_is_finished_equals_what_was_trained_on_raw_sequences(settings: dict[str, Any]) -> None:
    sites = row_layout(lorsa(**settings)).sites
    scales = {site: Affine(torch.linspace(-1, 1, 6) * i, torch.linspace(0.5, 2, 6)) for i, site in enumerate(sites)}
    made = objective(scales, **settings)
    train(made, 3)
    batch = planted(made.layout, seed=7)
    made.eval()
    _, metrics = made.loss(batch, 1.0)
    finished = made.finished()
    x, y = (
        Sequences(torch.cat([batch.values[..., made.layout.spans[s]] for s in layout.sites], -1), batch.kept)
        for layout in (finished.read_layout, finished.write_layout)
    )
    y_hat, codes = finished(x)
    # Sites are weighed in their normalised units, coordinate by coordinate.
    error = ((y.rows() - y_hat) / made.writes.s).square().sum(0)
    spread = ((y.rows() - y.rows().mean(0)) / made.writes.s).square().sum(0)
    each = [error[span].sum() / spread[span].sum() for span in finished.write_layout.spans.values()]
    torch.testing.assert_close(torch.stack(each).mean(), metrics["fvu"], rtol=1e-3, atol=1e-5)
    assert codes.counts().float().mean().item() == pytest.approx(float(metrics["l0"]), abs=0.02)


def test_the_loss_falls(settings: dict[str, Any]) -> None:
    losses = train(objective(**settings), 100, lr=2e-2)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0], losses[::10]


@pytest.mark.parametrize(
    "extra",
    [
        {"penalty": Penalty.tanh_quadratic, "penalty_coefficient": 1e-2, "decoder": Decoder.unit_norm},
        {"penalty": Penalty.l0, "penalty_coefficient": 1e-2},
        {"pre_activation_loss": PreActivationLoss.threshold, "pre_activation_coefficient": 1e-3},
    ],
    ids=lambda extra: next(iter(extra.values())).value,
)
def test_losses_beside_the_reconstruction_train_it_too(extra: dict[str, Any]) -> None:
    """Llamascopium's tanh-quadratic penalty, which Lorsa shares, stops with an error at the first step."""
    made = objective(**(LORSA | ACTIVATIONS["jumprelu"] | extra))
    losses = train(made, 40)
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0], losses[::8]


def test_every_parameter_gets_a_gradient(settings: dict[str, Any]) -> None:
    made = objective(**settings)
    loss, _ = made.loss(planted(made.layout), 0.5)
    loss.backward()
    turning = settings.get("rotary", True)
    for name, parameter in made.named_parameters():
        if turning or not name.endswith("b_K"):  # which without turning has no effect
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_saving_and_loading_keeps_every_bit(settings: dict[str, Any], tmp_path) -> None:
    made = settled(**settings)
    made.save_pretrained(tmp_path / "made")
    loaded = SparseDictionary.from_pretrained(tmp_path / "made")
    assert loaded.spec == made.spec and loaded.needs_sequences
    assert torch.equal(loaded(inputs(made))[0], made(inputs(made))[0])


def test_a_pass_site_by_site_equals_forward(settings: dict[str, Any]) -> None:
    made = settled(**settings)
    assert made.live_obstacle() is None
    x = inputs(made)
    y_hat, codes = made(x)
    run = made.live_run()
    for site in sorted({*made.reads, *made.writes}):
        if site in made.reads:
            run.read(site, x[:, made.read_layout.spans[site]])
        else:
            torch.testing.assert_close(run.write(site), y_hat[:, made.write_layout.spans[site]])
    assert torch.equal(run.active().counts(), codes.counts())


def test_those_trained_apart_stand_side_by_side_as_one() -> None:
    parts = [settled(**LORSA, **ACTIVATIONS["topk"], layers=[layer]) for layer in (0, 2)]
    whole = stack(parts, "lorsa")
    assert whole.needs_sequences
    each = [inputs(part, seed) for seed, part in enumerate(parts)]
    together = beside(each)
    assert isinstance(together, Sequences)
    torch.testing.assert_close(
        whole(together)[0], torch.cat([part(x)[0] for part, x in zip(parts, each, strict=True)], 1)
    )


def test_batchtopk_becomes_jumprelu_and_stays_what_it_is() -> None:
    made = settled(**LORSA, **ACTIVATIONS["batchtopk"])
    torch.testing.assert_close(to_jumprelu(made)(inputs(made))[0], made(inputs(made))[0])


def test_contributions_of_positions_add_up_to_what_a_head_reads() -> None:
    made = settled(**EVERY_ONE, layers=[1])
    (bank,), x = banks(made), inputs(made)
    chosen = torch.tensor([0, 7, 23])
    parts = bank.contributions(x.values, chosen)
    assert (parts.triu(1) == 0).all(), "later positions add nothing"
    z = bank.pre_activations(bank.seen(x), chosen) - bank.b_enc[chosen]
    torch.testing.assert_close(x.at_kept(parts.sum(-1).transpose(1, 2)), z)


def test_dead_heads_learn_from_what_the_others_left_over_and_patterns_do_not() -> None:
    made = objective(**(LORSA | ACTIVATIONS["topk"] | {"dead_after_tokens": 1, "layers": [1], "aux_k": 4}))
    batch = planted(made.layout)
    made.loss(batch, 0.0)
    made.after_step()
    silent = torch.zeros(24, dtype=torch.bool)
    silent[[3, 20]] = True
    made.tokens_since_fired.copy_(silent * 100)
    (bank,) = banks(made.dictionary)
    x, _ = made.split(batch)
    pre = dead_pre_activations(made.dictionary, x, 0, silent.nonzero()[:, 0])
    torch.testing.assert_close(pre, bank.pre_activations(bank.seen(x))[:, silent])
    loss, metrics = made.loss(batch, 0.1)
    made.zero_grad()
    reached = torch.autograd.grad(pre.sum(), [bank.W_Q, bank.W_enc], allow_unused=True)
    assert reached[0] is None and reached[1] is not None and (reached[1][silent].abs().sum(1) > 0).all()
    assert float(metrics["loss/aux"]) > 0 and loss.isfinite()


def test_costs_count_a_head_by_its_two_vectors_and_patterns_with_what_decides() -> None:
    made = settled(**LORSA, activation=Activation.topk, k=3)
    _, codes = made(inputs(made))
    active = codes.counts().double().mean(0)
    found = {axis.name: float(axis.of(active)) for axis in axes(made.costs, len(made.writes))}
    assert found["active_parameters"] == pytest.approx(float(active.sum()) * 12)
    per_layer = 24 * 6 + 2 * 4 * 3 * 6  # v of all heads; queries and keys of 4 patterns of d_head 3
    assert found["active_parameters_with_gate"] == pytest.approx(float(active.sum()) * 12 + 3 * per_layer)


def test_its_size_is_known_before_it_is_made() -> None:
    settings = LORSA | ACTIVATIONS["topk"]
    made = lorsa(**settings)
    assert n_parameters(config(**settings), TURNING) == sum(p.numel() for p in made.parameters())
    of_layer = 2 * 24 * 6 + 24 + 2 * 4 * (3 * 6 + 3) + 6
    assert n_parameters(config(**settings), TURNING) == 3 * of_layer


def test_rows_without_their_sequences_are_not_taken() -> None:
    made = settled(**EVERY_ONE)
    with pytest.raises(AssertionError, match="whole sequences"):
        made.encode(inputs(made).rows())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_features": 25}, "n_features=25 is not a multiple of the 4 attention patterns"),
        ({"attention_start": AttentionStart.target, "n_qk_heads": 3}, "n_qk_heads=3 and d_qk=3 do not fit"),
        ({"d_qk": 1}, "d_qk=1 is less than the 2 coordinates"),
        ({"n_qk_heads": 0}, "n_qk_heads=0 must be positive"),
        ({"reads": ["mlp_in"]}, "can only have attn_in"),
        ({"writes": ["resid_post"]}, "can only have attn_out"),
        ({"activation": Activation.gated, "k": None}, "activation=gated has no meaning"),
        ({"dead": Dead.resample}, "dead=resample has no meaning"),
        ({"skip": True}, "skip=true has no meaning"),
        ({"matryoshka": [0.5, 0.5]}, "matryoshka=.* has no meaning"),
        ({"centre_input": True}, "centre_input=true"),
        ({"directions": Directions.heads}, "directions=heads takes features from the target's heads"),
    ],
)
def test_what_cannot_be_sparse_attention_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        lorsa(**(LORSA | {"activation": Activation.topk, "k": 3} | settings))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_qk_heads": 4}, "n_qk_heads=4 has no effect without decomposition.architecture=lorsa"),
        ({"d_qk": 4}, "d_qk=4 has no effect"),
        ({"rotary": False}, "rotary=False has no effect"),
        ({"directions": Directions.heads}, "directions=heads takes features from the target's heads"),
    ],
)
def test_its_settings_are_its_own(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        any_dictionary(architecture=Architecture.per_layer_transcoder, **settings)
