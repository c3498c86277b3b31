"""Jacobians of replacements beside those of the target, on models whose derivatives are known."""

from pathlib import Path

import pytest
import torch
from decomposition_parts import ACTIVATIONS, GLU, inputs, settled
from experiment_parts import small_target
from spd_parts import decomposed
from torch import Tensor
from truth_parts import planted_settings

from nndecomp import build
from nndecomp.config.compose import compose
from nndecomp.config.faithfulness import FaithfulnessConfig
from nndecomp.config.schema import (
    Activation,
    Architecture,
    DecompositionConfig,
    EvaluationConfig,
    Inputs,
    Patched,
    Plan,
)
from nndecomp.config.target import TargetConfig, TargetKind
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.base import Replacement
from nndecomp.decompositions.held import hold, masks_of
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.spd.gates import Gate, GateKind
from nndecomp.errors import SettingError
from nndecomp.evaluation.faithfulness import (
    by_token,
    cosine,
    faithfulness,
    last_logits,
    logits_jacobian,
    places,
    random_masks,
    relative_error,
)
from nndecomp.evaluation.held import held
from nndecomp.targets.base import Target
from nndecomp.targets.load import load_target
from nndecomp.targets.modules import ModuleTarget
from nndecomp.targets.planted import PlantedTarget
from nndecomp.tokens.batch import Row, TokenBatch
from nndecomp.types import Point, Site

CPU = torch.device("cpu")
LAYERS, D, D_MLP = (0, 1, 2, 3), 16, 64
EVALUATION = EvaluationConfig(
    n_seqs=6, batch_seqs=4, inputs=[Inputs.live], patched=[Patched.all], bootstrap=50, confidence=0.95
)
CFG = FaithfulnessConfig(tokens_per_seq=2, n_logits=3)


def large_weights(directory: Path) -> Target:
    """Four layers, with MLPs whose part in the logits can be seen."""
    small_target(directory)
    made = load_target(TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(directory)), torch.device("cpu"))
    assert isinstance(made, ModuleTarget)
    draw = torch.Generator().manual_seed(0)
    for parameter in made.model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) / parameter.shape[-1] ** 0.5)
    return made


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return large_weights(tmp_path_factory.mktemp("target"))


def text() -> tuple[TokenBatch, Tensor]:
    """Six sequences, one of them padded, each with a BOS that does not count."""
    draw = torch.Generator().manual_seed(1)
    rows = [Row(torch.randint(250, (n,), generator=draw).tolist(), True) for n in (10, 10, 7, 10, 10, 10)]
    batch = TokenBatch.of(rows, 10, pad=0)
    return batch, batch.mask & ~batch.is_bos


def measured(target: Target, **decompositions: Replacement) -> dict[str, dict[tuple[str, str], float]]:
    replacements = {name: held(name, target, each) for name, each in decompositions.items()}
    found = faithfulness(target, replacements, *text(), CFG, EVALUATION, 0)
    return {name: {(m.metric, m.site): m.value for m in rows} for name, rows in found.items()}


def config(**settings) -> DecompositionConfig:
    defaults = {"architecture": Architecture.per_layer_transcoder, "reads": ["mlp_in"], "writes": ["mlp_out"]}
    sizes = {"n_features": 2 * D_MLP, "activation": Activation.topk, "k": 4}
    return DecompositionConfig(**(defaults | sizes | settings))


@pytest.mark.parametrize("encoder", [{}, GLU], ids=["linear", "glu"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", ["per_layer_transcoder", "cross_layer_transcoder", "molt"])
def test_a_dictionary_held_at_its_own_active_features_is_the_dictionary(architecture, activation, encoder):
    if architecture == "molt" and (activation == "gated" or encoder):
        pytest.skip("refused in the settings")
    extra = {"ranks": [[1, 4], [2, 2]]} if architecture == "molt" else {"skip": True}
    made = settled(architecture=Architecture[architecture], **ACTIVATIONS[activation], **extra, **encoder)
    x = inputs(made)
    y_hat, codes = made(x)
    copied, activation = hold(made)
    activation.masks = [mask.double() for mask in masks_of(codes)]
    torch.testing.assert_close(copied(x)[0], y_hat)
    assert all(0 < mask.mean() < 1 for mask in activation.masks), "some are active, and not all"


def test_the_jacobian_at_held_features_is_decoder_by_mask_by_encoder_and_that_of_a_small_step():
    made = settled(architecture=Architecture.transcoder, layers=[1], skip=True, **ACTIVATIONS["topk"])
    x = inputs(made, 5)
    copied, activation = hold(made)
    activation.masks = [mask.double() for mask in masks_of(made(x)[1])]
    J = by_token(lambda rows: copied(rows)[0], x)
    bank, eps = made.banks[0], 1e-7
    by_hand = torch.stack([bank.W_dec.T @ mask.diag() @ bank.W_enc for mask in activation.masks[0]]) + bank.W_skip.T
    steps = [(made(x + eps * e)[0] - made(x - eps * e)[0]) / (2 * eps) for e in torch.eye(x.shape[1]).double()]
    torch.testing.assert_close(J, by_hand)
    torch.testing.assert_close(J, torch.stack(steps, 2), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_transcoder_of_linear_mlps_that_is_perfect_has_cosine_1_and_error_0(tmp_path):
    """Without its activation function an MLP is W_down W_fc; half of the features read +W_fc, half -W_fc, and all that are positive are active."""
    target = large_weights(tmp_path)
    blocks = target.model.h
    for block in blocks:
        block.mlp.gelu = torch.nn.Identity()
    perfect = build_dictionary(config(activation=Activation.relu, k=None), target.shape, 0, target.device, "t").eval()
    for bank, block in zip(perfect.banks, blocks, strict=True):
        read, write = block.mlp.c_fc.weight, block.mlp.down_proj.weight.T
        bank.encoder.W_enc.copy_(torch.cat([read, -read]))
        bank.W_dec.copy_(torch.cat([write, -write]))
    rows = measured(target, perfect=perfect)["perfect"]
    for scope, site in (("local", "all"), ("local", "L2"), ("end_to_end", "all")):
        assert rows[f"jacobian_cosine_{scope}", site] == pytest.approx(1, abs=1e-5)
        assert rows[f"jacobian_error_{scope}", site] == pytest.approx(0, abs=1e-4)
        assert rows[f"jacobian_cosine_{scope}_random", site] < 0.95, "other features are another function"
    assert rows["jacobian_cosine_end_to_end_zero", "all"] < 0.95
    assert rows["l0_local", "all"] == D_MLP


def test_all_neurons_have_cosine_1_and_the_largest_are_better_than_random_ones(target):
    found = measured(
        target, all=NeuronBaseline(target, LAYERS, [D_MLP] * 4), few=NeuronBaseline(target, LAYERS, [8] * 4)
    )
    for scope in ("local", "end_to_end"):
        assert found["all"][f"jacobian_cosine_{scope}", "all"] == pytest.approx(1, abs=1e-5)
        assert found["all"][f"jacobian_error_{scope}", "all"] == pytest.approx(0, abs=1e-4)
        assert found["few"][f"jacobian_cosine_{scope}", "all"] < 0.99
        assert found["few"][f"l0_{scope}", "all"] == 8
    few, drawn = (found["few"][f"jacobian_cosine_local{end}", "all"] for end in ("", "_random"))
    assert drawn + 0.1 < few


def test_random_neurons_of_a_planted_mlp_know_nothing_of_it():
    """Rules are independent there, and those that have nothing to do have derivative 0: the active neurons are all of it."""
    settings = planted_settings(plan=Plan.chain, n_layers=2)
    target = PlantedTarget("planted", settings, CPU, torch.float32)
    rows = measured(target, neurons=NeuronBaseline(target, (0, 1), [12, 12]))["neurons"]
    assert rows["l0_local", "all"] < 6
    assert rows["jacobian_cosine_local", "all"] == pytest.approx(1, abs=1e-5)
    assert rows["jacobian_error_local", "all"] == pytest.approx(0, abs=1e-4)
    assert rows["jacobian_cosine_local_random", "all"] < 0.5
    assert rows["jacobian_cosine_end_to_end_random", "all"] < rows["jacobian_cosine_end_to_end", "all"]


def test_an_sae_is_differentiated_through_the_mlp_that_it_reads(target):
    """With W_enc = W_dec = I and -I a relu SAE is the identity, so what stands behind the MLP is the MLP."""
    settings = {
        "architecture": Architecture.per_layer_sae,
        "reads": ["mlp_out"],
        "activation": Activation.relu,
        "k": None,
    }
    sae = build_dictionary(config(n_features=2 * D, **settings), target.shape, 0, target.device, "t").eval()
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    with torch.no_grad():
        for bank in sae.banks:
            bank.encoder.W_enc.copy_(both)
            bank.W_dec.copy_(both)
    rows = measured(target, sae=sae)["sae"]
    for scope in ("local", "end_to_end"):
        assert rows[f"jacobian_cosine_{scope}", "all"] == pytest.approx(1, abs=1e-5)
        assert rows[f"jacobian_cosine_{scope}_random", "all"] < 0.95


def test_a_cross_layer_transcoder_that_writes_later_layers_alone_has_no_local_jacobian(target):
    """But through the model it has one: the first layer's features write to the second."""
    clt = build_dictionary(config(architecture=Architecture.cross_layer_transcoder), target.shape, 0, CPU, "t").eval()
    with torch.no_grad():
        for bank in clt.banks:
            bank.encoder.W_enc.normal_()
            bank.W_dec.normal_()
            bank.W_dec[:, :D] = 0
    rows = measured(target, clt=clt)["clt"]
    assert rows["jacobian_cosine_local", "all"] == 0 and rows["jacobian_error_local", "all"] == 1
    assert rows["jacobian_cosine_end_to_end", "all"] != rows["jacobian_cosine_end_to_end_zero", "all"]


@torch.no_grad()
def components(target: Target, important: float) -> GatedParameters:
    """Every input coordinate of a map is a component, so that all of them are the map; a share of them is important everywhere."""
    sizes = {"h.*.mlp.c_fc": D, "h.*.mlp.down_proj": D_MLP}
    made = decomposed(target.module(), sizes)
    for (linear, C), own in zip(made.sizes.items(), made.components.values(), strict=True):
        own.V.copy_(torch.eye(C))
        own.U.copy_(linear.matrix())
    for function in made.importance.functions:
        for parameter in function.parameters():
            parameter.zero_()
        last = function.b[-1]
        last[: round(important * len(last))] = 1
    return GatedParameters(made, target, Gate(GateKind.importance))


def test_all_components_have_cosine_1_and_half_of_them_less_unless_masks_are_drawn_between(target):
    found = measured(target, all=components(target, 1.0), half=components(target, 0.5))
    for scope in ("local", "end_to_end"):
        assert found["all"][f"jacobian_cosine_{scope}", "all"] == pytest.approx(1, abs=1e-5)
        assert found["all"][f"jacobian_error_{scope}", "all"] == pytest.approx(0, abs=1e-4)
        assert found["half"][f"l0_{scope}", "all"] == (D + D_MLP) / 4
        half, drawn = (found["half"][f"jacobian_cosine_{scope}{end}", "all"] for end in ("", "_stochastic"))
        assert half < 0.9 and half + 0.05 < drawn < 0.99, "masks of what is not important are 1/2 on average, not 0"


def test_the_jacobian_of_the_logits_says_what_a_small_step_of_the_stream_does(target):
    """Of the target, and of the target with its largest neurons held: along a random direction at the positions up to the last."""
    batch, keep = text()
    (place,) = places(batch, keep, 1, 6, CPU, 0)
    neurons = held("neurons", target, NeuronBaseline(target, LAYERS, [8] * 4))
    stream, eps = Site(0, Point.resid_pre), 1e-2
    x = target.record(place.tokens, [stream])[stream]
    step = eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    top = last_logits(target, place).topk(3).indices

    def moved(by: Tensor) -> Tensor:
        with target.patch({stream: lambda value: value + by}):
            return last_logits(target, place).gather(1, top)

    with torch.no_grad():
        for installed in (target.patch({}), neurons.installed(place, neurons.own_masks_replaced(place))):
            with installed:
                J = logits_jacobian(target, place, stream, x, top)
                after = torch.arange(x.shape[1]) > place.at[:, None]
                assert not J.transpose(1, 2)[after].any(), "no position sees a later one"
                expected = (J * step[:, None]).sum((2, 3))
                torch.testing.assert_close(expected, (moved(step) - moved(-step)) / 2, rtol=0.03, atol=3e-3)


def test_random_active_sets_have_as_many_units_of_those_that_live():
    draw = torch.Generator().manual_seed(0)
    mask = (torch.rand(200, 12, generator=draw) < 0.3).float()
    mask[:, 9:] = 0
    (drawn,) = random_masks([mask], [mask.any(0)], draw)
    assert torch.equal(drawn.sum(1), mask.sum(1)) and not drawn[:, 9:].any()
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and not torch.equal(drawn, mask)
    assert (drawn.mean(0)[:9] - mask.mean(0)[:9].mean()).abs().max() < 0.12, "evenly"


def test_places_are_kept_positions_each_drawn_once():
    batch, keep = text()
    found = list(places(batch, keep, 3, 4, CPU, 0))
    assert [len(place.tokens) for place in found] == [4, 2]
    for place in found:
        assert keep[place.seqs, place.at].all(), "logits are of positions that count"
        assert place.sampled_seqs.bincount()[place.seqs].tolist() == [3] * len(place.seqs)
        assert len(place.sampled.unique()) == len(place.sampled)
    with pytest.raises(SettingError, match="tokens_per_seq=7 is more than the 6 tokens"):
        list(places(batch, keep, 7, 4, CPU, 0))


def test_cosine_and_relative_error_by_hand():
    J = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    other = torch.tensor([[[0.0, 0.0], [0.0, 4.0]]])
    assert cosine(J, other).tolist() == [0.8] and relative_error(J, other).tolist() == [0.6]
    assert cosine(J, 0 * J).tolist() == [0.0] and relative_error(J, 2 * J).tolist() == [1.0]


def test_what_does_not_replace_mlps_is_refused(target):
    reads = {"architecture": Architecture.sae, "reads": ["L1.resid_post"], "writes": ["L1.resid_post"]}
    sae = build_dictionary(config(**reads), target.shape, 0, CPU, "t").eval()
    with pytest.raises(SettingError, match="sae reads or writes L1.resid_post, so it does not replace the MLPs"):
        held("sae", target, sae)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["faithfulness.n_logits=999"], "faithfulness.n_logits=999 is more than the target's"),
        (
            [
                "+compare.variants.pursuit={architecture: sae, activation: matching_pursuit, reads: [L1.mlp_out], writes: [L1.mlp_out]}"
            ],
            "finds codes step by step",
        ),
        (
            ["+compare.variants.oracle={architecture: neurons, reads: [mlp_hidden], ranking: attribution}"],
            "of oracle_k16 is known only",
        ),
        (["+compare.variants.attention={reads: [attn_in]}"], "attention_k16 reads or writes L0.attn_in"),
    ],
)
def test_what_could_not_be_compared_is_refused_before_it_is_trained(target, more, sentence):
    cfg = compose("exp_008_jacobian_faithfulness", ["+scale=smoke", *more])
    with pytest.raises(SettingError, match=sentence):
        build.check_faithful(cfg, target)
