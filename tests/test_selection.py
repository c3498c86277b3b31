"""What is selected a block of features at a time is what sorting all of them selects, equal entries included."""

from typing import Any

import pytest
import torch
from backend_parts import BACKENDS
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, GLU, PURSUIT, F, objective, planted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nndecomp.config.schema import BackendKind, Scope
from nndecomp.decompositions import backends, selection
from nndecomp.decompositions.activation_selecting import TopK
from nndecomp.decompositions.backends import compiled
from nndecomp.decompositions.backends.interface import Affine, Backend
from nndecomp.decompositions.selection import Above, BatchBest, Found, TokenBest

SMALL = 16 * 256  # entries of a block: 256 features or a few more of these many tokens


def whole_numbers(n_tokens: int, n_features: int, most: int, seed: int = 0) -> Affine:
    """z is one of 2 most + 1 numbers, exactly, so that most entries have equals."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randint(-most, most + 1, (n_tokens, n_features), generator=draw).float()
    return Affine(torch.eye(n_tokens), z.T.contiguous(), torch.zeros(n_features), None)


def active(support: Any) -> Tensor:
    return (support.tokens * support.n_features + support.indices).sort().values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [SMALL, selection.BLOCK])
@pytest.mark.parametrize(("n_features", "k", "most"), [(40, 5, 2), (700, 3, 1), (2048, 4, 9), (2500, 31, 2)])
def test_of_equal_entries_of_a_token_the_first_features_are_selected(
    backend: Backend, block, n_features, k, most, monkeypatch
):
    monkeypatch.setattr(selection, "BLOCK", block)
    of = whole_numbers(20, n_features, most)
    sorted_first = (of.x @ of.W.T).sort(dim=1, descending=True, stable=True).indices[:, :k]
    found = backend.topk(of, k)
    assert torch.equal(found.support.indices.view(-1, k).sort(1).values, sorted_first.sort(1).values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [SMALL, selection.BLOCK])
@pytest.mark.parametrize("n_slots", [1, 60, 900, 3000])
def test_of_equal_entries_of_a_batch_the_first_tokens_are_selected(backend: Backend, block, n_slots, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK", block)
    parts = [whole_numbers(20, n_features, 3, seed) for seed, n_features in enumerate((700, 40, 300))]
    together = torch.cat([of.x @ of.W.T for of in parts], 1)
    expected = together.flatten().sort(descending=True, stable=True).indices[:n_slots].sort().values
    found = backend.batchtopk(parts, n_slots)
    mask = torch.cat([dense(own) for own in found], 1)
    assert torch.equal(mask.flatten().nonzero().squeeze(1), expected)


@pytest.mark.parametrize(
    "backend", [BackendKind.torch, BackendKind.native, BackendKind.native_int8], ids=lambda b: b.value
)
def test_features_of_all_groups_compete_by_every_backend(backend):
    if backend is not BackendKind.torch and compiled.obstacle() is not None:
        pytest.skip(str(compiled.obstacle()))
    draw = torch.Generator().manual_seed(0)
    x, ks = [torch.randn(25, 16, generator=draw) for _ in range(3)], [3, 4, 5]
    sizes = [5, 900, 300]  # the first has fewer features than can be active
    scales = [None, 0.5 + torch.rand(900, generator=draw), None]
    of = [
        Affine(x[i], torch.randn(n, 16, generator=draw), torch.randn(n, generator=draw), scales[i])
        for i, n in enumerate(sizes)
    ]
    keys = torch.cat([(each.x @ each.W.T + each.b) * (1 if each.c is None else each.c) for each in of], 1)
    with backends.using(backend):
        found = TopK(ks, Scope.all).select(of, [0, 1, 2])
    assert found is not None
    expected = torch.zeros_like(keys).scatter(1, keys.topk(12).indices, 1).bool()
    assert torch.equal(torch.cat([dense(own) for own in found], 1), expected)
    for own, each in zip(found, of, strict=True):
        z = (each.x @ each.W.T + each.b)[own.support.tokens, own.support.indices]
        torch.testing.assert_close(own.values, z)
        assert (own.agreement is not None) == (backend is BackendKind.native_int8)


def dense(selected: Any) -> Tensor:
    mask = torch.zeros(selected.support.n_tokens, selected.support.n_features, dtype=torch.bool)
    mask[selected.support.tokens, selected.support.indices] = True
    return mask


def in_blocks(competition: Any, keys: Tensor, maps: list[Tensor], width: int) -> Found:
    """The last block first."""
    for start in reversed(range(0, keys.shape[1], width)):
        own = slice(start, start + width)
        competition.add(start, keys[:, own], [each[:, own] for each in maps])
    return competition.found()


@pytest.mark.parametrize("width", [1, 3, 30, 64, 100])
def test_blocks_of_any_width_in_any_order_select_what_the_whole_matrix_selects(width):
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(30, 100, generator=draw)
    keys[:, 50:] *= torch.linspace(0.1, 4, 50)  # the last features have most of the best entries
    maps = [keys, torch.randn(30, 100, generator=draw)]
    threshold = torch.linspace(-1, 3, 100)
    of_tokens = torch.zeros(30, 100).scatter(1, keys.topk(7).indices, 1).bool()
    of_size = torch.zeros(30, 100).scatter(1, keys.abs().topk(7).indices, 1).bool()
    of_batch = (keys >= keys.flatten().topk(200).values.amin()) & (keys > 0)
    cases = [
        (TokenBest(100, 7), of_tokens),
        (TokenBest(100, 7, signed=True), of_size),
        (BatchBest(30, 100, 200), of_batch),
        (BatchBest(30, 100, 10**9), keys > 0),
        (Above(30, threshold), keys > threshold),
    ]
    for competition, expected in cases:
        found = in_blocks(competition, keys, maps, width)
        assert torch.equal(active(found.support), expected.flatten().nonzero().squeeze(1))
        for values, each in zip(found.values, maps, strict=True):
            assert torch.equal(values, each[found.support.tokens, found.support.indices])


def test_what_is_not_a_number_is_selected_in_whichever_block_it_is():
    keys = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    keys[2, 95] = -torch.tensor(torch.inf) + torch.inf
    found = in_blocks(TokenBest(100, 3), keys, [keys], 10)
    assert found.values[0].view(4, 3).isnan().any(1).tolist() == [False, False, True, False]


def test_blocks_cover_all_features_once_and_hold_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(selection, "BLOCK", 1 << 20)
    for n_tokens, n_features in [(1, 7), (2048, 300), (2048, 5000), (1000, 131072), (10**6, 1000)]:
        parts = list(selection.blocks(n_tokens, n_features))
        assert [i for own in parts for i in range(own.start, own.stop)] == list(range(n_features))
        assert all((own.stop - own.start) <= max(256, (1 << 20) // n_tokens) for own in parts)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that anything makes. Parameters are there already."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor) and not func.is_view:
                self.numel = max(self.numel, each.numel())
        return out


N_TOKENS, WIDE = 600, 50 * F


def step(backend: BackendKind, **settings: Any) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and the largest tensor made."""
    with backends.using(backend):
        made = objective(**settings)
        made.start(planted(made.layout, 200))
        with Largest() as largest:
            loss, _ = made.loss(planted(made.layout, N_TOKENS), 0.0)
            loss.backward()
            made.before_step()
            made.after_step()
    grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads, largest.numel


SELECTING = [
    (architecture, activation, scope)
    for architecture in ("sae", "per_layer_transcoder", "cross_layer_transcoder", "decoupled_crosscoder", "glu")
    for activation in ("topk", "abs_topk", "batchtopk")
    for scope in (Scope.group, Scope.all)
] + [(architecture, "matching_pursuit", Scope.group) for architecture in ("sae", "causal_crosscoder")]


@pytest.mark.parametrize(("architecture", "activation", "scope"), SELECTING)
def test_a_step_in_blocks_is_a_step_and_holds_no_matrix_of_tokens_and_features(
    architecture, activation, scope, monkeypatch
):
    wiring = ARCHITECTURES["per_layer_transcoder"] | GLU if architecture == "glu" else ARCHITECTURES[architecture]
    settings = wiring | (ACTIVATIONS | PURSUIT)[activation] | {"scope": scope, "n_features": WIDE}
    loss, grads, whole = step(BackendKind.torch, **settings)
    monkeypatch.setattr(selection, "BLOCK", SMALL)
    same_loss, same_grads, in_parts = step(BackendKind.torch, **settings)
    assert same_loss == pytest.approx(loss, rel=1e-6)
    assert same_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(same_grads[name], grad, rtol=1e-5, atol=1e-7)
    assert in_parts < N_TOKENS * WIDE / 2 < N_TOKENS * WIDE <= whole
