"""A throw-away SLURM cluster on this machine: real daemons, virtual nodes, no systemd, no cgroups, no accounting.

    python tests/slurm/cluster.py COMMAND...     runs COMMAND with the cluster's sbatch, squeue and sacct at hand

Needs Debian's slurmctld, slurmd, slurm-client and munge. Everything lies in one directory and ends with the block.
"""

import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ["slurmctld", "slurmd", "sbatch", "munged", "setpriv"]
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# slurmd -N runs several nodes on one host; config_overrides lets them claim more CPUs than there are; cred_expire
# shortens the wait before a requeued job starts again from two minutes to seconds.
_CONF = """
ClusterName=nndecomp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
CompleteWait=0
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=65536 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=preempt Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=2
"""

# submitit asks sacct for the state of a job, and without accounting never learns that a killed one has ended.
# slurmctld remembers jobs for MinJobAge seconds.
_SACCT = """#!{python}
import re, subprocess, sys

print("JobID|State|NodeList")
for job in [after for before, after in zip(sys.argv, sys.argv[1:]) if before == "-j"]:
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True).stdout
    for line in shown.splitlines():
        of = dict(re.findall(r"(\\w+)=(\\S*)", line))
        task = of.get("ArrayTaskId", "")
        number = of["JobId"]
        if "ArrayJobId" in of:
            number = of["ArrayJobId"] + "_" + (task if task.isdigit() else f"[{{task}}]")
        print(number, of["JobState"], of.get("NodeList", ""), sep="|")
"""


@dataclass(frozen=True)
class Cluster:
    env: dict[str, str]  # the environment in which sbatch and its kin talk to this cluster

    def run(self, *command: str) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def jobs(self) -> dict[str, str]:
        """State of every job that waits or runs, by its number (`12`, or `12_3` for a task of an array)."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}


def missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


def wait_until(holds, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not after {seconds} s: {what}"
        time.sleep(0.1)


def _free_ports(count: int) -> int:
    """The first of `count` adjacent free ports."""
    for _ in range(100):
        first = random.SystemRandom().randrange(20000, 31000)
        with ExitStack() as sockets:
            try:
                for port in range(first, first + count):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError(f"no {count} adjacent free ports")


@contextmanager
def _daemon(command: list[str], env: dict[str, str], log: Path) -> Iterator[None]:
    # pdeathsig: also ends when the tests are killed.
    with log.open("w") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_orphans(conf: Path) -> None:
    """Job steps outlive slurmd by design: end those that carry this cluster's SLURM_CONF and a job's number."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environ.read_bytes().split(b"\0")
            name = (environ.parent / "comm").read_text().strip()
        except OSError:  # ended meanwhile
            continue
        in_job = name == "slurmstepd" or any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
        if in_job and f"SLURM_CONF={conf}".encode() in variables and int(environ.parent.name) != os.getpid():
            os.kill(int(environ.parent.name), signal.SIGKILL)


@contextmanager
def cluster(nodes: int = 2) -> Iterator[Cluster]:
    """A cluster of `nodes` virtual nodes of 4 CPUs, with partitions `main` and `preempt`: jobs in `main` oust those in
    `preempt`, which go back into the queue."""
    assert not missing(), f"not installed: {', '.join(missing())}"
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as directory, ExitStack() as daemons:
        root = Path(directory)
        root.chmod(0o755)  # munged insists: nobody else may write, but may pass
        for part in ("state", "spool", "munge", "bin"):
            (root / part).mkdir(mode=0o755)
        port = _free_ports(nodes + 1)
        conf = root / "slurm.conf"
        conf.write_text(
            _CONF.format(
                root=root,
                host=socket.gethostname(),
                user=getpass.getuser(),
                port=port,
                nodes=nodes,
                first=port + 1,
                last=port + nodes,
            )
        )
        sacct = root / "bin/sacct"
        sacct.write_text(_SACCT.format(python=sys.executable))
        sacct.chmod(0o755)
        key = root / "munge/key"
        key.write_bytes(random.SystemRandom().randbytes(128))
        key.chmod(0o600)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
        env = inherited | {"SLURM_CONF": str(conf), "PATH": f"{root}/bin:{_PATH}"}

        munge = [f"--{name}-file={root}/munge/{name}" for name in ("log", "pid", "seed")]
        munge += [f"--key-file={key}", f"--socket={root}/munge/socket"]
        daemons.enter_context(_daemon(["munged", "--foreground", "--force", *munge], env, root / "munged.log"))
        wait_until((root / "munge/socket").exists, 10, f"munged is up; see {root}")
        daemons.callback(_end_orphans, conf)
        daemons.enter_context(_daemon(["slurmctld", "-D", "-c", "-f", str(conf)], env, root / "slurmctld.log"))
        for node in range(1, nodes + 1):
            command = ["slurmd", "-D", "-N", f"n{node}", "-f", str(conf)]
            daemons.enter_context(_daemon(command, env, root / f"slurmd.n{node}.log"))

        def idle() -> bool:
            shown = subprocess.run(
                ["sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D"], env=env, capture_output=True, text=True
            )
            return shown.stdout.strip() == str(nodes)

        wait_until(idle, 30, f"{nodes} nodes are idle; {(root / 'slurmctld.log').read_text()[-2000:]}")
        up = Cluster(env)
        try:
            yield up
        finally:
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=env, timeout=10)
            wait_until(lambda: not set(up.jobs().values()) & {"RUNNING", "COMPLETING"}, 15, "all jobs have ended")


if __name__ == "__main__":
    with cluster() as running:
        sys.exit(subprocess.run(sys.argv[1:], env=running.env).returncode)
