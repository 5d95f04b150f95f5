"""Two or more pieces of work in turns: how many times as fast one is, and how sure that is."""

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
    """How many times as fast one side was as another.

    Attributes:
        median: Over the rounds.
        low: And `high`: bounds of the median, of 95 % confidence or more (order statistics).
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        """From one ratio a round."""
        values, n = sorted(ratios), len(ratios)
        # The median lies outside the k-th smallest and largest with probability 2 P(Binomial(n, ½) < k).
        outside, k = 2 / 2**n, 1
        while k < n / 2 and outside + 2 * comb(n, k) / 2**n <= 0.05:
            outside += 2 * comb(n, k) / 2**n
            k += 1
        return cls(statistics.median(values), values[k - 1], values[n - k])

    @property
    def verdict(self) -> str:
        """`faster` or `slower`; where the spread covers 1, neither."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference shown"

    def __str__(self) -> str:
        """Such as `1.08 (1.05-1.10)`."""
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, round by round.

    Attributes:
        wall: By the clock.
        cpu: Of all threads of the process.
    """

    wall: list[float]
    cpu: list[float]

    def faster_than(self, other: Timing) -> Ratio:
        """How many times as fast, by the clock."""
        return Ratio.of([theirs / mine for mine, theirs in zip(self.wall, other.wall, strict=True)])


def waits_for(device: str) -> Callable[[], object]:
    """What returns when `device` has done all that it was asked to.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        UsageError: Where torch has no such device.
    """
    if not device.startswith("cuda"):
        return lambda: None
    if not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no GPU here")
    return torch.cuda.synchronize


def take_turns(
    works: Sequence[Callable[[], object]],
    *,
    rounds: int = 11,
    seconds: float = 0.5,
    warmup: int = 2,
    wait: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """Times pieces of work against each other, A B … A B ….

    Args:
        works: Each does its work once.
        rounds: Turns of each; below 6 no spread is of 95 % confidence.
        seconds: Each turn repeats its work for about so long.
        warmup: Calls before the first round, the compiler's among them.
        wait: Waits for what a device still does.
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
    for turn in range(rounds):
        order = list(zip(works, repeats, timings, strict=True))
        # In both directions by turns, so that nobody always follows the same one.
        for work, count, timing in order if turn % 2 == 0 else reversed(order):
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                work()
            wait()
            timing.wall.append((time.perf_counter() - wall) / count)
            timing.cpu.append((time.process_time() - cpu) / count)
    return timings
