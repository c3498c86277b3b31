"""Many runs at once: the dictionaries of all jobs of a sweep, trained in one process on as few streams as they have.

    jobs -> groups whose streams are the same -> one harvest, one batch at a time -> each job's own directory

What a job finds in its directory afterwards is what it would have left there itself, so it goes on from there as if it had.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from nndecomp.activations.shared import SharedStream
from nndecomp.build.data import first_rows, stream
from nndecomp.build.data import target as load
from nndecomp.build.end_to_end import attends, is_end_to_end
from nndecomp.build.flops import utilisation
from nndecomp.build.objectives import sites_of
from nndecomp.build.settings import trainable
from nndecomp.build.training import Objectives, check_heldout, is_saved, looking, prepared, save
from nndecomp.config.schema import ActivationsKind, RunConfig, require
from nndecomp.training.log import Log
from nndecomp.training.loop import Run, train_all
from nndecomp.training.randomness import random_state, set_random_state, set_seed
from nndecomp.training.state import saved_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run of a sweep: settings and directory."""

    cfg: RunConfig
    out: Path

    @property
    def reads(self) -> str:
        """What decides which rows come in which order: jobs that agree on it share them, whatever their sites. A checkpoint
        goes on from its own step."""
        cfg = self.cfg
        settings = (cfg.target, cfg.paired_target, cfg.tokens, cfg.activations)
        numbers = [cfg.seed, cfg.device, cfg.training.batch_tokens, *saved_steps(self.out / "checkpoint")[-1:]]
        return json.dumps([*(each and asdict(each) for each in settings), numbers], default=str)


def check_sharing(jobs: Sequence[RunConfig]) -> None:
    """SettingError unless all jobs want it, and what they train is trained on rows that sites have by themselves."""
    for cfg in jobs:
        for name in ("device", "threads", "backend"):
            here, there = getattr(jobs[0], name), getattr(cfg, name)
            require(
                here == there,
                f"training.share_stream=true trains all jobs in one process, but {name} is {here} in one and {there} in "
                "another; write it once, not as an axis",
            )
        require(
            cfg.training.share_stream,
            "training.share_stream=true is of a whole sweep, but a job of this one has false; write it once, not as an axis",
        )
        members, kind = trainable(cfg), cfg.activations.kind
        require(
            not is_end_to_end(members) and not attends(members),
            f"training.share_stream=true shares rows, but {', '.join(members)} trains on whole sequences; write false",
        )
        require(
            kind is not ActivationsKind.synthetic,
            "training.share_stream=true shares what is harvested or stored, but activations.kind=synthetic draws rows for "
            "each job's own sites; write false",
        )


def trained_together(jobs: Sequence[Job]) -> None:
    """Trains and saves what the jobs would train one after the other; those that are trained already are left alone."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if not is_saved(job.out, trainable(job.cfg)):
            groups.setdefault(job.reads, []).append(job)
    for number, group in enumerate(groups.values(), 1):
        logger.info("stream %d of %d, shared by %d of %d jobs", number, len(groups), len(group), len(jobs))
        _train(group)


def _train(group: Sequence[Job]) -> None:
    cfg = group[0].cfg
    set_seed(cfg.seed)
    target = load(cfg)
    fresh = random_state()  # where the random numbers of each job stand once the target is loaded
    sites = sorted({site for job in group for site in sites_of(trainable(job.cfg), target.shape)})
    first = first_rows(cfg, target, sites)
    shared = SharedStream(stream(cfg, target, sites, first))
    trained: list[tuple[Job, Objectives]] = []
    with ExitStack() as logs:
        runs = []
        for job in group:
            set_random_state(fresh)
            check_heldout(job.cfg, target)
            members = trainable(job.cfg)
            used = utilisation(job.cfg, target, members)
            view = shared.view(sites_of(members, target.shape))
            objectives, rows = prepared(job.cfg, target, job.out, members, first, view)
            evaluate = looking(job.cfg, target, objectives, job.out.name) if job.cfg.training.evaluate_every else None
            log = logs.enter_context(Log(job.out, job.cfg.log, name=f"{job.cfg.name}/{job.out.name}"))
            runs.append(Run(objectives, rows, job.cfg.training, job.out, log=log, evaluate=evaluate, utilisation=used))
            trained.append((job, objectives))
        del first  # what was kept for the starts is the stream's alone
        train_all(runs, f"{cfg.name}: {len(runs)} jobs")
    for job, objectives in trained:
        save(job.out, objectives)
