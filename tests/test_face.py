"""The Python face: what a notebook does in a few lines, as the README shows it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nndecomp
from nndecomp.config.schema import Activation, Architecture, DecompositionConfig
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.errors import SettingError
from nndecomp.targets.base import Target

TEXT = "def area(radius):\n    return pi * radius ** 2"


@pytest.fixture(scope="module")
def target() -> Target:
    return nndecomp.load_target("tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, target: Target) -> Path:
    """A directory as a run leaves it, with two decompositions."""
    out = tmp_path_factory.mktemp("run")
    for architecture in (Architecture.cross_layer_transcoder, Architecture.per_layer_transcoder):
        cfg = DecompositionConfig(
            architecture=architecture,
            reads=["mlp_in"],
            writes=["mlp_out"],
            n_features=32,
            activation=Activation.topk,
            k=4,
        )
        dictionary = build_dictionary(cfg, target.shape, 0, target.device, target.name)
        dictionary.save_pretrained(out / "decompositions" / architecture.value)
    return out


def test_the_lines_of_the_readme(run: Path):
    import nndecomp

    target = nndecomp.load_target("tiny")  # or gpt2, a Hub id, a directory, wandb:<entity>/<project>/<run>
    clt = nndecomp.load_decomposition(run, "cross_layer_transcoder")

    sites = nndecomp.record(target, TEXT, ["L1.mlp_in", "blocks.1.hook_mlp_out"])
    x = nndecomp.read(target, clt, TEXT)  # [token, d_reads]
    codes = clt.encode(x)  # sparse: values and indices
    y_hat = clt.decode(codes, x)  # [token, d_writes]

    logits = nndecomp.patched_logits(target, clt, TEXT)  # all MLPs replaced, errors compound
    one = nndecomp.patched_logits(target, clt, TEXT, layers=[2], inputs="clean")

    rows = nndecomp.evaluate(
        target, {"clt": clt, "neurons": nndecomp.neurons(target, k=16)}, "tokens.seq_len=32", "evaluation.n_seqs=4"
    )

    n_tokens = nndecomp.tokenise(target, TEXT).tokens.shape[1]
    assert sites["L1.mlp_in"].shape == (1, n_tokens, 128)
    assert x.shape == y_hat.shape == (n_tokens, 4 * 128)
    assert (codes.counts() == 4).all()
    assert logits.shape == one.shape == (1, n_tokens, target.shape.n_vocab)
    increase = rows[(rows.metric == "ce_increase") & (rows.site == "all") & (rows.inputs == "live")].set_index("name")
    assert increase.value["neurons"] < increase.value["clt"], "untrained: worse than the best 16 neurons"


def test_what_is_read_is_what_was_recorded(target: Target, run: Path):
    clt = nndecomp.load_decomposition(run, "cross_layer_transcoder")
    recorded = nndecomp.record(target, TEXT, [f"L{layer}.mlp_in" for layer in range(4)])
    side_by_side = torch.cat([values[0] for values in recorded.values()], dim=1)
    assert torch.equal(nndecomp.read(target, clt, TEXT), side_by_side)


def test_texts_of_different_length_are_padded_and_padding_is_not_read(target: Target, run: Path):
    clt = nndecomp.load_decomposition(run, "cross_layer_transcoder")
    together = nndecomp.read(target, clt, [TEXT, "import os"])
    apart = torch.cat([nndecomp.read(target, clt, each) for each in (TEXT, "import os")])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_all_neurons_in_place_of_the_mlps_change_nothing(target: Target):
    everything = nndecomp.neurons(target, target.shape.d_mlp)
    plain = target.logits(nndecomp.tokenise(target, TEXT).tokens)
    for inputs in ("live", "clean"):
        torch.testing.assert_close(nndecomp.patched_logits(target, everything, TEXT, inputs=inputs), plain)


def test_one_layer_replaced_live_is_one_layer_replaced_clean(target: Target, run: Path):
    stack = nndecomp.load_decomposition(run, "per_layer_transcoder")
    live, clean = (
        nndecomp.patched_logits(target, stack, TEXT, layers=[1], inputs=inputs) for inputs in ("live", "clean")
    )
    torch.testing.assert_close(live, clean)
    both = [nndecomp.patched_logits(target, stack, TEXT, inputs=inputs) for inputs in ("live", "clean")]
    assert not torch.allclose(*both), "with all layers replaced, later ones see the errors of earlier ones"


def test_a_saved_directory_is_loaded_as_well_as_a_run(run: Path):
    whole = nndecomp.load_decomposition(run, "per_layer_transcoder")
    direct = nndecomp.load_decomposition(run / "decompositions" / "per_layer_transcoder")
    assert isinstance(whole, SparseDictionary)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), direct.parameters(), strict=True))


def test_a_text_longer_than_the_context_is_refused_and_not_cut(target: Target):
    n_ctx = target.shape.n_ctx
    with pytest.raises(SettingError, match=f"text 1 has .* takes in 1 to {n_ctx}"):
        nndecomp.tokenise(target, [TEXT, "x = 1\n" * n_ctx])
    with pytest.raises(SettingError, match="text 0 has 0 tokens"):
        nndecomp.tokenise(target, "")


def test_what_is_not_there_is_named(target: Target, run: Path):
    with pytest.raises(SettingError, match="there are: cross_layer_transcoder, per_layer_transcoder"):
        nndecomp.load_decomposition(run, "clt")
    with pytest.raises(SettingError, match="name one of cross_layer_transcoder, per_layer_transcoder"):
        nndecomp.load_decomposition(run)
    with pytest.raises(SettingError, match="layers 0 to 3"):
        nndecomp.record(target, TEXT, ["L9.mlp_in"])
    with pytest.raises(SettingError, match="layers=\\[7\\]"):
        nndecomp.patched_logits(target, nndecomp.neurons(target, 4), TEXT, layers=[7])
    with pytest.raises(SettingError, match="decompositions={} has nothing to measure"):
        nndecomp.evaluate(target, {})
    with pytest.raises(SettingError, match="tokens.seq_len=5000"):
        nndecomp.evaluate(target, nndecomp.neurons(target, 4), "tokens.seq_len=5000")


@pytest.mark.parametrize("source", ["output/nope", "./nope", "~/nope", "nope", "tests/nope", "a/b/c", Path("a/b")])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source: str | Path):
    with pytest.raises(SettingError, match="is neither a directory nor a Hub id"):
        nndecomp.load_decomposition(source)


def test_a_hub_id_that_gives_nothing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingError, match=r"nobody/nothing \(revision=None\) is no directory, and the Hub"):
        nndecomp.load_decomposition("nobody/nothing")


def test_a_decomposition_that_is_still_being_written_is_not_counted(run: Path, tmp_path: Path):
    saved = tmp_path / "decompositions"
    (saved / "partial").mkdir(parents=True)
    with pytest.raises(SettingError, match="has no decomposition yet"):
        nndecomp.load_decomposition(tmp_path)
    (saved / "clt").symlink_to(run / "decompositions" / "cross_layer_transcoder")
    assert nndecomp.load_decomposition(tmp_path).spec.architecture == "cross_layer_transcoder"


def test_texts_and_sites_that_are_none_or_no_list_are_named(target: Target):
    with pytest.raises(SettingError, match="text 0 has 0 tokens"):
        nndecomp.record(target, "", ["L1.mlp_in"])
    with pytest.raises(SettingError, match=r"text=\[\] holds no text"):
        nndecomp.record(target, [], ["L1.mlp_in"])
    with pytest.raises(SettingError, match=r"sites='L1.mlp_in' is not a list; write \['L1.mlp_in'\]"):
        nndecomp.record(target, TEXT, "L1.mlp_in")
    with pytest.raises(SettingError, match=r"sites=\[\] names none"):
        nndecomp.record(target, TEXT, [])


@pytest.mark.parametrize(("name", "meant"), [("tinyy", "tiny"), ("gpt-2", "gpt2")])
def test_a_misspelt_target_is_answered_with_the_names_that_are_close(name: str, meant: str):
    with pytest.raises(SettingError, match=f"target {name} is neither .* is it .*{meant}"):
        nndecomp.load_target(name)


def test_importing_is_quick_and_the_names_are_there():
    program = "import nndecomp, sys; assert 'torch' not in sys.modules; print(*dir(nndecomp)); nndecomp.load_target"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == sorted(nndecomp.__all__)
