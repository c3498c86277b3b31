"""Baselines that need no training: neurons in several rankings, principal and random directions."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model, tiny_tokens

import nndecomp
from nndecomp import build
from nndecomp.build.baselines import build_neurons
from nndecomp.config.compose import compose
from nndecomp.config.schema import (
    Activation,
    Architecture,
    DecompositionConfig,
    EvaluationConfig,
    Inputs,
    Patched,
    Ranking,
    TargetConfig,
    TargetKind,
)
from nndecomp.decompositions.attribution import AttributedNeurons, attributions, loss_gradients
from nndecomp.decompositions.directions import build_directions
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.decompositions.replacing import Sequences
from nndecomp.errors import SettingError
from nndecomp.evaluation import evaluate_all
from nndecomp.evaluation.patching import clean_run
from nndecomp.targets.base import Target
from nndecomp.targets.load import load_target
from nndecomp.tokens.batch import Row, TokenBatch
from nndecomp.types import Point, Site

LAYERS = [0, 2]
HIDDEN = [Site(layer, Point.mlp_hidden) for layer in LAYERS]
OUT = [Site(layer, Point.mlp_out) for layer in LAYERS]
DIRECTIONS = (Architecture.principal_directions, Architecture.random_directions)


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    directory: Path = save_tiny_model(request.param, tmp_path_factory.mktemp("targets") / request.param)
    return load_target(TargetConfig(kind=TargetKind.huggingface, path=str(directory)), torch.device("cpu"))


def rows_of(target: Target, sites: list[Site], n_seqs: int = 3) -> torch.Tensor:
    recorded = target.record(tiny_tokens(n_seqs), sites)
    return torch.cat([recorded[site].flatten(0, 1) for site in sites], 1)


def directions(kind: Architecture, target: Target, k: int, rows: torch.Tensor, seed: int = 0) -> SparseDictionary:
    cfg = DecompositionConfig(
        architecture=kind, reads=["mlp_out"], writes=["mlp_out"], layers=LAYERS, n_features=10**6,
        activation=Activation.abs_topk, k=k,
    )  # fmt: skip
    return build_directions(cfg, target.shape, rows, seed, target.name)


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_all_directions_are_the_model(kind, target):
    d, y = target.shape.width(OUT[0]), rows_of(target, OUT)
    made = directions(kind, target, d, rows_of(target, OUT, n_seqs=20))
    y_hat, codes = made(y)
    torch.testing.assert_close(y_hat, y, atol=1e-4, rtol=1e-4)
    assert [bank.n_features for bank in made.banks] == [d, d] and codes.counts().shape == (len(y), 2)
    for bank in made.banks:
        torch.testing.assert_close(bank.W_dec @ bank.W_dec.T, torch.eye(d), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_directions_answer_site_by_site_as_they_do_at_once_and_cost_what_an_sae_costs(kind, target):
    d, y = target.shape.width(OUT[0]), rows_of(target, OUT)
    made = directions(kind, target, 3, y)
    y_hat, codes = made(y)
    assert (codes.counts() == 3).all() and made.live_obstacle() is None
    run = made.live_run()
    for site in OUT:
        run.read(site, y[:, made.read_layout.spans[site]])
        torch.testing.assert_close(run.write(site), y_hat[:, made.write_layout.spans[site]])
    assert [(c.name, c.n_components, c.parameters, c.gate_parameters) for c in made.costs] == [
        ("L0", d, 2 * d, d * d),
        ("L2", d, 2 * d, d * d),
    ]


def test_principal_directions_of_rows_along_two_axes_are_these_axes_the_larger_first(target):
    """Rows m + a e_3 + b e_1 with a = +-5, b = +-1: with k = 1 only b is lost, with k = 2 nothing."""
    width = target.shape.width(OUT[0])
    m, e = torch.arange(width) / 7.0, torch.eye(width)
    y = torch.stack([m + a * e[3] + b * e[1] for a in (5.0, -5.0) for b in (1.0, -1.0)]).repeat(1, 2)
    one, two = (directions(Architecture.principal_directions, target, k, y) for k in (1, 2))
    for bank in one.banks:
        torch.testing.assert_close(bank.W_dec[:2].abs(), e[[3, 1]])
    torch.testing.assert_close((one(y)[0] - y).square().sum(1), torch.full((4,), 2.0))
    torch.testing.assert_close(two(y)[0], y)


@pytest.mark.parametrize("seed", range(3))
def test_principal_directions_leave_less_unexplained_than_random_ones(seed, target):
    """Where rows lie in r dimensions, r principal directions explain all; where they are merely longer in some, more."""
    width, draw = target.shape.width(OUT[0]), torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
    flat = torch.randn(400, 4, generator=draw) @ basis[:4]
    long = torch.randn(400, width, generator=draw) * (0.6 ** torch.arange(width)) @ basis

    def fvu(kind: Architecture, y: torch.Tensor, k: int) -> float:
        y = y.repeat(1, 2)
        error = directions(kind, target, k, y, seed)(y)[0].detach() - y
        return float(error.square().sum() / (y - y.mean(0)).square().sum())

    assert fvu(Architecture.principal_directions, flat, 4) < 1e-9 < 0.1 < fvu(Architecture.random_directions, flat, 4)
    for k in (1, 2, 4, 8):
        assert fvu(Architecture.principal_directions, long, k) < 0.9 * fvu(Architecture.random_directions, long, k)


def test_random_directions_depend_on_the_seed_and_differ_between_sites(target):
    rows = rows_of(target, OUT)
    a, again, b = (directions(Architecture.random_directions, target, 3, rows, seed) for seed in (0, 0, 1))
    assert torch.equal(a.banks[0].W_dec, again.banks[0].W_dec)
    assert not torch.allclose(a.banks[0].W_dec, b.banks[0].W_dec)
    assert not torch.allclose(a.banks[0].W_dec, a.banks[1].W_dec)


def test_by_output_norm_a_neuron_is_worth_its_activation_times_the_length_of_what_it_writes(target):
    hidden, d_mlp = rows_of(target, HIDDEN), target.shape.of(None).d_mlp
    made = NeuronBaseline(target, LAYERS, [1, 4], Ranking.output_norm)
    _, codes = made(hidden)
    for g, layer in enumerate(LAYERS):
        own = hidden[:, g * d_mlp : (g + 1) * d_mlp]
        lengths = [float(target.neuron_writes(layer)[i].norm()) for i in range(d_mlp)]
        for token, h in enumerate(own):
            best = sorted(range(d_mlp), key=lambda i, h=h: -abs(float(h[i])) * lengths[i])[: made.k[g]]
            assert (codes[g].dense()[token] != 0).nonzero().flatten().tolist() == sorted(best)
    plain = NeuronBaseline(target, LAYERS, [1, 4])(hidden)[1]
    assert any(not torch.equal(a.dense(), b.dense()) for a, b in zip(codes, plain, strict=True))
    assert (made.family, made.costs) == ("neurons_by_output_norm", NeuronBaseline(target, LAYERS, [1, 4]).costs)


def test_what_neurons_write_is_the_matrix_before_a_post_norm(target):
    assert isinstance(target.neuron_writes(1), torch.Tensor)
    hidden = torch.zeros(1, target.shape.of(None).d_mlp)
    hidden[0, 5] = 2.0
    silent = target.mlp_out_of(1, torch.zeros_like(hidden))
    written = target.mlp_out_of(1, hidden) - silent
    cosine = torch.cosine_similarity(written[0], target.neuron_writes(1)[5], dim=0)
    # A post-norm scales each coordinate of the sum by a gain of its own.
    assert cosine > (0.8 if "gemma" in target.name else 0.9999)


class Text:
    """Three sequences, of which the last one ends early and all but the first positions count."""

    tokens = tiny_tokens()
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    counted[2, 5:] = False
    batch = Sequences(tokens, counted.flatten().nonzero()[:, 0])


def loss_of(target: Target, hidden: dict[Site, torch.Tensor] | None = None) -> torch.Tensor:
    """By loops over positions, with activations put in place of the target's own."""
    values = {} if hidden is None else hidden
    with target.patch({site: lambda _, site=site: values[site] for site in values}):
        log_p = target.logits(Text.tokens).double().log_softmax(-1)
    n_seqs, n_pos = Text.tokens.shape
    return sum(
        (
            -log_p[b, t, Text.tokens[b, t + 1]]
            for b in range(n_seqs)
            for t in range(n_pos - 1)
            if Text.counted[b, t + 1]
        ),
        start=torch.zeros((), dtype=torch.float64),
    )


def test_gradients_are_those_of_the_loss_under_small_changes_of_the_activations(target):
    recorded = target.record(Text.tokens, HIDDEN)
    found = loss_gradients(target, Text.tokens, Text.counted, recorded)
    draw = torch.Generator().manual_seed(0)
    for site in HIDDEN:
        step = 1e-2 * torch.randn(recorded[site].shape, generator=draw)
        up, down = (loss_of(target, recorded | {site: recorded[site] + sign * step}) for sign in (1, -1))
        assert float((found[site] * step).sum()) == pytest.approx(float(up - down) / 2, rel=0.02)
    assert not any(p.requires_grad for p in target.model.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    nothing_follows = found[HIDDEN[0]][:, -1], found[HIDDEN[0]][2, 4:]
    assert all((each == 0).all() for each in nothing_follows)


def test_attributions_add_to_what_silencing_all_neurons_costs_unless_a_post_norm_undoes_the_scale(target):
    recorded = target.record(Text.tokens, HIDDEN)
    if "gemma" in target.name:
        gradients = loss_gradients(target, Text.tokens, Text.counted, recorded)
        found = attributions(target, Text.tokens, Text.counted, recorded)
        for site in HIDDEN:
            here = (recorded[site] * gradients[site])[Text.counted].flatten()
            assert torch.cosine_similarity(here, found[site][Text.counted].flatten(), dim=0) > 0.99
        return
    silent = {site: torch.where(Text.counted[..., None], 0.0, h) for site, h in recorded.items()}
    costs = float(loss_of(target) - loss_of(target, silent))
    found = attributions(target, Text.tokens, Text.counted, recorded, steps=200)
    assert sum(float(each.sum()) for each in found.values()) == pytest.approx(costs, abs=0.01 * abs(costs) + 0.02)
    assert all((each[~Text.counted] == 0).all() for each in found.values())


def test_by_attribution_neurons_are_kept_by_their_share_in_the_loss(target):
    made, d_mlp = AttributedNeurons(target, LAYERS, [1, 5]), target.shape.of(None).d_mlp
    clean = clean_run(target, _evaluated(), HIDDEN, HIDDEN)
    y_hat, codes = made(clean.read_by(made))
    hidden = target.record(Text.tokens, HIDDEN)
    shares = attributions(target, Text.tokens, Text.counted, hidden)
    for g, site in enumerate(HIDDEN):
        h, share = (each[site].flatten(0, 1)[Text.batch.kept] for each in (hidden, shares))
        for token in range(len(h)):
            scores = (share[token] if share[token].any() else h[token]).abs()
            best = sorted(range(d_mlp), key=lambda i, scores=scores: -float(scores[i]))[: made.k[g]]
            assert (codes[g].dense()[token] != 0).nonzero().flatten().tolist() == sorted(best)
        torch.testing.assert_close(
            y_hat[:, made.write_layout.spans[OUT[g]]], target.mlp_out_of(LAYERS[g], codes[g].dense())
        )
    assert made.family == "neurons_by_attribution"


def _evaluated():
    from nndecomp.evaluation.patching import Batch

    predicts = Text.counted[:, 1:]
    return Batch(Text.tokens, Text.batch.kept, slice(0, len(Text.tokens)), predicts)


def test_measured_as_any_other_they_cost_nothing_whole(target):
    d_mlp, d = target.shape.of(None).d_mlp, target.shape.width(OUT[0])
    rows = rows_of(target, OUT, n_seqs=40)
    made = {
        "all by attribution": AttributedNeurons(target, LAYERS, [d_mlp] * 2),
        "all by output norm": NeuronBaseline(target, LAYERS, [d_mlp] * 2, Ranking.output_norm),
        "all principal": directions(Architecture.principal_directions, target, d, rows),
        "by attribution": AttributedNeurons(target, LAYERS, [6] * 2),
        "by size": NeuronBaseline(target, LAYERS, [6] * 2),
    }
    draw = torch.Generator().manual_seed(3)
    text = TokenBatch.of([Row(torch.randint(1, 80, (20,), generator=draw).tolist(), False) for _ in range(8)], 20, 0)
    cfg = EvaluationConfig(n_seqs=8, batch_seqs=4, inputs=list(Inputs)[:2], patched=[Patched.all], bootstrap=0)
    means = {site: rows.mean(0)[:d] for site in OUT}
    found = evaluate_all(target, {n: [m.eval()] for n, m in made.items()}, text, text.mask, means, cfg, 0)
    increase = {
        (name, m.inputs): m.value for name, each in found.items() for m in each if m.metric == "ce_increase"
    }  # fmt: skip
    for name in ("all by attribution", "all by output norm", "all principal"):
        assert increase[name, "clean"] == pytest.approx(0, abs=1e-4)
    assert increase["by attribution", "clean"] != increase["by size", "clean"]
    assert ("by size", "live") in increase and ("by attribution", "live") not in increase
    (note,) = [m.note for m in found["by attribution"] if m.note]
    assert note.startswith("not evaluated live: attribution ranks neurons by gradients of a loss")


def test_settings_reach_every_baseline_and_rows_name_it():
    grid = [
        "compare.architectures=[neurons,principal_directions,random_directions]",
        "+compare.variants.norm={architecture: neurons, reads: [mlp_hidden], activation: topk, ranking: output_norm}",
        "+compare.variants.oracle={architecture: neurons, reads: [mlp_hidden], activation: topk, ranking: attribution}",
        *("+scale=smoke", "compare.k=[4]", "evaluation.patched=[all]"),
    ]
    cfg = compose("exp_000_quickstart", grid)
    target = build.target(cfg)
    made = build.baselines(cfg, target)
    assert list(made) == [
        *("neurons_k4", "principal_directions_k4", "random_directions_k4", "norm_k4", "oracle_k4")
    ]  # fmt: skip
    rows = build.measured(cfg, target, {name: [each] for name, each in made.items()}, "run")
    assert set(rows.architecture) == {
        *("neurons", "principal_directions", "random_directions", "neurons_by_output_norm", "neurons_by_attribution")
    }
    whole = rows[(rows.metric == "ce_increase") & (rows.inputs == "clean")].set_index("name").value
    assert whole["oracle_k4"] < whole["neurons_k4"], "what is known of the text that follows helps"
    fvu = rows[(rows.metric == "fvu") & (rows.site == "all") & (rows.inputs == "clean")].set_index("name").value
    assert fvu["principal_directions_k4"] < fvu["random_directions_k4"] < 1


def test_what_has_no_meaning_for_a_baseline_is_refused():
    for preset, setting, said in (
        (
            "per_layer_transcoder",
            "ranking=attribution",
            "ranks neurons, but decomposition.architecture is per_layer_tr",
        ),
        ("neurons", "activation=batchtopk", "write activation=topk"),
        ("principal_directions", "activation=topk", "write activation=abs_topk"),
    ):
        with pytest.raises(SettingError, match=said):
            compose("exp_027_train_presets", [f"decomposition={preset}", f"decomposition.{setting}"])
    with pytest.raises(SettingError, match="architecture=random_directions is a baseline that is never trained"):
        chosen = ["+scale=smoke", "decomposition=random_directions", "decomposition.k=4"]
        build.check(compose("exp_027_train_presets", chosen), trains=True)


def test_a_notebook_ranks_neurons_as_settings_do():
    target = nndecomp.load_target("tiny")
    cfg = DecompositionConfig(
        architecture=Architecture.neurons, reads=["mlp_hidden"], writes=["mlp_out"], n_features=512,
        activation=Activation.topk, k=8, ranking=Ranking.attribution,
    )  # fmt: skip
    ours, settings = nndecomp.neurons(target, 8, "attribution"), build_neurons(cfg, target)
    x = nndecomp.read(target, ours, "def area(radius): return 3.14 * radius ** 2")
    assert torch.equal(ours(x)[0], settings(x)[0])
    with pytest.raises(SettingError, match="ranking=size is not one of activation, output_norm, attribution"):
        nndecomp.neurons(target, 8, "size")
