"""From settings to objects. The one file that knows every kind of everything."""

import random

import numpy as np
import torch

from nndecomp.config.schema import RunConfig, require
from nndecomp.targets.base import Target
from nndecomp.targets.load import load_target


def device(cfg: RunConfig) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU."""
    match cfg.device:
        case "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        case "mps":
            require(torch.backends.mps.is_available(), "device=mps is not on this machine; write device=auto")
        case name if name.startswith("cuda"):
            n_devices, index = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
            require(index < n_devices, f"device={name} is not among {n_devices} CUDA devices; write device=auto")
    return torch.device(cfg.device)


def process(cfg: RunConfig) -> None:
    """The state a process has only one of: seeds and threads."""
    random.seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    torch.manual_seed(cfg.seed)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)


def check(cfg: RunConfig) -> None:
    """Refuses (SettingError) what sizes alone can refuse: no weight is loaded, nothing is written."""
    device(cfg)
    if cfg.pretrain is not None:
        return  # the target is made by the run


def target(cfg: RunConfig) -> Target:
    return load_target(cfg.target, device(cfg))
