"""Where progress is reported, beside metrics.jsonl in the run directory."""

from dataclasses import dataclass
from enum import Enum


class Wandb(Enum):
    disabled = "disabled"
    online = "online"
    offline = "offline"


@dataclass(kw_only=True)
class LogConfig:
    wandb: Wandb
    project: str = "nndecomp"
    entity: str | None = None
    group: str | None = None
    # Of dictionaries: FLOPs of a step, and the share of what the device can do that they take. Both are found out before the
    # first step: seconds, and memory for every dictionary once more.
    utilisation: bool = False
