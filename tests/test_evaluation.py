"""Laws of the patching evaluation, on decompositions whose answers are known."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from evaluation_parts import EachSite, ToyTarget, linear, text
from torch import Tensor

from nndecomp.config.schema import EvaluationConfig, Inputs, Patched
from nndecomp.evaluation import evaluate, evaluate_all, patching
from nndecomp.evaluation.rows import Measurement
from nndecomp.types import Point, Site

N_LAYERS = 3
INS = [Site(layer, Point.mlp_in) for layer in range(N_LAYERS)]
OUTS = [Site(layer, Point.mlp_out) for layer in range(N_LAYERS)]


def settings(batch_seqs: int = 4, patched: Sequence[Patched] = tuple(Patched)) -> EvaluationConfig:
    return EvaluationConfig(n_seqs=6, batch_seqs=batch_seqs, inputs=list(Inputs), patched=list(patched), bootstrap=200)


@pytest.fixture
def target() -> ToyTarget:
    return ToyTarget(N_LAYERS)


def means_of(target: ToyTarget, sites: Sequence[Site] = OUTS) -> dict[Site, Tensor]:
    heldout, keep = text()
    return {site: value[keep].mean(0) for site, value in target.record(heldout.tokens, sites).items()}


def measure(target: ToyTarget, *decompositions, cfg: EvaluationConfig | None = None) -> list[Measurement]:
    heldout, keep = text()
    means = means_of(target, [site for each in decompositions for site in each.writes])
    return evaluate(target, decompositions, heldout, keep, means, cfg or settings(), seed=0)


def value(rows: list[Measurement], metric: str, site: str = "all", patched: str = "all", inputs: str = "none") -> float:
    found = [row for row in rows if (row.metric, row.site, row.patched, row.inputs) == (metric, site, patched, inputs)]
    assert len(found) == 1, f"{len(found)} rows for {metric} {site} {patched} {inputs}"
    return found[0].value


def perfect(target: ToyTarget) -> EachSite:
    return EachSite(INS, OUTS, [target.mlp(layer) for layer in range(N_LAYERS)])


def each_mode(rows: list[Measurement], metric: str) -> list[float]:
    return [row.value for row in rows if row.metric == metric and row.inputs in ("clean", "live")]


def test_a_perfect_transcoder_costs_nothing_in_every_mode(target):
    rows = measure(target, perfect(target))
    increases, fvus = each_mode(rows, "ce_increase"), each_mode(rows, "fvu")
    assert len(increases) == 2 * (1 + 3 + 3) and len(fvus) == 2 * 4
    assert max(map(abs, increases)) < 1e-6
    assert max(map(abs, each_mode(rows, "kl"))) < 1e-6
    assert set(each_mode(rows, "top1_agreement")) == {1.0}
    assert max(fvus) < 1e-10
    assert value(rows, "kl_zero") > 0.01


def test_a_perfect_sae_is_exactly_the_model(target):
    sae = EachSite(OUTS, OUTS, [lambda x: x] * N_LAYERS)
    rows = measure(target, sae)
    assert set(each_mode(rows, "ce_increase")) == {0.0}
    assert set(each_mode(rows, "fvu")) == {0.0}


@pytest.mark.parametrize("inputs", ["clean", "live"])
def test_a_zero_decoder_is_zero_ablation_and_a_constant_mean_is_mean_ablation(target, inputs):
    means = means_of(target)
    zero = EachSite(INS, OUTS, [torch.zeros_like] * N_LAYERS)
    mean = EachSite(INS, OUTS, [lambda x, m=means[site]: m.expand(len(x), -1) for site in OUTS])
    for decomposition, kind in ((zero, "zero"), (mean, "mean")):
        rows = measure(target, decomposition)
        for row in rows:
            if row.metric == "ce_replaced" and row.inputs == inputs:
                assert row.value == value(rows, f"ce_{kind}", row.site, row.patched)
        assert value(rows, "kl", inputs=inputs) == value(rows, f"kl_{kind}") > 0


def test_clean_and_live_agree_with_nothing_upstream_and_differ_once_errors_compound(target):
    rows = measure(target, EachSite(INS, OUTS, [linear(layer) for layer in range(N_LAYERS)]))
    for site in OUTS:
        clean = value(rows, "ce_replaced", str(site), "single", "clean")
        assert clean == value(rows, "ce_replaced", str(site), "single", "live")
    clean, live = (value(rows, "ce_replaced", inputs=inputs) for inputs in ("clean", "live"))
    assert abs(clean - live) > 1e-4
    first, rest = str(OUTS[0]), str(OUTS[2])
    assert value(rows, "fvu", first, "none", "clean") == value(rows, "fvu", first, "all", "live")
    assert value(rows, "fvu", rest, "none", "clean") != value(rows, "fvu", rest, "all", "live")


def test_what_reads_a_replaced_site_reads_the_replacement_live_and_the_original_clean(target):
    """The first adds 1 after layer 0's MLP; the second copies what is there to layer 1."""
    first = EachSite([OUTS[0]], [OUTS[0]], [lambda x: x + 1])
    second = EachSite([OUTS[0]], [OUTS[1]], [lambda x: x])
    heldout, keep = text()
    seen: dict[str, list[Tensor]] = {"clean": [], "live": []}
    for inputs in ("clean", "live"):
        target.watch = lambda site, v, inputs=inputs: (
            seen[inputs].append(v[keep]) if site == Site(1, Point.resid_post) else None
        )
        cfg = EvaluationConfig(n_seqs=6, batch_seqs=6, inputs=[Inputs[inputs]], patched=[Patched.all], bootstrap=0)
        means = means_of(target, OUTS[:2])
        target_rows = evaluate(target, [first, second], heldout, keep, means, cfg, seed=0)
        assert value(target_rows, "mse", str(OUTS[0]), "all" if inputs == "live" else "none", inputs) == pytest.approx(
            1
        )
    target.watch = None
    torch.testing.assert_close(seen["live"][-1], seen["clean"][-1] + 1)


def test_prefixes_grow_from_the_first_site_to_all(target):
    rows = measure(target, EachSite(INS, OUTS, [linear(layer) for layer in range(N_LAYERS)]))
    for inputs in ("clean", "live"):
        prefix = [value(rows, "ce_replaced", f"{OUTS[0]}-{site}", "prefixes", inputs) for site in OUTS]
        assert prefix[0] == value(rows, "ce_replaced", str(OUTS[0]), "single", inputs)
        assert prefix[-1] == value(rows, "ce_replaced", "all", "all", inputs)


def test_ce_and_kl_are_those_of_a_slow_loop(target):
    rows = measure(target, EachSite(INS, OUTS, [linear(layer) for layer in range(N_LAYERS)]))
    heldout, keep = text()

    def run(replace: bool) -> Tensor:
        hooks: dict[Site, Callable] = {}
        arrived: dict[int, Tensor] = {}
        for layer in range(N_LAYERS):
            hooks[INS[layer]] = lambda v, layer=layer: arrived.update({layer: v})
            hooks[OUTS[layer]] = lambda v, layer=layer: torch.where(keep[..., None], linear(layer)(arrived[layer]), v)
        with target.patch(hooks if replace else {}):
            return target.logits(heldout.tokens).double().log_softmax(-1)

    p, q = run(False), run(True)
    ce, kl, n = 0.0, 0.0, 0
    for b in range(len(heldout.tokens)):
        for t in range(heldout.tokens.shape[1] - 1):
            if heldout.mask[b, t + 1]:
                ce -= q[b, t, heldout.tokens[b, t + 1]].item()
                kl += (p[b, t].exp() * (p[b, t] - q[b, t])).sum().item()
                n += 1
    assert value(rows, "ce_replaced", inputs="live") == pytest.approx(ce / n, rel=1e-5)
    assert value(rows, "kl", inputs="live") == pytest.approx(kl / n, rel=1e-4)


def test_positions_that_do_not_count_keep_their_value(target):
    heldout, keep = text()
    seen: list[Tensor] = []
    first = Site(0, Point.mlp_out)
    zero = EachSite([INS[0]], [first], [torch.zeros_like])
    original = target.record(heldout.tokens, [first])[first]
    after = Site(0, Point.resid_post)
    target.watch = lambda site, v: seen.append(v) if site == after else None
    evaluate(target, [zero], heldout, keep, means_of(target, [first]), settings(6, [Patched.all]), seed=0)
    target.watch = None
    patched, clean = seen[-1], seen[0]
    torch.testing.assert_close(patched[~keep], clean[~keep], rtol=0, atol=0)
    torch.testing.assert_close(patched[keep], (clean - original)[keep])
    assert (~keep).sum() > 6 and not torch.equal(patched[keep], clean[keep])


@pytest.mark.parametrize("batch_seqs", [1, 5])
def test_batch_size_of_the_evaluation_changes_nothing(target, batch_seqs):
    decomposition = EachSite(INS, OUTS, [linear(layer) for layer in range(N_LAYERS)])
    for a, b in zip(
        measure(target, decomposition), measure(target, decomposition, cfg=settings(batch_seqs)), strict=True
    ):
        assert (a.metric, a.site, a.n_tokens) == (b.metric, b.site, b.n_tokens)
        assert a.value == pytest.approx(b.value, rel=1e-5, abs=1e-6)
        assert a.low == pytest.approx(b.low, rel=1e-5, abs=1e-6, nan_ok=True)


def test_probabilities_that_are_too_many_to_hold_are_computed_anew_and_change_no_bit(target, monkeypatch):
    decomposition = EachSite(INS, OUTS, [linear(layer) for layer in range(N_LAYERS)])
    held = measure(target, decomposition)
    monkeypatch.setattr(patching, "_HELD", 0)
    assert repr(measure(target, decomposition)) == repr(held)


def test_measuring_together_is_measuring_one_by_one(target):
    heldout, keep = text()
    a, b = perfect(target), EachSite(INS[:2], OUTS[:2], [linear(0), linear(1)])
    together = evaluate_all(target, {"a": [a], "b": [b]}, heldout, keep, means_of(target), settings(), seed=0)
    alone = {"a": measure(target, a), "b": measure(target, b)}
    for name, rows in together.items():
        for x, y in zip(rows, alone[name], strict=True):
            assert {**vars(x), "low": str(x.low), "high": str(x.high)} == {
                **vars(y),
                "low": str(y.low),
                "high": str(y.high),
            }


def test_decompositions_with_disjoint_writes_form_one_replacement(target):
    parts = [EachSite([INS[layer]], [OUTS[layer]], [linear(layer)]) for layer in range(N_LAYERS)]
    whole = EachSite(INS, OUTS, [linear(layer) for layer in range(N_LAYERS)])
    for a, b in zip(measure(target, *parts), measure(target, whole), strict=True):
        assert a.metric == b.metric and a.value == pytest.approx(b.value, rel=1e-6, abs=1e-9)
    with pytest.raises(AssertionError, match=r"both written"):
        measure(target, whole, parts[1])


def test_what_cannot_run_live_has_no_live_rows_and_says_why(target):
    class Backwards(EachSite):
        def live_obstacle(self) -> str | None:
            return "it reads L1.mlp_in after writing L0.mlp_out"

    rows = measure(target, Backwards(INS, OUTS, [linear(layer) for layer in range(N_LAYERS)]))
    live = [row for row in rows if row.inputs == "live"]
    assert [row.metric for row in live] == ["live_obstacle"]
    assert "reads L1.mlp_in" in live[0].note
    assert value(rows, "kl", inputs="clean") > 0.01


def test_evaluation_refuses_training_mode_and_leaves_no_hooks(target):
    decomposition = perfect(target)
    with pytest.raises(AssertionError, match="training mode"):
        measure(target, decomposition.train())
    measure(target, decomposition.eval())
    assert target.hooks == {}
    broken = EachSite(INS, OUTS, [linear(0), linear(1), lambda x: x / 0 * 0])
    with pytest.raises(AssertionError, match="finite"):
        measure(target, broken)
    assert target.hooks == {}


def test_activity_is_counted_over_kept_tokens_only(target):
    _, keep = text()
    rows = measure(target, EachSite(INS, OUTS, [linear(layer) for layer in range(N_LAYERS)]))
    # EachSite reports, for group l, components 0..l active on every token, of 4.
    assert [value(rows, "l0", f"L{layer}", "none", "clean") for layer in range(N_LAYERS)] == [1, 2, 3]
    assert value(rows, "active_per_module", "all", "none", "clean") == 2
    assert value(rows, "dead_fraction", "L0", "none", "clean") == 0.75
    assert value(rows, "dead_fraction", "all", "all", "live") == 0.5
    assert value(rows, "density_median", "L1", "none", "clean") == 0
    l0 = [row for row in rows if row.metric == "l0"]
    assert {row.n_tokens for row in l0} == {int(keep.sum())}
    assert not any(math.isnan(row.value) for row in rows)
