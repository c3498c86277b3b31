"""What one loop promises: it fits, it is the same for one objective and for many, it stops at NaN, it looks without touching."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_parts import BATCH, N_IN, QUIET, Regression, Rows, training

from nndecomp.config.schema import DType, LrSchedule
from nndecomp.errors import SettingError
from nndecomp.training.log import Log
from nndecomp.training.loop import train
from nndecomp.training.preemption import EXIT_STATUS, Preempted
from nndecomp.training.window import NonFiniteError


def run(out: Path, objectives: dict[str, nn.Module], cfg: Any, stream: Any = None, evaluate: Any = None) -> list[dict]:
    """Trains from seed 0 and returns the rows of the log, without what depends on the machine's speed."""
    torch.manual_seed(0)
    with Log(out, QUIET) as log:
        train(objectives, stream or Rows(), cfg, out, log=log, evaluate=evaluate, description="test")
    return rows(out)


def rows(out: Path) -> list[dict]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in read]


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_a_linear_regression_reaches_its_closed_form(tmp_path: Path):
    """y = x A + 1 without noise: the minimum is A and 1."""
    model = Regression()
    run(tmp_path, {"fit": model}, training(600, lr=0.1, lr_schedule=LrSchedule.linear, lr_decay=0.5), Rows(noise=0.0))
    torch.testing.assert_close(model.W.data, Rows().A, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.b.data, torch.ones(3), atol=1e-4, rtol=0)


def test_the_loop_equals_ten_lines_of_torch(tmp_path: Path):
    model, plain = Regression(), Regression()
    cfg = training(30, clip_norm=0.5, lr_schedule=LrSchedule.cosine, lr_warmup=0.2)
    run(tmp_path, {"fit": model}, cfg)

    from nndecomp.training.schedules import learning_rate

    stream, optimiser = Rows(), torch.optim.Adam(plain.parameters(), betas=(0.9, 0.999))
    for step in range(30):
        loss, _ = plain.loss(stream.next_batch(), step / 30)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimiser.param_groups[0]["lr"] = learning_rate(step, cfg)
        optimiser.step()
    torch.testing.assert_close(model.W, plain.W)
    torch.testing.assert_close(model.b, plain.b)


def test_two_objectives_on_one_stream_equal_two_runs(tmp_path: Path):
    """Bit for bit, with random numbers drawn by both of them."""
    cfg = training(25)
    together = {"a": Regression(dropout=0.5), "b": Regression(dropout=0.1, init=1.0)}
    alone = {"a": Regression(dropout=0.5), "b": Regression(dropout=0.1, init=1.0)}
    both = run(tmp_path / "both", together, cfg)
    for name, model in alone.items():
        assert run(tmp_path / name, {name: model}, cfg) == [row for row in both if row["name"] == name]
        assert same(model, together[name])
    assert not same(together["a"], together["b"])


def test_the_log_has_one_row_an_objective_and_log_point(tmp_path: Path):
    found = run(tmp_path, {"a": Regression(), "b": Regression()}, training(25, log_every=10))
    assert [(row["step"], row["name"]) for row in found] == [(s, n) for s in (10, 20, 25) for n in "ab"]
    assert found[0].keys() == {"step", "tokens", "name", "loss", "gradient_norm", "mse", "largest", "lr"}
    assert [row["tokens"] for row in found[::2]] == [10 * BATCH, 20 * BATCH, 25 * BATCH]


def test_logged_losses_are_means_over_the_steps_since_the_last_row(tmp_path: Path):
    every = run(tmp_path / "1", {"a": Regression()}, training(20, log_every=1))
    tenth = run(tmp_path / "10", {"a": Regression()}, training(20, log_every=10))
    for key in ("loss", "mse", "gradient_norm"):
        assert tenth[1][key] == pytest.approx(sum(row[key] for row in every[10:]) / 10)


def test_progress_goes_from_0_up_to_but_not_including_1(tmp_path: Path):
    model = Regression()
    run(tmp_path, {"a": model}, training(4))
    assert model.progress == [0, 0.25, 0.5, 0.75]


def test_before_step_sees_gradients_before_they_are_clipped(tmp_path: Path):
    class Frozen(Regression):
        """Its own first row of W never moves, as its gradient is removed."""

        def before_step(self) -> None:
            assert self.W.grad is not None
            self.norm = self.W.grad.norm().item()
            self.W.grad[0] = 0

    model = Frozen(init=3.0)
    run(tmp_path, {"a": model}, training(3, clip_norm=1e-3))
    assert torch.equal(model.W[0], torch.full((3,), 3.0)) and not torch.equal(model.W[1], torch.full((3,), 3.0))
    assert model.norm > 1e-3


def test_after_step_comes_once_a_step(tmp_path: Path):
    model = Regression()
    run(tmp_path, {"a": model}, training(7))
    assert model.n_seen == 7


def test_autocast_multiplies_in_bf16_and_keeps_parameters_and_moments_in_fp32(tmp_path: Path):
    class Watching(Regression):
        def loss(self, batch: Tensor, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
            self.product = (batch[:, :N_IN] @ self.W).dtype
            return super().loss(batch, progress)

    model = Watching()
    run(tmp_path, {"a": model}, training(300, autocast=DType.bfloat16))
    assert model.product is torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = torch.load(tmp_path / "checkpoint/step_300/state.pt", weights_only=True)
    moments = state["trainees"]["a"]["optimiser"]["state"].values()
    assert {moment[key].dtype for moment in moments for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    torch.testing.assert_close(model.W.data, Rows().A, atol=0.1, rtol=0)


def test_parameters_in_half_precision_are_refused(tmp_path: Path):
    with pytest.raises(AssertionError, match="a: parameter W is torch.bfloat16"):
        run(tmp_path, {"a": Regression().bfloat16()}, training(1))


class Breaking(Regression):
    """Goes wrong at its fifth step, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def loss(self, batch: Tensor, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = super().loss(batch, progress)
        if self.n_seen == 4:
            match self.how:
                case "term":
                    terms = {**terms, "aux": loss.detach() * torch.nan}
                case "loss":
                    loss = loss * torch.inf
                case "gradient":
                    zero = (self.b - self.b).sum()
                    loss = loss + torch.sqrt(zero)  # value 0, slope infinite
        return loss, terms

    def after_step(self) -> None:
        super().after_step()
        if self.how == "parameter" and self.n_seen == 5:
            self.W.data[1, 1] = torch.nan


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("term", "bad: term 'aux' of the loss is nan at step 5"),
        ("loss", "bad: the loss is inf at step 5"),
        ("gradient", "bad: the gradient of b is nan at step 5"),
        ("parameter", "bad: parameter W has norm nan after step 5"),
    ],
)
@pytest.mark.parametrize("checkpoint_every", [1, 3, 1000])
def test_a_number_that_is_not_finite_stops_the_run_by_name_and_is_never_saved(
    tmp_path: Path, how: str, says: str, checkpoint_every: int
):
    cfg = training(20, log_every=5, checkpoint_every=checkpoint_every)
    with pytest.raises(NonFiniteError) as error:
        run(tmp_path, {"good": Regression(), "bad": Breaking(how)}, cfg)
    assert str(error.value) == says
    saved = {1: ["step_4"], 3: ["step_3"], 1000: []}[checkpoint_every]
    directory = tmp_path / "checkpoint"
    assert [entry.name for entry in directory.iterdir()] == saved if directory.exists() else saved == []
    assert rows(tmp_path) == []


def test_evaluation_leaves_no_trace_in_training(tmp_path: Path):
    cfg = training(12, evaluate_every=5)
    plain, watched = Regression(dropout=0.5), Regression(dropout=0.5)
    before = run(tmp_path / "plain", {"a": plain}, cfg)

    def evaluate(step: int) -> dict[str, float]:
        import random

        assert not watched.training and not torch.is_grad_enabled()
        loss, _ = watched.loss(Rows(1).next_batch(), 1.0)
        random.random()
        return {"loss": loss.item(), "draw": torch.rand(()).item(), "step": float(step)}

    after = run(tmp_path / "watched", {"a": watched}, cfg, evaluate=evaluate)
    assert watched.training and same(plain, watched)
    assert [row for row in after if row["name"] == "a"] == before
    looked = [row for row in after if row["name"] == "heldout"]
    assert [(row["step"], row["tokens"]) for row in looked] == [(5, 5 * BATCH), (10, 10 * BATCH), (12, 12 * BATCH)]
    torch.manual_seed(0)


def test_without_evaluate_every_held_out_metrics_come_once_at_the_end(tmp_path: Path):
    found = run(tmp_path, {"a": Regression()}, training(12), evaluate=lambda step: {"x": float(step)})
    assert [row for row in found if row["name"] == "heldout"] == [
        {"step": 12, "tokens": 12 * BATCH, "name": "heldout", "x": 12.0}
    ]


def test_a_step_never_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tensors are read by the host at log points and checkpoints only."""
    reads = []
    for method in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, method)

        def counted(self: Tensor, *args: Any, original: Any = original) -> Any:
            reads.append(self.shape)
            return original(self, *args)

        monkeypatch.setattr(Tensor, method, counted)

    def count(n_steps: int) -> int:
        reads.clear()
        run(tmp_path / str(n_steps), {"a": Regression()}, training(n_steps, log_every=1000))
        return len(reads)

    assert count(10) == count(50)


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    model = Regression()
    found = run(tmp_path, {"a": model}, training(10))
    again = Regression()
    assert run(tmp_path, {"a": again}, training(10)) == found
    assert same(model, again) and again.progress == []


def test_a_checkpoint_of_other_settings_is_refused_in_one_sentence(tmp_path: Path):
    run(tmp_path, {"a": Regression()}, training(10))
    with pytest.raises(SettingError) as error:
        run(tmp_path, {"a": Regression()}, training(10, lr=0.5))
    assert str(error.value) == (
        f"the checkpoint in {tmp_path / 'checkpoint'} was made with training.lr=0.05, not 0.5; "
        "set it back, or use another output directory"
    )
    wider = Regression()
    wider.b = nn.Parameter(torch.zeros(5))
    with pytest.raises(SettingError, match=r"objectives.a.b=\[3, 'torch.float32'\], not \[5, 'torch.float32'\]"):
        run(tmp_path, {"a": wider}, training(10))
    with pytest.raises(SettingError, match=r"objectives.b.W=absent"):
        run(tmp_path, {"a": Regression(), "b": Regression()}, training(10))


def test_when_to_write_and_look_may_change_between_two_starts(tmp_path: Path):
    run(tmp_path, {"a": Regression()}, training(10))
    run(tmp_path, {"a": Regression()}, training(10, log_every=3, checkpoint_every=2, evaluate_every=1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_the_run_and_ends_it_with_a_status_of_its_own(tmp_path: Path, number: signal.Signals):
    class Interrupted(Rows):
        def next_batch(self) -> Tensor:
            self.n = getattr(self, "n", 0) + 1
            if self.n == 7:
                os.kill(os.getpid(), number)
            return super().next_batch()

    before = signal.getsignal(number)
    whole, cut = Regression(dropout=0.5), Regression(dropout=0.5)
    found = run(tmp_path / "whole", {"a": whole}, training(25))
    with pytest.raises(Preempted, match="test was told to stop and is saved at step 7 of 25") as stop:
        run(tmp_path / "cut", {"a": cut}, training(25), Interrupted())
    assert stop.value.code == EXIT_STATUS == 75
    assert [entry.name for entry in (tmp_path / "cut/checkpoint").iterdir()] == ["step_7"]
    assert signal.getsignal(number) is before

    resumed = Regression(dropout=0.5)
    assert run(tmp_path / "cut", {"a": resumed}, training(25)) == found
    assert same(resumed, whole)


def test_a_signal_goes_on_to_whoever_listened_before(tmp_path: Path):
    """As submitit does, whose handler requeues the job and exits."""

    class Interrupted(Rows):
        def next_batch(self) -> Tensor:
            os.kill(os.getpid(), signal.SIGUSR2)
            return super().next_batch()

    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append((number, list(tmp_path.rglob("step_*")))))
    try:
        with pytest.raises(Preempted):
            run(tmp_path, {"a": Regression()}, training(5), Interrupted())
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [(signal.SIGUSR2, [tmp_path / "checkpoint/step_1"])]


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path):
    run(tmp_path, {"a": Regression()}, training(10, checkpoint_every=3))
    assert [entry.name for entry in (tmp_path / "checkpoint").iterdir()] == ["step_10"]


def test_what_a_killed_write_left_behind_is_ignored_and_removed(tmp_path: Path):
    whole = Regression()
    found = run(tmp_path / "a", {"a": whole}, training(10))
    left = tmp_path / "b/checkpoint/step_5.partial"
    left.mkdir(parents=True)
    (left / "state.pt").write_bytes(b"half of")
    model = Regression()
    assert run(tmp_path / "b", {"a": model}, training(10)) == found
    assert same(model, whole)
    assert [entry.name for entry in (tmp_path / "b/checkpoint").iterdir()] == ["step_10"]
