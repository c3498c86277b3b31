"""Two models on the same tokens: what each records, what patching one does to the other, which pairs are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from activation_parts import Counting, TokenIds, ids, settings
from tiny_models import save_tiny_model, tiny_tokenizer, tiny_tokens

from nndecomp import build
from nndecomp.activations.buffer import ShuffleBuffer
from nndecomp.activations.harvest import Harvester
from nndecomp.activations.manifest import row_settings
from nndecomp.activations.statistics import measure, site_scales
from nndecomp.activations.store import open_store
from nndecomp.activations.store_writer import write_store
from nndecomp.activations.stream import StoreStream
from nndecomp.config.compose import compose
from nndecomp.config.schema import TargetConfig, TargetKind, TokensConfig, TokensKind
from nndecomp.errors import SettingError
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget
from nndecomp.targets.load import load_target
from nndecomp.targets.pair import PairedShape, PairedTarget, load_pair, paired_shape
from nndecomp.types import Layout, Site

CPU = torch.device("cpu")
SIZES: dict[str, Any] = dict(n_heads=2, n_kv_heads=2, n_ctx=16, n_vocab=80)
TOKENS = tiny_tokens()


def single(seed: int, n_layers: int, d_model: int, tokenizer: Any = None, n_ctx: int = 16) -> LlamaSimpleMLPTarget:
    sizes = LlamaSimpleMLPConfig(**SIZES | dict(n_layers=n_layers, d_model=d_model, d_mlp=2 * d_model, n_ctx=n_ctx))
    model = LlamaSimpleMLP(sizes, torch.Generator().manual_seed(seed))
    return LlamaSimpleMLPTarget(f"m{seed}", model, tokenizer or tiny_tokenizer())


@pytest.fixture(scope="module")
def pair() -> PairedTarget:
    """Of other depth and width."""
    return PairedTarget(single(0, n_layers=2, d_model=8), single(1, n_layers=3, d_model=12, n_ctx=12))


def sites(*names: str) -> list[Site]:
    return [Site.parse(name) for name in names]


def test_each_site_holds_what_its_own_model_records(pair: PairedTarget):
    asked = sites("B:L2.mlp_in", "A:L1.resid_post", "B:L0.z.h1", "A:embed")
    recorded = pair.record(TOKENS, asked)
    assert list(recorded) == asked and pair.name == "m0+m1"
    for site in asked:
        own = pair.pair[site.model or ""]
        assert torch.equal(recorded[site], own.record(TOKENS, [site.within])[site.within])
        assert recorded[site].shape[-1] == pair.shape.width(site)


def test_patching_one_model_changes_its_predictions_and_not_the_others(pair: PairedTarget):
    of = {model: pair.predicting(model) for model in ("A", "B")}
    clean = {model: of[model].logits(TOKENS) for model in of}
    assert torch.equal(clean["B"], pair.pair["B"].logits(TOKENS)) and torch.equal(clean["A"], pair.logits(TOKENS))
    (there,) = sites("B:L1.mlp_out")
    with pair.patch({there: torch.zeros_like}):
        assert torch.equal(of["A"].logits(TOKENS), clean["A"])
        patched = of["B"].logits(TOKENS)
    with pair.pair["B"].patch({there.within: torch.zeros_like}):
        assert torch.equal(patched, pair.pair["B"].logits(TOKENS))
    assert not torch.equal(patched, clean["B"])
    assert torch.equal(of["B"].logits(TOKENS), clean["B"]), "the hooks are gone"


def test_families_may_differ_where_the_tokenizer_is_the_same(tmp_path: Path):
    paths = {family: save_tiny_model(family, tmp_path / family) for family in ("gpt2", "llama")}
    a, b = (TargetConfig(kind=TargetKind.huggingface, path=str(path)) for path in paths.values())
    pair = load_pair(a, b, CPU)
    assert pair.shape == paired_shape(a, b)
    recorded = pair.record(TOKENS, sites("A:L2.mlp_hidden", "B:L2.mlp_hidden"))
    assert [value.shape[-1] for value in recorded.values()] == [128, 48]


def test_sizes_are_those_of_the_model_that_a_site_names(pair: PairedTarget):
    shape = pair.shape
    assert isinstance(shape, PairedShape) and shape.models == ("A", "B")
    assert [shape.width(site) for site in sites("A:L0.mlp_hidden", "B:L0.mlp_hidden", "B:L0.z.h0")] == [16, 24, 6]
    assert shape.n_ctx == 12, "what both take in"
    shape.check(Site.parse("B:L2.mlp_in"), "sites")
    for name, sentence in (
        ("A:L2.mlp_in", "sites, in model A, asks for site L2.mlp_in, but the target has layers 0 to 1"),
        ("L0.mlp_in", "begin it with A:"),
        ("C:L0.mlp_in", "begins with C: but the two models are A"),
    ):
        with pytest.raises(SettingError, match=sentence):
            shape.check(Site.parse(name), "sites")


def test_tokenizers_that_differ_are_refused():
    from transformers import PreTrainedTokenizerFast

    def changed(**special: str) -> Any:
        return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, **special)

    words = tiny_tokenizer()
    words.add_tokens(["more"])
    for tokenizer, what in (
        (words, "the vocabulary"),
        (changed(eos_token="w1", bos_token="<|endoftext|>"), "the eos token"),
        (changed(eos_token="<|endoftext|>"), "the bos token"),
    ):
        with pytest.raises(SettingError, match=f"paired_target m1 and target m0 do not share a tokenizer: {what}"):
            PairedTarget(single(0, 2, 8), single(1, 2, 8, tokenizer))


class Ids(TokenIds):
    """Rows hold the id of their token (B: plus the shift)."""

    tokenizer = tiny_tokenizer()


READ_BOTH = sites("A:L0.mlp_in", "B:L0.mlp_in")


def id_harvester(shift: float = 0.0, **changes: Any) -> Harvester:
    pair = PairedTarget(Ids(), Ids(shift))
    return Harvester(
        pair, Counting(padded=True, bos=True), READ_BOTH, settings(**{"drop_bos": True, **changes}), seq_len=8
    )


def both(rows: torch.Tensor, layout: Layout) -> tuple[list[int], list[int]]:
    a, b = (ids(rows[:, layout.spans[site]]) for site in READ_BOTH)
    return a, b


def test_rows_of_both_models_at_one_index_are_one_token_however_shuffled(tmp_path: Path):
    """A peer's cache shuffled each model's shards by itself, after which rows of the two no longer met."""
    stream = ShuffleBuffer(id_harvester(), 64, 16, seed=0)
    shuffled = [both(stream.next_batch(), stream.layout) for _ in range(6)]
    assert all(a == b for a, b in shuffled)
    assert shuffled[0][0] != sorted(shuffled[0][0]), "shuffled"

    target, text = (
        TargetConfig(kind=TargetKind.llama_simple_mlp, path="ids"),
        TokensConfig(kind=TokensKind.stdlib, path=None),
    )
    writer = id_harvester()
    named = row_settings(target, target, text, writer.cfg, writer.target.tokenizer)
    write_store(writer, tmp_path, named, n_rows=600, seed=0, shard_rows=256)
    stored = StoreStream(open_store(tmp_path), 100, seed=0, window_rows=512, device=CPU)
    for _ in range(12):
        a, b = both(stored.next_batch(), stored.layout)
        assert a == b


def test_the_second_model_is_part_of_what_a_store_is():
    target, text = (
        TargetConfig(kind=TargetKind.llama_simple_mlp, path="ids"),
        TokensConfig(kind=TokensKind.stdlib, path=None),
    )
    alone, other = (row_settings(target, each, text, settings(), Ids.tokenizer) for each in (None, target))
    assert "paired_target.path" not in alone and other == alone | {
        f"paired_{k}": v for k, v in alone.items() if k.startswith("target.")
    }


def test_each_model_has_a_scale_of_its_own():
    """Per-model normalisation: the peer divided both models by one number, and the louder one was all that was learnt."""
    rows = id_harvester(shift=1000.0)
    scales = site_scales(measure(rows, 400), rows.layout)
    (a, b), n = READ_BOTH, 0
    again, squares = id_harvester(shift=1000.0), torch.zeros(2, dtype=torch.float64)
    while n < 400:
        x = again.next_rows().double()
        squares += torch.stack([x[:, again.layout.spans[site]].square().mean(1).sum() for site in (a, b)])
        n += len(x)
    assert torch.allclose(torch.tensor([scales[a], scales[b]], dtype=torch.float64), (squares / n).sqrt(), rtol=1e-5)
    assert scales[b] > 4 * scales[a]


def test_the_command_line_names_the_second_model_and_what_does_not_fit_is_refused():
    command = ["name=any", "+target@paired_target=tiny", "decomposition.architecture=crosscoder"]
    command += ["decomposition.reads=[A:resid_post,B:resid_post]", "decomposition.writes=[A:resid_post,B:resid_post]"]
    cfg = compose("config", [*command, "decomposition.layers=[2]"])
    assert cfg.paired_target == cfg.target
    build.check(cfg)
    (group,) = build.settings.wire(cfg.decomposition, build.settings.shape_of_target(cfg)).groups
    assert [str(site) for site in group.reads] == ["A:L2.resid_post", "B:L2.resid_post"]
    with pytest.raises(SettingError, match="does not say which of two models"):
        build.check(compose("config", [*command, "decomposition.reads=[L2.resid_post]", "decomposition.layers=null"]))
    with pytest.raises(
        SettingError, match=r"decomposition.reads=\['A:resid_post', .* there is one target; write paired_target"
    ):
        build.check(compose("config", ["name=any", *command[2:], "decomposition.layers=[2]"]))


def test_two_equal_models_give_equal_rows():
    cfg = TargetConfig(kind=TargetKind.llama_simple_mlp, path="tiny")
    pair, alone = load_pair(cfg, cfg, CPU), load_target(cfg, CPU)
    a, b = sites("A:L3.resid_post", "B:L3.resid_post")
    recorded = pair.record(TOKENS, [a, b])
    assert torch.equal(recorded[a], recorded[b])
    assert torch.equal(recorded[a], alone.record(TOKENS, [a.within])[a.within])
