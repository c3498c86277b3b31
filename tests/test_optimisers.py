"""Optimisers against their formulas, and runs that are stopped and go on."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_parts import QUIET, Regression, Rows, training

from nndecomp.config.schema import Optimizer, TrainingConfig
from nndecomp.errors import SettingError
from nndecomp.training.log import Log
from nndecomp.training.loop import train
from nndecomp.training.optimisers import build_optimiser, orthogonal, set_learning_rate

SHAPES = {"W": (4, 3), "wide": (2, 5), "b": (3,), "scalar": (), "cube": (2, 3, 4)}


def parameters() -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}


def steps(made: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        for p in made.values():
            p.grad = torch.randn(p.shape, generator=draw)
        optimiser.step()


def test_one_step_of_adam_is_the_formula():
    """First step: m / (1 - beta1) = g and v / (1 - beta2) = g^2, so every entry moves by lr against the sign of g."""
    p = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimiser = build_optimiser({"p": p}, training(1, lr=0.25))
    p.grad = torch.tensor([[3.0, -0.5]])
    optimiser.step()
    torch.testing.assert_close(p.data, torch.tensor([[0.75, -1.75]]))


def test_signed_momentum_moves_every_entry_by_lr_against_the_sign_of_the_mean_gradient():
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimiser = build_optimiser({"p": p}, training(1, optimizer=Optimizer.sign, lr=0.25, betas=[0.5, 0.9]))
    for gradient in ([8.0, -0.001, 0.0], [-6.0, -0.001, 0.0]):  # momenta 4, -0.0005; then -1, -0.00075
        p.grad = torch.tensor(gradient)
        optimiser.step()
    assert p.tolist() == [1.0, 1.5, 1.0]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own since 2.9")
def test_muon_moves_matrices_as_the_one_of_torch_and_the_rest_as_adamw():
    ours, theirs = parameters(), parameters()
    cfg = training(1, optimizer=Optimizer.muon, lr=0.05, weight_decay=0.1)
    steps(ours, build_optimiser(ours, cfg), 0, 3)
    matrices = [p for p in theirs.values() if p.ndim == 2]
    rest = [
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0},
        {"params": [theirs["cube"]], "weight_decay": 0.1},
    ]
    for optimiser in (
        torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.05),
    ):
        steps(theirs, optimiser, 0, 3)
    for name, p in ours.items():
        # Theirs weighs its momentum by another constant, which the orthogonal step does not see, and computes in bf16.
        loose = {"atol": 5e-3, "rtol": 0.05} if p.ndim == 2 else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(p.data, theirs[name].data, **loose, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_the_orthogonal_step_has_singular_values_near_one(shape: tuple[int, int]):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3
    assert orthogonal(torch.zeros(shape)).abs().max() == 0


@pytest.mark.parametrize("kind", list(Optimizer))
def test_weight_decay_acts_on_matrices_only(kind: Optimizer):
    W, b, s = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), ()))
    cfg = training(1, optimizer=kind, weight_decay=0.5, lr=0.1)
    optimiser = build_optimiser({"W": W, "b": b, "s": s}, cfg)
    for p in (W, b, s):
        p.grad = torch.zeros_like(p)
    optimiser.step()
    assert torch.equal(b, torch.ones(2)) and torch.equal(s, torch.ones(()))
    decayed = 1 - 0.1 if kind is Optimizer.adam else 1 - 0.1 * 0.5  # adam: decay is a gradient, so a step of lr
    torch.testing.assert_close(W.data, torch.full((2, 2), decayed))


@pytest.mark.parametrize("kind", list(Optimizer))
def test_a_restored_optimiser_goes_on_bit_for_bit(kind: Optimizer, tmp_path: Path):
    cfg = training(1, optimizer=kind, lr=0.01, weight_decay=0.1)
    whole, cut = parameters(), parameters()
    steps(whole, build_optimiser(whole, cfg), 0, 5)
    first = build_optimiser(cut, cfg)
    steps(cut, first, 0, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = build_optimiser(cut, cfg)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(cut, second, 2, 5)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("kind", list(Optimizer))
def test_parameters_that_no_loss_reached_stay(kind: Optimizer):
    made = parameters()
    before = {name: p.detach().clone() for name, p in made.items()}
    optimiser = build_optimiser(made, training(1, optimizer=kind, weight_decay=0.1))
    made["W"].grad = torch.ones(4, 3)
    optimiser.step()
    moved = {name for name, p in made.items() if not torch.equal(p, before[name])}
    assert moved == {"W"}


@pytest.mark.parametrize("kind", list(Optimizer))
def test_betas_of_whole_number_0_are_taken(kind: Optimizer):
    """A fault of dictionary_learning's gated trainer: torch refuses betas of (0, 0.999), an int beside a float."""
    made, cfg = parameters(), training(1, optimizer=kind)
    cfg.betas = json.loads("[0, 0.999]")
    steps(made, build_optimiser(made, cfg), 0, 2)
    assert all(p.isfinite().all() for p in made.values())


def test_the_learning_rate_can_be_set_for_all_parameters_and_shares_stay_shares():
    made = parameters()
    optimiser = build_optimiser(made, training(1), {"b": 0.5})
    set_learning_rate(optimiser, 0.125)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in made.items()} == {name: 0.125 for name in SHAPES} | {"b": 0.0625}


class Own(Regression):
    """A regression with settings of its own."""

    def __init__(self, lr: float | None = None, share: float = 1.0, optimizer: Optimizer = Optimizer.adam) -> None:
        super().__init__()
        self.lr, self.share, self.optimizer = lr, share, optimizer

    def own_training(self, cfg: TrainingConfig) -> TrainingConfig:
        return replace(cfg, lr=self.lr or cfg.lr, optimizer=self.optimizer)

    def lr_shares(self) -> dict[str, float]:
        return {"b": self.share}


def run(out: Path, objectives: dict[str, Own], n_steps: int = 20, **changes: object) -> list[dict]:
    with Log(out, QUIET) as log:
        train(objectives, Rows(), training(n_steps, **changes), out, log=log, description="own")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(objective: Own) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in objective.named_parameters()}


def test_each_objective_has_its_own_optimiser_and_learning_rate_and_the_log_says_so(tmp_path: Path):
    together = {"a": Own(), "b": Own(lr=0.01, optimizer=Optimizer.sign), "c": Own(share=0.0)}
    rows = run(tmp_path / "together", together)
    assert {row["name"]: row["lr"] for row in rows} == {"a": 0.05, "b": 0.01, "c": 0.05}
    alone = Own()
    run(tmp_path / "alone", {"a": alone}, optimizer=Optimizer.sign, lr=0.01)  # its own optimiser goes first, not its lr
    other = Own()
    run(tmp_path / "other", {"b": other}, lr=0.05)
    assert all(torch.equal(weights(together["a"])[name], value) for name, value in weights(other).items())
    assert not torch.equal(weights(alone)["W"], weights(together["b"])["W"])
    assert together["c"].b.abs().max() == 0, "a parameter with no share of the learning rate moved"


def test_a_run_with_another_rate_of_its_own_does_not_go_on(tmp_path: Path):
    run(tmp_path, {"a": Own(lr=0.1)})
    with pytest.raises(SettingError, match=r"own\.a\.lr=0\.1, not 0\.2"):
        run(tmp_path, {"a": Own(lr=0.2)})
