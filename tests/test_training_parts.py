"""Learning rates, norms, windows of metrics, the log, the progress line."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from training_parts import QUIET, training

from nndecomp.config.schema import LogConfig, LrSchedule, Wandb
from nndecomp.errors import SettingError
from nndecomp.training.log import Log, check_log, flat
from nndecomp.training.optimisers import clip_gradients, gradient_norms
from nndecomp.training.progress import Clock, Progress, duration
from nndecomp.training.randomness import Lanes, random_state, random_state_kept, set_random_state
from nndecomp.training.schedules import learning_rate
from nndecomp.training.window import NonFiniteError, Window, check_parameters


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"lr_warmup": 0.4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"lr_schedule": "linear", "lr_decay": 0.5}, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"lr_schedule": "linear", "lr_decay": 0.0}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (
            {"lr_schedule": "linear", "lr_decay": 0.5, "lr_end": 0.5, "lr_warmup": 0.2},
            [0.5, 1, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6],
        ),
        (
            {"lr_schedule": "cosine", "lr_warmup": 0.2},
            [0.5, 1, 1, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(1, 8))],
        ),
    ],
)
def test_the_learning_rate_follows_its_table(changes: dict, expected: list[float]):
    if "lr_schedule" in changes:
        changes = {**changes, "lr_schedule": LrSchedule[changes["lr_schedule"]]}
    cfg = training(10, **{"lr": 2.0, **changes})
    rates = [learning_rate(step, cfg) / 2 for step in range(10)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("schedule", list(LrSchedule))
@pytest.mark.parametrize("n_steps", [1, 2, 3, 1000])
def test_no_step_has_a_learning_rate_of_zero_or_above_the_setting(schedule: LrSchedule, n_steps: int):
    cfg = training(n_steps, lr=1.0, lr_schedule=schedule, lr_warmup=0.3, lr_decay=0.7)
    assert all(0 < learning_rate(step, cfg) <= 1 for step in range(n_steps))


def test_there_is_no_learning_rate_after_the_last_step():
    with pytest.raises(AssertionError, match="step 10 is not one of 10"):
        learning_rate(10, training(10))


@pytest.mark.parametrize(("clip_norm", "scale"), [(10.0, 1.0), (5.0, 1.0), (2.5, 0.5)])
def test_clipping_bounds_the_norm_of_all_gradients_together(clip_norm: float, scale: float):
    p, q, r = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])  # norm 5; the loss did not reach r
    norms = gradient_norms([p, q, r])
    assert norms.tolist() == [3, 4, 0]
    clip_gradients([p, q, r], norms.norm(), clip_norm)
    assert p.grad.tolist() == [3 * scale, 0] and q.grad.tolist() == [0, 4 * scale] and r.grad is None


def test_clipping_leaves_gradients_of_zero_alone():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    clip_gradients([p], gradient_norms([p]).norm(), 1.0)
    assert p.grad.tolist() == [0, 0]


def test_a_window_gives_means_and_is_empty_afterwards():
    window = Window("sae", ["W", "b"])
    window.add(torch.tensor(1.0), {"l0": torch.tensor(4)}, torch.tensor([3.0, 4.0]))
    window.add(torch.tensor(2.0), {"l0": torch.tensor(8), "aux": torch.tensor(7.0)}, torch.tensor([0.0, 1.0]))
    assert window.means(2) == {"loss": 1.5, "gradient_norm": 3.0, "l0": 6.0, "aux": 7.0}
    assert window.rows == []


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("term", "sae: term 'aux' of the loss is nan at step 11"),
        ("loss", "sae: the loss is nan at step 11"),
        ("gradient", "sae: the gradient of W_dec is nan at step 11"),
    ],
)
def test_a_window_names_the_first_step_and_tensor_that_is_not_finite(where: str, says: str):
    window = Window("sae", ["W_enc", "W_dec"])
    bad, good = torch.tensor(torch.nan), torch.tensor(1.0)

    def add(aux: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> None:
        window.add(loss, {"l0": good, "aux": aux}, torch.stack([good, gradient]))

    add(good, good, good)
    add(bad if where == "term" else good, bad if where in ("term", "loss") else good, bad)
    add(bad, bad, bad)
    with pytest.raises(NonFiniteError) as error:
        window.read(12)
    assert str(error.value) == says


def test_a_window_takes_only_scalars():
    with pytest.raises(AssertionError, match=r"term l0 has shape \(2,\)"):
        Window("sae", []).add(torch.tensor(1.0), {"l0": torch.ones(2)}, torch.ones(0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_parameter_that_is_not_finite_is_named(bad: float):
    parameters = {"W": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.tensor([0.0, bad]))}
    with pytest.raises(NonFiniteError, match="sae: parameter b has norm .* after step 7"):
        check_parameters("sae", parameters, 7)


def test_random_numbers_go_on_from_a_saved_state(tmp_path: Path):
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()
    torch.save(random_state(), tmp_path / "state.pt")
    first = draw()
    draw()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first
    with random_state_kept():
        between = draw()
    assert draw() == between


def test_lanes_take_no_random_numbers_from_each_other():
    lanes = Lanes(["a", "b"])

    def draw(name: str) -> float:
        with lanes.lane(name):
            return torch.rand(()).item()

    alone = [draw("a") for _ in range(3)]
    lanes = Lanes(["a", "b"])
    torch.manual_seed(0)
    lanes = Lanes(["a", "b"])
    torch.rand(5)
    mixed = [(draw("b"), draw("b"), draw("a"))[-1] for _ in range(3)]
    assert mixed == alone


def test_the_log_is_json_lines(tmp_path: Path):
    with Log(tmp_path, QUIET) as log:
        log.write(10, {"name": "sae", "loss": 0.5})
        log.write(20, {"name": "sae", "loss": 0.25, "timing": {"tokens_per_s": 3.0}})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 10, "name": "sae", "loss": 0.5},
        {"step": 20, "name": "sae", "loss": 0.25, "timing": {"tokens_per_s": 3.0}},
    ]


def test_the_log_forgets_what_came_after_a_position(tmp_path: Path):
    with Log(tmp_path, QUIET) as log:
        log.write(1, {"x": 1})
        position = log.position()
        log.write(2, {"x": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "x"')  # a kill in the middle of a row
    with Log(tmp_path, QUIET) as log:
        log.rewind(position)
        log.write(2, {"x": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": 1}\n{"step": 2, "x": 3}\n'


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path: Path):
    with (
        Log(tmp_path, QUIET) as log,
        pytest.raises(AssertionError, match="has 0 bytes, its checkpoint was made after 9"),
    ):
        log.rewind(9)


def test_the_log_refuses_what_is_not_json(tmp_path: Path):
    with Log(tmp_path, QUIET) as log, pytest.raises(ValueError, match="JSON"):
        log.write(1, {"loss": math.nan})


def test_wandb_sees_rows_by_name():
    row = {"name": "sae", "loss": 1.0, "l0": 3, "kind": "topk", "timing": {"tokens_per_s": 2.0}}
    assert flat(row) == {"sae/loss": 1.0, "sae/l0": 3, "sae/timing/tokens_per_s": 2.0}


def test_wandb_without_a_key_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    began = time.monotonic()
    with pytest.raises(SettingError, match="log.wandb=online finds no key"):
        check_log(LogConfig(wandb=Wandb.online))
    (tmp_path / "netrc").write_text("machine elsewhere.org login user password secret\n")
    with pytest.raises(SettingError, match="log.wandb=online finds no key"):
        Log(tmp_path / "run", LogConfig(wandb=Wandb.online))
    assert time.monotonic() - began < 1
    assert not (tmp_path / "run").exists()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_log(LogConfig(wandb=Wandb.online))


def test_a_line_says_how_far_how_fast_and_how_long_still(capsys: pytest.CaptureFixture[str]):
    with Progress("sae", 1000, 200) as progress:
        progress.started -= 10  # ten seconds ago
        progress.advance(400)
        progress.show("loss 0.5")
        progress.say()
        progress.advance(400)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "sae: 60 % (600 of 1.00k tokens), 40.0 tokens/s, 10 s left, loss 0.5"
    assert last == "sae: 100 % (1.00k of 1.00k tokens), 80.0 tokens/s, loss 0.5"


def test_a_line_counts_few_things_one_by_one(capsys: pytest.CaptureFixture[str]):
    with Progress("own", 5, 0, unit="rounds") as progress:
        progress.started -= 10
        progress.advance(5)
    assert capsys.readouterr().err == "own: 100 % (5 of 5 rounds), 0.50 rounds/s\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.0, "59 s"), (61.0, "1 min 01 s"), (3599.6, "1 h 00 min"), (7260.0, "2 h 01 min")],
)
def test_a_duration_is_read_at_a_glance(seconds: float, words: str):
    assert duration(seconds) == words


def test_the_clock_tells_waiting_from_working():
    clock = Clock()
    with clock.waiting():
        time.sleep(0.03)
    time.sleep(0.01)
    clock.count(80)
    lap = clock.lap()
    assert 0.03 <= lap["seconds"] < 1 and 0.3 < lap["waiting_share"] < 0.95
    assert lap["tokens_per_s"] == pytest.approx(80 / lap["seconds"], rel=0.01)
    clock.count(1)
    assert clock.lap()["waiting_share"] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandb_offline_keeps_rows_and_goes_on_under_the_same_id(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("training: {lr: 0.5}\n")
    ids = []
    for step in (1, 2):
        with Log(tmp_path, LogConfig(wandb=Wandb.offline), name="exp/1") as log:
            log.write(step, {"name": "sae", "loss": 0.5})
            ids.append(log.wandb.id)
            assert log.wandb.config["training"] == {"lr": 0.5}
    assert ids[0] == ids[1]
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) >= 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
