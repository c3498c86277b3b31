"""What finished runs hold at other sparsities than their own, and what is said where they hold no such thing."""

import pytest
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, inputs, settled
from spd_parts import decomposed, small_language_model
from test_spd_evaluation import MLPS

from nndecomp import build
from nndecomp.build.collecting import without_points
from nndecomp.build.parameters import left_out
from nndecomp.config.compose import compose
from nndecomp.config.schema import EvaluationConfig, Inputs, Patched, Scope
from nndecomp.decompositions.conversion import is_own_topk, to_topk
from nndecomp.errors import SettingError


def dictionary(activation: str, **settings):
    return settled(**ARCHITECTURES["per_layer_sae"], **ACTIVATIONS[activation], **settings)


def test_a_dictionary_that_no_number_ranks_is_named_once_with_every_k():
    (sentence,) = without_points("gated_n12_seed0", dictionary("gated"), [2, 4])
    assert sentence.startswith("gated_n12_seed0 has no points at k = 2, 4, since activation=gated does not rank")


def test_a_dictionary_that_is_too_small_is_named_with_the_k_it_lacks():
    made = dictionary("batchtopk")
    n = min(group.n_features for group in made.spec.groups)
    assert without_points("small", made, [1, n, n + 1, 2 * n]) == [
        f"small has no points at k = {n + 1}, {2 * n}, since its smallest group has {n} features"
    ]
    assert without_points("small", made, [1, n]) == []
    with pytest.raises(SettingError, match=f"k={n + 1} features of each group cannot be asked for: its smallest"):
        to_topk(made, n + 1)


def test_its_own_k_is_no_second_point_and_needs_no_sentence():
    made = dictionary("topk")
    (k,) = set(made.spec.activation.k)
    assert is_own_topk(made, k) and not is_own_topk(made, k + 1) and without_points("own", made, [k]) == []
    assert (to_topk(made, k).encode(inputs(made)).counts() == made.encode(inputs(made)).counts()).all()
    assert not is_own_topk(dictionary("topk", scope=Scope.all), k), "k a group on average is another selection"


def test_gates_for_more_components_than_there_are_are_named():
    """Maps of 5, 5, 4 and 4 components."""
    decomposition = decomposed(small_language_model().module(), MLPS)
    cfg = EvaluationConfig(
        n_seqs=2, batch_seqs=2, inputs=list(Inputs), patched=[Patched.all], topk=[4, 5], topk_all=[18, 19], delta=True
    )
    assert left_out(cfg, "spd", decomposition) == [
        "spd has no points topk5, topk_all19, topk5_delta, topk_all19_delta: its smallest map has 4 components, all maps together 18"
    ]
    cfg.topk, cfg.topk_all = [4], [18]
    assert left_out(cfg, "spd", decomposition) == []


def test_an_experiment_on_finished_runs_refuses_to_have_none():
    with pytest.raises(SettingError, match=r"^runs=\[\] names no finished run"):
        build.check(compose("exp_007_pareto_pile_all_layers", ["+scale=smoke"]), needs_runs=True)
