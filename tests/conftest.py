"""What holds for every test: no network, few threads, fixed seeds."""

import os

# Before anything imports the libraries that read them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_ERROR_REPORTING="false",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    HYDRA_FULL_ERROR="0",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors in tests are small: more threads only wait for each other

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs run in Triton's interpreter
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

REPO = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Tests that draw random numbers draw the same ones alone and in any order."""
    torch.manual_seed(0)


@pytest.fixture
def repo() -> Path:
    return REPO


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        without_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(without_gpu)
