"""Laws of training through the target: gradients against autograd through models patched by hand, and what resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decomposition_parts import CPU, config
from evaluation_parts import ToyTarget
from evaluation_parts import text as text_batch
from experiment_parts import small_target
from test_training_dictionaries import Stopping
from torch import Tensor
from training_parts import QUIET

from nndecomp import build
from nndecomp.build.end_to_end import sequences
from nndecomp.config.compose import compose
from nndecomp.config.schema import (
    Activation,
    ActivationsConfig,
    ActivationsKind,
    Architecture,
    Dead,
    Decoder,
    EndToEnd,
    Together,
)
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.errors import SettingError
from nndecomp.targets.base import Target
from nndecomp.targets.pair import PairedTarget
from nndecomp.training import end_to_end
from nndecomp.training.clean_sequences import CleanBatch, CleanSequences
from nndecomp.training.end_to_end import EndToEndObjective, cross_entropy, kl_divergence
from nndecomp.training.log import Log
from nndecomp.training.loop import train
from nndecomp.training.objective import Objective
from nndecomp.training.preemption import Preempted
from nndecomp.types import Point, Site

N_LAYERS = 3
ACTIVATIONS = ActivationsConfig(kind=ActivationsKind.live)
BOTH = pytest.mark.parametrize("kind", [EndToEnd.kl, EndToEnd.ce])


class SameText:
    """The six sequences of the toy, two of them padded, again and again."""

    def __init__(self) -> None:
        self.batch, self.n = text_batch()[0], 0

    def next_batch(self, batch_seqs: int) -> Any:
        self.n += 1
        assert batch_seqs == len(self.batch)
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def objective(target: Target, scale: float = 2.0, **settings: Any) -> EndToEndObjective:
    settings = {"n_features": 24, "end_to_end": EndToEnd.kl, "end_to_end_coefficient": 1.0} | settings
    cfg = config(**settings)
    made = build_dictionary(cfg, target.shape, 0, CPU, "toy")
    with torch.no_grad():
        for bank in made.banks:
            bank.W_dec.mul_(5)
    return EndToEndObjective(DictionaryObjective(made, cfg, stream(target, made).layout, scales(made, scale)), target)


def scales(made: SparseDictionary, scale: float) -> dict[Site, float]:
    """Another one at each site."""
    return {site: scale + 0.1 * i for i, site in enumerate(sorted({*made.reads, *made.writes}))}


def stream(target: Target, made: SparseDictionary, logits: bool = True) -> CleanSequences:
    sites = sorted({*made.reads, *made.writes})
    return CleanSequences(target, SameText(), sites, ACTIVATIONS, batch_seqs=6, seq_len=12, logits=logits)


def batch_of(made: EndToEndObjective) -> CleanBatch:
    return stream(made.target, made.dictionary).next_batch()  # pyright: ignore[reportArgumentType]


def by_hand(made: EndToEndObjective, kind: EndToEnd, replaced: list[int] | None = None) -> Tensor:
    """The loss from a forward pass written out: no hooks, no chunks, dense codes of relu, one layer after the other."""
    target, dictionary = made.target, made.dictionary
    assert isinstance(target, ToyTarget)
    batch, keep = text_batch()
    raw = {**scales(dictionary, 2.0)}
    resid = target.embed[batch.tokens]
    written = {site: dictionary.b_dec[span].expand(6, 12, -1) for site, span in dictionary.write_layout.spans.items()}
    for layer in range(N_LAYERS):
        resid = resid + resid.cumsum(1) / torch.arange(1, 13)[:, None]
        read, out = Site(layer, Point.mlp_in), Site(layer, Point.mlp_out)
        x = resid / resid.square().mean(-1, keepdim=True).sqrt()
        bank, spec = dictionary.banks[layer], dictionary.spec.groups[layer]
        codes = (x / raw[read] @ bank.W_enc.T + bank.b_enc).relu()
        for i, site in enumerate(spec.writes):
            written[site] = written[site] + codes @ bank.W_dec[:, 8 * i : 8 * (i + 1)]
        own = target.mlp(layer)(x)
        y = torch.where(keep[..., None], written[out] * raw[out], own)
        resid = resid + (own if replaced is not None and layer not in replaced else y)
    q = (resid / resid.square().mean(-1, keepdim=True).sqrt() @ target.embed.T).log_softmax(-1)
    p = target.logits(batch.tokens).log_softmax(-1)
    counts = batch.mask[:, 1:] & batch.mask[:, :-1]
    match kind:
        case EndToEnd.kl:
            each = (p.exp() * (p - q)).sum(-1)[:, :-1]
        case _:
            each = -q[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
    return each[counts].mean()


def gradients(made: EndToEndObjective, loss: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in made.named_parameters()}


@BOTH
def test_of_two_models_each_ones_own_predictions_are_damaged(kind: EndToEnd):
    """And learnt from, by the features that are read in it."""
    both = ["A:mlp_out", "B:mlp_out"]
    pair = PairedTarget(ToyTarget(N_LAYERS), ToyTarget(2))
    made = objective(pair, architecture=Architecture.per_layer_sae, reads=both, writes=both, end_to_end=kind)
    batch = batch_of(made)
    counts, each = batch.predicts, []
    with pair.patch(made._replacements(batch)):
        patched = {model: pair.predicting(model).logits(batch.tokens) for model in pair.pair}
    for model, alone in pair.pair.items():
        assert torch.equal(batch.logits[model], alone.logits(batch.tokens))
        p, q = (logits.log_softmax(-1)[:, :-1] for logits in (batch.logits[model], patched[model]))
        if kind is EndToEnd.kl:
            each.append((p.exp() * (p - q)).sum(-1)[counts].mean())
        else:
            each.append(-q.gather(-1, batch.tokens[:, 1:, None])[..., 0][counts].mean())
    damage = made.damage(batch)
    torch.testing.assert_close(damage, torch.stack(each).mean())
    learnt = gradients(made, damage)
    assert all(learnt[f"local.dictionary.groups.{g}.W_dec"].any() for g in range(N_LAYERS + 2))


@BOTH
@pytest.mark.parametrize("architecture", [Architecture.per_layer_transcoder, Architecture.cross_layer_transcoder])
def test_the_gradient_is_that_through_a_model_patched_by_hand(architecture: Architecture, kind: EndToEnd):
    made = objective(
        ToyTarget(N_LAYERS), architecture=architecture, activation=Activation.relu, k=None, end_to_end=kind
    )
    mine, theirs = made.damage(batch_of(made)), by_hand(made, kind)
    assert mine > 0.1
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    of_mine, of_theirs = gradients(made, mine), gradients(made, theirs)
    for name, gradient in of_theirs.items():
        assert gradient.abs().max() > 1e-5, f"nothing reaches {name}: the comparison would say nothing"
        torch.testing.assert_close(of_mine[name], gradient, rtol=1e-4, atol=1e-6)


def test_one_site_at_a_time_leaves_the_others_to_the_target():
    settings = {"activation": Activation.relu, "k": None, "end_to_end_sites": Together.single}
    made = objective(ToyTarget(N_LAYERS), **settings)
    batch, drawn = batch_of(made), []
    for seed in range(8):
        torch.manual_seed(seed)
        drawn.append(int(torch.randint(N_LAYERS, ())))
        torch.manual_seed(seed)
        mine, theirs = made.damage(batch), by_hand(made, EndToEnd.kl, [drawn[-1]])
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        of_mine, of_theirs = gradients(made, mine), gradients(made, theirs)
        for name in of_mine:
            torch.testing.assert_close(of_mine[name], of_theirs[name], rtol=1e-4, atol=1e-6)
    assert set(drawn) == {0, 1, 2}, "every site has its turn"


@pytest.mark.parametrize("sites", list(Together))
def test_a_perfect_transcoder_does_no_damage(sites: Together):
    target = ToyTarget(N_LAYERS)
    target.mlp = lambda layer: lambda x: 3 * x @ target.weights[layer]
    made = objective(target, skip=True, end_to_end_sites=sites)
    of = scales(made.dictionary, 2.0)
    with torch.no_grad():
        made.dictionary.b_dec.zero_()
        for layer, bank in enumerate(made.dictionary.banks):
            assert bank.W_skip is not None
            bank.W_dec.zero_()
            ratio = of[Site(layer, Point.mlp_in)] / of[Site(layer, Point.mlp_out)]
            bank.W_skip.copy_(3 * ratio * target.weights[layer])
    assert made.damage(batch_of(made)).detach().abs() < 1e-6
    with torch.no_grad():
        made.dictionary.b_dec.add_(1.0)
    assert made.damage(batch_of(made)).detach() > 1e-3


def test_nothing_that_is_not_kept_is_replaced():
    """Predictions at BOS, which reads nothing but itself, stay the target's."""
    made = objective(ToyTarget(N_LAYERS))
    batch = batch_of(made)
    with torch.no_grad(), made.target.patch(made._replacements(batch)):
        patched = made.target.logits(batch.tokens)
    clean = batch.logits[None]
    assert torch.equal(patched[:, 0], clean[:, 0]) and not torch.equal(patched[:, 1], clean[:, 1])


def test_chunks_change_neither_the_loss_nor_its_gradient(monkeypatch: pytest.MonkeyPatch):
    draw = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50, 7, generator=draw)
    weights, tokens = torch.rand(50, generator=draw), torch.randint(7, (50,), generator=draw)
    q.requires_grad_()

    def both() -> list[Tensor]:
        kl, ce = kl_divergence(p, q, weights), cross_entropy(q, tokens, weights)
        return [kl, ce, *(torch.autograd.grad(loss, q)[0] for loss in (kl, ce))]

    whole = both()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    torch.testing.assert_close(whole[0], (weights[:, None] * log_p.exp() * (log_p - log_q)).sum())
    torch.testing.assert_close(whole[1], (weights * F.nll_loss(log_q, tokens, reduction="none")).sum())
    monkeypatch.setattr(end_to_end, "CHUNK_VALUES", 7 * 4)
    torch.testing.assert_close(both(), whole)


def test_the_divergence_is_not_the_cross_entropy_under_the_clean_prediction():
    """A peer's `kl` leaves out the entropy of the clean prediction, so that what it logs is never 0."""
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert abs(float(kl_divergence(logits, logits + 2, torch.ones(5)))) < 1e-5


def step(made: Any, optimiser: torch.optim.Optimizer, batch: Any, progress: float) -> float:
    loss, _ = made.loss(batch, progress)
    optimiser.zero_grad()
    loss.backward()
    made.before_step()
    optimiser.step()
    made.after_step()
    return float(loss.detach())


def test_with_coefficient_zero_it_is_local_training_bit_for_bit():
    made, local = (objective(ToyTarget(N_LAYERS), activation=Activation.batchtopk) for _ in range(2))
    local = local.local
    made.cfg.end_to_end_coefficient = 0.0
    optimisers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (made, local)]
    batch = batch_of(made)
    for n in range(5):
        step(made, optimisers[0], batch, n / 5)
        step(local, optimisers[1], batch.clean, n / 5)
    for (name, mine), theirs in zip(made.local.state_dict().items(), local.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@BOTH
@pytest.mark.parametrize("sites", list(Together))
@pytest.mark.parametrize("activation", [Activation.batchtopk, Activation.jumprelu])
def test_the_damage_falls(activation: Activation, sites: Together, kind: EndToEnd):
    settings = {"activation": activation, "k": None if activation is Activation.jumprelu else 3}
    made = objective(ToyTarget(N_LAYERS), end_to_end=kind, end_to_end_sites=sites, local_coefficient=0.0, **settings)
    optimiser, batch = torch.optim.Adam(made.parameters(), lr=0.02), batch_of(made)
    torch.manual_seed(0)
    losses = [step(made, optimiser, batch, n / 40) for n in range(40)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_in_training_batchtopk_keeps_k_of_each_group_on_average_inside_the_patched_run():
    made = objective(ToyTarget(N_LAYERS), activation=Activation.batchtopk, k=3)
    batch = batch_of(made)
    run = made.dictionary.live_run()
    for layer in range(N_LAYERS):
        run.read(Site(layer, Point.mlp_in), torch.randn(len(batch.kept), 8))
    counts = run.active().counts().float()
    assert counts.mean(0).tolist() == [3.0, 3.0, 3.0] and counts.std() > 0


def test_without_predictions_the_clean_pass_gives_the_same_rows():
    made = objective(ToyTarget(N_LAYERS))
    whole, part = (stream(made.target, made.dictionary, logits).next_batch() for logits in (True, False))  # pyright: ignore[reportArgumentType]
    assert torch.equal(whole.clean.values, part.clean.values) and part.logits == {}
    batch, keep = text_batch()
    assert len(whole.clean) == int(keep.sum()) and whole.n_predictions == int((batch.mask[:, 1:]).sum())


def attempt(out: Path, model: Path, stop_after: int = -1, *overrides: str) -> dict[str, Any]:
    """Builds everything anew, as a job that starts does, and trains."""
    small = [f"target.path={model}", "training.n_tokens=1024", "compare.k=[4]", "decomposition.dead_after_tokens=500"]
    damage = ["decomposition.end_to_end=kl", "decomposition.end_to_end_coefficient=1", "training.batch_tokens=128"]
    cfg = compose("exp_000_quickstart", ["+scale=smoke", *small, *damage, *overrides])
    torch.manual_seed(cfg.seed)
    target = build.target(cfg)
    members = build.trainable(cfg)
    made = {
        name: build_dictionary(each.config, target.shape, each.seed, CPU, target.name) for name, each in members.items()
    }
    batches = sequences(
        cfg, target, sorted({site for each in made.values() for site in (*each.reads, *each.writes)}), members
    )
    objectives = {
        name: EndToEndObjective(
            DictionaryObjective(each, members[name].config, batches.layout, dict.fromkeys(batches.layout.sites, 1.0)),
            target,
        )
        for name, each in made.items()
    }
    with Log(out, QUIET) as log:
        train(objectives, Stopping(batches, stop_after), cfg.training, out, log=log, description="end to end")
    return {name: each.state_dict() for name, each in objectives.items()}


@pytest.mark.parametrize("sites", [pytest.param("all", marks=pytest.mark.slow), "single"])
def test_stopped_and_started_again_it_ends_as_if_never_stopped(tmp_path: Path, sites: str):
    model = small_target(tmp_path / "model")
    overrides = [f"decomposition.end_to_end_sites={sites}", "compare.architectures=[cross_layer_transcoder]"]
    whole = attempt(tmp_path / "whole", model, -1, *overrides)
    with pytest.raises(Preempted):
        attempt(tmp_path / "cut", model, 5, *overrides)
    resumed = attempt(tmp_path / "cut", model, -1, *overrides)
    for name, state in whole.items():
        assert all(torch.equal(state[key], resumed[name][key]) for key in state), name


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.batch_tokens=100"], "training.batch_tokens=100 must be a multiple of tokens.seq_len=32"),
        (["decomposition.scope=all"], "decomposition.scope=all lets features of all groups"),
        (
            ["+compare.variants.cc={architecture: crosscoder, reads: [mlp_out], writes: [mlp_out]}"],
            "decomposition.end_to_end_sites=all cannot be done with cc_k4, since group shared reads L3.mlp_out, which runs "
            "after L0.mlp_out",
        ),
    ],
)
def test_what_cannot_be_trained_through_the_target_is_refused_in_one_sentence(overrides: list[str], said: str):
    damage = ["decomposition.end_to_end=kl", "decomposition.end_to_end_coefficient=1", "compare.k=[4]"]
    small = ["compare.architectures=[per_layer_transcoder]", *damage]
    with pytest.raises(SettingError) as refused:
        build.check(compose("exp_000_quickstart", ["+scale=smoke", *small, *overrides]), trains=True)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_crosscoder_is_trained_one_site_at_a_time():
    """What it reads lies behind what it writes; its clean reconstruction of one site needs no order."""
    made = objective(
        ToyTarget(N_LAYERS),
        architecture=Architecture.crosscoder,
        reads=["mlp_out"],
        writes=["mlp_out"],
        end_to_end_sites=Together.single,
    )
    loss, terms = made.loss(batch_of(made), 0.0)
    assert loss.isfinite() and float(terms["end_to_end"]) > 0.1


def test_the_loop_can_train_it_and_resets_reach_it():
    settings = {"dead": Dead.resample, "dead_after_tokens": 1, "resample_every": 1}
    made = objective(ToyTarget(N_LAYERS), **settings)
    assert isinstance(made, Objective)
    optimiser, batch = torch.optim.Adam(made.parameters(), lr=0.01), batch_of(made)
    for n in range(3):
        step(made, optimiser, batch, n / 3)
    resets = made.take_resets()
    own = {id(parameter) for parameter in made.parameters()}
    assert resets and all(id(parameter) in own for parameter, _ in resets)


def test_the_learning_rate_of_thresholds_is_found_by_the_names_the_loop_sees():
    jumprelu = {"activation": Activation.jumprelu, "k": None, "threshold_lr": 0.1}
    made = objective(ToyTarget(N_LAYERS), **jumprelu)
    assert set(made.lr_shares()) <= set(dict(made.named_parameters())) and len(made.lr_shares()) == N_LAYERS


def test_a_decoder_that_is_computed_learns_through_the_target():
    """W_dec of an archetypal dictionary is no parameter: its weights on archetypes are."""
    archetypal = {"decoder": Decoder.archetypal, "archetypes": 16}
    made = objective(ToyTarget(N_LAYERS), local_coefficient=0.0, **archetypal)
    made.loss(batch_of(made), 0.0)
    reached = gradients(made, made.damage(batch_of(made)))
    assert all(reached[name].abs().max() > 0 for name in reached if name.endswith(".A"))
