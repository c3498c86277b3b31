"""Laws of recording and patching that hold for every backend, on a small LlamaSimpleMLP."""

import pytest
import torch
from tiny_models import N_VOCAB, tiny_tokenizer, tiny_tokens
from torch import Tensor, nn

from nndecomp.errors import SettingError
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget
from nndecomp.types import Point, Site

CONFIG = LlamaSimpleMLPConfig(n_layers=3, d_model=32, d_mlp=48, n_heads=4, n_kv_heads=2, n_ctx=16, n_vocab=N_VOCAB)
TOKENS = tiny_tokens()
MLP_OUT = Site(1, Point.mlp_out)
SITES = [Site(0, Point.embed), *(Site(layer, p) for layer in range(3) for p in Point if p is not Point.embed)]


@pytest.fixture
def target() -> LlamaSimpleMLPTarget:
    model = LlamaSimpleMLP(CONFIG, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    return LlamaSimpleMLPTarget("small", model, tiny_tokenizer())


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def calls_of(module: nn.Module) -> list[int]:
    """Grows by one with every call of the module, by a wrapped forward and no hook."""
    calls, forward = [], module.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    module.forward = counted
    return calls


def test_hooks_are_gone_after_recording_and_patching(target: LlamaSimpleMLPTarget) -> None:
    target.record(TOKENS, SITES)
    with target.patch({site: torch.zeros_like for site in SITES}):
        assert count_hooks(target.model) == len(SITES)
    assert count_hooks(target.model) == 0


def test_hooks_are_gone_after_an_exception(target: LlamaSimpleMLPTarget) -> None:
    before = target.logits(TOKENS)

    def fail(value: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), target.patch({MLP_OUT: fail, Site(0, Point.resid_mid): torch.zeros_like}):
        target.logits(TOKENS)
    with pytest.raises(ZeroDivisionError), target.patch({MLP_OUT: fail}):
        target.record(TOKENS, [Site(2, Point.mlp_out)])
    assert count_hooks(target.model) == 0
    assert torch.equal(target.logits(TOKENS), before)


def test_hooks_are_gone_after_a_patch_that_could_not_be_attached(target: LlamaSimpleMLPTarget) -> None:
    with pytest.raises(SettingError), target.patch({MLP_OUT: torch.zeros_like, Site(9, Point.z): torch.zeros_like}):
        pass
    assert count_hooks(target.model) == 0


def test_recording_stops_after_the_last_site_and_gives_the_same_activations(target: LlamaSimpleMLPTarget) -> None:
    full = target.record(TOKENS, SITES)
    later = [calls_of(target.model.h[2]), calls_of(target.model.lm_head), calls_of(target.model.ln_f)]
    earlier, down_proj = calls_of(target.model.h[0]), calls_of(target.model.h[1].mlp.down_proj)
    stopped = target.record(TOKENS, [Site(1, Point.mlp_hidden), Site(0, Point.z)])
    assert len(earlier) == 1 and not down_proj and not any(later)
    for site, value in stopped.items():
        assert torch.equal(value, full[site])


def test_recording_the_whole_model_computes_no_lm_head(target: LlamaSimpleMLPTarget) -> None:
    head, norm, last = calls_of(target.model.lm_head), calls_of(target.model.ln_f), calls_of(target.model.h[2])
    target.record(TOKENS, SITES)
    assert len(last) == 1 and not head and not norm
    target.logits(TOKENS)
    assert len(head) == 1


def test_sites_come_back_in_the_order_in_which_they_were_asked_for(target: LlamaSimpleMLPTarget) -> None:
    asked = [Site(2, Point.mlp_out), Site(0, Point.embed), Site(1, Point.z, 3)]
    assert list(target.record(TOKENS, asked)) == asked


def test_recording_keeps_no_gradient_and_gives_rows_one_can_train_on(target: LlamaSimpleMLPTarget) -> None:
    row = target.record(TOKENS, [MLP_OUT])[MLP_OUT]
    assert not row.requires_grad and not row.is_inference()
    weight = torch.ones(32, requires_grad=True)
    (row * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("point", [point for point in Point])
def test_recording_within_a_patch_records_the_replacement(target: LlamaSimpleMLPTarget, point: Point) -> None:
    site = Site(0, point)
    new = torch.randn_like(target.record(TOKENS, [site])[site])
    later = Site(2, Point.resid_post)
    before = target.record(TOKENS, [later])[later]
    with target.patch({site: lambda _: new}):
        recorded = target.record(TOKENS, [site, later])
    assert torch.equal(recorded[site], new)
    assert not torch.equal(recorded[later], before)


def test_an_inner_patch_sees_what_the_outer_one_has_put_there(target: LlamaSimpleMLPTarget) -> None:
    for site in (MLP_OUT, Site(1, Point.resid_mid), Site(1, Point.z, 1)):
        with target.patch({site: torch.ones_like}), target.patch({site: lambda value: value + 1}):
            assert (target.record(TOKENS, [site])[site] == 2).all()


def test_replacements_are_called_in_model_order_whatever_order_they_are_given_in(target: LlamaSimpleMLPTarget) -> None:
    visited: list[Site] = []
    with target.patch({site: lambda value, s=site: visited.append(s) for site in reversed(SITES)}):
        target.logits(TOKENS)
    assert visited == sorted(SITES)


def test_a_replacement_of_none_leaves_the_site_alone(target: LlamaSimpleMLPTarget) -> None:
    before = target.logits(TOKENS)
    with target.patch({site: lambda value: None for site in SITES}):
        assert torch.equal(target.logits(TOKENS), before)


def test_heads_and_whole_of_one_site_can_be_patched_together(target: LlamaSimpleMLPTarget) -> None:
    z, width = Site(1, Point.z), CONFIG.d_head
    with target.patch(
        {Site(1, Point.z, 3): lambda v: v + 3, z: torch.zeros_like, Site(1, Point.z, 0): lambda v: v + 1}
    ):
        patched = target.record(TOKENS, [z])[z]
    expected = torch.zeros_like(patched)
    expected[..., :width], expected[..., 3 * width :] = 1, 3
    assert torch.equal(patched, expected)


@pytest.mark.parametrize("patched", ["L1.resid_mid", "L1.z.h2"])
def test_a_value_that_was_seen_is_not_changed_by_later_patches(target: LlamaSimpleMLPTarget, patched: str) -> None:
    site = Site.parse(patched)
    whole = Site(site.layer, site.point)
    seen: list[Tensor] = []
    clean = target.record(TOKENS, [whole])[whole].clone()
    with target.patch({whole: lambda value: seen.append(value)}), target.patch({site: torch.zeros_like}):
        target.logits(TOKENS)
    assert torch.equal(seen[0], clean)


def test_a_replacement_of_the_wrong_shape_is_refused(target: LlamaSimpleMLPTarget) -> None:
    with pytest.raises(AssertionError, match=r"\(32,\).*\(3, 9, 32\)"), target.patch({MLP_OUT: lambda v: v[0, 0]}):
        target.logits(TOKENS)


def test_logits_have_gradients_only_where_the_caller_asks(target: LlamaSimpleMLPTarget) -> None:
    shift = torch.zeros(32, requires_grad=True)
    with target.patch({MLP_OUT: lambda value: value + shift}):
        assert target.logits(TOKENS).requires_grad
        with torch.no_grad():
            assert not target.logits(TOKENS).requires_grad
    assert not target.logits(TOKENS).requires_grad


def test_no_sites_are_a_mistake(target: LlamaSimpleMLPTarget) -> None:
    with pytest.raises(AssertionError, match="no sites"):
        target.record(TOKENS, [])
