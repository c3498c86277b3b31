"""setup_env.sh, on a package of no dependencies and on nothing but what this machine's pip finds."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "nndecomp"
version = "0"

[project.optional-dependencies]
dev = []

[tool.setuptools]
packages = []
"""


def checkout(directory: Path) -> Path:
    """A small project beside the real script."""
    directory.mkdir()
    shutil.copy(REPO / "setup_env.sh", directory)
    shutil.copy(REPO / "constraints.txt", directory)
    (directory / "pyproject.toml").write_text(PROJECT)
    return directory


def setup(project: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(project / "setup_env.sh"), *command],
        env={k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHON", "TORCH_BUILD")} | env,
        cwd="/",
        capture_output=True,
        text=True,
    )


def python_that_says(version: str, directory: Path) -> Path:
    directory.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        fake = directory / name
        fake.write_text(f"#!/bin/sh\necho {version}\n")
        fake.chmod(0o755)
    return directory


@pytest.mark.parametrize("version", ["2.7.18", "3.9.2", "3.10.13"])
def test_an_old_python_is_refused_in_a_sentence(tmp_path: Path, version: str):
    project, fakes = checkout(tmp_path / "project"), python_that_says(version, tmp_path / "bin")
    done = setup(project, "true", PATH=f"{fakes}:/usr/bin:/bin")
    assert done.returncode == 1
    assert f"Python 3.11 or newer is needed, but python3 is {version}" in done.stderr
    assert not (project / ".venv").exists()


def test_an_unknown_build_of_torch_is_refused_in_a_sentence(tmp_path: Path):
    done = setup(checkout(tmp_path / "project"), "true", TORCH_BUILD="tpu")
    assert done.returncode == 1
    assert done.stderr == "setup_env: TORCH_BUILD=tpu is not one of auto, cpu, cuda\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose environment is made, with torch."""
    project = checkout(tmp_path_factory.mktemp("setup") / "project")
    done = setup(project, "python", "-c", "import sys; print(sys.prefix)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{project}/.venv\n"
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["making", "installing", "ready"], done.stderr
    return project


@pytest.mark.slow
def test_torch_fits_a_machine_without_gpu(made: Path):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    done = setup(made, "python", "-c", "import torch; print(torch.version.cuda)")
    assert done.stdout == "None\n", "a CUDA build was installed on a machine without GPU"


@pytest.mark.slow
def test_a_current_environment_costs_nothing(made: Path):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert setup(made, "true").stderr == ""
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2, f"{min(times):.2f} s to find out that nothing is to be done"


@pytest.mark.slow
def test_the_command_takes_the_place_of_the_script(made: Path):
    assert setup(made, "bash", "-c", "exit 7").returncode == 7
    shown = setup(made, "bash", "-c", "pwd; echo $VIRTUAL_ENV; command -v python").stdout
    assert shown.split() == ["/", f"{made}/.venv", f"{made}/.venv/bin/python"]
    process = subprocess.Popen(["bash", made / "setup_env.sh", "sleep", "60"])
    time.sleep(0.5)
    assert Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == -signal.SIGTERM


@pytest.mark.slow
def test_changed_requirements_update_the_environment(made: Path):
    marker = made / ".venv/kept"
    marker.touch()
    pyproject = made / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("dev = []", 'dev = ["iniconfig"]'))
    done = setup(made, "python", "-c", "import iniconfig")
    assert done.returncode == 0, done.stderr
    assert "updating" in done.stderr
    assert marker.exists()


@pytest.mark.slow
def test_another_python_can_be_named(made: Path):
    assert setup(made, "true", PYTHON=sys.executable).stderr == ""
    done = setup(made, "true", PYTHON="python0")
    assert done.returncode == 1
    assert "but python0 is not there" in done.stderr


@pytest.mark.slow
def test_an_installation_that_broke_off_is_made_anew(made: Path):
    left_over = made / ".venv/half_written"
    left_over.touch()
    pyproject = made / "pyproject.toml"
    good = pyproject.read_text()
    pyproject.write_text(good.replace("dev = [", 'dev = ["torch==0.0.1", '))
    broken = setup(made, "echo", "ran")
    assert (broken.returncode, broken.stdout) == (1, "")
    assert broken.stderr.endswith("setup_env: installing failed; run it again to start over\n")

    pyproject.write_text(good)
    again = setup(made, "echo", "ran")
    assert again.stdout == "ran\n"
    assert "making" in again.stderr
    assert not left_over.exists()


@pytest.mark.slow
def test_a_moved_checkout_gets_an_environment_of_its_own(made: Path):
    moved = made.with_name("moved")
    made.rename(moved)
    done = setup(moved, "pip", "--version")
    assert "making" in done.stderr
    assert f"{moved}/.venv/lib" in done.stdout, "scripts still run the interpreter of the old place"
