"""Jobs of a sweep on one stream: each leaves in its directory what it would have left there by itself, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from experiment_parts import contents
from torch import Tensor

from nndecomp import build, run
from nndecomp.activations.manifest import row_settings
from nndecomp.activations.shared import SharedStream
from nndecomp.activations.store_writer import write_store
from nndecomp.checkpoint import write_text
from nndecomp.config.compose import compose, dump
from nndecomp.config.jobs import command_line, job_directories
from nndecomp.errors import SettingError
from nndecomp.training.randomness import set_seed

NAME = "exp_010_train_transcoder_pile_sweep"
SMALL = [
    "+scale=smoke",
    "decomposition.n_features=48",
    "decomposition.initial_tokens=256",
    "training.share_stream=true",
]
NARROW = ["decomposition.k=8", "decomposition.layers=[1]"]
# Two layers, two activation functions, two rates, and one that trains for less long.
VARIED = {
    "a": ["decomposition.layers=[1]"],
    "b": ["decomposition.layers=[2]", "decomposition.k=8", "training.lr=1e-3"],
    "c": ["decomposition.layers=[1]", "decomposition.activation=topk", "training.n_tokens=1792"],
}


def job(out: Path, *settings: str) -> build.Job:
    cfg = compose(NAME, [*SMALL, *settings])
    write_text(out / "config.yaml", dump(cfg))
    return build.Job(cfg, out)


def jobs(at: Path, *settings: str) -> list[build.Job]:
    return [job(at / name, *own, *settings) for name, own in VARIED.items()]


def alone(each: build.Job) -> None:
    set_seed(each.cfg.seed)
    build.trained(each.cfg, build.target(each.cfg), each.out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each job trained by itself."""
    at = tmp_path_factory.mktemp("alone")
    for each in jobs(at):
        alone(each)
    return {name: contents(at / name) for name in VARIED}


def found(at: Path) -> dict[str, dict[str, Any]]:
    return {name: contents(at / name) for name in VARIED}


def test_jobs_that_share_a_stream_end_as_each_ends_by_itself(tmp_path: Path, undisturbed: Any):
    build.trained_together(jobs(tmp_path))
    assert found(tmp_path) == undisturbed
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    build.trained_together(jobs(tmp_path))
    for each in jobs(tmp_path):
        alone(each)
    written = {file.name for file, time in before.items() if file.stat().st_mtime_ns != time and file.is_file()}
    assert written == {"config.yaml"}, "what is trained is left alone"


def test_one_harvest_serves_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(SharedStream, "__init__", watched(SharedStream.__init__, made))
    build.trained_together(jobs(tmp_path))
    (shared,) = made
    assert shared.n_made == 10 and {str(site) for site in shared.layout.sites} == {
        *("L1.mlp_in", "L1.mlp_out", "L2.mlp_in", "L2.mlp_out")
    }


def watched(function: Any, made: list[Any]) -> Any:
    def init(self: Any, *given: Any) -> None:
        made.append(self)
        function(self, *given)

    return init


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at_batch_7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints are made every 5 steps; the shortest job would have ended at 7."""
    taken = SharedStream.take

    def take(self: SharedStream, n_taken: int) -> Tensor:
        if n_taken == 6:
            raise Killed
        return taken(self, n_taken)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(SharedStream, "take", take)
        build.trained_together(jobs(tmp_path))
    assert {file.parent.name for file in tmp_path.rglob("state.pt")} == {"step_5"}
    return tmp_path


def test_jobs_that_were_killed_go_on_together(killed_at_batch_7: Path, undisturbed: Any):
    build.trained_together(jobs(killed_at_batch_7))
    assert found(killed_at_batch_7) == undisturbed


@pytest.mark.slow
def test_each_job_that_was_killed_can_go_on_by_itself(killed_at_batch_7: Path, undisturbed: Any):
    for each in jobs(killed_at_batch_7):
        alone(each)
    assert found(killed_at_batch_7) == undisturbed


@pytest.mark.slow
def test_jobs_that_were_saved_at_different_steps_go_on_apart(killed_at_batch_7: Path, undisturbed: Any):
    shutil.rmtree(killed_at_batch_7 / "b/checkpoint")
    both = jobs(killed_at_batch_7)
    assert both[0].reads == both[2].reads != both[1].reads
    build.trained_together(both)
    assert found(killed_at_batch_7) == undisturbed


def test_jobs_of_another_seed_or_text_read_another_stream(tmp_path: Path):
    same, seed, text, batch = (
        job(tmp_path / name, *settings).reads
        for name, settings in {
            "same": ["decomposition.k=8", "training.n_tokens=5120"],
            "seed": ["seed=1"],
            "text": ["tokens.seq_len=16"],
            "batch": ["training.batch_tokens=128"],
        }.items()
    )
    reads = job(tmp_path / "first").reads
    assert same == reads and len({reads, seed, text, batch}) == 4


@pytest.mark.slow
def test_jobs_share_the_rows_of_a_store(tmp_path: Path):
    cfg = compose(NAME, SMALL)
    target = build.target(cfg)
    sites = [
        site
        for each in ("[1]", "[2]")
        for site in build.decomposed_sites(compose(NAME, [*SMALL, f"decomposition.layers={each}"]), target.shape)
    ]
    settings = row_settings(cfg.target, None, cfg.tokens, cfg.activations, target.tokenizer)
    write_store(build.harvester(cfg, target, sites), tmp_path / "store", settings, n_rows=2000, seed=0, shard_rows=512)
    stored = ["activations.kind=store", f"activations.store={tmp_path / 'store'}"]
    build.trained_together(jobs(tmp_path / "together", *stored))
    for each in jobs(tmp_path / "alone", *stored):
        alone(each)
    assert found(tmp_path / "together") == found(tmp_path / "alone")


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("exp_001_train_transcoder_pile", [], "is of a sweep, and this is one job"),
        (NAME, ["hydra/launcher=local", *NARROW], "trains all jobs in one process; leave hydra/launcher out"),
        ("exp_022_stability", ["hydra.mode=MULTIRUN"], "is not for exp_022_stability, which does not train just"),
        (NAME, ["training.share_stream=true,false", *NARROW], "but a job of this one has false"),
        (
            "exp_001_train_transcoder_pile",
            ["hydra.mode=MULTIRUN", "decomposition.end_to_end=kl", "decomposition.end_to_end_coefficient=1.0"],
            "shares rows, but per_layer_transcoder trains on whole sequences",
        ),
        (
            "exp_027_train_presets",
            ["hydra.mode=MULTIRUN", "target=synthetic", "activations=synthetic", "decomposition=sae"],
            "activations.kind=synthetic draws rows for each job's own sites",
        ),
    ],
)
def test_what_cannot_share_a_stream_is_refused_in_a_sentence(name: str, settings: list[str], sentence: str):
    share = [] if any("share_stream" in each for each in settings) else ["training.share_stream=true"]
    small = [] if "target=synthetic" in settings else ["+scale=smoke"]
    with pytest.raises(SettingError, match=f"training.share_stream=true.*{sentence}"):
        run.check_shared(name, command_line(name, [*small, *settings, *share]), name != "exp_022_stability")


def test_the_directories_of_jobs_are_known_before_they_start(tmp_path: Path):
    asked = command_line(NAME, [*SMALL, "decomposition.k=8,16", "decomposition.layers=[1],[2]"])
    places = [place.relative_to(tmp_path).as_posix() for place in job_directories(NAME, asked.overrides, tmp_path)]
    own = "decomposition.initial_tokens=256,decomposition.k={},decomposition.layers=[{}],decomposition.n_features=48"
    assert places == [own.format(k, layer) for layer in (1, 2) for k in (8, 16)]


def test_utilisation_is_logged_when_it_is_asked_for_and_changes_nothing_else(tmp_path: Path):
    settings = ["training.share_stream=false", "decomposition.layers=[1]"]
    plain, asked = job(tmp_path / "plain", *settings), job(tmp_path / "asked", *settings, "log.utilisation=true")
    alone(plain), alone(asked)
    assert contents(plain.out) == contents(asked.out)
    row = json.loads((asked.out / "metrics.jsonl").read_text().splitlines()[-1])["timing"]
    assert "utilisation" not in json.loads((plain.out / "metrics.jsonl").read_text().splitlines()[-1])["timing"]
    (cost,) = build.training_flops(asked.cfg, build.target(asked.cfg)).values()
    assert row["flops_per_step"] == pytest.approx(asked.cfg.training.batch_tokens * cost.per_token, rel=1e-6)
    assert row["flops_per_s"] == pytest.approx(cost.per_token * row["tokens_per_s"], rel=1e-3)
    assert 0 < row["utilisation"] < 1
