"""Times of systems that made single steps in turn: medians, ratios within a round, and intervals of both.

A round is one step of each system, forwards in one round and backwards in the next, so that whatever else the machine does
meets all alike. A ratio is taken within a round, its median over rounds.

    the interval of a median holds all but a share of 5% of what n rounds could have shown, whatever the distribution: from the
    j-th smallest to the j-th largest, the largest j with  2 P(Binomial(n, 1/2) < j) <= 0.05;  fewer than 6 rounds: all of them
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, floor, log10
from statistics import median

from nndecomp.config.schema import SizeConfig

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Subject:
    """Who makes steps."""

    library: str
    version: str
    activation: str
    backend: str | None = None  # of this library's kernels
    variant: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.library, self.backend, self.activation, self.variant) if part)


@dataclass(frozen=True)
class Times:
    """Of one system at one size, one entry a round."""

    subject: Subject
    size: str
    wall: list[float]  # seconds
    cpu: list[float]  # seconds of all threads of its process
    peak_bytes: int  # of the process, beyond what it had before the system was made
    floor: list[float]  # seconds of the floor in the same rounds
    roofline: list[float] | None = None  # and of what a GPU could do


@dataclass(frozen=True)
class Floor:
    """What no step at this size can do without, in seconds a round, and what memory does beside it."""

    name: str
    size: SizeConfig
    encoder: list[float]  # x @ W_enc.T, dense
    optimiser: list[float]  # torch's fused Adam over all parameters
    copy: list[float]  # of `copied` bytes
    cache: list[float]  # of `cached` bytes, which are in the cache
    product: list[float]  # of two square matrices
    copied: int
    cached: int
    side: int
    bits: int  # of the numbers that are multiplied
    on: str  # threads, or a GPU

    @property
    def wall(self) -> list[float]:
        return [a + b for a, b in zip(self.encoder, self.optimiser, strict=True)]

    @property
    def encoder_rate(self) -> float:
        """FLOP/s of the product."""
        return encoder_flops(self.size) / median(self.encoder)

    @property
    def optimiser_rate(self) -> float:
        """Bytes/s: the gradient read, parameter and both momenta read and written, 4 bytes each."""
        return 28 * self.size.n_parameters / median(self.optimiser)

    @property
    def cache_rate(self) -> float:
        """Bytes/s, read and written."""
        return 2 * self.cached / median(self.cache)

    @property
    def product_rate(self) -> float:
        """FLOP/s of the square product."""
        return 2 * self.side**3 / median(self.product)

    @property
    def roofline(self) -> list[float]:
        """Seconds of a step that is held up by nothing but what the device can do at most, in each round:

        the encoder's product              at the rate of the square product
        parameters and both momenta        read and written once, at the rate of the copy: no gradient is
        the rows gathered for active features    at the rate of the copy in the cache: to decode, for the gradients of codes, and for
                                                 those of decoder and encoder rows
        """
        return [
            encoder_flops(self.size) * product / (2 * self.side**3)
            + 24 * self.size.n_parameters * copy / (2 * self.copied)
            + self.bits // 8 * gathered(self.size) * cache / (2 * self.cached)
            for product, copy, cache in zip(self.product, self.copy, self.cache, strict=True)
        ]

    @property
    def copy_rate(self) -> float:
        """Bytes/s, read and written."""
        return 2 * self.copied / median(self.copy)


@dataclass(frozen=True)
class Speed:
    """Of one way of doing what others of its group do, the first of them what can hardly be done faster."""

    group: str
    name: str
    amount: int  # of each round
    unit: str
    wall: list[float]  # seconds


def encoder_flops(size: SizeConfig) -> int:
    return 2 * size.batch_tokens * size.d_model * size.n_features * size.n_layers


def gathered(size: SizeConfig) -> int:
    """Numbers of rows that k active features a token read: one row that is read, and three as wide as what is written."""
    widths = sum(size.d_model + 3 * n * size.d_model for n in range(1, size.n_layers + 1))
    return size.batch_tokens * size.k * widths


def sparse_flops(size: SizeConfig) -> int:
    """Forward and backward of one step that touches active features alone, k a token: the dense encoder, its gradient, and
    decoding, the gradients of codes and of decoder rows, which are as wide as what they write."""
    return encoder_flops(size) + 2 * gathered(size)


def dense_flops(size: SizeConfig) -> int:
    """The same with every feature: codes and their gradients, and two more products for each pair of layers."""
    pairs = size.n_layers * (size.n_layers + 1) // 2
    return 2 * size.batch_tokens * size.d_model * size.n_features * (2 * size.n_layers + 3 * pairs)


@dataclass(frozen=True)
class Median:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


def number(value: float) -> str:
    """Three digits or more, never a power of ten."""
    return f"{value:,.{max(0, 2 - floor(log10(abs(value))))}f}" if value else "0"


def rank(n: int) -> int:
    """j of n values, counted from 1."""
    below, j = 0.0, 0
    while 2 * (below + comb(n, j) / 2**n) <= 1 - CONFIDENCE:
        below += comb(n, j) / 2**n
        j += 1
    return max(1, j)


def middle(values: Sequence[float]) -> Median:
    ordered, j = sorted(values), rank(len(values))
    return Median(median(ordered), ordered[j - 1], ordered[-j])


def ratio(over: Sequence[float], under: Sequence[float]) -> Median:
    """Of two systems' times, round by round."""
    return middle([a / b for a, b in zip(over, under, strict=True)])
