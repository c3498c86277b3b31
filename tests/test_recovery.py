"""Laws of recovery, on dictionaries that hold the true features, some of them, or others."""

import math

import pytest
import torch
from truth_parts import IN, OUT, exact, pair, settings, world

from nndecomp.activations.synthetic import World
from nndecomp.activations.truth import Truth
from nndecomp.config.schema import Activation, Magnitudes, Scope
from nndecomp.decompositions.activation_selecting import AbsTopK
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.molt import TransformGroup
from nndecomp.decompositions.spec import ActivationSpec, DictionarySpec, GroupSpec
from nndecomp.evaluation.absorption import absorbed, main_latents
from nndecomp.evaluation.features import features_of
from nndecomp.evaluation.recovery import Recovery, measurements, recovery
from nndecomp.types import Layout, Site


def truth(**changes: object) -> Truth:
    return world((IN, OUT), coherence=0.0, **changes).heldout(2000)


def sae(of: Truth, features: list[int] | None = None) -> SparseDictionary:
    return exact(of, [("L0", (OUT,), (OUT,), list(range(20)) if features is None else features)])


def found(dictionary: SparseDictionary, of: Truth) -> Recovery:
    return recovery(dictionary, of, seed=0)


def test_the_true_dictionary_in_any_order_and_size_recovers_everything():
    of = truth()
    dictionary = sae(of, torch.randperm(20).tolist())
    with torch.no_grad():
        dictionary.banks[0].W_dec.mul_(3)
        dictionary.banks[0].W_enc.div_(3)
        dictionary.banks[0].b_enc.div_(3)
    result = found(dictionary, of)
    assert result.cosine.min() > 0.9999 and result.encoder_cosine.min() > 0.9999 and result.uniqueness == 1
    assert result.precision.min() == result.recall.min() == result.f1.min() == 1
    assert result.magnitude.nanmean().item() == pytest.approx(1, abs=1e-2)
    assert result.l0 == result.true_l0 and result.fvu < 1e-3
    assert result.null < 0.6


def test_features_that_are_missing_count_as_nothing_found():
    of = truth()
    result = found(sae(of, list(range(15))), of)
    assert result.cosine[15:].eq(0).all() and result.f1[15:].eq(0).all() and result.partner[15:].eq(-1).all()
    assert result.cosine.mean().item() == pytest.approx(0.75, abs=1e-3)


def test_a_feature_that_never_fires_recovers_nothing():
    of = truth()
    dictionary = sae(of)
    with torch.no_grad():
        dictionary.banks[0].b_enc[3] = -100.0
    result = found(dictionary, of)
    assert result.cosine[3] == 0 and result.found_frequency[3] == 0 and result.cosine[4] > 0.999


def test_a_copy_is_paired_once_and_is_not_unique():
    of = truth()
    result = found(sae(of, [*range(19), 0]), of)
    assert result.cosine[19] < 0.1 and result.uniqueness == pytest.approx(19 / 20)


def test_half_of_every_code_is_half_of_the_magnitude():
    of = truth(magnitudes=Magnitudes.constant)
    dictionary = sae(of)
    with torch.no_grad():
        dictionary.banks[0].W_dec.div_(2)
    rows = {row.metric: row.value for row in measurements(found(dictionary, of)) if row.site == "all"}
    assert rows["shrinkage"] == pytest.approx(0.5, abs=1e-2) and rows["matched_cosine"] > 0.999


def test_a_feature_that_fires_twice_as_often_has_half_the_precision_and_all_the_recall():
    of = truth()
    codes = of.codes.clone()
    also = (codes[:, 0] != 0).nonzero().flatten()[::2]
    codes[also, 0] = 0  # the truth did not fire there, the dictionary does
    result = found(sae(of), Truth(of.layout, of.rows, codes, of.directions, of.bias, of.parents, of.classes))
    assert result.recall[0] == 1 and result.precision[0].item() == pytest.approx(0.5, abs=0.02)
    assert result.f1[0].item() == pytest.approx(2 / 3, abs=0.02)


def test_a_transcoder_is_matched_by_what_it_writes_and_its_encoder_by_what_it_reads():
    of = truth()
    result = found(exact(of, [("L0", (IN,), (OUT,), list(range(20)))]), of)
    assert result.cosine.min() > 0.999 and result.encoder_cosine.min() > 0.999 and result.f1.min() == 1
    wrong = exact(of, [("L0", (OUT,), (IN,), list(range(20)))])
    assert found(wrong, of).cosine.min() > 0.999, "its own truth is at its own sites"


def test_a_feature_turned_round_counts_where_codes_are_signed():
    of = truth()
    dictionary = sae(of)
    turned = torch.arange(20) % 2 == 0
    with torch.no_grad():
        bank = dictionary.banks[0]
        bank.W_enc[turned] *= -1
        bank.W_dec[turned] *= -1
        bank.b_enc.zero_()
    dictionary.activation = AbsTopK([3], Scope.group)
    result = found(dictionary, of)
    assert result.cosine.min() > 0.999 and result.encoder_cosine.min() > 0.999


def test_a_transform_points_where_it_sends_what_its_encoder_reads():
    groups = (GroupSpec("L0", (IN,), (OUT,), 3, ranks=((1, 1), (2, 2))),)
    spec = DictionarySpec("molt", "known", {IN: 4, OUT: 4}, groups, ActivationSpec(kind=Activation.relu))
    dictionary = SparseDictionary(spec)
    (bank,) = dictionary.banks
    assert isinstance(bank, TransformGroup)
    e = torch.eye(4)
    with torch.no_grad():
        bank.W_enc.copy_(2 * e[:3])
        bank.V.copy_(torch.stack([-e[0], e[1], e[3], e[1], e[2]]))
        bank.U.copy_(torch.stack([-3 * e[1], e[2], e[0], e[0], 5 * e[3]]))
    assert features_of(dictionary).decoder.tolist() == [[0, 3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 5]]


def models() -> tuple[Truth, Site, Site]:
    a, b = Site.parse("A:L0.resid_post"), Site.parse("B:L0.resid_post")
    return World(settings(exclusive=[4, 4], coherence=0.0), pair(), (a, b)).heldout(2000), a, b


def test_exclusive_features_are_asked_for_in_the_group_of_their_model():
    of, a, b = models()
    shared, own_a, own_b = (of.classes[name].tolist() for name in ("shared", "A", "B"))
    right = exact(of, [("A", (a,), (a,), own_a), ("shared", (a, b), (a, b), shared), ("B", (b,), (b,), own_b)])
    result = found(right, of)
    assert {name: cosine.min().item() > 0.99 for name, cosine in result.in_own_group.items()} == dict.fromkeys(
        ("shared", "A", "B"), True
    )
    whole = {row.metric: row.value for row in measurements(result) if row.site == "all"}
    assert whole["recovered_in_own_group"] == 1
    misplaced = exact(
        of, [("A", (a,), (a,), shared[:4]), ("shared", (a, b), (a, b), [*own_a, *own_b]), ("B", (b,), (b,), own_b)]
    )
    lost = found(misplaced, of)
    assert lost.in_own_group["A"].max() < 0.9 < lost.in_own_group["B"].min()
    assert lost.cosine[own_a].min() > 0.99, "found, but not where they belong"
    whole = {row.metric: row.value for row in measurements(lost) if row.site == "all"}
    assert whole["recovered_in_own_group"] == 0.5, "B's four of eight"


def test_a_feature_at_some_sites_only_is_scored_at_those():
    of, a, b = models()
    both = exact(of, [("shared", (a, b), (a, b), list(range(20)))])
    result = found(both, of)
    own_a = of.classes["A"]
    assert result.site_cosine[a][own_a].min() > 0.99 and result.site_cosine[b][own_a].isnan().all()
    rows = [row for row in measurements(result) if row.metric == "matched_cosine"]
    assert {row.site for row in rows} == {"all", str(a), str(b)}
    assert all(math.isfinite(row.value) for row in rows)


def test_absorption_by_hand():
    w = torch.tensor([1.0, 0.0])
    decoder = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # the parent, and a child that holds 0.6 of it
    p = torch.ones(1)
    main = torch.tensor([0])

    def fraction(z: list[float], p: torch.Tensor = p) -> tuple[float, float]:
        return absorbed(torch.tensor([z]), decoder, w, p, main)

    assert fraction([1.0, 1.0]) == (0.0, 0.0), "m >= p: the parent fires in full"
    assert fraction([0.0, 1.0]) == (1.0, 1.0), "m <= 0: the child holds all there is"
    assert fraction([0.0, 0.5]) == (0.0, 0.0), "A / p = 0.3 < 0.4"
    # m = 0.4 and A = 0.6 = p - m: 0.6 / (0.6 + 0.4)
    assert fraction([0.4, 1.0])[0] == pytest.approx(0.6) and fraction([0.4, 1.0])[1] == 0.0


def test_lengths_of_decoder_rows_do_not_change_absorption():
    w, main, p = torch.tensor([1.0, 0.0]), torch.tensor([0]), torch.ones(1)
    decoder, z = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.4, 1.0]])
    scale = torch.tensor([2.0, 5.0])
    one, other = absorbed(z, decoder, w, p, main), absorbed(z / scale, decoder * scale[:, None], w, p, main)
    assert one == pytest.approx(other)


def test_the_main_latents_are_the_pieces_a_feature_was_split_into():
    fires = torch.zeros(4000, dtype=torch.bool)
    fires[:1200] = True
    latents = torch.zeros(4000, 12)
    latents[:1200, 4] = 1.0
    latents[::7, 9] = 1.0
    assert main_latents(latents, fires).tolist() == [4]
    latents[:, 4] = 0
    latents[:400, 1] = latents[400:800, 6] = latents[800:1200, 11] = 1.0
    assert sorted(main_latents(latents, fires).tolist()) == [1, 6, 11]


def hierarchy(child_share: float = 0.3) -> Truth:
    return world(
        (OUT,), trees=2, children=2, child_share=child_share, l0=3.0, coherence=0.0, magnitudes=Magnitudes.constant
    ).heldout(8000)


def test_true_features_of_a_hierarchy_absorb_and_split_nothing():
    result = found(sae(hierarchy()), hierarchy())
    assert result.absorption is not None
    assert result.absorption.fraction < 0.01 and result.absorption.full == 0 and result.absorption.split == 1


def without_parents(of: Truth) -> SparseDictionary:
    """Parents silent where a child fires, whose direction holds the parent's."""
    dictionary = sae(of)
    bank = dictionary.banks[0]
    with torch.no_grad():
        for child, parent in enumerate(of.parents.tolist()):
            if parent >= 0:
                bank.W_dec[child] += bank.W_dec[parent]
                bank.W_enc[parent] -= 2 * bank.W_enc[child]
    return dictionary


def test_a_parent_that_is_silent_where_a_rare_child_fires_is_absorbed_there():
    of = hierarchy(child_share=0.012)
    result = found(without_parents(of), of)
    with_child = (of.codes[:, :2] != 0) & (of.codes[:, [2, 4]] + of.codes[:, [3, 5]] != 0)
    share = (with_child.sum(0) / (of.codes[:, :2] != 0).sum(0)).mean().item()
    assert result.absorption is not None and result.absorption.split == 1
    assert result.absorption.full == pytest.approx(share) and result.absorption.fraction == pytest.approx(share)
    assert 0.01 < share < 0.05 and result.fvu < 0.01, "a reconstruction as good as the true one"


def test_a_parent_that_is_silent_where_its_common_children_fire_is_split():
    of = hierarchy(child_share=0.3)
    result = found(without_parents(of), of)
    assert result.absorption is not None and result.absorption.split == 3 and result.absorption.full == 0


def test_the_sites_of_a_layout_hold_what_the_truth_says():
    of = truth()
    assert of.layout == Layout.of({IN: 32, OUT: 32}) and of.rows.shape == (2000, 64)
