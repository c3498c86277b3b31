"""Targets that a Weights & Biases run keeps among its files: `wandb:<entity>/<project>/<run>`.

The files are kept in a cache directory and fetched once. Delete it to fetch a run again that has gone on.
"""

import os
import re
import tempfile
from pathlib import Path

from nndecomp.errors import SettingError

PREFIX = "wandb:"
_RUN = re.compile(r"wandb:(\w[\w.-]*)/(\w[\w.-]*)/(?:runs/)?(\w[\w.-]*)")
# In the order in which they are fetched: where model_config.yaml is, the others are too.
_SMALL = ("final_config.yaml", "tokenizer.json", "model_config.yaml")
_WEIGHTS = re.compile(r"model_step_(\d+)\.pt")


def cache_directory(path: str) -> Path:
    """Where the files of `wandb:<entity>/<project>/<run>` are kept."""
    run = _RUN.fullmatch(path)
    if run is None:
        raise SettingError(f"target.path={path} does not name a run; write wandb:<entity>/<project>/<run>")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "nndecomp" / "wandb" / run[1] / run[2] / run[3]


def fetch(path: str, weights: bool) -> Path:
    """The directory with the run's configuration and tokenizer and, if asked for, its last weights."""
    directory = cache_directory(path)
    present = {file.name for file in directory.iterdir()} if directory.is_dir() else set()
    if "model_config.yaml" in present and (not weights or any(map(_WEIGHTS.fullmatch, present))):
        return directory

    import wandb
    from wandb.apis.public.runs import RunNotFoundError
    from wandb.errors import CommError, UsageError

    try:
        files = {file.name: file for file in wandb.Api(timeout=60).run("/".join(directory.parts[-3:])).files()}
    except (RunNotFoundError, CommError, UsageError) as refused:
        reason = str(refused).splitlines()[0]
        raise SettingError(f"target.path={path}: Weights & Biases does not give this run ({reason})") from refused
    steps = {int(match[1]): name for name in files if (match := _WEIGHTS.fullmatch(name))}
    if "model_config.yaml" not in files or not steps:
        raise SettingError(
            f"target.path={path} is a run without model_config.yaml and model_step_<n>.pt, so it holds no LlamaSimpleMLP"
        )
    wanted = [name for name in _SMALL if name in files] + ([steps[max(steps)]] if weights else [])
    directory.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        with tempfile.TemporaryDirectory(dir=directory) as unfinished:  # a file is whole or it is not there
            files[name].download(root=unfinished).close()
            os.replace(Path(unfinished) / name, directory / name)
    return directory
