"""A run directory is whole or not there."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from nndecomp import checkpoint


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At every write to disk, what stands under the name is the old content or the new."""
    path = tmp_path / "a/file.json"
    checkpoint.write_json(path, {"x": 1})
    seen = []

    def looking(descriptor: int, fsync=os.fsync) -> None:
        seen.append(json.loads(path.read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", looking)
    checkpoint.write_json(path, {"x": 2})
    assert seen == [{"x": 1}, {"x": 2}]  # the new content was on the disk before it took the name
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_a_directory_appears_only_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "saved"

    def fill(partial: Path) -> None:
        assert not path.exists()
        (partial / "inner").mkdir()
        (partial / "inner/file").write_text("new")

    checkpoint.write_directory(path, fill)
    assert (path / "inner/file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_fails_to_be_written_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "saved"
    checkpoint.write_directory(path, lambda partial: (partial / "file").write_text("old") and None)

    def fail(partial: Path) -> None:
        (partial / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_directory(path, fail)
    assert (path / "file").read_text() == "old"

    checkpoint.write_directory(path, lambda partial: (partial / "other").write_text("new") and None)
    assert [entry.name for entry in path.iterdir()] == ["other"]
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.write_json(tmp_path / "x.json", {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_scores_say_that_a_run_is_finished(tmp_path: Path):
    assert not checkpoint.finished(tmp_path)
    with pytest.raises(AssertionError, match="is not finished"):
        checkpoint.scores(tmp_path)
    with pytest.raises(AssertionError, match="score ce is inf"):
        checkpoint.write_scores(tmp_path, {"ce": math.inf})
    assert not checkpoint.finished(tmp_path)
    checkpoint.write_scores(tmp_path, {"ce": 1.5})
    assert checkpoint.finished(tmp_path) and checkpoint.scores(tmp_path) == {"ce": 1.5}


def repository(path: Path) -> str:
    """A git repository with one commit, whose id is returned."""
    git = ["git", "-C", str(path), "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    path.mkdir()
    (path / "code.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return commit.stdout.strip()


def test_provenance_has_the_commit_and_what_differs_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = repository(tmp_path / "source")
    monkeypatch.setattr(checkpoint, "SOURCE", tmp_path / "source")
    out = tmp_path / "out"
    checkpoint.write_provenance(out, ["seed=3"])
    assert not (out / "git.diff").exists()
    (tmp_path / "source/code.py").write_text("x = 2\n")
    (tmp_path / "source/new.py").write_text("")
    checkpoint.write_provenance(out, ["seed=3"])
    starts = json.loads((out / "provenance.json").read_text())
    assert [start["commit"] for start in starts] == [commit, commit]
    assert [start["changed"] for start in starts] == [[], ["code.py", "new.py"]]
    assert "-x = 1\n+x = 2\n" in (out / "git.diff").read_text()


def test_provenance_has_versions_and_no_path_or_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import platform

    import torch

    monkeypatch.setattr(checkpoint, "SOURCE", tmp_path)  # installed: no git tree
    checkpoint.write_provenance(tmp_path / "out", [])
    text = (tmp_path / "out/provenance.json").read_text()
    [start] = json.loads(text)
    assert start["commit"] is None and start["changed"] is None
    assert start["packages"]["torch"] == torch.__version__
    assert str(tmp_path) not in text and platform.node() not in text and str(Path.home()) not in text
