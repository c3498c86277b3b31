"""How far training is, how fast, and for how long still: a bar on a terminal, a line every half minute elsewhere.

sae_k16:  42%|████████▍           | 2.10M/5.00M [00:41<00:57, 51.0ktok/s, loss 0.213]
sae_k16: 42 % (2.10M of 5.00M tokens), 51.0k tokens/s, 57 s left, loss 0.213
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_SECONDS = 30


def duration(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {whole:02} s" if minutes else f"{whole} s"


def amount_of(n: int) -> str:
    """5, 400, 1.64k, 2.10M."""
    return str(n) if n < 1000 else tqdm.format_sizeof(n)


class Progress:
    def __init__(self, description: str, n_tokens: int, done_tokens: int, unit: str = "tokens") -> None:
        """done_tokens: those of earlier starts of the same run, which count for how far but not for how fast."""
        self.description, self.n_tokens, self.unit = description, n_tokens, unit
        self.first = self.done = done_tokens
        self.note = ""
        self.started = self.spoken = time.monotonic()
        self.bar = tqdm(
            total=n_tokens,
            initial=done_tokens,
            desc=description,
            unit={"tokens": "tok"}.get(unit, f" {unit}"),
            unit_scale=n_tokens >= 1000,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.bar.disable:
            self.say()

    def advance(self, n_tokens: int) -> None:
        self.done += n_tokens
        self.bar.update(n_tokens)
        if self.bar.disable and time.monotonic() - self.spoken >= LINE_EVERY_SECONDS:
            self.say()

    def show(self, note: str) -> None:
        """What is said beside the numbers until the next call, e.g. the loss."""
        self.note = note
        self.bar.set_postfix_str(note, refresh=False)

    def say(self) -> None:
        self.spoken = time.monotonic()
        speed = (self.done - self.first) / (self.spoken - self.started)
        left = (
            [f"{duration((self.n_tokens - self.done) / speed)} left"] if speed > 0 and self.done < self.n_tokens else []
        )
        amount = (
            f"{100 * self.done // self.n_tokens} % ({amount_of(self.done)} of {amount_of(self.n_tokens)} {self.unit})"
        )
        parts = [amount, f"{tqdm.format_sizeof(speed)} {self.unit}/s", *left, *([self.note] if self.note else [])]
        print(f"{self.description}: {', '.join(parts)}", file=sys.stderr, flush=True)


class Waits:
    """Seconds spent waiting for data, by all who read one stream in turn: the first who asks for a batch waits for all."""

    def __init__(self) -> None:
        self.seconds = 0.0


class Clock:
    """Tokens per second, and the share of the time spent waiting for data, from lap to lap.

    Waiting is what the host spends on the next batch: the target's own pass where nothing runs ahead of it. On a GPU, whose
    work is only sent off, it is what sending takes.
    """

    def __init__(self, waits: Waits | None = None) -> None:
        self.waits = Waits() if waits is None else waits
        self.started, self.waited = time.monotonic(), self.waits.seconds
        self.tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.waits.seconds += time.monotonic() - began

    def count(self, n_tokens: int) -> None:
        self.tokens += n_tokens

    def lap(self) -> dict[str, float]:
        now, waited = time.monotonic(), self.waits.seconds
        seconds = now - self.started
        row = {
            "tokens_per_s": round(self.tokens / seconds, 1),
            "waiting_share": round((waited - self.waited) / seconds, 4),
            "seconds": round(seconds, 4),
        }
        self.started, self.tokens, self.waited = now, 0, waited
        return row
