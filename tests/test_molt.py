"""Mixtures of linear transforms. The laws of every dictionary hold too: see test_decompositions_contract."""

import pytest
import torch
from decomposition_parts import config, dictionary, inputs, objective, planted, settled
from torch import Tensor

from nndecomp.build.members import of_architecture
from nndecomp.config.schema import Activation, Architecture, Dead
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.molt import TransformGroup
from nndecomp.errors import SettingError
from nndecomp.evaluation.costs import axes

RANKS = [[1, 4], [2, 2]]
MOLT = {"architecture": Architecture.molt, "ranks": RANKS}
RELU = {"activation": Activation.relu, "k": None}


def banks(made: SparseDictionary) -> list[TransformGroup]:
    return [bank for bank in made.banks if isinstance(bank, TransformGroup)]


def test_features_are_periods_of_the_ranks_with_those_of_one_rank_side_by_side() -> None:
    (first, *_) = banks(dictionary(**MOLT))
    assert first.ranks == ((1, 16), (2, 8)) and first.n_features == 24
    assert first.V.shape == first.U.shape == (16 + 2 * 8, 6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_features": 25}, "decomposition.n_features=25 is not a multiple of the 6 transforms"),
        ({"ranks": [[2, 1], [1, 1]]}, "ranks increasing"),
        ({"ranks": [[1]]}, "pairs of a rank"),
        ({"ranks": []}, "pairs of a rank"),
        ({"ranks": [[7, 6]]}, "rank above 6"),
        ({"activation": Activation.gated, "k": None}, "activation=gated has no meaning"),
        ({"dead": Dead.ghost}, "dead=ghost has no meaning"),
        ({"matryoshka": [0.5, 0.5]}, "matryoshka=.* has no meaning"),
        ({"architecture": Architecture.per_layer_transcoder}, "decomposition.ranks=.* no effect"),
    ],
)
def test_what_cannot_be_a_mixture_is_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        dictionary(**(MOLT | settings))


def test_a_transform_of_full_rank_recovers_a_linear_map() -> None:
    """One transform, always on: y = x M, found by gradients from its random start."""
    torch.manual_seed(0)
    settings = MOLT | RELU | {"ranks": [[6, 1]], "n_features": 1, "layers": [1], "dead": Dead.none}
    made = objective(**settings)
    (bank,) = banks(made.dictionary)
    with torch.no_grad():
        bank.b_enc.fill_(1.0)
        bank.W_enc.zero_()
    bank.W_enc.requires_grad_(False)
    M = torch.randn(6, 6)
    optimiser = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=2e-2)
    for step in range(500):
        x = torch.randn(64, 6)
        loss, metrics = made.loss(torch.cat([x, x @ M], 1), step / 500)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        made.after_step()
    assert metrics["fvu"] < 1e-3
    torch.testing.assert_close(bank.b_enc.item() * bank.V.T @ bank.U, M, atol=0.1, rtol=0.1)


def test_reconstruction_needs_the_input_it_transforms() -> None:
    """Llamascopium decodes transforms without it where it builds circuits, and stops there."""
    made = settled(**(MOLT | RELU))
    x = inputs(made)
    codes = made.encode(x)
    assert not torch.allclose(made.decode(codes, 2 * x), made.decode(codes, x))
    linear = made.decode(codes, 2 * x) - made.decode(codes, x)
    torch.testing.assert_close(linear, made.decode(codes, x) - made.b_dec)


def test_parameters_of_active_transforms_are_counted_by_their_ranks() -> None:
    made = settled(**MOLT)
    y, codes = made(inputs(made))
    assert [cost.name for cost in made.costs[:2]] == ["L0.rank1", "L0.rank2"]
    assert [cost.parameters for cost in made.costs[:2]] == [12, 24]
    active = codes.counts().double().mean(0)
    dense = torch.stack([group.dense() != 0 for group in codes])
    rank = banks(made)[0].rank
    by_hand = (dense * rank * 12).sum(2).double().mean(1).sum()
    found = {axis.name: axis.of(active) for axis in axes(made.costs, len(made.writes))}
    torch.testing.assert_close(found["active_parameters"], by_hand)
    torch.testing.assert_close(found["active_parameters_with_gate"], by_hand + 3 * 24 * 6)
    torch.testing.assert_close(found["active_per_module"], dense.sum(2).double().mean())
    torch.testing.assert_close(
        found["description_length"], active.sum() * (torch.tensor(24.0).double().log2() + 8), msg="all 24 compete"
    )


def test_transforms_that_do_not_fire_learn_from_what_the_others_left_over() -> None:
    made = objective(**(MOLT | {"dead_after_tokens": 1, "layers": [1], "aux_k": 4}))
    rows = planted(made.layout, 100)
    made.loss(rows, 0.0)
    made.after_step()
    silent = torch.zeros(24, dtype=torch.bool)
    silent[[3, 20]] = True
    made.tokens_since_fired.copy_(silent * 100)
    loss, metrics = made.loss(rows, 0.1)
    only = metrics["loss/aux"]
    assert only > 0
    loss.backward()
    (bank,) = banks(made.dictionary)
    assert bank.V.grad is not None
    dead_atoms = torch.isin(bank.transform, silent.nonzero()[:, 0])
    assert (bank.V.grad[dead_atoms].abs().sum(1) > 0).all()


def test_some_transforms_answer_as_all_do_with_the_others_silent() -> None:
    made = settled(**MOLT)
    bank = banks(made)[0]
    x, chosen = inputs(made)[:, bank.reads], torch.tensor([2, 17, 21])
    codes = torch.rand(len(x), 3, dtype=x.dtype)
    dense = torch.zeros(len(x), 24, dtype=x.dtype).index_copy(1, chosen, codes)
    expected: Tensor = sum(dense[:, [t]] * (x @ _matrix(bank, t)) for t in range(24))  # type: ignore[assignment]
    torch.testing.assert_close(bank.answers(x, codes, chosen), expected)


def _matrix(bank: TransformGroup, t: int) -> Tensor:
    own = slice(int(bank.first[t]), int(bank.first[t] + bank.rank[t]))
    return bank.V[own].T @ bank.U[own]


def test_settings_of_ranks_are_kept_by_the_spec_and_by_files(tmp_path) -> None:
    made = settled(**MOLT)
    made.save_pretrained(tmp_path / "molt")
    loaded = SparseDictionary.from_pretrained(tmp_path / "molt")
    assert loaded.spec == made.spec and isinstance(loaded.banks[0], TransformGroup)
    assert config(**MOLT).ranks == RANKS


def test_a_comparison_has_transforms_beside_others_and_ranks_are_theirs_alone() -> None:
    base = config(ranks=RANKS, architecture=Architecture.molt)
    assert of_architecture(base, Architecture.molt, 5).ranks == RANKS
    other = of_architecture(base, Architecture.per_layer_transcoder, 5)
    assert (other.architecture, other.reads, other.k) == (Architecture.per_layer_transcoder, ["mlp_in"], 5)
