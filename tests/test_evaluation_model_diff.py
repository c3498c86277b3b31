"""Differences of two models, on dictionaries whose features one knows."""

import math

import numpy as np
import pytest
import torch
from decomposition_parts import CPU, SHAPE, config
from matplotlib.patches import Rectangle
from torch import Tensor

from nndecomp.config.schema import Activation, Architecture, CodeNormalisation
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.errors import SettingError
from nndecomp.evaluation.decoder_pairs import kind_of
from nndecomp.evaluation.model_diff import ModelDiff, group_activity, model_diff
from nndecomp.report import group_activity as report
from nndecomp.targets.pair import PairedShape
from nndecomp.types import Site

PAIR = PairedShape(SHAPE, SHAPE)
SITES = [Site.parse("A:L1.resid_post"), Site.parse("B:L1.resid_post")]
D = SHAPE.d_model
ONES = dict.fromkeys(SITES, 1.0)


def crosscoder(**settings) -> SparseDictionary:
    names = ["A:L1.resid_post", "B:L1.resid_post"]
    cfg = config(
        **dict(architecture=Architecture.crosscoder, activation=Activation.relu, k=None) | settings,
        reads=names,
        writes=names,
    )
    made = build_dictionary(cfg, PAIR, 0, CPU, "pair")
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 2)
    return made.eval()


def dfc(**settings) -> SparseDictionary:
    return crosscoder(
        architecture=Architecture.dedicated_feature_crosscoder, n_exclusive=[3, 4], n_features=5, **settings
    )


def rows(n: int = 60, seed: int = 2) -> Tensor:
    return torch.randn(n, 2 * D, generator=torch.Generator().manual_seed(seed)) + 0.5


def diff(made: SparseDictionary, x: Tensor, scales: dict[Site, float] = ONES, share: float = 0.5) -> ModelDiff:
    return model_diff(made, scales, lambda: ((part, part) for part in x.split(13)), share)


def spans(made: SparseDictionary) -> dict[str, slice]:
    return {model: made.write_layout.spans[site] for model, site in zip("AB", SITES, strict=True)}


@pytest.mark.parametrize("s", [ONES, {SITES[0]: 2.0, SITES[1]: 0.25}])
def test_latent_scaling_is_the_least_squares_answer_over_all_tokens(s: dict[Site, float]):
    """Against numpy's solver, one feature and one target at a time."""
    made, x = crosscoder(n_features=7), rows()
    found = diff(made, x, s).features
    with torch.no_grad():
        y_hat, codes = made(x)
    f, columns = codes[0].dense().double(), spans(made)
    scale = torch.cat([torch.full((D,), s[site], dtype=torch.float64) for site in SITES])
    x, y_hat, b = x.double() / scale, y_hat.double() / scale, made.b_dec.detach().double() / scale
    W = made.banks[0].W_dec.detach().double() / scale
    for j, line in found.iterrows():
        norms = {m: W[j, columns[m]].norm() for m in "AB"}
        owner = max("AB", key=lambda m: norms[m])
        contribution = torch.outer(f[:, j], W[j, columns[owner]])
        for m in "AB":
            c = columns[m]
            put_back = contribution if m == owner else 0
            targets = {
                "activation": x[:, c] - b[c],
                "reconstruction": y_hat[:, c] - b[c],
                "error": (x - y_hat)[:, c] + put_back,
            }
            for what, y in targets.items():
                (beta,), *_ = np.linalg.lstsq(contribution.reshape(-1, 1).numpy(), y.reshape(-1).numpy(), rcond=None)
                assert line[f"beta_{what}_{m}"] == pytest.approx(beta, abs=1e-6), (j, what, m)
        other = "B" if owner == "A" else "A"
        for what in ("reconstruction", "error"):
            assert line[f"nu_{what}"] == pytest.approx(line[f"beta_{what}_{other}"] / line[f"beta_{what}_{owner}"])
        assert line.relative_norm == pytest.approx(float(norms["B"] / (norms["A"] + norms["B"])))


def planted(also_in_a: float, explained_in_a: float) -> ModelDiff:
    """One feature of B. A has `also_in_a` of it, and its decoder says `explained_in_a`."""
    made = crosscoder(n_features=1)
    direction = torch.eye(D)[0]
    with torch.no_grad():
        made.banks[0].W_enc.copy_(torch.cat([0 * direction, direction])[None])
        made.banks[0].W_dec.copy_(torch.cat([explained_in_a * direction, direction])[None])
        made.banks[0].b_enc.zero_()
        made.b_dec.zero_()
    f = torch.rand(50, generator=torch.Generator().manual_seed(1))[:, None]
    unrelated = torch.linspace(-1, 1, 50)[:, None] * torch.eye(D)[1]
    return diff(made, torch.cat([also_in_a * f * direction + unrelated, f * direction], 1))


def test_a_feature_that_one_model_does_not_have_has_no_error_and_no_activation_there():
    (line,) = planted(0.0, 0.0).features.to_dict("records")
    assert line["kind"] == "exclusive_B"
    assert line["nu_error"] == pytest.approx(0, abs=1e-6) and line["beta_activation_A"] == pytest.approx(0, abs=1e-6)
    assert line["beta_activation_B"] == pytest.approx(1) and line["beta_error_B"] == pytest.approx(1)


def test_complete_shrinkage_is_seen_in_the_error_of_the_other_model():
    """The feature is in A at 0.8 of its size, but the decoder says nothing of it there: exclusive by its norm alone."""
    (line,) = planted(0.8, 0.0).features.to_dict("records")
    assert line["kind"] == "exclusive_B" and line["nu_error"] == pytest.approx(0.8)
    (shown,) = planted(0.8, 0.8).features.to_dict("records")
    assert shown["kind"] == "shared" and shown["nu_error"] == pytest.approx(0, abs=1e-6)
    assert shown["nu_reconstruction"] == pytest.approx(0.8) and shown["cosine"] == pytest.approx(1)


def test_the_most_active_tokens_are_those_from_a_share_of_the_maximum_on():
    made, x = crosscoder(n_features=5), rows(40)
    with torch.no_grad():
        f = made(x)[1][0].dense().double()
    found = diff(made, x, share=0.6).features
    W, b = made.banks[0].W_dec.detach().double(), made.b_dec.detach().double()
    for j, line in found.iterrows():
        top = f[:, j] * (f[:, j] >= 0.6 * f[:, j].max())
        owner = "B" if line.relative_norm > 0.5 else "A"
        c = spans(made)[owner]
        beta = (top @ ((x.double() - b)[:, c] @ W[j, c])) / (top.square().sum() * W[j, c].square().sum())
        assert line[f"beta_activation_{owner}_max"] == pytest.approx(float(beta), abs=1e-6)
        assert line[f"max_{owner}"] == pytest.approx(float(f[:, j].max() * W[j, c].norm()), rel=1e-6)


def test_the_louder_model_does_not_seem_to_own_every_feature():
    made = crosscoder(n_features=6)
    with torch.no_grad():
        made.banks[0].W_dec[:, spans(made)["B"]] = 50 * made.banks[0].W_dec[:, spans(made)["A"]]
    raw, normalised = (diff(made, rows(), s).features for s in (ONES, {SITES[0]: 1.0, SITES[1]: 50.0}))
    assert set(raw.kind) == {"exclusive_B"} and set(normalised.kind) == {"shared"}
    assert np.allclose(normalised.cosine, 1)


def test_groups_say_what_each_of_them_does_by_leaving_it_out():
    made, x = dfc(), rows(80)
    found = diff(made, x)
    groups = found.groups.set_index("group")
    assert list(groups.index) == ["A", "shared", "B", "all"]
    with torch.no_grad():
        y_hat, codes = made(x)
    variance = (x - x.mean(0)).double().square()
    for m, c in spans(made).items():
        assert groups.loc["all", f"fvu_{m}"] == pytest.approx(
            float((x - y_hat)[:, c].double().square().sum() / variance[:, c].sum()), rel=1e-5
        )
        for g, bank in enumerate(made.banks):
            without = y_hat.clone()
            without[:, bank.writes] -= codes[g].decode(bank.W_dec.detach())
            expected = float((x - without)[:, c].double().square().sum() / variance[:, c].sum())
            assert groups.loc[bank.name, f"fvu_without_{m}"] == pytest.approx(expected, rel=1e-5)
    # Of the other model a group knows nothing: leaving it out changes nothing there.
    assert groups.loc["A", "fvu_without_B"] == pytest.approx(groups.loc["A", "fvu_B"], rel=1e-9)
    assert groups.loc["B", "fvu_without_A"] == pytest.approx(groups.loc["B", "fvu_A"], rel=1e-9)
    assert groups.share_of_size[["A", "shared", "B"]].sum() == pytest.approx(1)
    assert groups.l0["A"] == pytest.approx(float(codes[0].counts().double().mean()))
    assert groups.alive["all"] == pytest.approx(float(codes.fired().double().mean()))


def test_dedicated_features_are_exclusive_by_construction():
    found = diff(dfc(), rows()).features.set_index("group")
    assert (found.relative_norm["A"] == 0).all() and (found.relative_norm["B"] == 1).all()
    assert found.cosine[["A", "B"]].isna().all()


@pytest.mark.parametrize(
    ("relative", "kind"),
    [(0.0, "exclusive_A"), (0.2, "other"), (0.5, "shared"), (0.7, "other"), (0.95, "exclusive_B"), (math.nan, "zero")],
)
def test_kinds_are_told_by_the_relative_norm(relative: float, kind: str):
    assert kind_of(relative) == kind


def test_models_of_other_widths_are_compared_by_length_alone():
    from dataclasses import replace

    shape = PairedShape(SHAPE, replace(SHAPE, d_model=2 * D))
    names = ["A:L1.resid_post", "B:L1.resid_post"]
    cfg = config(architecture=Architecture.crosscoder, activation=Activation.relu, k=None, reads=names, writes=names)
    made = build_dictionary(cfg, shape, 0, CPU, "pair").eval()
    x = torch.randn(30, 3 * D, generator=torch.Generator().manual_seed(0))
    found = diff(made, x).features
    assert found.cosine.isna().all() and found.relative_norm.notna().all() and found.nu_error.isna().all()
    own = np.where(found.relative_norm > 0.5, found.beta_activation_B, found.beta_activation_A)
    assert np.isfinite(own[found.frequency > 0]).all()


def test_what_is_not_of_two_models_is_refused():
    cfg = config(architecture=Architecture.crosscoder, reads=["resid_post"], writes=["resid_post"])
    made = build_dictionary(cfg, SHAPE, 0, CPU, "one").eval()
    with pytest.raises(SettingError, match="between models A and B"):
        diff(made, rows(), dict.fromkeys(made.writes, 1.0))
    with pytest.raises(SettingError, match="decoupled gives a feature other codes"):
        diff(crosscoder(code_normalisation=CodeNormalisation.decoupled, activation=Activation.topk, k=2), rows())


def test_activity_is_that_of_the_codes_and_needs_no_threshold():
    """Before its first step a batchtopk dictionary has no threshold, so how it starts is told by its training selection."""
    made, x = dfc(activation=Activation.batchtopk, k=[1, 2, 1]).train(), rows(40)
    parts = [made.encode(part) for part in x.split(10)]
    found = group_activity(made, iter(parts)).set_index("group")
    assert list(found.index) == ["A", "shared", "B"] and list(found.n_features) == [3, 5, 4]
    assert found.l0["A"] == found.l0["B"] == pytest.approx(1.0), "k of each group"
    for g, name in enumerate(found.index):
        active = torch.cat([codes[g].dense() for codes in parts]) != 0
        assert found.l0[name] == pytest.approx(float(active.double().sum(1).mean()))
        fired = active.double().mean(0)
        assert found.alive[name] == pytest.approx(float((fired > 0).double().mean()))
        assert found.firing_rate[name] == pytest.approx(float(fired[fired > 0].mean()))


def test_the_table_of_activity_has_the_start_and_the_end_of_each_group():
    made, x = dfc(activation=Activation.batchtopk, k=[1, 2, 1]).train(), rows(40)
    start = {"made": group_activity(made, [made.encode(x)])}
    with torch.no_grad():
        made.banks[2].b_enc.fill_(-100.0)
    end = {"made": group_activity(made, [made.encode(x)])}
    table = report.table(start, end).set_index("decomposition")
    assert table.loc["made B", ["alive at start", "l0 at start"]].tolist()[1] == "1.00"
    assert table.loc["made B", ["alive at end", "l0 at end"]].tolist() == ["0.0%", "0.00"]
    (panel,) = report.figure(start, end).axes
    heights = [bar.get_height() for bar in panel.patches if isinstance(bar, Rectangle)]
    assert heights[:3] == pytest.approx((100 * start["made"].alive).tolist())
    assert heights[3:] == pytest.approx((100 * end["made"].alive).tolist()) and heights[5] == 0


def test_features_shown_are_the_least_shared_and_of_equals_those_the_other_model_has_least_of():
    found = diff(dfc(), rows(80))
    features = found.features.set_index("group")
    shown = [found.features.iloc[row] for row in found.extremes(2, 1)]
    assert [line.group for line in shown] == ["A", "A", "B", "B"]
    for model in "AB":
        own = features.loc[model]
        doubts = (own.nu_error.abs() + own.nu_reconstruction.abs())[own.frequency > 0].sort_values()
        of = [abs(line.nu_error) + abs(line.nu_reconstruction) for line in shown if line.group == model]
        assert of == pytest.approx(doubts.iloc[:2].tolist())
    seldom = found.features.frequency.sort_values().index[0]
    assert seldom not in found.extremes(12, int(found.features.frequency[seldom] * found.n_tokens) + 1)
