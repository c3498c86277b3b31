"""Sweeps through a real queue, on a cluster of two virtual nodes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from slurm.cluster import Cluster, cluster, missing, wait_until

from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, save
from nndecomp.tokens.tokenizer import train_tokenizer

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if missing() and "NNDECOMP_REQUIRE_SLURM" not in os.environ:
        pytest.skip(f"SLURM is not installed: no {', '.join(missing())}")
    with cluster(nodes=2) as up:
        yield up


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaSimpleMLP of random weights."""
    directory = tmp_path_factory.mktemp("target")
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 50, vocab_size=270, n_ctx=64)
    sizes = LlamaSimpleMLPConfig(n_layers=2, d_model=32, d_mlp=64, n_heads=2, n_kv_heads=2, n_ctx=64, n_vocab=270)
    save(LlamaSimpleMLP(sizes, torch.Generator().manual_seed(0)), tokenizer, directory)
    return directory


def command(target: Path, *overrides: str) -> list[str]:
    program = str(REPO / "experiments/exp_001_train_transcoder_pile/run.py")
    small = ["+scale=smoke", "tokens=stdlib", f"target.path={target}", "allow_dirty=true"]
    return [sys.executable, program, *small, *overrides]


def through_the_queue(sweep: Path, *overrides: str) -> list[str]:
    small = ["hydra.launcher.mem_gb=2", "hydra.launcher.cpus_per_task=1"]
    return ["hydra.mode=MULTIRUN", "hydra/launcher=slurm", f"hydra.sweep.dir={sweep}", *small, *overrides]


def weights(run: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(run.glob("decompositions/*/model.safetensors"))}


def said_by(sweep: Path) -> str:
    """What the jobs of a sweep wrote, for the message of a failing test."""
    return "\n".join(path.read_text()[-3000:] for path in sorted(sweep.glob(".submitit/**/*.err")))


def test_a_sweep_runs_through_the_queue_and_leaves_finished_runs(slurm: Cluster, target: Path, tmp_path: Path):
    sweep = tmp_path / "sweep"
    done = subprocess.run(
        command(target, *through_the_queue(sweep, "decomposition.k=2,4")), env=slurm.env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{said_by(sweep)}"
    runs = sorted(path.parent for path in sweep.glob("*/scores.json"))
    assert len(runs) == 2, f"{len(runs)} finished runs below {sweep}"
    assert weights(runs[0]).keys() == weights(runs[1]).keys() != set()
    completed = "JobState=COMPLETED"
    wait_until(lambda: slurm.run("scontrol", "show", "job").count(completed) == 2, 30, "SLURM has seen both jobs end")


def test_a_preempted_job_goes_on_and_ends_as_one_never_stopped(
    slurm: Cluster, target: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    long = ["decomposition.k=4", "training.n_tokens=256_000", "training.checkpoint_every=50"]
    calm, sweep = tmp_path / "calm", tmp_path / "sweep"
    preemptible = through_the_queue(sweep, "hydra.launcher.partition=preempt", *long)
    with (tmp_path / "launch.log").open("w") as log:
        launch = subprocess.Popen(command(target, *preemptible), env=slurm.env, stdout=log, stderr=log)
        request.addfinalizer(launch.wait)
        request.addfinalizer(launch.kill)

    wait_until(lambda: any(sweep.glob("*/checkpoint/step_*/state.json")), 300, f"a checkpoint\n{said_by(sweep)}")
    (number,) = slurm.jobs()
    slurm.run("sbatch", "--partition=main", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    def requeued() -> bool:
        assert not list(sweep.glob("*/scores.json")), "the job had ended before it was preempted: train for longer"
        return "Restarts=1" in slurm.run("scontrol", "-o", "show", "job", number)

    wait_until(requeued, 60, f"the job is requeued: {slurm.run('scontrol', '-o', 'show', 'job', number)}")
    # Logged before the checkpoint that the job left, with its timings: a job that started from nothing has others.
    *_, checkpoint = sorted(sweep.glob("*/checkpoint/step_*/state.json"))
    metrics = checkpoint.parents[2] / "metrics.jsonl"
    kept = metrics.read_bytes()[: json.loads(checkpoint.read_text())["log_bytes"]]
    assert kept

    subprocess.run(command(target, f"hydra.run.dir={calm}", *long), env=slurm.env, check=True, capture_output=True)
    assert launch.wait(timeout=600) == 0, f"{(tmp_path / 'launch.log').read_text()[-3000:]}\n{said_by(sweep)}"
    (scores,) = sweep.glob("*/scores.json")
    assert scores.read_text() == (calm / "scores.json").read_text()
    assert metrics.read_bytes().startswith(kept), "the job started from nothing"
    assert weights(scores.parent) == weights(calm), "the preempted run ended with other weights"
