"""Dedicated-feature crosscoders: features of A alone, of both models, of B alone (Jiralerspong & Bricken 2026).

What the reference enforces by masks, hooks and a shared score follows here from shapes: A's features have no weights in B.
The second model of these tests is narrower and shallower than the first.
"""

import copy
import json
from typing import Any

import pytest
import torch
from decomposition_parts import (
    ACTIVATIONS,
    ARCHITECTURES,
    BOTH_MODELS,
    PAIR,
    F,
    K,
    config,
    dictionary,
    inputs,
    objective,
    planted,
    train,
)
from torch import Tensor

from nndecomp.config.schema import Activation, Architecture, CodeNormalisation, Dead, Penalty, Reconstruction, Scope
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.wiring import wire
from nndecomp.errors import SettingError

DFC = ARCHITECTURES["dedicated_feature_crosscoder"]
BATCHTOPK = DFC | ACTIVATIONS["batchtopk"]
# The groups in their order.
A, SHARED, B = 0, 1, 2


def columns(made: SparseDictionary, model: str) -> slice:
    spans = [span for site, span in made.read_layout.spans.items() if site.model == model]
    return slice(spans[0].start, spans[-1].stop)


def louder(rows: Tensor, made: SparseDictionary, model: str) -> Tensor:
    """The same rows, with other values in one model."""
    changed = rows.clone()
    changed[:, columns(made, model)] = 3 * rows[:, columns(made, model)].roll(1, 0) + 1
    return changed


def weights(made: SparseDictionary, name: str) -> Tensor:
    """The matrix [feature of any group, column of any model], with zeros where there is no weight."""
    whole = torch.zeros(sum(bank.n_features for bank in made.banks), made.read_layout.width)
    start = 0
    for bank in made.banks:
        span = bank.reads if name == "W_enc" else bank.writes
        whole[start : start + bank.n_features, span] = getattr(bank, name).detach()
        start += bank.n_features
    return whole


# --- exclusive by construction ---


@pytest.mark.parametrize("dead", [Dead.aux_k, Dead.ghost, Dead.resample])
@pytest.mark.parametrize("optimiser", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_weights_in_the_other_model_do_not_exist_whatever_writes_to_weights(dead, optimiser, tmp_path):
    """DFC: resampling writes forbidden slices (0.40), copies lose the hooks that mask gradients (0.88), and the optimiser's
    moments are cleared before there are any."""
    often: dict[str, Any] = {"resample_every": 300} if dead is Dead.resample else {}
    made = copy.deepcopy(objective(**BATCHTOPK, dead=dead, dead_after_tokens=300, **often))
    step = optimiser(made.parameters(), lr=1e-2)
    for i in range(8):
        loss, _ = made.loss(planted(made.layout, 100, seed=i), i / 8)
        step.zero_grad()
        loss.backward()
        made.before_step()
        step.step()
        made.after_step()
    finished = made.finished()
    finished.save_pretrained(tmp_path / "made")
    finished = SparseDictionary.from_pretrained(tmp_path / "made")
    assert sum(p.numel() for p in finished.banks[A].parameters()) == F * (2 * 18 + 1), "A reads and writes 18 columns"
    assert sum(p.numel() for p in finished.banks[B].parameters()) == F * (2 * 8 + 1), "B reads and writes 8"
    for name in ("W_enc", "W_dec"):
        dense = weights(finished, name)
        of_a, of_b = dense[:F, columns(finished, "B")], dense[-F:, columns(finished, "A")]
        assert float(of_a.abs().max()) == float(of_b.abs().max()) == 0.0
        assert (dense[F:-F] != 0).all(), "shared features have weights everywhere"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_codes_of_one_model_do_not_depend_on_the_other(activation, training):
    made = objective(**DFC | ACTIVATIONS[activation])
    train(made, 2)
    own, x = made.dictionary.train(training), planted(made.layout, 60)
    codes, changed = own.encode(x), own.encode(louder(x, own, "B"))
    assert torch.equal(codes[A].dense(), changed[A].dense())
    assert not torch.equal(codes[SHARED].dense(), changed[SHARED].dense())
    assert not torch.equal(codes[B].dense(), changed[B].dense())


def test_exclusive_codes_change_what_is_written_in_their_own_model_alone():
    made = dictionary(**BATCHTOPK).train()
    x = inputs(made)
    codes = made.encode(x)
    y_hat = made.decode(codes, x)
    with torch.no_grad():
        made.banks[A].W_dec.mul_(2)
    again = made.decode(codes, x)
    assert torch.equal(again[:, columns(made, "B")], y_hat[:, columns(made, "B")])
    assert not torch.equal(again[:, columns(made, "A")], y_hat[:, columns(made, "A")])


@pytest.mark.parametrize("reconstruction", Reconstruction)
def test_exclusive_features_learn_from_their_own_model_alone_dead_or_alive(reconstruction):
    """DFC: the other model's residual enters the auxiliary loss, and what it is divided by. Without shared features, through
    which B changes what is left over of A, the gradient of A's features is the same whatever happens in B."""

    def gradients(in_b: bool) -> dict[str, Tensor]:
        made = objective(**BATCHTOPK | {"n_features": 0}, reconstruction=reconstruction, dead_after_tokens=100)
        made.start(planted(made.layout, 200))
        made.loss(planted(made.layout, 200), 0.0)
        made.after_step()
        made.tokens_since_fired[: F // 2] = 10**6
        rows = planted(made.layout, 60, seed=1)
        loss, parts = made.loss(louder(rows, made.dictionary, "B") if in_b else rows, 0.5)
        assert float(parts["loss/aux"]) > 0
        loss.backward()
        return {name: p.grad for name, p in made.dictionary.banks[A].named_parameters()}

    alone, with_b = gradients(False), gradients(True)
    assert all(float(grad.abs().sum()) > 0 for grad in alone.values())
    for name, grad in alone.items():
        torch.testing.assert_close(with_b[name], grad)


# --- sizes ---


def test_sizes_are_whole_numbers_and_other_sizes_do_not_load(tmp_path):
    """DFC: shares of F rounded down (57% of 100 are 56), and a state of another partition that loads with the wrong columns
    masked (100 for 50)."""
    made = dictionary(**BATCHTOPK | {"n_exclusive": [57, 3], "n_features": 40})
    assert [bank.n_features for bank in made.banks] == [57, 40, 3]
    made.save_pretrained(tmp_path / "made")
    saved = json.loads((tmp_path / "made" / "config.json").read_text())
    assert [group["n_features"] for group in saved["groups"]] == [57, 40, 3]
    saved["groups"][A]["n_features"], saved["groups"][SHARED]["n_features"] = 40, 57
    (tmp_path / "made" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(
        SettingError, match=r"do not fit their config.json: groups.0.W_dec is \(57, 18\), expected \(40, 18\)"
    ):
        SparseDictionary.from_pretrained(tmp_path / "made")


def test_each_group_has_its_own_k_and_its_own_threshold():
    made = objective(**BATCHTOPK | {"k": [1, 5, 2]})
    train(made, 3)
    x = planted(made.layout, 200)
    assert made.dictionary.train().encode(x).counts().float().mean(0).tolist() == [1, 5, 2]
    assert made.dictionary.activation.threshold.shape == (3,)
    assert len(made.dictionary.activation.threshold.unique()) == 3


def test_an_exclusive_group_may_be_larger_than_the_shared_one():
    made = dictionary(**BATCHTOPK | {"n_features": 4, "n_exclusive": [12, 8], "k": [6, 2, 3]})
    assert made.train().encode(inputs(made, 50)).counts().float().mean(0).tolist() == [6, 2, 3]


def test_without_exclusive_features_it_is_a_crosscoder_bit_for_bit():
    made = objective(**BATCHTOPK | {"n_exclusive": [0, 0]})
    plain = objective(**BATCHTOPK | {"n_exclusive": None, "architecture": Architecture.crosscoder})
    assert train(made, 5) == train(plain, 5)
    for name, tensor in made.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name


@pytest.mark.parametrize("scope", Scope)
def test_without_shared_features_it_is_two_saes(scope):
    """With a budget in common where the groups compete."""
    made = dictionary(**BATCHTOPK | {"n_features": 0, "scope": scope}).train()
    assert [bank.name for bank in made.banks] == ["A", "B"]
    x = inputs(made, 400)
    y_hat, codes = made(x)
    assert int(codes.counts().sum()) == 2 * K * 400
    if scope is Scope.all:
        return
    for bank, model in zip(made.banks, "AB", strict=True):
        alone = torch.zeros_like(x)
        alone[:, columns(made, model)] = x[:, columns(made, model)]
        assert torch.equal(made(alone)[0][:, columns(made, model)], y_hat[:, columns(made, model)])
        assert bank.W_dec.shape[1] == columns(made, model).stop - columns(made, model).start


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_features": 0, "n_exclusive": [0, 0]}, "decomposition.n_features=0 must be positive"),
        ({"n_features": 2}, "decomposition.k=3 is more than the 2 features of group shared"),
        ({"n_exclusive": [F, 2]}, "decomposition.k=3 is more than the 2 features of group B"),
        ({"k": [3, 3]}, r"has 2 entries, but the decomposition has 3 groups \(A, shared, B\)"),
        ({"k": F + 1}, f"decomposition.k={F + 1} must lie between 1 and the {F} features of the largest group"),
        ({"n_exclusive": [4, F], "k_start": 8, "k_anneal": 0.5}, "decomposition.k_start=8 is more than the 4 features of group A"),
        ({"n_exclusive": [-1, 4]}, "must be two whole numbers"),
        ({"n_exclusive": [4]}, "must be two whole numbers"),
        ({"n_exclusive": None}, "dedicated_feature_crosscoder needs it"),
        ({"reads": ["A:mlp_out"], "writes": ["A:mlp_out"]}, "must have sites of both models"),
        ({"code_normalisation": CodeNormalisation.decoupled}, "decoupled is for decomposition.architecture=crosscoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(settings: dict[str, Any], sentence: str):
    with pytest.raises(SettingError, match=sentence) as refused:
        wire(config(**BATCHTOPK | settings), PAIR)
    assert "\n" not in str(refused.value)


def test_a_penalty_cannot_weigh_one_code_by_each_site_on_its_own():
    """It would silently be another normalisation."""
    with pytest.raises(SettingError, match="penalty_normalisation=decoupled needs codes of each site on its own"):
        config(**DFC | ACTIVATIONS["relu"], penalty=Penalty.l1, penalty_coefficient=1.0, penalty_normalisation=CodeNormalisation.decoupled)  # fmt: skip


# --- a fair start ---

FAIR = [(kind, scope) for kind in CodeNormalisation if kind is not CodeNormalisation.decoupled for scope in Scope]
SIZES = {"n_exclusive": [400, 200], "n_features": 1000}


@pytest.mark.parametrize(("kind", "scope"), FAIR, ids=[f"{kind.value}-{scope.value}" for kind, scope in FAIR])
def test_exclusive_features_fire_as_often_as_shared_ones_where_training_starts(kind, scope):
    """DFC: exclusive features sum one model instead of two and have half the code norm: firing rates of 0.000 (crosscoder,
    mixed), 0.0003 (sae) and 0.058 (none) of those of shared ones, so that 98% and more never fire."""
    ks = [8, 20, 4] if scope is Scope.group else 11
    made = dictionary(**BATCHTOPK | SIZES | {"k": ks}, scope=scope, code_normalisation=kind).train()
    codes = made.encode(inputs(made, 3000))
    rates = [float(group.counts().float().mean()) / group.n_features for group in codes]
    assert rates == pytest.approx([0.02] * 3 if scope is Scope.group else [rates[SHARED]] * 3, rel=0.2)
    never = [float((group.firings() == 0).float().mean()) for group in codes]
    assert max(never) < 0.02, f"shares that never fire: {never}"


@pytest.mark.parametrize("kind", [kind for kind in CodeNormalisation if kind is not CodeNormalisation.decoupled])
def test_one_initial_threshold_of_jumprelu_means_the_same_in_all_groups(kind):
    made = dictionary(**DFC | ACTIVATIONS["jumprelu"] | SIZES | {"jumprelu_threshold": 1.5}, code_normalisation=kind)
    codes = made.encode(inputs(made, 2000))
    rates = [float(group.counts().float().mean()) / group.n_features for group in codes]
    assert rates == pytest.approx([rates[SHARED]] * 3, rel=0.2) and rates[SHARED] > 0.01


def test_features_of_all_groups_start_with_the_same_decoder_norm():
    """DFC: the subclass makes its decoder anew without the initial norm: 0.045 instead of 1."""
    for norm in (None, 0.25):
        made = dictionary(**BATCHTOPK | {"decoder_norm": norm})
        for bank in made.banks:
            torch.testing.assert_close(bank.W_dec.norm(dim=1), torch.full((bank.n_features,), norm or 1.0))


def test_settings_of_the_reference_come_back_from_disk(tmp_path):
    """DFC: a dictionary that selects by one normalisation is loaded with another, and saving to the Hub crashes."""
    made = dictionary(**DFC, activation=Activation.topk, k=[1, 2, 3], code_normalisation=CodeNormalisation.sae).eval()
    made.save_pretrained(tmp_path / "made")
    loaded = SparseDictionary.from_pretrained(tmp_path / "made")
    assert loaded.spec == made.spec and [str(site) for site in loaded.reads] == [
        *(f"A:L{layer}.mlp_out" for layer in range(3)),
        *(f"B:L{layer}.mlp_out" for layer in range(2)),
    ]
    assert torch.equal(loaded(inputs(made))[0], made(inputs(made))[0])
    assert BOTH_MODELS["reads"] == ["A:mlp_out", "B:mlp_out"]
