"""Causal importances: each function against loops over components, and what it may see."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spd_parts import chain, decomposed
from torch import Tensor, nn
from torch.testing import assert_close

from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.decompositions.spd import scalar_mlps as scalar
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.importance import (
    GlobalImportance,
    GlobalTransformer,
    LayerwiseImportance,
    ParallelMLP,
    SharedMLP,
    TransformerBlock,
)
from nndecomp.errors import SettingError

SIZES = {"0": 5, "2": 3}
ROWS = (2, 6)
TRANSFORMER: dict[str, Any] = {"d_model": 8, "n_blocks": 2, "n_heads": 2, "d_mlp": 12}


def made(kind: ImportanceKind, **changes: Any) -> ParameterDecomposition:
    """Every bias random too, so that leaving one out changes the numbers."""
    cfg = ImportanceConfig(kind=kind, **{"hidden": [7, 4], **TRANSFORMER, **changes})
    decomposition = decomposed(chain(4, 6, 3), SIZES, cfg)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in decomposition.importance.named_parameters():
            if "b_" in name or ".b." in name:
                parameter.normal_(generator=draw)
    return decomposition


def inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"0": torch.randn(*ROWS, 4, generator=draw), "2": torch.randn(*ROWS, 6, generator=draw)}


def q_of(decomposition: ParameterDecomposition, x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.q for name, each in decomposition.importances(x).items()}


def gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


@torch.no_grad()
def mlp_by_hand(x: Tensor, W: list[Tensor], b: list[Tensor]) -> Tensor:
    """One input row, number by number."""
    for n in range(len(W)):
        values = [gelu(float(each)) if n else float(each) for each in x]
        x = torch.tensor(
            [sum(v * float(W[n][i, o]) for i, v in enumerate(values)) + float(b[n][o]) for o in range(W[n].shape[1])]
        )
    return x


def function_of(decomposition: ParameterDecomposition, name: str) -> nn.Module:
    importance = decomposition.importance
    assert isinstance(importance, LayerwiseImportance)
    return importance.functions[list(SIZES).index(name)]


@pytest.mark.parametrize("kind", [ImportanceKind.mlp, ImportanceKind.vector_mlp])
def test_each_component_has_an_mlp_of_its_own(kind: ImportanceKind):
    decomposition, x = made(kind), inputs()
    q = q_of(decomposition, x)
    for name, C in SIZES.items():
        function, V = function_of(decomposition, name), decomposition.components[name].V
        assert isinstance(function, ParallelMLP)
        for c in range(C):
            for b, s in [(0, 0), (1, 4)]:
                row = x[name][b, s]
                seen = (row @ V[:, c])[None] if kind is ImportanceKind.mlp else row
                expected = mlp_by_hand(seen.detach(), [W[c] for W in function.W], [each[c] for each in function.b])
                assert_close(q[name][b, s, c].detach(), expected[0])


@pytest.mark.parametrize("chunk", [1, 2 * 3 * 7, 1 << 18])
def test_mlps_of_single_numbers_are_their_formula_with_its_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch):
    """One component at a time, two of five, all at once."""
    monkeypatch.setattr(scalar, "CHUNK_VALUES", chunk)
    draw = torch.Generator().manual_seed(3)
    a, w, b, v, k = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()
        for shape in ((7, 5), (5, 3), (5, 3), (5, 3), (5, 1))
    )
    inputs = (a, w, b, v, k)
    expected = (F.gelu(a[..., None] * w + b) * v).sum(-1) + k[:, 0]
    found = scalar.scalar_mlps(*inputs)
    assert_close(found, expected)
    weights = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert_close(ours, theirs)
    assert torch.autograd.gradcheck(scalar.scalar_mlps, inputs)
    rows = a.detach().expand(2, 7, 5)
    assert torch.equal(scalar.scalar_mlps(rows, *inputs[1:])[1], found), "leading axes are rows"


def test_one_mlp_a_map_makes_the_importances_of_all_its_components():
    decomposition, x = made(ImportanceKind.shared_mlp), inputs()
    q = q_of(decomposition, x)
    for name in SIZES:
        function = function_of(decomposition, name)
        assert isinstance(function, SharedMLP)
        assert_close(q[name][1, 4].detach(), mlp_by_hand(x[name][1, 4], list(function.W), list(function.b)))


def test_one_mlp_for_all_maps_sees_their_inputs_side_by_side():
    decomposition, x = made(ImportanceKind.global_shared_mlp), inputs()
    function = decomposition.importance
    assert isinstance(function, GlobalImportance) and isinstance(function.function, SharedMLP)
    q = q_of(decomposition, x)
    together = torch.cat([x["0"][1, 4], x["2"][1, 4]])
    expected = mlp_by_hand(together, list(function.function.W), list(function.function.b))
    assert_close(q["0"][1, 4].detach(), expected[:5])
    assert_close(q["2"][1, 4].detach(), expected[5:])


def transformer_by_hand(function: GlobalTransformer, x: Tensor, n_heads: int, causal: bool) -> Tensor:
    """One sequence [pos, sum of d_in]; rotary pairs (i, i + half), angle pos / base^(i / half)."""

    def rms(row: Tensor) -> Tensor:
        return row / row.square().mean().sqrt()

    def turned(row: Tensor, pos: int) -> Tensor:
        half = len(row) // 2
        out = row.clone()
        for i in range(half):
            angle = pos / 10_000 ** (i / half)
            out[i] = row[i] * math.cos(angle) - row[i + half] * math.sin(angle)
            out[i + half] = row[i + half] * math.cos(angle) + row[i] * math.sin(angle)
        return out

    stream = [row @ function.W_in + function.b_in for row in x]
    for block in function.blocks:
        assert isinstance(block, TransformerBlock)
        d = len(stream[0])
        d_head = d // n_heads
        qkv = [rms(row) @ block.W_QKV for row in stream]
        mixed = []
        for s in range(len(stream)):
            heads = []
            for h in range(n_heads):
                part = [slice(i * d + h * d_head, i * d + (h + 1) * d_head) for i in range(3)]
                seen = range(s + 1) if causal else range(len(stream))
                own = turned(qkv[s][part[0]], s)
                scores = torch.stack([own @ turned(qkv[t][part[1]], t) / d_head**0.5 for t in seen]).softmax(0)
                heads.append(sum(scores[n] * qkv[t][part[2]] for n, t in enumerate(seen)))
            mixed.append(torch.cat(heads) @ block.W_O)  # pyright: ignore[reportArgumentType, reportCallIssue]
        stream = [row + each for row, each in zip(stream, mixed, strict=True)]
        W, b = block.mlp.W, block.mlp.b
        stream = [row + F.gelu(rms(row) @ W[0] + b[0]) @ W[1] + b[1] for row in stream]
    return torch.stack([row @ function.W_out + function.b_out for row in stream])


@pytest.mark.parametrize("causal", [True, False])
def test_the_transformer_position_by_position(causal: bool):
    """Inputs at RMS 1, attention with halves turned as pairs, no biases in attention, GELU MLPs. The faults: rotary positions of
    neighbours as pairs, and tanh-GELU here, where the network is ours and exact."""
    decomposition, x = made(ImportanceKind.global_shared_transformer, causal=causal), inputs()
    function = decomposition.importance
    assert isinstance(function, GlobalImportance) and isinstance(function.function, GlobalTransformer)
    q = q_of(decomposition, x)
    normed = [each / each.square().mean(-1, keepdim=True).sqrt() for each in (x["0"], x["2"])]
    together = torch.cat(normed, -1)
    for sequence in range(2):
        with torch.no_grad():
            expected = transformer_by_hand(function.function, together[sequence], 2, causal)
        assert_close(q["0"][sequence].detach(), expected[:, :5], atol=1e-5, rtol=1e-4)
        assert_close(q["2"][sequence].detach(), expected[:, 5:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", [each for each in ImportanceKind if each is not ImportanceKind.global_shared_transformer]
)
def test_importances_of_a_position_see_that_position_alone(kind: ImportanceKind):
    assert seen_by(made(kind), position=3) == {3}


def test_a_causal_transformer_sees_the_past_and_a_bidirectional_one_the_future_too():
    """The fault: gates that know the text that follows, beside dictionaries that do not; the causal one is the default."""
    kind = ImportanceKind.global_shared_transformer
    assert ImportanceConfig(kind=kind).causal
    assert seen_by(made(kind, causal=True), position=3) == {0, 1, 2, 3}
    assert seen_by(made(kind, causal=False), position=3) == {0, 1, 2, 3, 4, 5}


def seen_by(decomposition: ParameterDecomposition, position: int) -> set[int]:
    """The positions whose inputs change the importances at `position`."""
    before = q_of(decomposition, inputs())
    seen = set()
    for changed in range(ROWS[1]):
        x = inputs()
        x["0"][:, changed] += torch.tensor([1.0, -2.0, 0.5, 1.0])
        after = q_of(decomposition, x)
        if any(not torch.equal(after[name][:, position], before[name][:, position]) for name in SIZES):
            seen.add(changed)
    return seen


@pytest.mark.parametrize("kind", [ImportanceKind.global_shared_mlp, ImportanceKind.global_shared_transformer])
def test_the_order_of_global_inputs_is_of_sorted_names_whatever_the_patterns_order(kind: ImportanceKind):
    """The fault: inputs side by side in the order of a dict, so that weights read back meet other maps' inputs."""
    cfg = ImportanceConfig(kind=kind, hidden=[7], **TRANSFORMER)
    model = chain(4, 4, 4, 4)
    a = decomposed(model, {"0": 5, "2": 3, "4": 2}, cfg)
    b = decomposed(model, {"4": 2, "0": 5, "2": 3}, cfg)
    assert isinstance(b.importance, GlobalImportance) and b.importance.names == ["0", "2", "4"]
    b.importance.load_state_dict(a.importance.state_dict())
    x = {name: torch.randn(*ROWS, 4) for name in ("2", "4", "0")}
    found, expected = q_of(b, x), q_of(a, x)
    assert list(found) == ["4", "0", "2"], "by map, in the decomposition's order"
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_all_maps_have_their_say_in_global_importances_and_only_there():
    for kind in ImportanceKind:
        decomposition, x = made(kind), inputs()
        before = q_of(decomposition, x)["2"]
        after = q_of(decomposition, x | {"0": x["0"] + 1})["2"]
        assert torch.equal(before, after) is not decomposition.cfg.is_global, kind


@pytest.mark.parametrize("kind", ImportanceKind)
def test_importances_send_gradients_to_V_where_they_see_what_components_read(kind: ImportanceKind):
    decomposition = made(kind)
    for bank in decomposition.components.values():
        bank.zero_grad()
    torch.stack([q.sum() for q in q_of(decomposition, inputs()).values()]).sum().backward()
    for bank in decomposition.components.values():
        reached = bank.V.grad is not None and bool((bank.V.grad != 0).all())
        assert reached is (kind is ImportanceKind.mlp)
        assert bank.U.grad is None
    assert all(p.grad is not None for p in decomposition.importance.parameters())


def test_layers_start_as_gaussians_by_fan_in_and_biases_at_zero():
    """Variance 2 / fan_in of hidden layers, 1 / fan_in of the last."""
    model = chain(200, 300)
    shared = decomposed(model, {"0": 100}, ImportanceConfig(kind=ImportanceKind.shared_mlp, hidden=[150, 120]))
    vector = decomposed(model, {"0": 100}, ImportanceConfig(kind=ImportanceKind.vector_mlp, hidden=[8]))
    scalar = decomposed(model, {"0": 5000}, ImportanceConfig(kind=ImportanceKind.mlp, hidden=[8]))
    expected = {shared: [2 / 200, 2 / 150, 1 / 120], vector: [2 / 200, 1 / 8], scalar: [2 / 1, 1 / 8]}
    for decomposition, variances in expected.items():
        assert isinstance(decomposition.importance, LayerwiseImportance)
        (function,) = decomposition.importance.functions
        assert isinstance(function, SharedMLP | ParallelMLP)
        for W, variance in zip(function.W, variances, strict=True):
            assert float(W.detach().var()) == pytest.approx(variance, rel=0.1)
        assert all(not b.any() for b in function.b)


def test_the_same_seed_gives_the_same_decomposition_whatever_was_drawn_before():
    model, cfg = chain(4, 6), ImportanceConfig(kind=ImportanceKind.shared_mlp)
    a = decomposed(model, {"0": 5}, cfg, seed=1)
    torch.rand(7)
    b, c = decomposed(model, {"0": 5}, cfg, seed=1), decomposed(model, {"0": 5}, cfg, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.components["0"].V, c.components["0"].V)


def test_weights_of_a_gate_are_counted_by_map():
    """By hand: of `mlp` V counts, since the gate cannot open without it; of global ones all with the first map."""
    model = chain(4, 6, 3)
    cases = {
        ImportanceKind.mlp: [5 * 2 * 7 + 4 * 5, 3 * 2 * 7 + 6 * 3],
        ImportanceKind.vector_mlp: [5 * (4 * 7 + 7), 3 * (6 * 7 + 7)],
        ImportanceKind.shared_mlp: [4 * 7 + 7 * 5, 6 * 7 + 7 * 3],
        ImportanceKind.global_shared_mlp: [10 * 7 + 7 * 8, 0],
        ImportanceKind.global_shared_transformer: [10 * 8 + 2 * (4 * 8 * 8 + 2 * 8 * 12) + 8 * 8, 0],
    }
    for kind, expected in cases.items():
        decomposition = decomposed(model, SIZES, ImportanceConfig(kind=kind, hidden=[7], **TRANSFORMER))
        importance = decomposition.importance
        assert isinstance(importance, LayerwiseImportance | GlobalImportance)
        assert importance.gate_weights(decomposition.sizes) == expected, kind


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden": []}, r"spd.importance.hidden=\[\] must name widths"),
        ({"hidden": [0]}, r"spd.importance.hidden=\[0\]"),
        ({"kind": ImportanceKind.global_shared_transformer, "d_model": 12, "n_heads": 4}, "d_model=12 must divide"),
        ({"kind": ImportanceKind.global_shared_transformer, "n_blocks": 0}, "n_blocks=0 must be positive"),
    ],
)
def test_importances_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(SettingError, match=sentence):
        ImportanceConfig(**{"kind": ImportanceKind.shared_mlp, **changes})
