"""The TransformerLens backend against the Hugging Face one: one protocol, the same numbers at the same sites."""

from pathlib import Path

import pytest
import torch
from tiny_models import begins_at_every_layer, save_tiny_model, tiny_tokens
from torch import Tensor

from nndecomp.config.target import TargetConfig, TargetKind
from nndecomp.errors import SettingError
from nndecomp.targets.base import Target
from nndecomp.targets.load import load_target, target_shape
from nndecomp.types import Point, Site

CPU = torch.device("cpu")
TOKENS = tiny_tokens()
TOKENS[0, 0] = TOKENS[1, 4] = TOKENS[2, 8] = 0  # what the tokenizer pads with is a token like any other

pytestmark = pytest.mark.slow  # importing transformer_lens takes 5 to 10 s


@pytest.fixture(scope="module", params=["gpt2", "pythia", "neox_sequential", "llama", "qwen3", "gemma2", "gemma3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(request.param, tmp_path_factory.mktemp("bridge") / request.param)


@pytest.fixture(scope="module")
def bridge(directory: Path) -> Target:
    return load_target(TargetConfig(kind=TargetKind.transformer_lens, path=str(directory)), CPU)


@pytest.fixture(scope="module")
def plain(directory: Path) -> Target:
    return load_target(TargetConfig(kind=TargetKind.huggingface, path=str(directory)), CPU)


def all_sites(target: Target) -> list[Site]:
    points = [point for point in Point if point in target.shape.points and point is not Point.embed]
    sites = [Site(0, Point.embed), *(Site(layer, p) for layer in range(target.shape.n_layers) for p in points)]
    return [*sites, Site(1, Point.z, 2)]


def close(actual: Tensor, expected: Tensor, site: Site) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=lambda m: f"{site}: {m}")


def test_both_backends_have_the_same_shape_name_and_tokens(bridge: Target, plain: Target, directory: Path) -> None:
    cfg = TargetConfig(kind=TargetKind.transformer_lens, path=str(directory))
    assert bridge.shape == plain.shape == target_shape(cfg)
    assert bridge.name == plain.name
    assert bridge.tokenizer.encode("w3 w4") == plain.tokenizer.encode("w3 w4")


def test_both_backends_record_the_same_values_at_every_site(bridge: Target, plain: Target) -> None:
    ours, theirs = (target.record(TOKENS, all_sites(plain)) for target in (plain, bridge))
    for site in ours:
        close(theirs[site], ours[site], site)


def test_both_backends_replace_the_same_thing_at_every_site(bridge: Target, plain: Target) -> None:
    for site in all_sites(plain):
        logits = []
        for target in (bridge, plain):
            with target.patch({site: lambda value: value * 0.5 + 0.1}):
                logits.append(target.logits(TOKENS))
        close(*logits, site)


def test_replacing_a_site_by_itself_leaves_logits_bit_identical(bridge: Target) -> None:
    before = bridge.logits(TOKENS)
    for site in all_sites(bridge):
        with bridge.patch({site: lambda value: value.clone()}):
            assert torch.equal(bridge.logits(TOKENS), before), site


def test_a_pass_begun_at_a_layer_has_every_bit_of_a_whole_one(bridge: Target) -> None:
    begins_at_every_layer(bridge, TOKENS)


def test_a_stopped_pass_leaves_nothing_behind(bridge: Target) -> None:
    before, full = bridge.logits(TOKENS), bridge.record(TOKENS, all_sites(bridge))
    for site in all_sites(bridge):
        assert torch.equal(bridge.record(TOKENS, [site])[site], full[site]), site
        assert torch.equal(bridge.logits(TOKENS), before), site


def test_mlp_out_follows_from_the_neurons(bridge: Target) -> None:
    hidden, out = bridge.record(TOKENS, [Site(1, Point.mlp_hidden), Site(1, Point.mlp_out)]).values()
    assert torch.equal(bridge.mlp_out_of(1, hidden), out)


def test_the_model_is_frozen_and_in_eval_mode(bridge: Target) -> None:
    model = bridge.model  # type: ignore[attr-defined]
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_hook_names_of_the_bridge_and_of_hooked_transformer_name_our_sites(bridge: Target, directory: Path) -> None:
    """Each name that Site.parse understands is a hook of the bridge, and holds what we record there."""
    names = {
        "hook_resid_pre": "hook_in",
        "attn.hook_in": "attn.hook_in",
        "attn.hook_z": "attn.o.hook_in",
        "hook_attn_out": "hook_attn_out",
        "hook_resid_mid": "hook_resid_mid",
        "mlp.hook_in": "mlp.hook_in",
        "mlp.hook_post": "mlp.out.hook_in",
        "hook_mlp_out": "hook_mlp_out",
        "hook_resid_post": "hook_out",
    }
    _, cache = bridge.model.run_with_cache(TOKENS)  # type: ignore[attr-defined]
    for old, new in names.items():
        site = Site.parse(f"blocks.1.{old}")
        if site.point not in bridge.shape.points:
            continue
        assert Site.parse(f"blocks.1.{new}") == site
        value = cache[f"blocks.1.{old}"]
        close(value.reshape(*TOKENS.shape, -1), bridge.record(TOKENS, [site])[site], site)


def test_a_path_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingError, match="target.path=./nowhere"):
        load_target(TargetConfig(kind=TargetKind.transformer_lens, path="./nowhere"), CPU)


def test_both_backends_have_the_same_neurons_and_mlps(bridge: Target, plain: Target) -> None:
    site = Site(1, Point.mlp_in)
    ours, theirs = plain.neurons_of(site), bridge.neurons_of(site)
    for name in ("read", "bias", "write"):
        close(getattr(theirs, name), getattr(ours, name), site)
    rows = torch.randn(5, plain.shape.d_model)
    close(bridge.mlp_of(site, rows), plain.mlp_of(site, rows), site)
