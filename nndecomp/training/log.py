"""metrics.jsonl always, wandb by choice: the same rows to both.

One row a line, numbers only as they are measured. What depends on the machine's speed is under "timing"; everything
else is the same, byte for byte, for a run that was stopped and started again.
"""

import json
import netrc
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlparse

from nndecomp.checkpoint import flush, read_json, write_json
from nndecomp.config.schema import LogConfig, Wandb, require

WANDB_INIT_SECONDS = 60


def has_wandb_key() -> bool:
    """Whether wandb would find a key where it looks for one: the environment, or the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    return file.exists() and host is not None and netrc.netrc(file).authenticators(host) is not None


def check_log(cfg: LogConfig) -> None:
    """Raises SettingError if wandb could not start; asked before any heavy work, as wandb itself would wait for long."""
    require(
        cfg.wandb is not Wandb.online or has_wandb_key(),
        "log.wandb=online finds no key in WANDB_API_KEY or in a netrc file; run `wandb login`, or use log.wandb=offline",
    )


class Log:
    """Rows of one run. `with Log(...) as log` closes both files, also when training stops early."""

    def __init__(self, out: Path, cfg: LogConfig, name: str = "") -> None:
        """name: what wandb shows the run as; beside it, the settings in <out>/config.yaml."""
        check_log(cfg)
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        self.file = self.path.open("ab")
        self.wandb = None if cfg.wandb is Wandb.disabled else start_wandb(out, cfg, name)

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Appends {"step": step, **row}. wandb gets the numbers as <name>/<key>, `name` being the row's name."""
        self.file.write(json.dumps({"step": step, **row}, allow_nan=False).encode() + b"\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(flat(row), step=step)

    def position(self) -> int:
        """Bytes written and on the disk: the log that belongs to a checkpoint made now."""
        flush(self.path)
        return self.file.tell()

    def rewind(self, position: int) -> None:
        """Forgets the rows after `position`, which the run is going to write again."""
        size = self.path.stat().st_size
        assert size >= position, f"{self.path} has {size} bytes, its checkpoint was made after {position}"
        self.file.truncate(position)
        self.file.seek(position)


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """{"name": "sae", "loss": 1.0, "timing": {"tokens_per_s": 2.0}} -> {"sae/loss": 1.0, "sae/timing/tokens_per_s": 2.0}."""
    prefix = f"{row['name']}/" if "name" in row else ""
    return {
        f"{prefix}{key}{f'/{inner}' if inner else ''}": number
        for key, value in row.items()
        for inner, number in (value.items() if isinstance(value, Mapping) else [("", value)])
        if isinstance(number, int | float)
    }


def start_wandb(out: Path, cfg: LogConfig, name: str) -> Any:
    """A wandb run whose id is kept in the run directory, so that a run started again goes on in the same place.

    wandb keeps the first value it saw of a step: rows that are written again after a restart are dropped there, and
    they are the same rows.
    """
    import wandb
    import yaml
    from wandb.errors import CommError

    settings = out / "config.yaml"
    identity = out / "wandb.json"
    if not identity.exists():
        write_json(identity, {"id": uuid.uuid4().hex[:12]})
    try:
        return wandb.init(
            dir=out,
            mode=cfg.wandb.value,  # type: ignore[arg-type]
            id=read_json(identity)["id"],
            resume="allow" if cfg.wandb is Wandb.online else None,
            reinit="create_new",  # jobs that share a stream log side by side
            project=cfg.project,
            entity=cfg.entity,
            group=cfg.group,
            name=name or None,
            config=yaml.safe_load(settings.read_text()) if settings.exists() else None,
            settings=wandb.Settings(init_timeout=WANDB_INIT_SECONDS),
        )
    except CommError as error:
        require(False, f"log.wandb=online does not reach wandb ({error}); use log.wandb=offline and sync later")
