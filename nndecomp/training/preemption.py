"""SIGTERM and SIGUSR2 mean: save and go. SLURM sends them before it takes a machine away.

The trainer listens itself, since submitit ignores SIGTERM. Once the state is saved the signal goes on to whoever listened
before (submitit's SIGUSR2 handler requeues the job); if nobody ends the process, `Preempted` does.

After SIGTERM in a SLURM job the process waits to be killed. SLURM requeues a preempted job when it kills it at the end of
the grace time; one that ends by itself before that counts as finished, and is not started again.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
log = logging.getLogger(__name__)
SLURM_KILLS_WITHIN_S = 3600  # longer than any grace time we know of; a job that nobody kills ends after it
EXIT_STATUS = 75  # EX_TEMPFAIL: try again. Started again with the same output directory, the run goes on.


class Preempted(SystemExit):
    """The run was told to stop and has saved its state. Unless caught, the process exits with status 75."""

    def __init__(self, sentence: str) -> None:
        super().__init__(EXIT_STATUS)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class Preemption:
    """Which signal has arrived, if any. Asked once a step, so that a step is never cut in two."""

    received: signal.Signals | None = None

    def __init__(self) -> None:
        self.before = {}

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def leave(self, sentence: str) -> None:
        assert self.received is not None, "no signal was received"
        before = self.before[self.received]
        if callable(before):
            before(self.received, None)
        if self.received is signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
            log.info("%s; SLURM is left to end or requeue the job", sentence)
            time.sleep(SLURM_KILLS_WITHIN_S)
        raise Preempted(sentence)


@contextmanager
def preemption() -> Iterator[Preemption]:
    """Listens while inside. Only the main thread may; elsewhere signals are left to whoever started the thread."""
    listening = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield listening
        return
    listening.before = {number: signal.signal(number, listening.receive) for number in SIGNALS}
    try:
        yield listening
    finally:
        for number, handler in listening.before.items():
            signal.signal(number, handler)
