"""Counted operations beside those of a formula, on models whose sizes can be multiplied by hand."""

from dataclasses import replace

import pytest
import torch
from decomposition_parts import objective
from experiment_parts import small_target
from spd_parts import chain, loss_term, objective_on_vectors
from torch import nn

from nndecomp import build
from nndecomp.config.compose import compose
from nndecomp.config.schema import Activation, Architecture, LrSchedule, Optimizer, RunConfig, TrainingConfig
from nndecomp.config.spd import Masks
from nndecomp.training.flops import UPDATE, TrainingFlops, count, spd_flops, step_flops

CFG = TrainingConfig(
    n_tokens=320, batch_tokens=40, optimizer=Optimizer.adam, lr=1e-3, lr_schedule=LrSchedule.constant, lr_warmup=0.0
)


def test_a_small_model_of_matrix_products_costs_two_operations_a_weight_forward_and_four_backward():
    """The first layer needs no gradient of its input: 2 n (5 7 + 7 3) forward, 2 n (5 7 + 2 * 7 3) backward."""
    model, n = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), 11
    x = torch.randn(n, 5)
    assert count(lambda: model(x)) == 2 * n * (5 * 7 + 7 * 3)
    assert count(lambda: model(x).sum().backward()) == 2 * n * (2 * 5 * 7 + 3 * 7 * 3)


def test_attention_costs_both_products_of_all_positions():
    """Scores and their mixture, 2 * 2 * heads * pos^2 * d_head forward; five such products instead of two backward."""
    q, k, v = torch.randn(3, 1, 2, 9, 4, requires_grad=True).unbind()
    run = lambda: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    one = 2 * 2 * 9 * 9 * 4
    assert count(run) == 2 * one
    assert count(lambda: run().sum().backward()) == (2 + 5) * one


@pytest.mark.parametrize("k", [1, 3])
def test_a_sparse_dictionary_costs_its_dense_encoder_and_four_sums_over_active_features(k: int):
    """T tokens, F features, d read and written: the encoder 2 T F d; decoding, its two gradients and the encoder's, 2 T k d each."""
    made = objective(architecture=Architecture.transcoder, layers=[1], k=k)
    bank, x = made.dictionary.banks[0], inputs_of(made)
    (T, F, d), n = (len(x), bank.n_features, bank.d_read), sum(p.numel() for p in made.parameters())
    assert step_flops(made, x, CFG) == (2 * T * F * d + 4 * 2 * T * k * d, UPDATE[Optimizer.adam] * n)


def test_a_dense_dictionary_costs_five_products():
    """Encoder and decoder forward, their weights' gradients, and the gradient of the codes; what is read needs none."""
    made = objective(architecture=Architecture.transcoder, layers=[1], activation=Activation.relu, k=None)
    bank, x = made.dictionary.banks[0], inputs_of(made)
    assert step_flops(made, x, CFG)[0] == 5 * 2 * len(x) * bank.n_features * bank.d_read


def inputs_of(made) -> torch.Tensor:
    return torch.randn(40, made.layout.width, generator=torch.Generator().manual_seed(0))


def test_a_parameter_decomposition_costs_its_passes_through_the_target_its_gate_and_its_components():
    """One map 3 -> 4 of 5 components, importances by an MLP 3 -> 6 -> 5, one masked run; nothing wants the gradient of x."""
    losses = {"stochastic": loss_term(Masks.stochastic)}
    made, n = objective_on_vectors(chain(3, 4), losses, maps={"0": 5}, warmup_steps=7), 40
    model, gate, product = 3 * 4, 3 * 6 + 6 * 5, 3 * 5 * 4
    components = 3 * 5 + 5 * 4
    forward = 2 * n * (model + gate + components) + 2 * product
    backward = 2 * n * (gate + 6 * 5 + components + 5 * 4) + 2 * 2 * product
    flops = spd_flops(made, torch.randn(n, 3), CFG)
    assert flops.target == 2 * model
    assert flops.objective == (forward + backward) / n
    assert flops.once == 7 * (3 * 2 * product + UPDATE[Optimizer.adamw] * components)


def test_what_has_no_formula_is_named_instead_of_passed_over():
    with pytest.raises(AssertionError, match="no formula for the cost of aten.*cdist"):
        count(lambda: torch.cdist(torch.randn(30, 2), torch.randn(30, 2), compute_mode="donot_use_mm_for_euclid_dist"))


def test_a_budget_buys_as_many_tokens_as_cost_it():
    flops = TrainingFlops(target=10.0, objective=100.0, optimiser=5.0, once=1000.0)
    assert flops.per_token == 115 and flops.of(8) == 1920 and flops.tokens(1920.0) == 8
    with pytest.raises(AssertionError, match="used up before the first step"):
        flops.tokens(900.0)


D, D_MLP, D_HEAD, SEQ_LEN = 16, 64, 8, 32


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two members on a model of 4 layers; one that reads the first layer alone."""
    path = small_target(tmp_path_factory.mktemp("flops"))
    return [
        *("+scale=smoke", f"target.path={path}", "target.kind=llama_simple_mlp", f"tokens.seq_len={SEQ_LEN}"),
        *("decomposition.activation=topk", "decomposition.k=4", "training.optimizer=adam"),
    ]


def config(settings: list[str], *more: str) -> RunConfig:
    return compose("exp_000_quickstart", [*settings, "~compare", *more])


def test_of_the_target_a_training_token_costs_the_layers_up_to_its_last_site(settings: list[str]):
    """A layer: four d x d maps, scores and mixture over all positions, and the MLP, whose output is the last layer's site."""
    layer = 2 * (4 * D * D + 2 * SEQ_LEN * D + 2 * D * D_MLP)
    for layers, n in (("[0]", 1), ("null", 4)):
        cfg = config(settings, f"decomposition.layers={layers}")
        (flops,) = build.training_flops(cfg, build.target(cfg)).values()
        assert flops.target == n * layer
        assert flops.objective == n * (2 * 64 * D + 4 * 2 * 4 * D) and flops.once == 0


def test_of_the_target_a_parameter_decomposition_costs_what_its_predictions_are_made_from(settings: list[str]):
    """The undisturbed run stops before the LM head; the rest is passes through a target that is changed."""
    own = [each for each in settings if not each.startswith("decomposition.")]
    cfg = compose("exp_023_train_spd_pile", [*own, "training.batch_tokens=64"])
    assert cfg.spd is not None
    cfg = replace(cfg, spd=replace(cfg.spd, maps={"h.0.mlp.c_fc": 6}, warmup_steps=3))
    flops = build.parameter_flops(cfg, build.target(cfg))
    assert flops.target == 4 * 2 * (4 * D * D + 2 * SEQ_LEN * D + 2 * D * D_MLP)
    assert flops.objective > 3 * flops.target, "two losses, one of them with an adversary, there and back"
    product, components = D * 6 * D_MLP, 6 * (D + D_MLP)
    assert flops.once == 3 * (3 * 2 * product + UPDATE[Optimizer.adamw] * components)


def test_end_to_end_the_target_is_passed_again_there_and_back(settings: list[str]):
    cfg = config(
        settings, "decomposition.end_to_end=kl", "decomposition.end_to_end_coefficient=1.0", "decomposition.layers=[3]"
    )
    target = build.target(cfg)
    (flops,) = build.training_flops(cfg, target).values()
    whole = 4 * 2 * (4 * D * D + 2 * SEQ_LEN * D + 2 * D * D_MLP) + 2 * D * target.shape.of(None).n_vocab
    assert flops.target == whole
    local = 2 * 64 * D + 4 * 2 * 4 * D
    head = 2 * D * target.shape.of(None).n_vocab
    # The replaced MLP is run, and what it returns is not used; the dictionary reads before the first of its writes.
    assert flops.objective == pytest.approx(2 * local + whole + head, rel=0.01)
