"""The settings of every job a command line stands for, composed before the first job starts.

Hydra composes a job's settings when the job starts: on a cluster that is hours after the sweep was sent off, and a
value that cannot work would be found in the queue. Here a sweep is spread out as Hydra's own grid sweeper will.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # not public; Hydra is pinned below 1.4
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from nndecomp.config.compose import compose_tree, refusing, resolve
from nndecomp.config.schema import RunConfig


@dataclass(frozen=True)
class CommandLine:
    jobs: list[RunConfig]  # empty: the command line only asks for information
    on_slurm: bool  # jobs are sent to SLURM


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
        return CommandLine(jobs=[], on_slurm=False)
    with refusing():
        parsed = OverridesParser.create().parse_overrides(args.overrides)
        fixed = [one.input_line for one in parsed if not one.is_sweep_override()]
        hydra_node = compose_tree(name, [one for one in fixed if one is not None], with_hydra=True).hydra
        many = args.multirun or hydra_node.mode is RunMode.MULTIRUN
        spread = list(job_overrides(args.overrides, hydra_node.sweeper.params or {})) if many else [args.overrides]
    trees = [compose_tree(name, overrides) for overrides in spread]
    return CommandLine(
        jobs=[resolve(tree) for tree in trees], on_slurm="slurm" in str(hydra_node.launcher.get("_target_")).lower()
    )
