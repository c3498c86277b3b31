"""What every experiment shares: the command line in, checked settings and a run directory out.

    @experiment("exp_010_train_transcoder_pile_sweep")
    def main(cfg: RunConfig, out: Path) -> dict[str, float]: ...

    command line -> every job's settings checked -> each job: run directory, config.yaml, provenance, seeds
                 -> main(cfg, out) -> scores.json

A job whose directory holds scores.json is finished and is not run again; one that was killed goes on from its
checkpoint when it is started in the same directory (`hydra.run.dir=...`, for a sweep `hydra.sweep.dir=...`).
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from nndecomp import checkpoint
from nndecomp.config.compose import differences, dump, load, resolve
from nndecomp.config.jobs import CommandLine, command_line, job_directories
from nndecomp.config.registry import CONF, REPO, register
from nndecomp.config.schema import RunConfig, require
from nndecomp.errors import SettingError

Main = Callable[[RunConfig, Path], dict[str, float]]
log = logging.getLogger(__name__)
SUBMITTED = "NNDECOMP_SUBMITTED_COMMIT"


def experiment(
    name: str, *, trains: bool = False, patches: bool = True, needs_runs: bool = False, shares: bool = False
) -> Callable[[Main], Callable[[], None]]:
    """Makes `main(cfg, out) -> scores` a command line program, its settings in conf/<name>.yaml.

    trains: it trains decompositions, so settings with which none can be trained are refused at once.
    patches: it puts decompositions into the target, so targets that compute nothing are refused at once.
    needs_runs: it looks at finished runs, so `runs=[]` is refused at once.
    shares: it trains what its settings name, in its own directory: the jobs of a sweep can be trained on one stream.
    """

    def wrap(main: Main) -> Callable[[], None]:
        def command() -> None:
            register()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come back as they are: bugs with their traceback
            try:
                asked = command_line(name)
                if asked.on_slurm and not all(cfg.allow_dirty for cfg in asked.jobs):
                    os.environ[SUBMITTED] = committed()  # SLURM hands the environment on to the jobs
                check(asked.jobs, trains, patches, needs_runs)
                check_shared(name, asked, shares)
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(_job(name, main, asked))()
            except SettingError as error:
                refuse(error)

        return command

    return wrap


def _job(name: str, main: Main, asked: CommandLine) -> Callable[[DictConfig], dict[str, float]]:
    begun: set[Path] = set()  # directories of jobs that share a stream, trained before the first of them runs

    def job(raw: DictConfig) -> dict[str, float]:
        started = HydraConfig.get()
        try:
            cfg, out = resolve(raw), Path(started.runtime.output_dir)
            if cfg.training.share_stream and not begun:
                sweep = Path(started.sweep.dir).absolute()
                begun.update(trained_together(asked, job_directories(name, asked.overrides, sweep)))
                assert out in begun, f"{out} is not among {', '.join(map(str, begun))}"
            return run(cfg, out, main, started.overrides.task, begun=out in begun)
        except SettingError as error:
            if started.mode is RunMode.RUN:
                refuse(error)  # before Hydra adds a line of its own
            raise

    return job


def check_shared(name: str, asked: CommandLine, shares: bool) -> None:
    """Refuses training.share_stream where jobs do not run one after the other in this process, or train something else."""
    if not any(cfg.training.share_stream for cfg in asked.jobs):
        return
    setting = "training.share_stream=true"
    require(asked.is_sweep, f"{setting} is of a sweep, and this is one job; write +sweep=k, or false")
    require(
        asked.in_this_process, f"{setting} trains all jobs in one process; leave hydra/launcher out, or write false"
    )
    require(shares, f"{setting} is not for {name}, which does not train just what its settings name; write false")
    from nndecomp import build  # late: loads torch

    build.check_sharing(asked.jobs)


def trained_together(asked: CommandLine, places: Sequence[Path]) -> Sequence[Path]:
    """Begins every job of a sweep that is not finished, and trains them all; returns their directories."""
    from nndecomp import build  # late: loads torch

    jobs = []
    for cfg, out, overrides in zip(asked.jobs, places, asked.overrides, strict=True):
        if begins(cfg, out, overrides):
            jobs.append(build.Job(cfg, out))
    if jobs:
        set_process(jobs[0].cfg)
        build.trained_together(jobs)
    return places


def refuse(error: SettingError) -> None:
    """A setting that cannot work: the sentence alone, and an exit status of its own."""
    print(error, file=sys.stderr)
    sys.exit(2)


def check(jobs: list[RunConfig], trains: bool, patches: bool = True, needs_runs: bool = False) -> None:
    """Everything that sizes alone can refuse, for all jobs, before a model is loaded or a directory made."""
    if jobs:
        from nndecomp import build  # late: torch takes seconds, and --help should not

        for cfg in jobs:
            build.check(cfg, trains, patches, needs_runs)


def begins(cfg: RunConfig, out: Path, overrides: Sequence[str]) -> bool:
    """The run directory, with what the run came from. False, and nothing is written, if it is finished."""
    if (out / "config.yaml").exists():
        same_settings(cfg, out)
    if checkpoint.finished(out):
        return False
    if "SLURM_JOB_ID" in os.environ and not cfg.allow_dirty:
        unchanged_since_submission()
    checkpoint.write_text(out / "config.yaml", dump(cfg))
    checkpoint.write_provenance(out, overrides)
    return True


def run(cfg: RunConfig, out: Path, main: Main, overrides: Sequence[str], begun: bool = False) -> dict[str, float]:
    """One job: the run directory (unless it is `begun`), the process's own state, the experiment, and its scores last."""
    if checkpoint.finished(out) if begun else not begins(cfg, out, overrides):
        log.info("finished before, skipped: %s", out)
        return checkpoint.scores(out)
    set_process(cfg)
    scores = main(cfg, out)
    log.info("done: %s", out)
    checkpoint.write_scores(out, scores)
    return scores


def set_process(cfg: RunConfig) -> None:
    """The state a process has only one of: seeds, threads, heap, and what computes the hot path."""
    import torch  # late: takes seconds

    from nndecomp.training.heap import retain_heap
    from nndecomp.training.randomness import set_seed

    retain_heap()
    set_seed(cfg.seed)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)

    from nndecomp.decompositions import backends

    backends.use(cfg.backend)


def same_settings(cfg: RunConfig, out: Path) -> None:
    """A directory belongs to one set of settings; only where the run happens, beside what, and who is told may change."""
    before = load(out / "config.yaml")
    where = {each: getattr(before, each) for each in ("device", "threads", "backend", "allow_dirty", "log")}
    beside = replace(cfg.training, share_stream=before.training.share_stream)
    changed = differences(before, replace(cfg, training=beside, **where))
    require(
        not changed, f"{out} holds a run with other settings ({'; '.join(changed)}); give this one its own directory"
    )


def committed() -> str:
    """The commit that runs, which must be all of it: jobs on SLURM read code and conf/ only when they start."""
    status, commit = checkpoint.git("status", "--porcelain"), checkpoint.git("rev-parse", "HEAD")
    if status is None or commit is None:
        raise SettingError(f"allow_dirty=false, but {REPO} is not a git tree; write allow_dirty=true")
    changed = status.splitlines()
    require(
        not changed,
        f"allow_dirty=false, but {len(changed)} {'file differs' if len(changed) == 1 else 'files differ'} from the commit ({', '.join(line[3:] for line in changed[:3])}"
        f"{', ...' if len(changed) > 3 else ''}) and jobs on SLURM read them only when they start; commit them, submit "
        "from a clean git worktree, or write allow_dirty=true",
    )
    return commit.strip()


def unchanged_since_submission() -> None:
    now = committed()
    before = os.environ.get(SUBMITTED, now)
    require(
        now == before,
        f"allow_dirty=false, but the job was submitted at commit {before[:12]} and starts at {now[:12]}; submit from a "
        "git worktree that stays as it is, or write allow_dirty=true",
    )
