"""Timing training steps: who makes which step, on what, and what is made of the times."""

import copy
import json
import logging
import re
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from experiment_parts import REPO, start

from nndecomp import build
from nndecomp.build import throughput, throughput_floor, throughput_steps, throughput_systems
from nndecomp.build.throughput_harvest import cut, evenly, in_turn
from nndecomp.build.throughput_start import until_first_line
from nndecomp.build.throughput_worker import FLOOR, Worker, size_of
from nndecomp.config.compose import compose, dump
from nndecomp.config.schema import DType, RunConfig, SizeConfig
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.errors import SettingError
from nndecomp.evaluation.agreement import agreement, dense_losses
from nndecomp.evaluation.dense import DensePairs
from nndecomp.evaluation.timing import (
    Floor,
    Speed,
    Subject,
    Times,
    dense_flops,
    encoder_flops,
    middle,
    number,
    rank,
    ratio,
    sparse_flops,
)
from nndecomp.report import growth, speeds
from nndecomp.report import throughput as report
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget
from nndecomp.training.flops import count, step_flops
from nndecomp.types import Point, Site

SIZE = SizeConfig(d_model=16, n_features=64, batch_tokens=128, k=4)
CPU = torch.device("cpu")
CLT = SizeConfig(d_model=16, n_features=64, batch_tokens=128, k=4, n_layers=3)

TINY = {"n_layers": 3, "d_model": 16, "d_mlp": 32, "n_heads": 2, "n_kv_heads": 2, "n_ctx": 8, "n_vocab": 50}


@pytest.fixture(scope="module")
def cfg() -> RunConfig:
    return compose("exp_020_throughput", ["+scale=smoke", "throughput.rounds=3"])


def test_the_interval_of_a_median_covers_as_it_says():
    for n in range(6, 60):
        outside = [2 * sum(comb(n, i) for i in range(j)) / 2**n for j in (rank(n), rank(n) + 1)]
        assert outside[0] <= 0.05 < outside[1], n
    assert rank(3) == 1, "of few rounds all there is"


def test_ratios_are_taken_within_rounds():
    slow, fast = [2.0, 20.0, 200.0], [1.0, 10.0, 100.0]
    assert ratio(slow, fast).low == ratio(slow, fast).high == 2.0
    assert middle(slow).value == 20.0 and (middle(slow).low, middle(slow).high) == (2.0, 200.0)


def test_numbers_have_three_digits_and_no_powers_of_ten():
    assert [number(x) for x in (0.01234, 0.5, 1.234, 12.34, 123.4, 12345.6)] == [
        *("0.0123", "0.500", "1.23", "12.3", "123", "12,346")
    ]


def test_the_parameters_of_a_size_are_those_of_the_dictionary(cfg: RunConfig):
    for size in (SIZE, CLT):
        system = throughput_systems.systems()["nndecomp_torch_topk"]
        settings = throughput_steps.configured(cfg.decomposition, system, size)
        rows = throughput_steps.rows(size, 1, seed=0)[0]
        made = throughput_steps.objective(settings, size, rows, seed=0)
        assert sum(p.numel() for p in made.parameters()) == size.n_parameters


def test_what_a_sparse_step_needs_is_what_ours_is_counted_to_do(cfg: RunConfig):
    system = throughput_systems.systems()["nndecomp_torch_topk"]
    for size in (SIZE, CLT):
        settings = throughput_steps.configured(cfg.decomposition, system, size)
        rows = throughput_steps.rows(size, 1, seed=0)[0]
        made = throughput_steps.objective(settings, size, rows, seed=0)
        training = throughput_steps.training_config(cfg.training, system, size)
        counted, _ = step_flops(made, rows, training)
        # Beside it the gradient of the bias that centres the input: one product of a vector and W_enc.
        centre = 2 * size.n_features * size.d_model if made.dictionary.centres else 0
        assert counted == sparse_flops(size) + centre
    floor = throughput_floor.floor(SIZE, throughput_steps.rows(SIZE, 1, seed=0)[0], DType.float32)
    assert count(floor["encoder"]) == encoder_flops(SIZE)
    x, y = torch.randn(2, CLT.batch_tokens, CLT.n_layers, CLT.d_model)
    assert count(lambda: DensePairs(CLT, 1e-3).step(x, y)) == dense_flops(CLT)


def test_rows_are_the_same_in_every_process_and_of_unit_mean_square():
    one, other = (throughput_steps.rows(CLT, 2, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and not torch.equal(one[0], one[1])
    assert one[0].shape == (128, 2 * 3 * 16) and one[0].square().mean().item() == pytest.approx(1, rel=1e-5)


def test_thresholds_start_where_twice_k_features_are_active(cfg: RunConfig):
    system = throughput_systems.systems()["nndecomp_torch_jumprelu"]
    rows = throughput_steps.rows(SIZE, 1, seed=0)[0]
    settings = throughput_steps.configured(cfg.decomposition, system, SIZE)
    made = throughput_steps.objective(settings, SIZE, rows, seed=0)
    assert isinstance(made.dictionary.activation, JumpRelu)
    _, terms = made.loss(rows, 0.0)
    assert terms["l0"].item() == pytest.approx(SIZE.l0, rel=0.02) and SIZE.l0 == 8


def test_a_process_steps_reports_its_memory_and_writes_a_trace(cfg: RunConfig, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(dump(cfg))
    with closing(Worker(tmp_path / "config.yaml", "own", "nndecomp_torch_topk")) as worker:
        assert worker.read()["threads"] >= 1
        times = worker.ask("step")
        assert 0 < times["wall"]["step"] < 60 and times["cpu"]["step"] > 0
        size = size_of(cfg, "own")
        assert worker.ask("peak")["bytes"] >= 4 * size.n_parameters
        worker.ask(f"trace {tmp_path / 'trace.json'}")
        assert "embedding_bag" in (tmp_path / "trace.json").read_text()
    assert worker.process.returncode == 0


def test_a_process_that_fails_says_why(cfg: RunConfig, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(dump(cfg))
    says = pytest.raises(RuntimeError, match="(?s)the process of nobody ended:.*KeyError")
    with closing(Worker(tmp_path / "config.yaml", "own", "nobody")) as worker, says:
        worker.read()


def test_systems_that_are_not_there_are_said_once_and_refused_when_named(
    cfg: RunConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    nobody = throughput_systems.System("a-library-of-nobody", throughput_systems.Activation.topk)
    known = throughput_systems.systems() | {nobody.name: nobody}
    for module in (throughput, throughput_systems):
        monkeypatch.setattr(module, "systems", lambda: known)
    assert cfg.throughput is not None
    with caplog.at_level(logging.WARNING):
        names = throughput.chosen(cfg.throughput, CPU)
    assert "nndecomp_torch_topk" in names and nobody.name not in names
    (said,) = caplog.messages
    assert "a-library-of-nobody" in said and "cannot be imported and are left out" in said
    cfg.throughput.systems = [nobody.name]
    with pytest.raises(SettingError, match="a_library_of_nobody_topk.* need .*a-library-of-nobody"):
        throughput.chosen(cfg.throughput, CPU)
    cfg.throughput.systems = None


@pytest.mark.parametrize("systems", [["nobody_topk"], []])
def test_systems_that_nobody_knows_are_refused_before_anything_is_made(cfg: RunConfig, systems: list[str]):
    assert cfg.throughput is not None
    asked = replace(cfg, throughput=replace(cfg.throughput, systems=systems))
    with pytest.raises(
        SettingError, match="^" + re.escape(f"throughput.systems={systems} must be among nndecomp_torch_topk, ")
    ):
        build.check(asked)


def test_growth_is_the_exponent_of_the_fitted_power():
    assert growth.slope({x: [3e-3 * x**1.5] * 3 for x in (1, 2, 4, 8)}) == pytest.approx(1.5)
    subject = Subject("nndecomp", "1", "topk", "torch")
    times = [Times(subject, f"k={k}", [0.01 * k] * 2, [0.01] * 2, 1, [0.01] * 2) for k in (1, 2)]
    axes = {"k": {"k=1": 1, "k=2": 2}}
    assert growth.scores(axes, times, []) == {"slope/k/torch": pytest.approx(1)}
    assert list(growth.table(axes, times, []).slope) == ["1.00", ""]


def test_a_size_that_differs_in_one_axis_is_named_by_it(cfg: RunConfig):
    own = size_of(cfg, "own")
    assert size_of(cfg, "batch_tokens=7") == replace(own, batch_tokens=7)
    assert size_of(cfg, "n_layers=3").n_layers == 3 and size_of(cfg, "c3").n_features == 12288


def test_a_model_that_is_cut_is_the_whole_up_to_there():
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(**TINY), torch.Generator().manual_seed(0))
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(1))
    site = Site(1, Point.resid_post)
    whole = LlamaSimpleMLPTarget("whole", model, None).record(tokens, [site])[site]
    assert torch.equal(cut(model, 2).residual(tokens), whole) and len(model.h) == 3


def test_ways_of_doing_the_same_are_set_beside_the_first():
    runs = {"one": lambda: None, "other": lambda: None}
    found = in_turn("both", runs, 10, "bytes", rounds=4)
    assert [each.name for each in found] == ["one", "other"] and all(len(each.wall) == 4 for each in found)
    given = [Speed("g", "first", 10**9, "bytes", [1.0, 1.0]), Speed("g", "half", 10**9, "bytes", [2.0, 2.0])]
    table = speeds.table(given)
    assert list(table["a second"]) == ["1.00 GB", "0.50 GB"]
    assert speeds.scores(given) == {"g/half": 0.5}


def test_a_start_is_timed_until_the_first_line_and_ended_then(tmp_path: Path):
    file = tmp_path / "lines"
    write = f"import time; f = open({str(file)!r}, 'w'); f.write('half a'); f.flush(); time.sleep(0.3); f.write(' line\\n'); f.flush()"
    began = time.perf_counter()
    seconds = until_first_line([sys.executable, "-c", f"{write}; time.sleep(60)"], file)
    assert 0.3 <= seconds < 30 and time.perf_counter() - began < 30
    with pytest.raises(AssertionError, match="ended with 3, .*nothing has no line"):
        until_first_line([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "nothing")


def test_rows_drawn_evenly_come_back_only_when_all_have_been_read():
    batches = list(islice(evenly(10, 3, seed=0), 6))
    assert len(np.unique(np.concatenate(batches[:3]))) == 9 and all((np.diff(each) > 0).all() for each in batches)
    assert all((a == b).all() for a, b in zip(batches[:3], batches[3:], strict=True))


def test_sizes_that_are_not_there_are_refused():
    with pytest.raises(SettingError, match="must name sizes among own, c3, c4"):
        compose("exp_020_throughput", ["throughput.at=[c5]"])
    with pytest.raises(SettingError, match="k=99 is more than n_features=8"):
        SizeConfig(d_model=4, n_features=8, batch_tokens=4, k=99)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_the_fast_step_learns_and_selects_as_dense_products_do(cfg: RunConfig, activation: str):
    system = throughput_systems.systems()[f"nndecomp_torch_{activation}"]
    settings = throughput_steps.configured(cfg.decomposition, system, SIZE)
    batches = throughput_steps.rows(SIZE, 3, seed=0)
    training = replace(cfg.training, n_tokens=8 * SIZE.batch_tokens, batch_tokens=SIZE.batch_tokens, lr=5e-3)
    made = throughput_steps.objective(settings, SIZE, batches[0], seed=0)
    dense = dense_losses(made, batches, training), dense_losses(made, batches, training, reverse=True)
    same = agreement(copy.deepcopy(made), batches, training, dense, "synthetic", "torch")
    assert same.deviation <= max(1e-4, 2 * same.rounding) and same.rounding < 0.01
    assert same.share == 1.0 and same.n_either > 8 * 0.9 * SIZE.k * SIZE.batch_tokens
    assert same.losses[-1] < 0.95 * same.losses[0], "it learns, so there is something to agree about"
    other = throughput_steps.objective(settings, SIZE, batches[0], seed=1)
    differs = agreement(other, batches, training, dense, "synthetic", "torch").deviation
    assert differs > 0.02, f"from other weights losses are others, not within {differs}"


def floor_of(encoder: list[float], optimiser: list[float]) -> Floor:
    """Of a device that multiplies 1 TFLOP/s, copies 1 GB/s, and 4 GB/s where it is in the cache."""
    copy, cache, product = [0.2] * 2, [0.5] * 2, [2.0] * 2
    amounts = {"copied": 10**8, "cached": 10**9, "side": 10**4, "bits": 16, "on": "a GPU"}
    return Floor("own", SIZE, encoder, optimiser, copy, cache, product, **amounts)


def test_the_roofline_is_what_must_be_done_at_the_rates_that_were_measured():
    floor = floor_of([0.1, 0.1], [0.1, 0.1])
    assert (floor.product_rate, floor.copy_rate, floor.cache_rate) == (1e12, 1e9, 4e9)
    product = 2 * 128 * 16 * 64 / 1e12
    adam = 24 * (2 * 64 * 16 + 64 + 16) / 1e9
    rows = 2 * 4 * 128 * 4 * 16 / 4e9  # of 2 bytes, 4 times for each of 4 features a token
    assert floor.roofline == pytest.approx([product + adam + rows] * 2)
    times = Times(
        Subject("nndecomp", "1", "topk", "triton"), "own", [1e-3] * 2, [1e-3] * 2, 1, floor.wall, floor.roofline
    )
    share = 1e3 * (product + adam + rows)
    assert report.scores([times])["own/nndecomp_triton_topk/roofline_share"] == pytest.approx(share)
    assert list(report.table([times], [floor])["roofline / step"]) == [f"{share:.0%}"]
    (said, _) = [line for line in report.notes([times], [floor]) if "roofline" in line] + [""]
    assert "square product at 1 TFLOP/s, a copy at 0.001 TB/s, one in the cache at 0.004 TB/s" in said


def test_each_device_has_backends_of_its_own():
    known, cuda = throughput_systems.systems(), torch.device("cuda")
    ours = lambda backend: throughput_systems.System("nndecomp", throughput_systems.Activation.topk, backend)  # noqa: E731
    runs = {
        backend: (ours(backend).runs_on(CPU), ours(backend).runs_on(cuda)) for backend in ("torch", "native", "triton")
    }
    assert runs == {"torch": (True, True), "native": (True, False), "triton": (False, True)}
    assert [known["torch_topk_dense"].runs_on(each) for each in (CPU, cuda)] == [False, True]
    assert known["sae_lens_topk"].runs_on(CPU) and known["sae_lens_topk"].runs_on(cuda)


def test_systems_of_the_cpu_are_refused_on_a_gpu(cfg: RunConfig):
    assert cfg.throughput is not None
    if "nndecomp_native_topk" not in throughput_systems.systems():
        pytest.skip("no native backend here")
    asked = replace(cfg.throughput, systems=["nndecomp_native_topk"])
    with pytest.raises(SettingError, match="nndecomp_native_topk.* work on the CPU; write device=cpu"):
        throughput.chosen(asked, torch.device("cuda"))


def test_the_plain_dense_step_learns_in_either_precision_and_keeps_its_weights_in_float32(cfg: RunConfig):
    batch, last = throughput_steps.rows(SIZE, 1, seed=0)[0], []
    for precision in (DType.float32, DType.bfloat16):
        torch.manual_seed(0)
        training = replace(cfg.training, autocast=precision, lr=1e-2)
        step = throughput_steps.dense_pairs(SIZE, training, CPU)
        losses = [step(batch, number) for number in range(9)]
        assert losses[-1] < 0.9 * losses[0] and losses[0].dtype == torch.float32
        last.append(losses[-1].item())
    assert last[1] != last[0] and last[1] == pytest.approx(last[0], rel=0.02)


def test_the_table_divides_by_what_does_the_same():
    floor = floor_of([0.004, 0.004], [0.001, 0.002])
    ours = Times(Subject("nndecomp", "1", "topk", "torch"), "own", [0.010, 0.012], [0.01, 0.01], 2**20, floor.wall)
    theirs = Times(Subject("sae-lens", "2", "topk"), "own", [0.040, 0.048], [0.04, 0.04], 3 * 2**20, floor.wall)
    other = Times(Subject("sae-lens", "2", "jumprelu"), "own", [0.040, 0.048], [0.04, 0.04], 3 * 2**20, floor.wall)
    table = report.table([ours, theirs, other], [floor])
    assert list(table["times ours, torch"]) == ["-", "4.00 [4.00, 4.00]", "-"], "ours has no jumprelu here"
    assert list(table["floor / step"]) == ["50%", "12%", "12%"]
    found = report.scores([ours, theirs, other])
    assert found["own/sae-lens_topk/times_torch"] == pytest.approx(4)
    assert found["own/nndecomp_torch_topk/floor_share"] == pytest.approx(0.5)
    assert {FLOOR, *found} and len(report.raw([ours, theirs, other], [floor])) == 3 * 2 + 5 * 2


def test_growth_that_would_select_more_features_than_there_are_is_refused_before_a_process_starts(tmp_path: Path):
    for factors, most in (([0.25, 1], 16), ([1, 2], 32), ([0.125, 4], 8)):
        at = f"throughput.factors={factors}".replace(" ", "")
        settings = ["+scale=smoke", "question=growth", "throughput.layers=[]", "decomposition.n_features=64", at]
        with pytest.raises(
            SettingError, match=rf"decomposition\.k={most + 1} .* write decomposition\.k={most}, or less"
        ):
            throughput.grown_steps(compose("exp_020_throughput", [*settings, f"decomposition.k={most + 1}"]), tmp_path)
        fits = compose("exp_020_throughput", [*settings, f"decomposition.k={most}"])
        for factor in factors:
            for axis, value in (("n_features", 64), ("k", most)):
                assert size_of(fits, f"{axis}={round(factor * value)}").k <= 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "settings"),
    [
        ("clt", []),
        ("growth", ["throughput.factors=[0.5,1]", "throughput.layers=[2]", "throughput.rounds=2"]),
        ("quality", []),
        ("harvest", ["throughput.at=[own]"]),
        ("start", ["throughput.rounds=1"]),
    ],
)
def test_every_question_is_answered_at_the_smallest_scale(question: str, settings: list[str], tmp_path: Path):
    run = REPO / "experiments" / "exp_020_throughput" / "run.py"
    result = start(run, f"question={question}", "+scale=smoke", f"hydra.run.dir={tmp_path}", *settings)
    assert result.status == 0, result.err
    found = json.loads((tmp_path / "scores.json").read_text())
    if question == "quality":
        assert all(value <= 1e-4 for name, value in found.items() if name.endswith("/deviation"))
        assert all(value >= 0.9999 for name, value in found.items() if name.endswith("/agreement"))
    assert len((tmp_path / "table.md").read_text().splitlines()) > 3
