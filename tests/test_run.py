"""The harness around every experiment: what a run directory holds, when a run is refused, skipped or gone on with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from experiment_parts import REPO, script, small_target, start

from nndecomp import checkpoint, run
from nndecomp.config.compose import load
from nndecomp.config.jobs import command_line
from nndecomp.config.registry import job_directory
from nndecomp.errors import SettingError


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harness")


@pytest.fixture(scope="module")
def settings(here: Path) -> list[str]:
    """Of the quickstart, so that they fit a small random target."""
    return [f"target.path={small_target(here / 'model')}", "tokens.seq_len=32", "log.project=tests"]


# A body that says what it found in its directory when it started.
BODY = """
import torch
found = sorted(path.name for path in out.iterdir())
assert "scores.json" not in found, "scores come last"
print("started with", *found)
(out / "made").write_text("once")
return {"k": cfg.decomposition.k, "draw": torch.rand(()).item()}
"""


@pytest.fixture(scope="module")
def finished(here: Path, settings: list[str]) -> Path:
    """One run, started from elsewhere than the repository."""
    out = here / "run"
    result = start(script(here, BODY), *settings, f"hydra.run.dir={out}", "threads=1", cwd=here)
    assert result.status == 0, result.err
    return out


def test_a_run_directory_holds_what_the_result_came_from(finished: Path):
    assert load(finished / "config.yaml").decomposition.k == 16
    (came_from,) = json.loads((finished / "provenance.json").read_text())
    assert {"commit", "changed", "packages", "python"} <= came_from.keys()
    assert "threads=1" in came_from["overrides"] and "done" in (finished / "run.log").read_text()


def test_scores_are_the_last_file_written(finished: Path):
    times = {path.name: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert max(times, key=lambda name: times[name]) == "scores.json", times


def test_the_same_seed_draws_the_same_numbers(finished: Path, here: Path, settings: list[str]):
    draws = [json.loads((finished / "scores.json").read_text())["draw"]]
    sweep = start(script(here, BODY), *settings, "hydra.mode=MULTIRUN", "seed=0,1", f"hydra.sweep.dir={here / 'seeds'}")
    assert sweep.status == 0, sweep.err
    draws += [
        json.loads(
            (
                here
                / "seeds"
                / job_directory(0, f"log.project=tests,seed={seed},target.path={here / 'model'},tokens.seq_len=32")
                / "scores.json"
            ).read_text()
        )["draw"]
        for seed in (0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_finished_run_is_skipped_wherever_it_is_started_again(finished: Path, here: Path, settings: list[str]):
    before = {path: path.stat().st_mtime_ns for path in (finished / "scores.json", finished / "made")}
    again = start(script(here, BODY), *settings, f"hydra.run.dir={finished}", "device=cpu", "threads=2")
    assert again.status == 0 and "finished before, skipped" in again.out and "started with" not in again.out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_in_the_directory_of_another_is_refused_and_leaves_it_as_it_was(
    finished: Path, here: Path, settings: list[str]
):
    content = lambda: {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}  # noqa: E731
    before = content()
    other = start(script(here, BODY), *settings, f"hydra.run.dir={finished}", "decomposition.k=8")
    assert other.status == 2
    assert other.err.strip().splitlines() == [
        f"{finished} holds a run with other settings (decomposition.k: 16, 8); give this one its own directory"
    ]
    assert content() == before


def test_a_run_that_died_goes_on_in_its_directory(here: Path, settings: list[str]):
    out = here / "killed"
    where = [*settings, f"hydra.run.dir={out}"]
    died = start(script(here, "(out / 'half').touch()\nimport os\nos.kill(os.getpid(), 9)"), *where)
    assert died.status == -9 and not (out / "scores.json").exists()
    assert "half" in start(script(here, BODY), *where).out
    assert (out / "scores.json").exists()
    assert len(json.loads((out / "provenance.json").read_text())) == 2, "both starts are recorded"


def test_a_sweep_started_again_runs_only_what_is_missing(here: Path, settings: list[str]):
    sweep = [*settings, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={here / 'sweep'}"]
    fails_at_16 = script(here, "assert cfg.decomposition.k != 16, 'a fault'\n" + BODY)
    first = start(fails_at_16, *sweep, "decomposition.k=8,16")
    assert first.status == 1 and "a fault" in first.err
    second = start(script(here, BODY), *sweep, "decomposition.k=8,16,32")
    assert second.status == 0 and second.out.count("finished before, skipped") == 1
    assert {path.parent.name for path in (here / "sweep").rglob("scores.json")} == {
        job_directory(0, f"decomposition.k={k},log.project=tests,target.path={here / 'model'},tokens.seq_len=32")
        for k in (8, 16, 32)
    }


def test_a_setting_that_cannot_work_ends_as_one_line_and_status_2_and_leaves_nothing(here: Path, settings: list[str]):
    out = here / "refused"
    typo = start(script(here, BODY), *settings, f"hydra.run.dir={out}", "decomposition.kk=3")
    assert typo.status == 2 and not out.exists() and typo.out == ""
    assert typo.err.splitlines() == ["decomposition.kk is not a setting; did you mean decomposition.k?"]
    late = start(
        script(here, "from nndecomp.errors import SettingError\nraise SettingError('late, but one line')"), *settings
    )
    assert (late.status, late.err.splitlines()) == (2, ["late, but one line"])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("activations.buffer_tokens=10", "activations.buffer_tokens=10 is too small"),
        ("activations.drop_first=32", "activations.drop_first=32 leaves nothing of tokens.seq_len=32"),
        ("decomposition=neurons decomposition.activation=topk", "decomposition.architecture=neurons is a baseline"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(settings: list[str], setting: str, sentence: str):
    jobs = command_line("exp_001_train_transcoder_pile", [*settings, *setting.split()]).jobs
    with pytest.raises(SettingError, match=sentence):
        run.check(jobs, trains=True)


def test_a_fault_keeps_its_traceback(here: Path, settings: list[str]):
    fault = start(script(here, "return {'x': 1 / 0}"), *settings, f"hydra.run.dir={here / 'fault'}")
    assert fault.status == 1 and "Traceback" in fault.err and "ZeroDivisionError: division by zero" in fault.err
    assert not (here / "fault" / "scores.json").exists()


def test_help_is_quick_because_nothing_heavy_is_loaded():
    program = """
import runpy, sys
from pathlib import Path
for path in sorted(Path("experiments").glob("exp_*/run.py")):
    runpy.run_path(str(path), run_name="imported")
sys.argv = [str(path), "--help"]
try:
    runpy.run_path(str(path), run_name="__main__")
except SystemExit as end:
    assert not end.code
heavy = {"torch", "transformers", "pandas", "matplotlib", "datasets", "wandb"} & set(sys.modules)
assert not heavy, f"{heavy} loaded"
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0 and "Override anything in the config" in result.stdout, result.stderr


# On SLURM, jobs read code and settings when they start, which may be hours after they were sent off.


def commit(tree: Path, content: str = "first") -> None:
    """A git tree with one more commit."""
    tree.mkdir(exist_ok=True)
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    (tree / "code.py").write_text(content)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", "-C", str(tree), "add", "."], check=True)
    subprocess.run(["git", "-C", str(tree), *who, "commit", "-q", "-m", content], check=True)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git tree in place of the package's own."""
    monkeypatch.setattr(checkpoint, "SOURCE", tmp_path)
    monkeypatch.delenv(run.SUBMITTED, raising=False)
    commit(tmp_path)
    return tmp_path


def test_code_that_is_not_committed_is_refused_on_slurm(tree: Path):
    assert len(run.committed()) == 40
    (tree / "code.py").write_text("changed")
    with pytest.raises(SettingError, match="allow_dirty=false, but 1 files? differ.*code.py.*allow_dirty=true"):
        run.committed()
    (tree / "code.py").write_text("first")
    (tree / "new.yaml").write_text("not added")
    with pytest.raises(SettingError, match="new.yaml"):
        run.committed()


def test_a_job_that_starts_at_another_commit_than_it_was_submitted_at_is_refused(
    tree: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(run.SUBMITTED, run.committed())
    run.unchanged_since_submission()
    commit(tree, "second")
    with pytest.raises(SettingError, match="submitted at commit .* and starts at"):
        run.unchanged_since_submission()


def test_only_jobs_on_slurm_need_a_clean_tree(here: Path, settings: list[str]):
    commit(tree := here / "tree")
    dirty = script(here, BODY)
    # The package's own tree, replaced by one that certainly differs from its commit.
    other = f"from nndecomp import checkpoint\ncheckpoint.SOURCE = Path({str(tree)!r})\n\n@experiment"
    dirty.write_text(dirty.read_text().replace("@experiment", other))
    (tree / "code.py").write_text("changed")
    refused = start(dirty, *settings, f"hydra.run.dir={here / 'slurm'}", SLURM_JOB_ID="7")
    assert refused.status == 2 and refused.err.startswith("allow_dirty=false, but 1 file differs"), refused.err
    assert start(dirty, *settings, f"hydra.run.dir={here / 'told'}", "allow_dirty=true", SLURM_JOB_ID="7").status == 0
    assert start(dirty, *settings, f"hydra.run.dir={here / 'elsewhere'}").status == 0
