"""Laws of planted targets: what the MLPs compute is what their rules say, and their sites are those of any target."""

import pytest
import torch
from truth_parts import CPU, planted_settings

from nndecomp.activations.planted import planted_truth, written
from nndecomp.config.schema import Plan
from nndecomp.errors import SettingError
from nndecomp.targets.planted import PlantedTarget
from nndecomp.tokens.random_ids import RandomTokens
from nndecomp.types import Site


def target(**changes: object) -> PlantedTarget:
    return PlantedTarget("planted", planted_settings(**changes), CPU, torch.float32)


def tokens(n: int = 256) -> torch.Tensor:
    return torch.arange(n).reshape(-1, 8)


def sites(n_layers: int) -> list[Site]:
    return [Site.parse(f"L{layer}.{point}") for layer in range(n_layers) for point in ("mlp_in", "mlp_out")]


CHAIN = {"plan": Plan.chain, "n_layers": 3}


@pytest.mark.parametrize("changes", [{}, CHAIN])
def test_a_layer_writes_the_values_of_the_keys_that_are_present(changes: dict[str, object]):
    model = target(**changes)
    for layer in range(model.rules.n_layers):
        for id in range(40):
            out = Site(layer, Site.parse("L0.mlp_out").point)
            y = model.record(torch.tensor([[id]]), [out])[out][0, 0]
            along = model.rules.values[layer] @ y
            present = model.rules.fires(layer)[id]
            assert (along[present] > 0.3).all() and along[~present].abs().max() < 1e-4
            torch.testing.assert_close(y, along @ model.rules.values[layer], atol=1e-5, rtol=1e-4)


def test_the_truth_reconstructs_the_rows_exactly_where_directions_are_orthogonal():
    model = target()
    truth = planted_truth(model, tokens(), sites(2), chains=False)
    for layer in range(2):
        out = sites(2)[2 * layer + 1]
        rows = truth.rows[:, truth.layout.spans[out]]
        torch.testing.assert_close(truth.codes @ truth.directions[out], rows, atol=1e-4, rtol=1e-4)


def test_rules_belong_to_their_layer_and_chains_to_all():
    model = target(**CHAIN)
    rules = planted_truth(model, tokens(), sites(3), chains=False)
    chains = planted_truth(model, tokens(), sites(3), chains=True)
    assert rules.n_features == 48 and chains.n_features == 16 and list(rules.classes) == ["L0", "L1", "L2"]
    for layer, out in enumerate(sites(3)[1::2]):
        present = rules.directions[out].norm(dim=1) > 0.5
        assert present.nonzero().flatten().tolist() == list(range(16 * layer, 16 * layer + 16))
        assert (chains.directions[out].norm(dim=1) > 0.5).all()
    assert torch.equal(chains.codes != 0, rules.codes[:, :16] != 0)


def test_one_layer_is_asked_for_its_own_rules_alone():
    model = target()
    own = planted_truth(model, tokens(), sites(2)[2:], chains=False)
    both = planted_truth(model, tokens(), sites(2), chains=False)
    assert own.n_features == 16 and {name: len(rules) for name, rules in own.classes.items()} == {"L1": 16}
    assert torch.equal(own.codes, both.codes[:, 16:])
    assert all(torch.equal(own.directions[site], both.directions[site][16:]) for site in sites(2)[2:])


def test_one_key_sets_off_its_rule_in_every_layer():
    model = target(**CHAIN)
    present = model.rules.present
    alone = (present.sum(1) == 1).nonzero().flatten()[:4]
    for id in alone.tolist():
        rule = present[id].nonzero().item()
        for layer, out in enumerate(sites(3)[1::2]):
            y = model.record(torch.tensor([[id]]), [out])[out][0, 0]
            assert (model.rules.values[layer] @ y).argmax().item() == rule


def test_cutting_a_chain_silences_its_later_rules():
    model = target(**CHAIN)
    first, last = Site.parse("L0.mlp_out"), Site.parse("L2.mlp_out")
    with model.patch({first: torch.zeros_like}):
        assert model.record(tokens(), [last])[last].abs().max() < 1e-4
    assert model.record(tokens(), [last])[last].abs().max() > 0.1


def test_own_neurons_write_a_value_exactly_and_shared_ones_as_far_as_they_can():
    own, shared = target(), target(n_rules=24, d_mlp=16, neurons_per_rule=3, d_model=128)
    cosine = lambda model: torch.nn.functional.cosine_similarity(written(model, 0), model.rules.values[0], dim=1)  # noqa: E731
    assert cosine(own).min() > 0.9999
    assert 0.6 < cosine(shared).mean() < 0.95, "24 rules on 16 neurons"
    assert shared.rules.neurons.shape == (2, 24, 3)
    assert all(len(set(hand)) == 3 for hand in shared.rules.neurons[0].tolist()), "a rule's neurons are different ones"


def test_neurons_are_what_the_plan_says():
    model = target()
    neurons = model.neurons_of(Site.parse("L1.mlp_in"))
    for rule, (own,) in enumerate(model.rules.neurons[1].tolist()):
        torch.testing.assert_close(neurons.read[own], model.rules.keys[1][rule] / 0.8, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(neurons.write[own], model.rules.values[1][rule], atol=1e-5, rtol=1e-4)


def test_replacing_a_site_by_itself_changes_no_bit_of_the_logits():
    model = target()
    for site in [*sites(2), Site.parse("embed"), Site.parse("L1.resid_pre"), Site.parse("L1.resid_post")]:
        with model.patch({site: torch.clone}):
            patched = model.logits(tokens())
        assert torch.equal(patched, model.logits(tokens())), str(site)


def test_the_same_seed_plants_the_same_rules():
    one, again, other = target(), target(), target(seed=1)
    assert torch.equal(one.model.wte.weight, again.model.wte.weight)
    assert not torch.equal(one.model.wte.weight, other.model.wte.weight)


def test_what_is_not_described_is_refused():
    with pytest.raises(SettingError, match="L0.resid_post has no planted directions"):
        planted_truth(target(), tokens(), [Site.parse("L0.resid_post")], chains=False)
    with pytest.raises(SettingError, match="plan=key_value has no chains"):
        planted_truth(target(), tokens(), sites(2), chains=True)


def test_random_tokens_resume_and_hold_out():
    train, again, held = (
        RandomTokens(256, 8, "train 0 0"),
        RandomTokens(256, 8, "train 0 0"),
        RandomTokens(256, 8, "heldout"),
    )
    train.next_batch(4)
    again.load_state_dict(train.state_dict())
    assert torch.equal(train.next_batch(4).tokens, again.next_batch(4).tokens)
    assert not torch.equal(held.next_batch(4).tokens, RandomTokens(256, 8, "train 0 0").next_batch(4).tokens)
    batch = held.next_batch(4)
    assert batch.mask.all() and not batch.is_bos.any() and batch.tokens.max() < 256
