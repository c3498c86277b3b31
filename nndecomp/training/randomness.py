"""Random numbers that survive a restart, and that objectives trained together do not take from each other.

Torch's global generators are split into lanes: the stream and every objective have one, all begin where the
generators stood when training began. What an objective draws then does not depend on what else is trained beside it.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def set_seed(seed: int) -> None:
    """All global generators start anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def torch_random_state() -> dict[str, Tensor]:
    """States of torch's global generators: the CPU's, and the current accelerator's if there is one in use."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    elif torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_torch_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def random_state() -> dict[str, Any]:
    """States of all global generators (Python, NumPy, torch) as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = cast(
        "tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True)
    )
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch_random_state(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    set_torch_random_state(state["torch"])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn inside, the generators stand afterwards where they stood before."""
    state = random_state()
    yield
    set_random_state(state)


class Lanes:
    """Separate sequences of torch's random numbers, by name."""

    def __init__(self, names: Sequence[str]) -> None:
        state = torch_random_state()
        self.states = dict.fromkeys(names, state)

    @contextmanager
    def lane(self, name: str) -> Iterator[None]:
        set_torch_random_state(self.states[name])
        yield
        self.states[name] = torch_random_state()
