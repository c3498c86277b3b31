"""Sites of Hugging Face models against values worked out from the models' weights."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, begins_at_every_layer, save_tiny_model, tiny_tokens
from torch import Tensor, nn

from nndecomp.config.target import DType, TargetConfig, TargetKind
from nndecomp.errors import SettingError
from nndecomp.targets.base import Heads, Target
from nndecomp.targets.load import load_target, target_shape
from nndecomp.types import Point, Site

CPU = torch.device("cpu")
TOKENS = tiny_tokens()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(family, tmp_path_factory.mktemp("targets") / family)


@pytest.fixture(scope="module")
def target(directory: Path) -> Target:
    return load_target(TargetConfig(kind=TargetKind.huggingface, path=str(directory)), CPU)


def test_a_local_model_is_read_without_progress_bars(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from transformers.utils import logging

    # As where nobody has switched them off by HF_HUB_DISABLE_PROGRESS_BARS.
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    directory, before = save_tiny_model("gpt2", tmp_path / "gpt2"), logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    load_target(TargetConfig(kind=TargetKind.huggingface, path=str(directory)), CPU)
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled(), "elsewhere they stay as they were"
    if not before:
        logging.disable_progress_bar()


def all_sites(target: Target) -> list[Site]:
    points = [point for point in Point if point in target.shape.points and point is not Point.embed]
    return [Site(0, Point.embed), *(Site(layer, p) for layer in range(target.shape.n_layers) for p in points)]


def norm_by_formula(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias
    weight = module.weight + 1 if "Gemma" in type(module).__name__ else module.weight
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def values_from_weights(directory: Path, family: str) -> dict[Site, Tensor]:
    """Every site, layer by layer, from the residual streams and attention patterns that transformers itself reports."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    n_heads = model.config.num_attention_heads
    reported = model(TOKENS, output_hidden_states=True, output_attentions=True)
    blocks = model.base_model.h if "gpt2" in family else model.base_model.layers
    parallel = getattr(model.config, "use_parallel_residual", False)
    embedding = model.get_input_embeddings().weight[TOKENS]
    values = {Site(0, Point.embed): embedding * 32**0.5 if "gemma" in family else embedding}
    for layer, block in enumerate(blocks):
        resid_pre = reported.hidden_states[layer]
        x = norm_by_formula(block.ln_1 if "gpt2" in family else block.input_layernorm, resid_pre)
        match family:
            case "gpt2" | "gpt2_narrow_mlp":
                v, out = block.attn.c_attn(x).chunk(3, dim=-1)[2].unflatten(-1, (n_heads, -1)), block.attn.c_proj
                second_norm, post_norms = block.ln_2, None
            case "pythia" | "neox_sequential":
                v = block.attention.query_key_value(x).unflatten(-1, (n_heads, 3, -1))[..., 2, :]
                out, second_norm, post_norms = block.attention.dense, block.post_attention_layernorm, None
            case "gemma2" | "gemma3":
                v, out = block.self_attn.v_proj(x).unflatten(-1, (2, -1)), block.self_attn.o_proj
                second_norm = block.pre_feedforward_layernorm
                post_norms = block.post_attention_layernorm, block.post_feedforward_layernorm
            case _:
                v, out = block.self_attn.v_proj(x).unflatten(-1, (2, -1)), block.self_attn.o_proj
                second_norm, post_norms = block.post_attention_layernorm, None
        v = v.repeat_interleave(n_heads // v.shape[2], dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", reported.attentions[layer], v).flatten(-2)
        attn_out = out(z)
        if post_norms is not None:
            attn_out = norm_by_formula(post_norms[0], attn_out)
        resid_mid = resid_pre if parallel else resid_pre + attn_out
        mlp_in = norm_by_formula(second_norm, resid_mid)
        match family:
            case "gpt2" | "gpt2_narrow_mlp":
                mlp_hidden, down = F.gelu(block.mlp.c_fc(mlp_in), approximate="tanh"), block.mlp.c_proj
            case "pythia" | "neox_sequential":
                mlp_hidden, down = F.gelu(block.mlp.dense_h_to_4h(mlp_in)), block.mlp.dense_4h_to_h
            case "gemma2" | "gemma3":
                gate = F.gelu(block.mlp.gate_proj(mlp_in), approximate="tanh")
                mlp_hidden, down = gate * block.mlp.up_proj(mlp_in), block.mlp.down_proj
            case _:
                mlp_hidden = F.silu(block.mlp.gate_proj(mlp_in)) * block.mlp.up_proj(mlp_in)
                down = block.mlp.down_proj
        mlp_out = down(mlp_hidden)
        if post_norms is not None:
            mlp_out = norm_by_formula(post_norms[1], mlp_out)
        resid_post = resid_pre + attn_out + mlp_out
        if layer + 1 < len(blocks):  # the last one that transformers reports is after the final norm
            torch.testing.assert_close(resid_post, reported.hidden_states[layer + 1], atol=1e-4, rtol=1e-4)
        values |= {
            Site(layer, Point.resid_pre): resid_pre,
            Site(layer, Point.attn_in): x,
            Site(layer, Point.z): z,
            Site(layer, Point.attn_out): attn_out,
            Site(layer, Point.mlp_in): mlp_in,
            Site(layer, Point.mlp_hidden): mlp_hidden,
            Site(layer, Point.mlp_out): mlp_out,
            Site(layer, Point.resid_post): resid_post,
        }
        if not parallel:
            values[Site(layer, Point.resid_mid)] = resid_mid
    return values


@torch.no_grad()
def test_recorded_sites_equal_values_worked_out_from_the_weights(target: Target, directory: Path, family: str) -> None:
    expected = values_from_weights(directory, family)
    recorded = target.record(TOKENS, all_sites(target))
    assert set(recorded) == set(expected)
    for site, value in recorded.items():
        torch.testing.assert_close(value, expected[site], atol=1e-4, rtol=1e-4, msg=lambda m, s=site: f"{s}: {m}")


def test_the_shape_is_known_from_the_configuration_and_true_of_the_model(target: Target, directory: Path) -> None:
    assert target_shape(TargetConfig(kind=TargetKind.huggingface, path=str(directory))) == target.shape
    for site, value in target.record(TOKENS, all_sites(target)).items():
        assert value.shape == (*TOKENS.shape, target.shape.width(site)), site
    assert target.logits(TOKENS).shape == (*TOKENS.shape, target.shape.n_vocab)


def test_replacing_a_site_by_itself_leaves_logits_bit_identical(target: Target) -> None:
    before = target.logits(TOKENS)
    for site in [*all_sites(target), Site(1, Point.z, 2)]:
        with target.patch({site: lambda value: value.clone()}):
            assert torch.equal(target.logits(TOKENS), before), site


def test_everything_replaced_by_itself_at_once_leaves_logits_bit_identical(target: Target) -> None:
    before = target.logits(TOKENS)
    with target.patch({site: lambda value: value + 0 for site in all_sites(target)}):
        assert torch.equal(target.logits(TOKENS), before)


def test_a_pass_begun_at_a_layer_has_every_bit_of_a_whole_one(target: Target) -> None:
    begins_at_every_layer(target, TOKENS)


def logits_with_zeroed(directory: Path, zeroed: Callable[[str], bool]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    names = [name for name, _ in model.named_parameters() if zeroed(name)]
    assert names, "no parameter was zeroed"
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            # Gemma's norms multiply by 1 + weight.
            parameter.fill_(-1.0 if "layernorm" in name and "Gemma" in type(model).__name__ else 0.0)
        return model(TOKENS).logits


@pytest.mark.parametrize(("point", "writer"), [(Point.mlp_out, "mlp"), (Point.attn_out, "attention")])
def test_zeroing_what_is_written_equals_zeroing_the_weights_that_write_it(
    target: Target, directory: Path, family: str, point: Point, writer: str
) -> None:
    if "gemma" in family:
        last = "post_feedforward_layernorm" if writer == "mlp" else "post_attention_layernorm"
    else:
        attention = {"gpt2": "attn.c_proj", "gpt2_narrow_mlp": "attn.c_proj"}.get(family, "self_attn.o_proj")
        attention = "attention.dense" if family in ("pythia", "neox_sequential") else attention
        mlp = {"gpt2": "mlp.c_proj", "gpt2_narrow_mlp": "mlp.c_proj"}.get(family, "mlp.down_proj")
        mlp = "mlp.dense_4h_to_h" if family in ("pythia", "neox_sequential") else mlp
        last = mlp if writer == "mlp" else attention
    expected = logits_with_zeroed(directory, lambda name: f".1.{last}." in name)
    with target.patch({Site(1, point): torch.zeros_like}):
        torch.testing.assert_close(target.logits(TOKENS), expected, atol=1e-4, rtol=1e-4)


def test_replacing_resid_mid_replaces_the_stream_itself(target: Target) -> None:
    """With the stream set to v, the block must return v + mlp_out(v): the skip may not carry the old stream."""
    if Point.resid_mid not in target.shape.points:
        pytest.skip("parallel blocks have no resid_mid")
    new = torch.randn(*TOKENS.shape, target.shape.d_model)
    sites = [Site(1, Point.resid_mid), Site(1, Point.mlp_out), Site(1, Point.resid_post)]
    with target.patch({Site(1, Point.resid_mid): lambda _: new}):
        mid, mlp_out, post = target.record(TOKENS, sites).values()
    assert torch.equal(mid, new)
    torch.testing.assert_close(post, new + mlp_out)


def test_resid_post_of_a_block_is_resid_pre_of_the_next(target: Target) -> None:
    post, pre = target.record(TOKENS, [Site(0, Point.resid_post), Site(1, Point.resid_pre)]).values()
    assert torch.equal(post, pre)


def test_one_head_replaced_leaves_the_others(target: Target) -> None:
    head, whole = Site(1, Point.z, 2), Site(1, Point.z)
    d_head = target.shape.d_head
    clean = target.record(TOKENS, [whole, head])
    assert torch.equal(clean[head], clean[whole][..., 2 * d_head : 3 * d_head])
    with target.patch({head: torch.zeros_like}):
        patched = target.record(TOKENS, [whole])[whole]
    expected = clean[whole].clone()
    expected[..., 2 * d_head : 3 * d_head] = 0
    assert torch.equal(patched, expected)
    assert clean[head].abs().max() > 0, "recording must not share memory with what a later patch writes"


def test_mlp_out_follows_from_the_neurons(target: Target) -> None:
    for layer in range(target.shape.n_layers):
        hidden, out = target.record(TOKENS, [Site(layer, Point.mlp_hidden), Site(layer, Point.mlp_out)]).values()
        assert torch.equal(target.mlp_out_of(layer, hidden), out)
        torch.testing.assert_close(target.mlp_out_of(layer, hidden.flatten(0, 1)), out.flatten(0, 1))


def scores_from(weights: Heads, frequencies: tuple[float, ...], x: Tensor) -> Tensor:
    """Attention patterns by the definition of `Heads`, one pair of positions after the other."""
    angle = torch.tensor(frequencies)

    def turned(v: Tensor, position: int) -> Tensor:
        n = len(angle)
        a, b, rest = v[:, :n], v[:, n : 2 * n], v[:, 2 * n :]
        cos, sin = (position * angle).cos(), (position * angle).sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], 1)

    n_seqs, n_pos, _ = x.shape
    scores = torch.full((n_seqs, len(weights.W_Q), n_pos, n_pos), -torch.inf)
    for seq in range(n_seqs):
        for t in range(n_pos):
            q = turned(torch.einsum("d,hdk->hk", x[seq, t], weights.W_Q) + weights.b_Q, t)
            for u in range(t + 1):
                k = turned(torch.einsum("d,hdk->hk", x[seq, u], weights.W_K) + weights.b_K, u)
                scores[seq, :, t, u] = weights.scale * (q * k).sum(1)
    return scores.softmax(-1)


@torch.no_grad()
def test_attention_follows_from_the_weights_of_its_heads_and_how_they_turn(
    target: Target, directory: Path, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    site, rotary = Site(1, Point.attn_in), target.shape.of(None).rotary
    if family in ("qwen3", "gemma2", "gemma3"):
        with pytest.raises(SettingError, match="attention_start=random"):
            target.heads_of(site)
        assert [len(each) for each in rotary] == [8] * 3
        return
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    n_pos = 6  # within the sliding window of the family that has one
    reported = model(TOKENS[:, :n_pos], output_attentions=True).attentions[1]
    x = target.record(TOKENS[:, :n_pos], [site])[site]
    weights = target.heads_of(site)
    torch.testing.assert_close(scores_from(weights, rotary[1] if rotary else (), x), reported, atol=1e-4, rtol=1e-4)
    out = Site(1, Point.attn_out)
    alone, moved = target.record(TOKENS[:, :1], [site, out]).values()  # a sequence of one token attends to itself
    with target.patch({site: torch.zeros_like}):
        bias = target.record(TOKENS[:, :1], [out])[out]
    by_heads = torch.einsum("bpd,hdk,hke->bpe", alone, weights.W_V, weights.W_O)
    torch.testing.assert_close(by_heads, moved - bias, atol=1e-4, rtol=1e-4)


def test_gradients_reach_what_is_put_at_every_site(target: Target) -> None:
    """Also at resid_mid, which is written in place. The slope in a direction is checked by finite differences."""
    for site in all_sites(target):
        if site.layer != 1:
            continue
        value = target.record(TOKENS, [site])[site]
        direction = torch.randn_like(value)
        loss = lambda step, at=site, d=direction: _loss(target, at, d, step)  # noqa: E731
        step = torch.zeros((), requires_grad=True)
        (slope,) = torch.autograd.grad(loss(step), step)
        with torch.no_grad():
            finite = (loss(torch.tensor(3e-3)) - loss(torch.tensor(-3e-3))) / 6e-3
        torch.testing.assert_close(slope, finite, atol=2e-2, rtol=5e-2, msg=lambda m, s=site: f"{s}: {m}")


def _loss(target: Target, site: Site, direction: Tensor, step: Tensor) -> Tensor:
    with target.patch({site: lambda value: value + step * direction * value.square()}):
        return target.logits(TOKENS)[..., 5].sum()


def test_the_model_is_frozen_and_in_eval_mode(target: Target) -> None:
    model = target.model  # type: ignore[attr-defined]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_sequence_longer_than_the_context_is_refused(target: Target) -> None:
    with pytest.raises(AssertionError, match="41 tokens.*40"):
        target.logits(tiny_tokens(1, 41))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("gpt2"))


def huggingface(path: str, **settings) -> TargetConfig:
    return TargetConfig(kind=TargetKind.huggingface, path=path, **settings)


def test_the_target_has_the_asked_precision(gpt2: Path) -> None:
    target = load_target(huggingface(str(gpt2), dtype=DType.bfloat16), CPU)
    site = Site(1, Point.mlp_out)
    assert target.record(TOKENS, [site])[site].dtype is torch.bfloat16
    before = target.logits(TOKENS)
    with target.patch({site: lambda value: value.float()}):  # fp32 replacements are cast back
        assert torch.equal(target.logits(TOKENS), before)


def test_a_site_that_the_model_lacks_is_refused_by_name(gpt2: Path, tmp_path: Path) -> None:
    target = load_target(huggingface(str(gpt2)), CPU)
    with pytest.raises(SettingError, match=r"L3\.mlp_out.*layers 0 to 2"):
        target.record(TOKENS, [Site(3, Point.mlp_out)])
    with pytest.raises(SettingError, match=r"L0\.z\.h4.*heads 0 to 3"):
        target.record(TOKENS, [Site(0, Point.z, 4)])
    pythia = load_target(huggingface(str(save_tiny_model("pythia", tmp_path))), CPU)
    with pytest.raises(SettingError, match="no resid_mid"):
        pythia.record(TOKENS, [Site(0, Point.resid_mid)])


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "wandb:a/b/c"])
def test_a_path_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(SettingError, match="target.path=" + path):
        target_shape(huggingface(path))


def test_a_hub_model_that_cannot_be_read_is_named() -> None:
    with pytest.raises(SettingError, match=r"target.path=nobody/nothing \(target.revision=v9\)"):
        target_shape(huggingface("nobody/nothing", revision="v9"))


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    for file in save_tiny_model("gpt2", tmp_path).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SettingError, match=r"target.path=.* gives no tokenizer"):
        load_target(huggingface(str(tmp_path)), CPU)


def test_an_unsupported_family_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    with pytest.raises(SettingError, match="type bert; supported are gpt2, gpt_neox, llama"):
        target_shape(huggingface(str(tmp_path)))


def test_the_mlp_alone_answers_as_within_the_model(target: Target) -> None:
    for layer in range(target.shape.n_layers):
        read, out = Site(layer, Point.mlp_in), Site(layer, Point.mlp_out)
        recorded = target.record(TOKENS, [read, out])
        torch.testing.assert_close(target.mlp_of(read, recorded[read].flatten(0, 1)), recorded[out].flatten(0, 1))


def test_neurons_are_the_vectors_that_the_mlp_reads_and_writes(target: Target) -> None:
    site, hidden = Site(1, Point.mlp_in), Site(1, Point.mlp_hidden)
    recorded, neurons = target.record(TOKENS, [site, hidden]), target.neurons_of(site)
    pre = recorded[site].flatten(0, 1) @ neurons.read.T + neurons.bias
    if target.shape.gated:
        gate = next(m for name, m in target.model.named_modules() if name.endswith("layers.1.mlp.gate_proj"))
        torch.testing.assert_close(pre, gate(recorded[site].flatten(0, 1)), atol=1e-5, rtol=1e-4)
    else:
        values = recorded[hidden].flatten(0, 1)
        assert ((values > 0) == (pre > 0)).all(), "an activation function keeps the sign"
        torch.testing.assert_close(values[pre > 4], pre[pre > 4], atol=1e-3, rtol=1e-3)
    d_mlp = target.shape.d_mlp
    alone = target.mlp_out_of(1, torch.eye(d_mlp)) - target.mlp_out_of(1, torch.zeros(1, d_mlp))
    torch.testing.assert_close(neurons.write, alone, atol=1e-5, rtol=1e-4)
