"""Every backend selects what sorting selects, and adds up what dense products add up: forward and backward."""

import logging
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from backend_parts import BACKENDS, needs_native
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, GLU, objective, planted
from torch import Tensor

from nndecomp.config.schema import Activation, BackendKind, CodeNormalisation, JumpReluGradient, Penalty, Scope
from nndecomp.decompositions import backends, encoding, kernels, selection
from nndecomp.decompositions.backends import candidates, compiled, native
from nndecomp.decompositions.backends.interface import Affine, Backend
from nndecomp.decompositions.codes import SparseCodes
from nndecomp.decompositions.support import Selected, Support
from nndecomp.errors import SettingError

SIZES = [(1, 3, 5, 1), (7, 6, 24, 3), (40, 33, 300, 8), (70, 16, 2500, 31)]  # tokens, d, features, k


def affine(n_tokens: int, d: int, n_features: int, *, scaled: bool = False, seed: int = 0) -> Affine:
    draw = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(n, d, generator=draw) for n in (n_tokens, n_features))
    c = 0.5 + torch.rand(n_features, generator=draw) if scaled else None
    return Affine(x, W, torch.randn(n_features, generator=draw), c)


def pre_and_score(of: Affine) -> tuple[Tensor, Tensor]:
    pre = of.x @ of.W.T + of.b
    return pre, pre if of.c is None else pre * of.c


def mask(selected: Selected) -> Tensor:
    chosen = torch.zeros(selected.support.n_tokens, selected.support.n_features, dtype=torch.int64)
    chosen.index_put_((selected.support.tokens, selected.support.indices), torch.tensor(1), accumulate=True)
    assert chosen.max() <= 1, "an entry has one slot"
    return chosen.bool()


def values(selected: Selected) -> Tensor:
    return SparseCodes(selected.values, selected.support).dense()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So small that these sizes take several; and what screening leaves is never too much."""
    monkeypatch.setattr(candidates, "_MANY", 1.0)
    monkeypatch.setattr(candidates, "_MANY_FOR_LARGEST", 1.0)
    monkeypatch.setattr(native, "_FEW", dict.fromkeys(candidates.Bound, 1.0))
    monkeypatch.setattr(candidates, "_width", lambda of: compiled.LONG(256))
    monkeypatch.setattr(selection, "BLOCK", 16 * 256)
    yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_topk_is_the_k_largest_of_each_token(backend: Backend, size, scaled):
    *shape, k = size
    of = affine(*shape, scaled=scaled)
    pre, score = pre_and_score(of)
    found = backend.topk(of, k)
    expected = torch.zeros_like(score).scatter(1, score.topk(k).indices, 1).bool()
    assert torch.equal(mask(found), expected)
    assert found.support.offsets.tolist() == [k * t for t in range(shape[0] + 1)]
    torch.testing.assert_close(values(found), pre * expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_batchtopk_is_the_largest_of_the_batch(backend: Backend, size, scaled):
    *shape, k = size
    for seed in range(3):  # the second and third time it knows where the first one's threshold was
        of = affine(*shape, scaled=scaled, seed=seed)
        pre, score = pre_and_score(of)
        n_slots = k * shape[0]
        (found,) = backend.batchtopk([of], n_slots)
        best = score.flatten().topk(n_slots)
        expected = torch.zeros(score.numel()).scatter(0, best.indices[best.values > 0], 1).view_as(score).bool()
        assert torch.equal(mask(found), expected)
        torch.testing.assert_close(values(found), pre * expected)


@needs_native
def test_a_batch_after_one_of_another_size_is_selected_as_if_it_were_the_first():
    backend = native.Native(None)
    of = affine(40, 33, 300)
    loud = Affine(100 * of.x, of.W, of.b, None)
    first = mask(backend.batchtopk([of], 200)[0])
    backend.batchtopk([loud], 200)
    assert torch.equal(mask(backend.batchtopk([of], 200)[0]), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_share_a_batch_compete(backend: Backend):
    parts = [affine(12, 5, n, seed=n) for n in (40, 7, 90)]
    scores = torch.cat([pre_and_score(of)[1] for of in parts], 1)
    together = torch.cat([mask(each) for each in backend.batchtopk(parts, 60)], 1)
    best = scores.flatten().topk(60).indices
    assert torch.equal(together.flatten().nonzero().squeeze(1), best.sort().values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_above_is_every_entry_above_its_features_threshold(backend: Backend, scaled):
    of = affine(40, 33, 300, scaled=scaled)
    threshold = torch.linspace(-3, 20, 300)
    pre, score = pre_and_score(of)
    found = backend.above(of, threshold)
    assert torch.equal(mask(found), score > threshold)
    torch.testing.assert_close(values(found), pre * (score > threshold))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_positive_entries_than_asked_for(backend: Backend):
    of = affine(9, 4, 30)
    low = Affine(of.x, of.W, of.b - 6, None)
    score = pre_and_score(low)[1]
    (found,) = backend.batchtopk([low], 100)
    assert torch.equal(mask(found), score > 0) and int((score > 0).sum()) < 100
    assert backend.topk(low, 5).support.offsets[-1] == 45


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_entries_fill_what_is_left(backend: Backend):
    same = Affine(torch.ones(4, 2), torch.ones(50, 2), torch.zeros(50), None)
    assert backend.topk(same, 7).support.offsets.tolist() == [0, 7, 14, 21, 28]
    assert mask(backend.topk(same, 7)).sum(1).tolist() == [7, 7, 7, 7]
    assert len(backend.batchtopk([same], 33)[0].values) == 33


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_is_seen(backend: Backend):
    of = affine(7, 6, 24)
    of.x[3, 2] = torch.nan
    found = backend.topk(of, 3)
    assert values(found)[3].isnan().any() and not values(found)[[0, 1, 2, 4, 5, 6]].isnan().any()
    of = affine(7, 6, 24)
    of.b[5] = torch.nan
    assert mask(backend.topk(of, 3))[:, 5].all() and values(backend.topk(of, 3))[:, 5].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("d", "columns"), list(product((1, 7, 32, 70), (slice(None), slice(3, None)))))
def test_sums_and_dots_equal_dense_products(backend: Backend, d, columns):
    draw = torch.Generator().manual_seed(d)
    dense = torch.randn(30, 50, generator=draw) * (torch.rand(30, 50, generator=draw) < 0.2)
    dense[4] = 0  # a token without features
    dense[:, 9] = 0  # a feature without tokens
    tokens, indices = dense.nonzero(as_tuple=True)
    support = Support.of(tokens, indices, 30, 50)
    table = torch.randn(50, d, generator=draw)
    wide = torch.randn(30, d + (columns.start or 0), generator=draw)
    rows, weights = wide[:, columns], dense[tokens, indices]
    out = wide.clone()
    backend.add_bags(out[:, columns], support, weights, table)
    torch.testing.assert_close(out[:, columns], rows + dense @ table)
    assert torch.equal(out[:, : columns.start or 0], wide[:, : columns.start or 0])
    torch.testing.assert_close(backend.dots(rows, table, support), (rows @ table.T)[tokens, indices])
    torch.testing.assert_close(backend.feature_sums(support, rows, weights), dense.T @ rows)
    order, bounds = backend.by_feature(indices, 50)
    assert torch.equal(order, indices.sort(stable=True).indices)
    assert torch.equal(bounds.diff(), torch.bincount(indices, minlength=50)) and bounds[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_normalised_and_gradients_made_tangent(backend: Backend):
    W, grad = (torch.randn(9, 37, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    grad[2] = 0
    unit = W / W.norm(dim=1, keepdim=True)
    backend.normalise(W)
    torch.testing.assert_close(W, unit)
    tangent = grad - (grad * unit).sum(1, keepdim=True) * unit
    backend.project_out(grad, W)
    torch.testing.assert_close(grad, tangent)
    assert float((grad * W).sum(1).abs().max()) < 1e-5 and not grad[2].any()


def gradients(backend: BackendKind, **settings) -> tuple[float, dict[str, Tensor]]:
    with backends.using(backend):
        made = objective(**settings)
        made.start(planted(made.layout, 200))
        loss, _ = made.loss(planted(made.layout, 200), 0.0)
        loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@needs_native
@pytest.mark.parametrize("activation", [Activation.topk, Activation.batchtopk], ids=lambda a: a.value)
@pytest.mark.parametrize("scope", Scope, ids=lambda s: s.value)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_native_losses_and_gradients_are_those_of_torch(architecture, scope, activation):
    settings = ARCHITECTURES[architecture] | {"activation": activation, "scope": scope}
    loss, grads = gradients(BackendKind.torch, **settings)
    native_loss, native_grads = gradients(BackendKind.native, **settings)
    assert native_loss == pytest.approx(loss, rel=1e-5)
    assert native_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            native_grads[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


L1 = {"penalty": Penalty.l1, "penalty_coefficient": 0.1, "penalty_normalisation": CodeNormalisation.sae}
RELU, GATED = ({**ACTIVATIONS[name], **L1} for name in ("relu", "gated"))
JUMP = {**ACTIVATIONS["jumprelu"], "penalty": Penalty.l0, "penalty_coefficient": 0.1}
POINTWISE_ARCHITECTURES = {
    name: ARCHITECTURES[name]
    for name in ("sae", "per_layer_transcoder", "skip_cross_layer_transcoder", "decoupled_crosscoder")
} | {"glu": ARCHITECTURES["per_layer_transcoder"] | GLU}
POINTWISE = {
    "relu": RELU,
    "tanh": {**RELU, "penalty": Penalty.tanh},
    "gated": GATED,
    "jumprelu": JUMP,
    "jumprelu_target": {**JUMP, "penalty": Penalty.l0_target, "penalty_target": 1.0},
    "jumprelu_rectangle": {**JUMP, "jumprelu_gradient": JumpReluGradient.rectangle, "jumprelu_log_threshold": True},
    "jumprelu_scaled": {**JUMP, "code_normalisation": CodeNormalisation.sae},
}


@pytest.mark.parametrize(
    "backend", [BackendKind.torch, pytest.param(BackendKind.native, marks=needs_native)], ids=lambda b: b.value
)
@pytest.mark.parametrize("settings", POINTWISE.values(), ids=POINTWISE)
@pytest.mark.parametrize("architecture", POINTWISE_ARCHITECTURES)
def test_entries_that_neither_have_a_code_nor_teach_are_left_out_without_a_trace(
    architecture, settings, backend, monkeypatch
):
    settings = POINTWISE_ARCHITECTURES[architecture] | settings
    monkeypatch.setattr(encoding, "_MANY", 10**9)
    loss, grads = gradients(backend, **settings)
    monkeypatch.setattr(encoding, "_MANY", 1)
    monkeypatch.setattr(encoding, "_DENSE", 1.1)
    monkeypatch.setattr(encoding, "_SAMPLE", 1)
    sparse_loss, sparse_grads = gradients(backend, **settings)
    assert sparse_loss == pytest.approx(loss, rel=1e-5)
    assert sparse_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            sparse_grads[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def awkward(name: str) -> Affine:
    """Rows that 8 bits serve badly."""
    of = affine(60, 37, 3000)
    draw = torch.Generator().manual_seed(1)
    match name:
        case "one coordinate is large":
            of.x[:, 5] *= 1000
        case "features that hardly differ":
            of.W[:] = of.W[0] + 1e-4 * torch.randn(of.W.shape, generator=draw)
        case "large biases":
            of.b[:] *= 1e4
        case "heavy tails":
            of.x[:] = of.x**5
            of.W[:] = of.W**5
        case "a token of zeros":
            of.x[7] = 0
        case other:
            raise AssertionError(other)
    return of


@needs_native
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "name",
    ["one coordinate is large", "features that hardly differ", "large biases", "heavy tails", "a token of zeros"],
)
def test_by_certain_bounds_nothing_larger_is_ever_missed(name: str, scaled: bool):
    of = awkward(name)
    of = Affine(of.x, of.W, of.b, torch.linspace(0.1, 3, 3000) if scaled else None)
    score = of.x.double() @ of.W.double().T + of.b.double()
    score = score if of.c is None else score * of.c.double()
    rounding = 1e-5 * score.abs().amax(1, keepdim=True)

    chosen = mask(native.CERTAIN.topk(of, 20))
    smallest = score.masked_fill(~chosen, torch.inf).amin(1, keepdim=True)
    assert (chosen | (score <= smallest + rounding)).all()

    chosen = mask(native.CERTAIN.batchtopk([of], 700)[0])
    smallest = score[chosen].min()
    assert int(chosen.sum()) == 700 and (chosen | (score <= smallest + rounding)).all()

    threshold = score.quantile(0.99, dim=0).float()
    chosen, margin = mask(native.CERTAIN.above(of, threshold)), rounding + 1e-5 * threshold.abs()
    assert (chosen | (score <= threshold + margin)).all() and (~chosen | (score >= threshold - margin)).all()


@needs_native
@pytest.mark.parametrize("bound", [candidates.Bound.certain, candidates.Bound.likely], ids=lambda b: b.name)
def test_where_8_bits_leave_too_much_all_is_done_in_float32(bound, monkeypatch):
    """The same bits as without screening, whether it is seen before, among the blocks or after them."""
    of = affine(70, 16, 2500)
    screening = native.Native(bound)
    for share in (1e-6, 0.013, 0.02):
        monkeypatch.setattr(candidates, "_MANY", share)
        monkeypatch.setattr(candidates, "_MANY_FOR_LARGEST", share)
        monkeypatch.setattr(native, "_FEW", dict.fromkeys(candidates.Bound, share))
        pairs = [
            (native.PLAIN.topk(of, 31), screening.topk(of, 31)),
            (native.PLAIN.batchtopk([of], 2000)[0], screening.batchtopk([of], 2000)[0]),
            (native.PLAIN.above(of, torch.full((2500,), 6.0)), screening.above(of, torch.full((2500,), 6.0))),
        ]
        for plain, found in pairs:
            assert torch.equal(mask(plain), mask(found))
            assert share > 0.015 or torch.equal(plain.values, found.values)
            assert found.agreement == (1.0 if bound is candidates.Bound.likely else None)


@needs_native
@pytest.mark.parametrize("backend", [native.PLAIN, native.CERTAIN, native.LIKELY], ids=["plain", "certain", "likely"])
def test_the_number_of_threads_changes_no_bit(backend: Backend):
    of, before = affine(70, 16, 2500), torch.get_num_threads()
    weights = torch.randn(70 * 31, generator=torch.Generator().manual_seed(3))
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        found = backend.topk(of, 31)
        sums = backend.feature_sums(found.support, of.x, weights)
        results.append((found.support.indices, sums, kernels.bag(found.support, of.W, weights)))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_other_precisions_and_autocast_are_torchs():
    assert backends.of(torch.zeros(1, dtype=torch.float64)).name == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert backends.of(torch.zeros(1)).name == "torch"
    with backends.using(BackendKind.torch):
        assert backends.of(torch.zeros(1)).name == "torch"


@needs_native
def test_on_the_cpu_native_is_what_runs_by_default():
    assert backends.of(torch.zeros(1)).name == "native"


@needs_native
def test_compiled_code_is_kept_and_where_nothing_can_be_written_a_sentence_says_so(monkeypatch, tmp_path):
    places = compiled.obstacle, compiled.available, compiled._library_path
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for each in places:
            each.cache_clear()
        assert compiled.obstacle() is None
        assert [path.suffix for path in (tmp_path / "cache" / "nndecomp").iterdir()] == [".so"]
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        for each in places:
            each.cache_clear()
        may = compiled.os.access  # the superuser may write anywhere
        monkeypatch.setattr(compiled.os, "access", lambda path, mode: str(path) != "/proc" and may(path, mode))
        assert compiled.obstacle() == (
            "/proc cannot be written, where native kernels would be compiled; XDG_CACHE_HOME names another place"
        )
    finally:
        for each in places:
            each.cache_clear()


def test_without_a_compiler_native_is_refused_and_auto_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled.obstacle.cache_clear()
    compiled.available.cache_clear()
    try:
        with pytest.raises(SettingError, match="backend=native: there is no C\\+\\+ compiler \\(no-such-compiler"):
            backends.use(BackendKind.native)
        assert backends.of(torch.zeros(1)).name == "torch"
        assert backends.of(torch.zeros(1)).name == "torch"
        assert len([record for record in caplog.records if "no-such-compiler" in record.message]) == 1
    finally:
        compiled.obstacle.cache_clear()
        compiled.available.cache_clear()


def test_what_computes_is_said_when_it_first_does_and_once_a_run(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    with backends.using(BackendKind.auto):
        for _ in range(2):
            backends.use(BackendKind.torch)
            assert not caplog.messages, "nothing was computed"
            backends.of(torch.zeros(1))
            backends.of(torch.zeros(2))
            assert caplog.messages == ["sparse codes on cpu by backend=torch"]
            caplog.clear()
