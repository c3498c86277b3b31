"""Sparse attention in place of a model's own: what it equals, where it starts, how it trains and what it costs the model."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from decomposition_parts import config
from evaluation_parts import text
from tiny_models import save_tiny_model

import nndecomp
from nndecomp import build
from nndecomp.activations.sequences import Sequences
from nndecomp.activations.statistics import Affine
from nndecomp.build import training
from nndecomp.config.compose import compose
from nndecomp.config.schema import (
    Activation,
    Architecture,
    Directions,
    EvaluationConfig,
    Inputs,
    Patched,
)
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.attention import AttentionGroup
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.errors import SettingError
from nndecomp.evaluation import evaluate
from nndecomp.targets.base import Target
from nndecomp.targets.llama_simple_mlp import Block, LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget
from nndecomp.training.preemption import Preempted
from nndecomp.types import Layout, Point, Site

CPU = torch.device("cpu")


def toy() -> LlamaSimpleMLPTarget:
    """Two layers whose heads turn, share keys, and matter."""
    sizes = dict(n_layers=2, d_model=8, d_mlp=16, n_heads=4, n_kv_heads=2, n_ctx=16, n_vocab=17)
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(**sizes), torch.Generator().manual_seed(0)).eval()
    draw = torch.Generator().manual_seed(1)
    model.wte.weight.data.normal_(generator=draw)
    for block in model.h:
        assert isinstance(block, Block)
        for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj, block.attn.o_proj):
            linear.weight.data.normal_(generator=draw).mul_(1.5 / 8**0.5)
    return LlamaSimpleMLPTarget("toy", model, None)


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    if request.param == "toy":
        return toy()
    if request.param in ("tiny", "tiny_docs"):
        return nndecomp.load_target(request.param)
    return nndecomp.load_target(str(save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))))


# Turning, turning by a part, not at all; with and without biases, shared keys and a post-norm's layer beside it.
TARGETS = pytest.mark.parametrize("target", ["toy", "tiny", "tiny_docs", "gpt2", "pythia", "llama"], indirect=True)


def settings(target: Target, **own: Any) -> dict[str, Any]:
    """One head for each coordinate of each of the target's heads, no activation function."""
    shape = target.shape.of(None)
    n = shape.n_heads * shape.d_head
    every = {"n_features": n, "activation": Activation.abs_topk, "k": n}
    where = {"architecture": Architecture.lorsa, "reads": ["attn_in"], "writes": ["attn_out"]}
    return where | every | own


def made_of(target: Target, scales: Any = None, **own: Any) -> DictionaryObjective:
    cfg = config(**settings(target, **own))
    made = build_dictionary(cfg, target.shape, 0, target.device, target.name)
    layout = Layout.of({site: made.spec.widths[site] for site in (*made.reads, *made.writes)})
    return DictionaryObjective(made, cfg, layout, scales or dict.fromkeys(layout.sites, 1.0))


def tokens_of(target: Target) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(1, target.shape.of(None).n_vocab, (3, 12), generator=draw)


def sequences(target: Target, layout: Layout, tokens: torch.Tensor) -> Sequences:
    recorded = target.record(tokens, layout.sites)
    values = torch.cat([recorded[site] for site in layout.sites], -1)
    return Sequences(values.float(), torch.arange(values.shape[0] * values.shape[1]))


def units(layout: Layout) -> dict[Site, Affine]:
    return {
        site: Affine(0.1 * torch.linspace(-1, 1, w) + 0.05 * i, torch.linspace(0.5, 2, w))
        for i, (site, w) in enumerate(zip(layout.sites, layout.widths, strict=True))
    }


@torch.no_grad()
def as_attention(target: Target, objective: DictionaryObjective, tokens: torch.Tensor) -> SparseDictionary:
    """Patterns as training would start with them; values and outputs are the target's. Back in raw units, with the constant
    that its biases add, as a sequence of one token shows it."""
    objective.start(sequences(target, objective.layout, tokens), target)
    for spec, bank in zip(objective.dictionary.spec.groups, objective.dictionary.banks, strict=True):
        heads = target.heads_of(spec.reads[0])
        s, m = objective.reads.s[bank.reads], objective.reads.m[bank.reads]
        bank.W_enc.copy_(heads.W_V.mT.flatten(0, 1) * s)
        bank.b_enc.copy_(heads.W_V.mT.flatten(0, 1) @ m)
        bank.W_dec.copy_(heads.W_O.flatten(0, 1) / objective.writes.s[bank.writes])
    made = objective.finished()
    one = sequences(target, objective.layout, tokens[:1, :1])
    x = Sequences(
        torch.cat([one.values[..., objective.layout.spans[site]] for site in made.read_layout.sites], -1), one.kept
    )
    y = torch.cat([one.values[..., objective.layout.spans[site]] for site in made.write_layout.sites], -1)
    made.b_dec.add_((y[0] - made(x)[0])[0])
    return made


@TARGETS
def test_with_the_targets_own_heads_it_is_the_targets_attention(target: Target) -> None:
    """Layer by layer, in the units of training and folded back; the start takes queries and keys from the target."""
    objective = made_of(target)
    objective = made_of(target, units(objective.layout))
    tokens = tokens_of(target)
    made = as_attention(target, objective, tokens)
    batch = sequences(target, objective.layout, tokens)
    x = Sequences(
        torch.cat([batch.values[..., objective.layout.spans[s]] for s in made.read_layout.sites], -1), batch.kept
    )
    y = torch.cat([batch.rows()[:, objective.layout.spans[s]] for s in made.write_layout.sites], -1)
    y_hat, codes = made.requires_grad_(False)(x)
    error = (y_hat - y).abs().amax() / y.abs().amax()
    assert float(error) < 1e-4
    assert (codes.counts() == settings(target)["n_features"]).all()


def test_patterns_asked_for_more_than_once_start_alike_and_scores_keep_their_scale() -> None:
    target = toy()
    objective = made_of(target, n_qk_heads=8, layers=[1])
    tokens = tokens_of(target)
    objective.start(sequences(target, objective.layout, tokens), target)
    (bank,) = objective.dictionary.banks
    assert isinstance(bank, AttentionGroup)
    x = target.record(tokens, [Site(1, Point.attn_in)])[Site(1, Point.attn_in)]
    patterns = bank.pattern(x)
    torch.testing.assert_close(patterns[:, 0::2], patterns[:, 1::2])
    assert not torch.allclose(patterns[:, 0], patterns[:, 2])
    assert bank.pattern(x).shape == (3, 8, 12, 12) and torch.allclose(patterns.sum(-1), torch.ones(3, 8, 12))


def test_heads_start_along_what_the_targets_heads_move() -> None:
    """o is what the head makes of v, and both lie in its d_head directions; norms are as asked for."""
    target = toy()
    objective = made_of(
        target, units(made_of(target).layout), directions=Directions.heads, subspace_share=1.0, layers=[1]
    )
    objective.start(sequences(target, objective.layout, tokens_of(target)), target)
    (bank,) = objective.dictionary.banks
    heads = target.heads_of(Site(1, Point.attn_in))
    v, o = bank.W_enc / objective.reads.s[bank.reads], bank.W_dec * objective.writes.s[bank.writes]
    for h in range(4):
        own = slice(2 * h, 2 * h + 2)
        a = torch.linalg.lstsq(heads.W_V[h], v[own].T).solution.T
        torch.testing.assert_close(a @ heads.W_V[h].T, v[own], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            torch.cosine_similarity(a @ heads.W_O[h], o[own]), torch.ones(2), atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(bank.W_enc.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(bank.W_dec.norm(dim=1), torch.full((8,), 0.1))


def test_in_place_of_attention_it_changes_nothing_clean_or_live() -> None:
    """BOS is attended to, though it is not replaced."""
    target = toy()
    heldout, keep = text()
    made = as_attention(target, made_of(target), tokens_of(target))
    cfg = EvaluationConfig(n_seqs=6, batch_seqs=4, inputs=list(Inputs), patched=list(Patched), bootstrap=20)
    means = {site: torch.zeros(8) for site in made.writes}
    rows = evaluate(target, [made], heldout, keep, means, cfg, seed=0)
    target.begins_late = False
    assert rows == evaluate(target, [made], heldout, keep, means, cfg, seed=0), "layers before are as they were"
    found = {(r.metric, r.inputs): r.value for r in rows if r.site == "all"}
    for inputs in ("clean", "live"):
        assert abs(found["fvu", inputs]) < 1e-8 and abs(found["kl", inputs]) < 1e-8
    assert found["kl_zero", "none"] > 0.01, "attention matters here"


def test_live_it_reads_what_others_left_and_clean_what_was_there() -> None:
    """With wrong heads in layer 0, layer 1 sees other inputs live, and the same ones clean."""
    target = toy()
    tokens = tokens_of(target)
    made = as_attention(target, made_of(target), tokens)
    with torch.no_grad():
        made.banks[0].W_dec.mul_(-1)
    keep = torch.arange(tokens.numel())
    seen: dict[str, torch.Tensor] = {}
    site = Site(1, Point.attn_out)
    for inputs in ("clean", "live"):
        rows = evaluate(
            target,
            [made],
            text()[0],
            text()[1],
            {each: torch.zeros(8) for each in made.writes},
            EvaluationConfig(n_seqs=6, batch_seqs=6, inputs=[Inputs[inputs]], patched=[Patched.all], bootstrap=2),
            seed=0,
        )
        seen[inputs] = torch.tensor([r.value for r in rows if r.metric == "fvu" and r.site == str(site)])
    assert len(keep) == 36 and float(seen["clean"]) < 1e-8 and float(seen["live"]) < 1e-8, (
        "each explains what it is given"
    )


def test_a_notebook_reads_encodes_and_patches_it() -> None:
    target = nndecomp.load_target("tiny")
    made = as_attention(target, made_of(target, layers=[0, 2]), tokens_of(target))
    words = ["def area(r):", "import os"]
    x = nndecomp.read(target, made, words)
    assert isinstance(x, Sequences) and made.encode(x).counts().shape == (len(x), 2)
    logits = target.logits(nndecomp.tokenise(target, words).tokens)
    for inputs in ("clean", "live"):
        patched = nndecomp.patched_logits(target, made, words, inputs=inputs)
        torch.testing.assert_close(patched, logits, atol=2e-3, rtol=1e-3)


SMALL = [
    "+scale=smoke",
    "decomposition=lorsa",
    "decomposition.k=4",
    "training.n_tokens=1024",
    "training.batch_tokens=128",
]


class Stopping:
    """A stream that has the process told to stop while it draws its n-th batch."""

    def __init__(self, stream: Any, n: int) -> None:
        self.stream, self.left = stream, n
        self.state_dict, self.load_state_dict, self.layout = stream.state_dict, stream.load_state_dict, stream.layout

    def next_batch(self) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.stream.next_batch()


def attempt(out: Path, stop_after: int = -1, *overrides: str) -> SparseDictionary:
    """Builds everything anew, as a job that starts does, and trains."""
    texts = out.parent / "texts"
    texts.mkdir(exist_ok=True)
    for i in range(60):
        (texts / f"{i}.txt").write_text("\n".join(f"def f{i}_{j}(x): return x + {i * j}" for j in range(40)))
    cfg = compose("exp_027_train_presets", [*SMALL, "tokens=files", f"tokens.path={texts}", *overrides])
    torch.manual_seed(cfg.seed)
    with pytest.MonkeyPatch.context() as patch:
        batches = training._batches
        patch.setattr(training, "_batches", lambda *args: Stopping(batches(*args), stop_after))
        return build.trained(cfg, build.target(cfg), out)["lorsa"]


def test_stopped_and_started_again_it_ends_as_if_never_stopped(tmp_path: Path) -> None:
    whole = attempt(tmp_path / "whole")
    with pytest.raises(Preempted):
        attempt(tmp_path / "cut", 4)
    resumed = attempt(tmp_path / "cut")
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("sites", ["all", "single"])
def test_it_trains_through_the_target(tmp_path: Path, sites: str) -> None:
    damage = ["decomposition.end_to_end=kl", "decomposition.end_to_end_coefficient=1"]
    made = attempt(tmp_path / "out", -1, *damage, f"decomposition.end_to_end_sites={sites}")
    assert all(tensor.isfinite().all() for tensor in made.state_dict().values())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["training.batch_tokens=100"], "training.batch_tokens=100 must be a multiple of tokens.seq_len=32"),
        (
            ["activations=store", "activations.store=nowhere"],
            "activations.kind=store holds rows without their sequences",
        ),
        (["activations.buffer_tokens=256"], "buffer_tokens=256"),
        (["decomposition.n_features=62"], "n_features=62 is not a multiple"),
    ],
)
def test_what_it_cannot_train_on_is_refused_before_the_target_loads(overrides: list[str], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence) as refused:
        build.check(compose("exp_027_train_presets", [*SMALL, *overrides]), trains=True)
    assert "\n" not in str(refused.value)
