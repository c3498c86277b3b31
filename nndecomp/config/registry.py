"""Makes the settings known to Hydra: the schema that conf/*.yaml fill, and the resolvers that name directories."""

import hashlib
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from nndecomp.config.schema import RunConfig

REPO = Path(__file__).resolve().parents[2]
CONF = REPO / "conf"


def in_repo(path: str) -> str:
    """`path` below the repository, wherever the command was started."""
    return str(REPO / path)


def job_directory(number: int, overrides: str) -> str:
    """A directory for one job of a sweep: its overrides, as far as a file name can hold them.

    Named by what the job is rather than by its number, so that a longer sweep in the same directory finds the jobs
    that a shorter one finished.
    """
    plain = "".join(c if c.isalnum() or c in "=.,_-+[]" else "_" for c in overrides)
    if len(plain) > 120:
        return f"{plain[:100]}_{hashlib.sha256(overrides.encode()).hexdigest()[:12]}"
    return plain or str(number)


def register() -> None:
    """Called before Hydra composes. Calling it again changes nothing."""
    OmegaConf.register_new_resolver("repo", in_repo, replace=True)
    OmegaConf.register_new_resolver("job_directory", job_directory, replace=True)
    ConfigStore.instance().store(name="schema", node=RunConfig)
