"""The evaluation with real models and real dictionaries: perfect ones by construction, and random ones against loops."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from evaluation_parts import text
from torch import Tensor

from nndecomp.config.schema import (
    Activation,
    Architecture,
    DecompositionConfig,
    EvaluationConfig,
    Inputs,
    Patched,
    Reconstruction,
    Scope,
)
from nndecomp.decompositions.base import Decomposition
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.decompositions.spec import ActivationSpec, DictionarySpec, GroupSpec
from nndecomp.evaluation import Measurement, evaluate, evaluate_all
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget
from nndecomp.types import Layout, Point, Site

D, D_MLP, N_LAYERS = 8, 16, 3
INS = tuple(Site(layer, Point.mlp_in) for layer in range(N_LAYERS))
OUTS = tuple(Site(layer, Point.mlp_out) for layer in range(N_LAYERS))
CFG = EvaluationConfig(n_seqs=6, batch_seqs=4, inputs=list(Inputs), patched=list(Patched), bootstrap=100)


@pytest.fixture
def target() -> LlamaSimpleMLPTarget:
    """Its MLPs are linear maps: neurons come in pairs with opposite weights, and gelu(z) - gelu(-z) = z."""
    sizes = dict(n_layers=N_LAYERS, d_model=D, d_mlp=D_MLP, n_heads=2, n_kv_heads=1, n_ctx=16, n_vocab=17)
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(**sizes), torch.Generator().manual_seed(0)).eval()
    draw = torch.Generator().manual_seed(1)
    model.wte.weight.data.normal_(generator=draw)
    for block in model.h:
        for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj, block.attn.o_proj):
            linear.weight.data.normal_(generator=draw).div_(D**0.5)
        half = torch.randn(D_MLP // 2, D, generator=draw) / D**0.5
        block.mlp.c_fc.weight.data = torch.cat([half, -half])
        half = torch.randn(D, D_MLP // 2, generator=draw) / D**0.5
        block.mlp.down_proj.weight.data = torch.cat([half, -half], dim=1)
    return LlamaSimpleMLPTarget("toy", model, None)


def dictionary(groups: Sequence[GroupSpec], activation: ActivationSpec, skip: bool = False) -> SparseDictionary:
    widths = {site: D for group in groups for site in (*group.reads, *group.writes)}
    return SparseDictionary(DictionarySpec("test", "toy", widths, tuple(groups), activation, skip=skip)).eval()


RELU = ActivationSpec(Activation.relu)


@torch.no_grad()
def perfect(target: LlamaSimpleMLPTarget, wiring: str, skip: bool) -> SparseDictionary:
    """Either the linear skip is the MLP and no feature ever fires, or paired ReLU features are: z = relu(z) - relu(-z)."""
    groups = [
        GroupSpec(f"L{i}", (INS[i],), OUTS[i : i + 1] if wiring == "per_layer" else OUTS[i:], D_MLP)
        for i in range(N_LAYERS)
    ]
    whole = dictionary(groups, RELU, skip)
    for i, bank in enumerate(whole.banks):
        mlp = target.model.h[i].mlp
        if skip:
            bank.b_enc.fill_(-1.0)
            half = D_MLP // 2
            bank.W_skip[:, :D] = (mlp.down_proj.weight[:, :half] @ mlp.c_fc.weight[:half]).T
        else:
            bank.W_enc.copy_(mlp.c_fc.weight)
            bank.W_dec[:, :D] = mlp.down_proj.weight.T
    return whole


def randomly_filled(whole: SparseDictionary) -> SparseDictionary:
    draw = torch.Generator().manual_seed(3)
    for parameter in whole.parameters():
        parameter.data.normal_(generator=draw).div_(D**0.5)
    return whole


def means_of(target: LlamaSimpleMLPTarget) -> dict[Site, Tensor]:
    heldout, keep = text()
    return {site: value[keep].mean(0) for site, value in target.record(heldout.tokens, OUTS).items()}


def measure(target: LlamaSimpleMLPTarget, *parts: Decomposition, cfg: EvaluationConfig = CFG) -> list[Measurement]:
    heldout, keep = text()
    return evaluate(target, parts, heldout, keep, means_of(target), cfg, seed=0)


def value(rows: list[Measurement], metric: str, inputs: str, patched: str = "all", site: str = "all") -> float:
    found = [r.value for r in rows if (r.metric, r.inputs, r.patched, r.site) == (metric, inputs, patched, site)]
    assert len(found) == 1, f"{len(found)} rows for {metric} {inputs} {patched} {site}"
    return found[0]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("wiring", ["per_layer", "cross_layer"])
def test_a_perfect_transcoder_costs_nothing_in_every_mode_with_and_without_skip(target, wiring, skip):
    rows = measure(target, perfect(target, wiring, skip))
    replaced = [row for row in rows if row.inputs in ("clean", "live")]
    assert max(abs(row.value) for row in replaced if row.metric == "ce_increase") < 1e-5
    assert max(row.value for row in replaced if row.metric == "fvu") < 1e-10
    assert value(rows, "kl_zero", "none") > 0.1
    expected_l0 = 0 if skip else D_MLP / 2  # of each pair one fires
    assert value(rows, "active_per_module", "live") == pytest.approx(expected_l0)


def test_all_neurons_are_the_model_and_no_decoder_is_zero_ablation(target):
    rows = measure(target, NeuronBaseline(target, range(N_LAYERS), [D_MLP] * N_LAYERS))
    for inputs in ("clean", "live"):
        assert abs(value(rows, "ce_increase", inputs)) < 1e-6
        assert value(rows, "fvu", inputs, "all" if inputs == "live" else "none") < 1e-10
    nothing = perfect(target, "cross_layer", skip=False)
    for bank in nothing.banks:
        bank.W_dec.data.zero_()
    rows = measure(target, nothing)
    for inputs in ("clean", "live"):
        assert value(rows, "ce_replaced", inputs) == value(rows, "ce_zero", "none")


def test_one_site_alone_is_the_same_clean_and_live_and_several_are_not(target):
    groups = [GroupSpec(f"L{i}", (INS[i],), OUTS[i:], 12) for i in range(N_LAYERS)]
    rows = measure(target, randomly_filled(dictionary(groups, ActivationSpec(Activation.topk, k=(2,) * N_LAYERS))))
    for site in OUTS:
        clean, live = (value(rows, "ce_replaced", inputs, "single", str(site)) for inputs in ("clean", "live"))
        assert clean == pytest.approx(live, rel=1e-6)
    assert abs(value(rows, "ce_replaced", "clean") - value(rows, "ce_replaced", "live")) > 1e-3
    assert value(rows, "active_per_reconstruction", "live") <= 2 * (1 + 2 + 3) / 3
    assert value(rows, "active_per_reconstruction", "live") > 1


def test_live_replacement_is_the_model_with_other_mlps(target):
    """A stack of transcoders, live, everywhere: the same as a model whose MLP modules are the transcoders."""
    groups = [GroupSpec(f"L{i}", (INS[i],), (OUTS[i],), 12) for i in range(N_LAYERS)]
    stack = randomly_filled(dictionary(groups, RELU))
    heldout, _ = text()
    everywhere = torch.ones_like(heldout.mask)
    rows = evaluate(target, [stack], heldout, everywhere, means_of(target), CFG, seed=0)
    for i, (block, bank) in enumerate(zip(target.model.h, stack.banks, strict=True)):
        bias = stack.b_dec[stack.write_layout.spans[OUTS[i]]]
        block.mlp.forward = lambda x, bank=bank, b=bias: (x @ bank.W_enc.T + bank.b_enc).relu() @ bank.W_dec + b
    log_q = target.logits(heldout.tokens).log_softmax(-1)
    next_real = heldout.mask[:, 1:]
    ce = -log_q[:, :-1].gather(-1, heldout.tokens[:, 1:, None])[..., 0][next_real].mean()
    assert value(rows, "ce_replaced", "live") == pytest.approx(ce.item(), rel=1e-5)


def test_saes_read_and_write_one_site_live(target):
    """An SAE after each MLP: exact for paired features, and its own error alone at the first site."""
    groups = [GroupSpec(f"L{i}", (OUTS[i],), (OUTS[i],), 2 * D) for i in range(N_LAYERS)]
    saes = dictionary(groups, RELU)
    eye = torch.cat([torch.eye(D), -torch.eye(D)])
    for bank in saes.banks:
        bank.W_enc.data.copy_(eye)
        bank.W_dec.data.copy_(eye)
    rows = measure(target, saes)
    assert [value(rows, "ce_increase", inputs) for inputs in ("clean", "live")] == [0, 0]
    saes.b_dec.data += 0.3
    rows = measure(target, saes)
    first = str(OUTS[0])
    assert value(rows, "mse", "live", "all", first) == pytest.approx(0.09, rel=1e-4)
    assert value(rows, "kl", "live") > 1e-4


def test_selection_over_all_groups_cannot_run_live_and_says_so(target):
    groups = [GroupSpec(f"L{i}", (INS[i],), (OUTS[i],), 12) for i in range(N_LAYERS)]
    together = dictionary(groups, ActivationSpec(Activation.topk, Scope.all, (2,) * N_LAYERS))
    rows = measure(target, randomly_filled(together))
    assert [row.metric for row in rows if row.inputs == "live"] == ["live_obstacle"]
    assert value(rows, "active_per_module", "clean", "none") <= 2


def test_batchtopk_is_measured_the_same_in_batches_of_any_size_and_not_without_a_threshold(target):
    groups = [GroupSpec(f"L{i}", (INS[i],), (OUTS[i],), 12) for i in range(N_LAYERS)]
    whole = randomly_filled(dictionary(groups, ActivationSpec(Activation.batchtopk, k=(2,) * N_LAYERS)))
    with pytest.raises(ValueError, match="no inference threshold"):
        measure(target, whole)
    whole.activation.threshold.fill_(0.5)
    one_by_one = measure(target, whole, cfg=replace(CFG, batch_seqs=1))
    for a, b in zip(measure(target, whole), one_by_one, strict=True):
        assert a.metric == b.metric and a.value == pytest.approx(b.value, rel=1e-5, abs=1e-6)


def test_training_and_evaluation_agree_on_the_reconstruction_of_the_same_rows(target):
    groups = [GroupSpec(f"L{i}", (INS[i],), OUTS[i:], 12) for i in range(N_LAYERS)]
    whole = randomly_filled(dictionary(groups, ActivationSpec(Activation.topk, k=(2,) * N_LAYERS)))
    settings = DecompositionConfig(
        architecture=Architecture.cross_layer_transcoder, reads=["mlp_in"], writes=["mlp_out"], n_features=12,
        activation=Activation.topk, k=2, reconstruction=Reconstruction.mean_of_squares, aux_coefficient=0.0,
    )  # fmt: skip
    layout = Layout.of(dict.fromkeys((*INS, *OUTS), D))
    scales = {site: 0.5 + i for i, site in enumerate(layout.sites)}
    objective = DictionaryObjective(whole, settings, layout, scales).eval()
    heldout, keep = text()
    recorded = target.record(heldout.tokens, layout.sites)
    loss, metrics = objective.loss(torch.cat([recorded[site][keep] for site in layout.sites], dim=1), progress=1.0)
    rows = measure(target, objective.finished())
    in_scale = [value(rows, "mse", "clean", "none", str(site)) / scales[site] ** 2 for site in OUTS]
    assert loss.item() == pytest.approx(sum(in_scale) / N_LAYERS, rel=1e-4)


def test_groups_of_the_same_name_are_told_apart(target):
    parts = [dictionary([GroupSpec("same", (INS[i],), (OUTS[i],), 12)], RELU) for i in range(2)]
    rows = measure(target, *parts)
    assert {row.site for row in rows if row.metric == "l0"} == {"same#0", "same#1"}


def test_several_methods_measured_together_share_their_references(target):
    heldout, keep = text()
    parts = {
        "neurons": [NeuronBaseline(target, range(N_LAYERS), [4] * N_LAYERS)],
        "transcoders": [perfect(target, "per_layer", False)],
    }
    passes = 0
    logits = target.logits

    def counted(tokens: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return logits(tokens)

    target.logits = counted
    cfg = EvaluationConfig(n_seqs=6, batch_seqs=6, inputs=list(Inputs), patched=[Patched.all], bootstrap=10)
    found = evaluate_all(target, parts, heldout, keep, means_of(target), cfg, seed=0)
    assert passes == 1 + 2 + 2 * len(parts)  # clean, zero and mean, then clean and live of each
    zero = {name: value(rows, "ce_zero", "none") for name, rows in found.items()}
    assert len(set(zero.values())) == 1


@pytest.mark.parametrize("kind", ["per_layer", "cross_layer", "neurons", "one_layer", "saes"])
def test_what_stands_before_the_first_replaced_layer_is_computed_once_and_changes_no_bit(target, kind):
    def made(reads: Sequence[Site], cross: bool, layers: Sequence[int] = range(N_LAYERS)) -> SparseDictionary:
        groups = [GroupSpec(f"L{i}", (reads[i],), OUTS[i:] if cross else (OUTS[i],), 12) for i in layers]
        return randomly_filled(dictionary(groups, ActivationSpec(Activation.topk, k=(2,) * len(groups))))

    part = {
        "per_layer": lambda: made(INS, False),
        "cross_layer": lambda: made(INS, True),
        "neurons": lambda: NeuronBaseline(target, range(N_LAYERS), [4] * N_LAYERS),
        "one_layer": lambda: made(INS, False, [2]),
        "saes": lambda: made(OUTS, False),
    }[kind]()
    computed = 0

    def count(block: torch.nn.Module) -> None:
        forward = block.mlp.forward

        def counted(x: Tensor) -> Tensor:
            nonlocal computed
            computed += 1
            return forward(x)

        block.mlp.forward = counted

    for block in target.model.h:
        count(block)
    cfg = replace(CFG, batch_seqs=6)
    means = means_of(target)
    found = {}
    for late in (True, False):
        target.begins_late, computed = late, 0
        heldout, keep = text()
        rows = evaluate(target, [part], heldout, keep, means, cfg, seed=0)
        found[late] = rows, computed
    assert found[True][0] == found[False][0]
    # Clean, then zero, mean, clean and live of each set: 0, 1, 2, 01 and 012, or of 2 alone.
    n_sets, saved = (1, 2) if kind == "one_layer" else (5, 1 + 2)
    assert found[False][1] == N_LAYERS * (1 + 4 * n_sets)
    assert found[True][1] == found[False][1] - 4 * saved
