"""The settings of every job a command line stands for, composed before the first job starts.

Hydra composes a job's settings when the job starts: on a cluster that is hours after the sweep was sent off, and a
value that cannot work would be found in the queue. Here a sweep is spread out as Hydra's own grid sweeper will.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # not public; Hydra is pinned below 1.4
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import open_dict, read_write

from nndecomp.config.compose import compose_tree, refusing, resolve
from nndecomp.config.schema import RunConfig


@dataclass(frozen=True)
class CommandLine:
    jobs: list[RunConfig]  # empty: the command line only asks for information
    overrides: list[list[str]]  # of each job
    is_sweep: bool
    launcher: str  # the class that starts the jobs

    @property
    def on_slurm(self) -> bool:
        return "slurm" in self.launcher.lower()

    @property
    def in_this_process(self) -> bool:
        """Jobs run here, one after the other."""
        return self.launcher.endswith("BasicLauncher")


def only_asks(args: Namespace) -> bool:
    """--help, --cfg, --info and the like: nothing will run."""
    return bool(args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)


def job_overrides(overrides: Sequence[str], sweep_params: Mapping[Any, Any]) -> Iterator[list[str]]:
    """One list of overrides a job: the product of the sweep's axes, the command line narrowing them."""
    axes = [f"{key}={values}" for key, values in sweep_params.items()]
    parsed = OverridesParser.create().parse_overrides([*axes, *overrides])
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    yield from jobs


def command_line(name: str, arguments: Sequence[str] | None = None) -> CommandLine:
    """What `arguments` (default: the program's) stand for. SettingError names the setting that cannot work."""
    args = get_args_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
    if only_asks(args):
        return CommandLine([], [], is_sweep=False, launcher="")
    with refusing():
        parsed = OverridesParser.create().parse_overrides(args.overrides)
        fixed = [one.input_line for one in parsed if not one.is_sweep_override()]
        hydra_node = compose_tree(name, [one for one in fixed if one is not None], with_hydra=True).hydra
        many = args.multirun or hydra_node.mode is RunMode.MULTIRUN
        spread = list(job_overrides(args.overrides, hydra_node.sweeper.params or {})) if many else [args.overrides]
    trees = [compose_tree(name, overrides) for overrides in spread]
    return CommandLine([resolve(tree) for tree in trees], spread, many, str(hydra_node.launcher.get("_target_")))


def job_directories(name: str, overrides: Sequence[Sequence[str]], sweep_directory: Path) -> list[Path]:
    """Where Hydra will put each job of a sweep."""
    found = []
    for number, each in enumerate(overrides):
        node = compose_tree(name, each, with_hydra=True)
        with read_write(node), open_dict(node):
            node.hydra.job.num = number
        found.append(sweep_directory / node.hydra.sweep.subdir)
    return found
