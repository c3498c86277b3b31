"""Triton's kernels select what sorting selects and add up what dense products add up: on a GPU, else interpreted."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, objective, planted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_parts import training

from nndecomp.config.schema import Activation, BackendKind, DType, Penalty, Scope
from nndecomp.decompositions import backends
from nndecomp.decompositions.backends.interface import AdamNumbers, Affine, RowGradient
from nndecomp.decompositions.codes import SparseCodes
from nndecomp.decompositions.support import Selected, Support
from nndecomp.errors import SettingError
from nndecomp.training.loop import Trainee

pytest.importorskip("triton", reason="Triton is not installed: pip install 'nndecomp[triton]'")

from nndecomp.decompositions.backends import triton_gather, triton_rows, triton_threshold, triton_topk
from nndecomp.decompositions.backends.triton_adam import TritonRows
from nndecomp.decompositions.backends.triton_collect import FEATURES
from nndecomp.decompositions.backends.triton_launch import INTERPRETED, operands

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with DEVICE:
        yield


def affine(n_tokens: int, d: int, n_features: int, *, scaled: bool = False, seed: int = 0) -> Affine:
    draw = torch.Generator(DEVICE).manual_seed(seed)
    x, W = (torch.randn(n, d, generator=draw) for n in (n_tokens, n_features))
    c = 0.5 + torch.rand(n_features, generator=draw) if scaled else None
    return Affine(x, W, torch.randn(n_features, generator=draw), c)


def scores_are(scores: Tensor) -> Affine:
    """z is this matrix."""
    return Affine(scores, torch.eye(scores.shape[1]), torch.zeros(scores.shape[1]), None)


def pre_and_score(of: Affine) -> tuple[Tensor, Tensor]:
    pre = of.x.float() @ of.W.float().T + of.b.float()
    return pre, pre if of.c is None else pre * of.c


def active(selected: Selected) -> Tensor:
    """Slots whose value is not 0, as a matrix of ones."""
    return SparseCodes((selected.values != 0).float(), selected.support).dense().bool()


def best_of_batch(score: Tensor, n: int) -> Tensor:
    best = score.flatten().topk(min(n, score.numel()))
    return torch.zeros(score.numel()).scatter(0, best.indices[best.values > 0], 1).view_as(score).bool()


# Tokens, d, features, k, strips: sizes beside those of a tile (16 by 16 by 16), one strip or several, one shorter than k.
SIZES = [(1, 3, 5, 1, 1), (17, 20, 130, 5, 1), (5, 16, 130, 5, 4), (3, 40, 70, 33, 2), (2, 7, 7, 7, 1)]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_topk_is_the_k_largest_of_each_token_by_feature(size, scaled):
    *shape, k, n_strips = size
    of = affine(*shape, scaled=scaled)
    pre, score = pre_and_score(of)
    found = triton_topk.topk(of, k, n_strips)
    expected = score.topk(k).indices.sort(1).values
    assert torch.equal(found.support.indices.view(-1, k), expected)
    assert found.support.offsets.tolist() == [k * t for t in range(shape[0] + 1)]
    torch.testing.assert_close(found.values.view(-1, k), pre.gather(1, expected))


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "negative"])
def test_topk_is_exact_however_scores_are_ordered(order):
    """Rising scores are above the floor all along, so that lists are shortened again and again."""
    n_features, k = 9 * FEATURES, 3
    line = torch.arange(1.0, n_features + 1)
    row = {"rising": line, "falling": line.flip(0), "equal": torch.ones(n_features), "negative": -line}[order]
    found = triton_topk.topk(scores_are(torch.stack([row, 2 * row])), k, 1)
    expected = list(range(n_features - k, n_features)) if order == "rising" else list(range(k))
    assert found.support.indices.view(2, k).tolist() == [expected] * 2
    assert torch.equal(found.values.view(2, k)[1], 2 * row[expected])


def test_what_is_not_a_number_is_selected_and_stays_in_its_token():
    scores = torch.arange(40.0).repeat(3, 1)
    scores[1, 30] = torch.nan
    found = triton_topk.topk(scores_are(scores), 2)  # times 0 it is not a number in the whole row
    assert found.values.view(3, 2).isnan().tolist() == [[False, False], [True, True], [False, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_exactly_and_added_in_float32(dtype):
    of = affine(6, 33, 50)
    half = Affine(of.x.to(dtype), of.W.to(dtype), of.b, None)
    pre, _ = pre_and_score(half)
    found = triton_topk.topk(half, 4)
    assert found.values.dtype == dtype
    assert torch.equal(active(found), torch.zeros_like(pre).scatter(1, pre.topk(4).indices, 1).bool())
    with torch.autocast(DEVICE.type, dtype):
        assert torch.equal(triton_topk.topk(of, 4).support.indices, found.support.indices)


def test_the_precision_of_the_product_is_torchs():
    before, x = torch.get_float32_matmul_precision(), torch.tensor([[1 + 2**-12]])
    try:
        torch.set_float32_matmul_precision("medium")
        assert operands(Affine(x, x, torch.zeros(1), None))[0].item() == 1
        torch.set_float32_matmul_precision("highest")
        assert operands(Affine(x, x, torch.zeros(1), None))[0].item() == 1 + 2**-12
    finally:
        torch.set_float32_matmul_precision(before)


# A guess that is right, one that lets everything through, one that lets nothing through.
@pytest.mark.parametrize("guess", [None, 0.0, 1e9])
@pytest.mark.parametrize("size", [(1, 3, 5, 2), (33, 20, 70, 100)])
def test_batchtopk_is_the_largest_of_the_batch_whatever_was_guessed(size, guess):
    *shape, n_slots = size
    of = affine(*shape, scaled=True)
    pre, score = pre_and_score(of)
    ((found,), _) = triton_threshold.batchtopk([of], n_slots, None if guess is None else torch.tensor([guess]))
    expected = best_of_batch(score, n_slots)
    assert torch.equal(active(found), expected)
    torch.testing.assert_close(SparseCodes(found.values, found.support).dense(), pre * expected)


@pytest.mark.parametrize("guess", [None, 0.0, 2.0])
def test_slots_of_a_batch_that_nobody_wants_have_value_0(guess):
    of = affine(9, 4, 30)
    low = Affine(of.x, of.W, of.b - 6, None)
    score = pre_and_score(low)[1]
    assert 0 < int((score > 0).sum()) < 100
    ((found,), _) = triton_threshold.batchtopk([low], 100, None if guess is None else torch.tensor([guess]))
    assert len(found.values) == 100 and found.support.offsets[-1] == 100
    assert torch.equal(active(found), score > 0)
    torch.testing.assert_close(SparseCodes(found.values, found.support).dense(), score.relu())


@pytest.mark.parametrize("guess", [None, 0.0, 1.0])
def test_equal_entries_fill_what_is_left_of_a_batch(guess):
    """More of them than the list of candidates has room for, under a few larger ones, which must not be lost."""
    scores = torch.ones(6, 100)
    scores[2, 7:10] = 3
    given = None if guess is None else torch.tensor([guess])
    ((found,), _) = triton_threshold.batchtopk([scores_are(scores)], 40, given)
    assert sorted(found.values.tolist()) == [1] * 37 + [3] * 3
    assert active(found).sum() == 40 and active(found)[2, 7:10].all()


@pytest.mark.parametrize("guess", [None, 1e9])
def test_groups_that_share_a_batch_compete(guess):
    parts = [affine(12, 5, n, seed=n, scaled=n == 7) for n in (40, 7, 90)]
    scores = torch.cat([pre_and_score(of)[1] for of in parts], 1)
    found, _ = triton_threshold.batchtopk(parts, 60, None if guess is None else torch.tensor([guess]))
    assert torch.equal(torch.cat(list(map(active, found)), 1), best_of_batch(scores, 60))
    assert sum(len(each.values) for each in found) == 60


def test_the_last_threshold_of_an_encoder_is_where_the_next_one_is_looked_for():
    """After a louder batch too, whose threshold nothing reaches."""
    select, of = triton_threshold.BatchTopK(), affine(17, 5, 40)
    for factor in (1, 100, 1):
        louder = Affine(factor * of.x, of.W, of.b, None)
        (found,) = select([louder], 50)
        assert torch.equal(active(found), best_of_batch(pre_and_score(louder)[1], 50))


@pytest.mark.parametrize("room", [None, 1])
@pytest.mark.parametrize("scaled", [False, True])
def test_above_is_every_entry_above_its_features_threshold_also_where_room_was_short(scaled, room):
    of = affine(20, 33, 70, scaled=scaled)
    threshold = torch.linspace(-3, 20, 70)
    pre, score = pre_and_score(of)
    found = triton_threshold.above(of, threshold, room)
    tokens, indices = (score > threshold).nonzero(as_tuple=True)
    assert torch.equal(found.support.tokens, tokens) and torch.equal(found.support.indices, indices)
    torch.testing.assert_close(found.values, pre[tokens, indices])
    assert len(triton_threshold.above(of, threshold + 1e9).values) == 0


@pytest.mark.parametrize(("d", "columns"), list(product((1, 300), (slice(None), slice(3, None)))))
def test_sums_and_dots_equal_dense_products(d, columns):
    draw = torch.Generator(DEVICE).manual_seed(d)
    dense = torch.randn(12, 9, generator=draw) * (torch.rand(12, 9, generator=draw) < 0.3)
    dense[4], dense[:, 8] = 0, 0  # a token without features, a feature without tokens
    tokens, indices = dense.nonzero(as_tuple=True)
    support, weights = Support.of(tokens, indices, 12, 9), dense[tokens, indices]
    table, wide = torch.randn(9, d, generator=draw), torch.randn(12, d + (columns.start or 0), generator=draw)
    rows, out = wide[:, columns], wide.clone()
    triton_gather.add_bags(out[:, columns], support, weights, table)
    torch.testing.assert_close(out[:, columns], rows + dense @ table)
    assert torch.equal(out[:, : columns.start or 0], wide[:, : columns.start or 0])
    torch.testing.assert_close(triton_gather.dots(rows, table, support), (rows @ table.T)[tokens, indices])
    for piece in (1, 2, 256):
        torch.testing.assert_close(triton_gather.feature_sums(support, rows, weights, piece), dense.T @ rows)
    order, bounds = triton_gather.by_feature(indices, 9)
    assert torch.equal(order, indices.sort(stable=True).indices)
    assert torch.equal(bounds.diff(), torch.bincount(indices, minlength=9)) and bounds[0] == 0


@pytest.mark.parametrize("d", [3, 1500])  # narrower than a block of columns, wider than one
def test_rows_have_norm_1_and_gradients_along_them_are_taken_away(d):
    draw = torch.Generator(DEVICE).manual_seed(d)
    W, grad = (torch.randn(4, d, generator=draw) for _ in range(2))
    expected = W / W.norm(dim=1, keepdim=True)
    triton_rows.normalise(W)
    torch.testing.assert_close(W, expected)
    left = grad.clone()
    triton_rows.project_out(left, W)
    torch.testing.assert_close(left, grad - (grad * W).sum(1, keepdim=True) * W)
    torch.testing.assert_close((left * W).sum(1), torch.zeros(4), atol=1e-5, rtol=0)


def test_sums_over_nothing_are_0():
    none = Support(torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 5)
    rows = torch.randn(3, 6)
    out = rows.clone()
    triton_gather.add_bags(out, none, torch.zeros(0), torch.randn(5, 6))
    assert torch.equal(out, rows)
    assert torch.equal(triton_gather.feature_sums(none, rows, torch.zeros(0)), torch.zeros(5, 6))
    assert triton_gather.dots(rows, torch.randn(5, 6), none).shape == (0,)


def gradients(backend: BackendKind, *, bf16: bool = False, **settings) -> tuple[float, dict[str, Tensor]]:
    with backends.using(backend):
        assert backends.of(torch.zeros(1)).name == backend.value
        with torch.device("cpu"):
            made = objective(**settings)
            x = planted(made.layout, 8)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss, _ = made.to(DEVICE).loss(x.to(DEVICE), 0.0)
        loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "activation", "scope"),
    [
        ("sae", Activation.topk, Scope.group),
        ("cross_layer_transcoder", Activation.topk, Scope.group),
        ("cross_layer_transcoder", Activation.batchtopk, Scope.all),
        ("decoupled_crosscoder", Activation.batchtopk, Scope.group),
    ],
)
def test_losses_and_gradients_are_those_of_torch(architecture, activation, scope):
    settings = ARCHITECTURES[architecture] | {"activation": activation, "scope": scope}
    loss, grads = gradients(BackendKind.torch, **settings)
    own_loss, own_grads = gradients(BackendKind.triton, **settings)
    assert own_loss == pytest.approx(loss, rel=1e-5)
    assert own_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(own_grads[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_under_autocast_products_are_rounded_and_the_rest_is_float32():
    settings = ARCHITECTURES["sae"] | {"activation": Activation.batchtopk}
    loss, grads = gradients(BackendKind.torch, **settings)
    near, own = gradients(BackendKind.triton, bf16=True, **settings)
    assert near != loss and near == pytest.approx(loss, rel=0.02)
    for name, grad in grads.items():
        assert own[name].dtype == torch.float32
        assert 0 < (own[name] - grad).norm() < 0.05 * grad.norm(), name


@pytest.mark.parametrize(("d", "tangent", "piece"), [(5, False, 256), (300, True, 256), (300, True, 2), (5, True, 1)])
def test_adam_a_row_at_a_time_is_torchs(monkeypatch, d, tangent, piece):
    """Three steps, clipped, with decoupled decay; of one feature without slots, of one with many, of one that is in pieces."""
    monkeypatch.setattr(triton_gather.FeatureRows.of, "__defaults__", (piece,))
    draw = torch.Generator(DEVICE).manual_seed(d)
    W = torch.nn.functional.normalize(torch.randn(9, d, generator=draw))
    p = torch.nn.Parameter(W.clone())
    adamw = torch.optim.AdamW([p], lr=0.03, betas=(0.9, 0.999), weight_decay=0.1)
    m, v, n = torch.zeros_like(W), torch.zeros_like(W), torch.zeros(())
    for _ in range(3):
        dense = torch.randn(12, 9, generator=draw) * (torch.rand(12, 9, generator=draw) < 0.3)
        dense[:, 8], dense[:, 0] = 0, 1
        tokens, indices = dense.nonzero(as_tuple=True)
        rows = torch.randn(12, d + 3, generator=draw)[:, 3:]
        gradient = RowGradient(Support.of(tokens, indices, 12, 9), rows, dense[tokens, indices], tangent)
        g = dense.T @ rows
        g = g - (g * p).sum(1, keepdim=True) * p if tangent else g
        update = TritonRows(gradient, W)
        torch.testing.assert_close(update.norm(), g.detach().norm())
        clip, n = 0.5 / g.detach().norm(), n + 1
        p.grad = (g * clip).detach()
        adamw.step()
        update.adam(m, v, n, clip, AdamNumbers(1 - 0.03 * 0.1, 0.03, (0.9, 0.999), 1e-8))
        torch.testing.assert_close(W, p.detach(), rtol=1e-4, atol=1e-5)
        W.copy_(torch.nn.functional.normalize(W))
        p.data.copy_(W)
    state = adamw.state[p]
    torch.testing.assert_close(m, state["exp_avg"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(v, state["exp_avg_sq"], rtol=1e-4, atol=1e-9)


def trained(
    backend: BackendKind, settings: dict, n_steps: int, *, bf16: bool, few: float, monkeypatch
) -> dict[str, Tensor]:
    monkeypatch.setattr(TritonRows, "few", few)
    with backends.using(backend):
        with torch.device("cpu"):
            made = objective(**settings)
            batches = [planted(made.layout, 12, seed=step) for step in range(n_steps)]
        made.to(DEVICE).train()
        changes = {"lr": 1e-2, "clip_norm": 0.5, "autocast": DType.bfloat16 if bf16 else DType.float32}
        trainee = Trainee("it", made, training(n_steps, **changes))
        for step, rows in enumerate(batches):
            trainee.step(rows.to(DEVICE), step)
        large = [p for p in trainee.parameters.values() if p.ndim == 2]
        written = [p.grad is not None for p in large]
        assert all(written) if few == 0 or backend is BackendKind.torch else not any(written)
        return {name: p.detach().clone() for name, p in made.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [ARCHITECTURES["sae"], ARCHITECTURES["cross_layer_transcoder"] | {"activation": Activation.batchtopk}],
    ids=["sae", "batchtopk clt"],
)
def test_steps_by_rows_end_at_the_weights_that_written_gradients_lead_to(settings, monkeypatch):
    slow = trained(BackendKind.torch, settings, 3, bf16=False, few=0, monkeypatch=monkeypatch)
    fast = trained(BackendKind.triton, settings, 3, bf16=False, few=1e9, monkeypatch=monkeypatch)
    for name, weight in slow.items():
        torch.testing.assert_close(fast[name], weight, rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_rows_are_rounded_under_autocast_as_written_gradients_are(monkeypatch):
    """To the last bit but for the order of additions: bfloat16 itself would show."""
    written, by_rows, exact = (
        trained(BackendKind.triton, ARCHITECTURES["sae"], 2, bf16=bf16, few=few, monkeypatch=monkeypatch)
        for bf16, few in ((True, 0), (True, 1e9), (False, 1e9))
    )
    name = "dictionary.groups.0.W_dec"
    torch.testing.assert_close(by_rows[name], written[name], rtol=1e-5, atol=1e-6)
    assert (by_rows[name] - exact[name]).abs().max() > 1e-5


class Asked(TorchDispatchMode):
    """Operations whose result, or its size, a GPU would have to be waited for."""

    WAITS = (
        *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive", "equal"),
        *("is_nonzero", "lift_fresh"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").partition(".")[0]
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in self.WAITS or by_mask or unsized:
            self.found.append(func.name())
        return func(*args, **kwargs)


JUMPRELU = ACTIVATIONS["jumprelu"] | {"penalty": Penalty.l0, "penalty_coefficient": 0.01}
STEPS = {
    "topk": ARCHITECTURES["sae"],
    "batchtopk": ARCHITECTURES["sae"] | ACTIVATIONS["batchtopk"],
    "jumprelu": ARCHITECTURES["sae"] | JUMPRELU,
}


@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(settings, id=name) for name, settings in STEPS.items()),
        pytest.param(ARCHITECTURES["cross_layer_transcoder"], id="topk clt", marks=pytest.mark.slow),
    ],
)
def test_a_training_step_asks_nothing_of_the_device(settings):
    with backends.using(BackendKind.triton):
        with torch.device("cpu"):
            made = objective(**settings)
            batches = [planted(made.layout, 5, seed=step).to(DEVICE) for step in range(2)]
        trainee = Trainee("it", made.to(DEVICE).train(), training(2, lr=1e-2, clip_norm=0.5))
        trainee.step(batches[0], 0)
        with Asked() as asked:
            trainee.step(batches[1], 1)
        assert not asked.found
        with asked:
            trainee.window.rows[0][0].item()
        assert asked.found, "it is seen where something is read"


def test_without_triton_it_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(backends, "without_triton", lambda: "Triton is not installed")
    with pytest.raises(SettingError, match="^backend=triton: Triton is not installed; use backend=auto or native$"):
        backends.use(BackendKind.triton)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device():
    of, batchtopk = affine(300, 64, 900), triton_threshold.BatchTopK()
    for mode in ("default", "error"):  # kernels are compiled the first time
        torch.cuda.set_sync_debug_mode(mode)
        for found in (triton_topk.topk(of, 8), *batchtopk([of], 2400)):
            out = torch.zeros_like(of.x)
            triton_gather.add_bags(out, found.support, found.values, of.W)
            weights = triton_gather.dots(out, of.W, found.support)
            triton_gather.feature_sums(found.support, out, weights)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_within_its_registers(repo):
    """For compute capability 9.0, which takes no GPU: what the interpreter cannot see."""
    made = subprocess.run([sys.executable, repo / "tests/triton_compiled.py"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    spilled = [int(line.split()[-1]) for line in made.stdout.splitlines()]
    assert len(spilled) == 16 and max(spilled) <= 128, made.stdout
