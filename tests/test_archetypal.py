"""Decoder rows near the hull of data."""

from typing import Any

import numpy as np
import pytest
import torch
from decomposition_parts import ARCHITECTURES, F, objective, planted, train

from nndecomp.config.schema import Activation, Dead, Decoder
from nndecomp.decompositions import archetypal
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.errors import SettingError

N, SLACK = 12, 0.3
SETTINGS: dict[str, Any] = {
    "decoder": Decoder.archetypal,
    "archetypes": N,
    "archetypal_slack": SLACK,
    "activation": Activation.topk,
    "k": 3,
}


def placed(architecture: str = "sae", **changes: Any) -> DictionaryObjective:
    """With the archetypes of its first batch."""
    made = objective(**ARCHITECTURES[architecture], **(SETTINGS | changes))
    made.loss(planted(made.layout, 300, seed=9), 0.0)
    made.after_step()
    return made


def distance_to_hull(point: np.ndarray, C: np.ndarray) -> float:
    """By projected gradients on the simplex of weights."""
    w = np.full(len(C), 1 / len(C))
    rate = 1 / np.linalg.norm(C @ C.T, 2)
    for _ in range(3000):
        v = w - rate * C @ (w @ C - point)
        u = np.sort(v)[::-1]
        excess = (np.cumsum(u) - 1) / np.arange(1, len(u) + 1)
        w = np.maximum(v - excess[np.nonzero(u > excess)[0][-1]], 0)
    return float(np.linalg.norm(w @ C - point))


@pytest.mark.parametrize("architecture", ["sae", "transcoder", "cross_layer_transcoder"])
def test_rows_stay_within_the_slack_of_the_hull_while_they_learn(architecture: str):
    made = placed(architecture)
    before = [bank.W_dec.detach().clone() for bank in made.dictionary.banks]
    train(made, 30)
    for bank, old in zip(made.dictionary.banks, before, strict=True):
        archetypes = archetypal.archetypes_of(bank)
        C = archetypes.C.double().numpy()
        radius = np.linalg.norm(C - C.mean(0), axis=1).mean()
        rows = (bank.W_dec / archetypes.m.exp()).detach().double().numpy()
        far = [distance_to_hull(row, C) for row in rows[:6]]
        assert max(far) <= SLACK * radius + 1e-4, far
        assert not torch.allclose(bank.W_dec.detach(), old, atol=1e-3), "they learn"


def test_without_slack_rows_are_mixtures_of_data():
    made = placed(archetypal_slack=0.0)
    train(made, 10)
    (bank,) = made.dictionary.banks
    archetypes = archetypal.archetypes_of(bank)
    torch.testing.assert_close(bank.W_dec, archetypes.m.exp() * (archetypes.A.softmax(1) @ archetypes.C))


def test_features_start_at_data_points_with_the_norm_that_is_asked_for():
    made = placed()
    (bank,) = made.dictionary.banks
    C = archetypal.archetypes_of(bank).C
    cosine = torch.nn.functional.cosine_similarity(bank.W_dec[:, None].detach(), C[None], dim=2)
    own = cosine[torch.arange(F), torch.arange(F) % N]
    assert torch.equal(own, cosine.amax(1)) and float(own.median()) > 0.9
    torch.testing.assert_close(bank.W_enc * bank.W_dec.norm(dim=1, keepdim=True), bank.W_dec, msg="an SAE starts tied")
    assert float(bank.W_dec.detach().norm(dim=1).mean()) == pytest.approx(1.0, rel=1e-5)


def test_all_parts_of_the_decoder_learn():
    made = placed()
    train(made, 2)
    made.loss(planted(made.layout, 100), 0.5)[0].backward()
    archetypes = archetypal.archetypes_of(made.dictionary.banks[0])
    R = dict(made.named_parameters())["dictionary.groups.0.parametrizations.W_dec.original"]
    assert all(p.grad is not None and (p.grad != 0).any() for p in (archetypes.A, archetypes.m, R))


def test_what_is_finished_has_a_plain_decoder_and_computes_the_same():
    made = placed()
    train(made, 5)
    made.eval()
    finished = made.finished()
    names = {name for name, _ in finished.named_parameters()}
    assert "groups.0.W_dec" in names and not any("parametrizations" in name for name in names)
    rows = planted(made.layout, 50)
    torch.testing.assert_close(finished(rows)[0], made.dictionary(rows)[0])


def test_saved_archetypes_continue_bit_for_bit():
    first, second = placed(), objective(seed=3, **ARCHITECTURES["sae"], **SETTINGS)
    train(first, 3)
    second.load_state_dict(first.state_dict())
    rows = planted(first.layout, 128, seed=50)
    for made in (first, second):
        made.zero_grad()
        made.loss(rows, 0.5)[0].backward()
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dead": Dead.resample}, "write dead=aux_k"),
        ({"decoder_norm_search": True}, "write decoder_norm_search=false"),
        ({"archetypes": 9000}, "must not exceed"),
    ],
)
def test_nothing_else_writes_to_an_archetypal_decoder(settings: dict[str, Any], sentence: str):
    with pytest.raises(SettingError, match=sentence):
        placed(**settings)
