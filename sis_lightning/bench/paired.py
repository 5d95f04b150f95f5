"""Times two or more functions alternately, and gives the ratio of their speeds with its confidence interval."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import torch

from sis_lightning.errors import UsageError


@dataclass(frozen=True)
class Ratio:
    """Ratio of two speeds over several rounds.

    Attributes:
        median: Median of the rounds' ratios.
        low: Lower bound of the median, with a confidence of at least 95 % together with `high` (order statistics).
        high: Upper bound of the median.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        """The ratio from those of the rounds."""
        values, n = sorted(ratios), len(ratios)
        # The median lies outside the k-th smallest and largest with probability 2 P(Binomial(n, ½) < k).
        outside, k = 2 / 2**n, 1
        while k < n / 2 and outside + 2 * comb(n, k) / 2**n <= 0.05:
            outside += 2 * comb(n, k) / 2**n
            k += 1
        return cls(statistics.median(values), values[k - 1], values[n - k])

    @property
    def verdict(self) -> str:
        """`faster` or `slower`, or `no difference shown` if the interval contains 1."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference shown"

    def __str__(self) -> str:
        """The median and its interval, such as `1.080 (1.050-1.100)`."""
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call in each round.

    Attributes:
        wall: Elapsed time.
        cpu: Processor time of all threads of the process.
    """

    wall: list[float]
    cpu: list[float]

    def faster_than(self, other: Timing) -> Ratio:
        """How many times as fast as another function, by elapsed time."""
        return Ratio.of([theirs / mine for mine, theirs in zip(self.wall, other.wall, strict=True)])


def waits_for(device: str) -> Callable[[], object]:
    """A function that returns when all work queued on a device is done.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        UsageError: If torch has no such device.
    """
    if not device.startswith("cuda"):
        return lambda: None
    if not torch.cuda.is_available():
        raise UsageError(f"device is {device}, but torch finds no GPU here")
    return torch.cuda.synchronize


def time_alternately(
    works: Sequence[Callable[[], object]],
    *,
    rounds: int = 11,
    seconds: float = 0.5,
    warmup: int = 2,
    wait: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """Times functions alternately: A B, B A, A B and so on.

    Args:
        works: Functions that do their work once.
        rounds: Number of rounds; with fewer than 6, no interval has a confidence of 95 %.
        seconds: Approximate duration of each function in a round, which repeats it accordingly.
        warmup: Number of calls before the first round, in which compilers compile.
        wait: Function that waits for work queued on a device.

    Returns:
        The timing of each function.
    """
    repeats = []
    for work in works:
        for _ in range(warmup):
            work()
        wait()
        begun = time.perf_counter()
        work()
        wait()
        repeats.append(max(1, round(seconds / max(time.perf_counter() - begun, 1e-9))))
    timings = [Timing([], []) for _ in works]
    for number in range(rounds):
        order = list(zip(works, repeats, timings, strict=True))
        # Every second round is in reverse order, so that no function always follows the same one.
        for work, count, timing in order if number % 2 == 0 else reversed(order):
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                work()
            wait()
            timing.wall.append((time.perf_counter() - wall) / count)
            timing.cpu.append((time.process_time() - cpu) / count)
    return timings
