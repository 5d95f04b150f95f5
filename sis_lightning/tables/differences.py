"""Differences between rows of a table: intervals that do not assume equal variances, and a correction for many rows."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

#: Fewer seeds than these, on either side, allow no statement.
MIN_SEEDS = 5
#: Confidence of intervals, and of the statement that there is a difference.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Difference between the means of two independent sets of seeds (Welch's t-test).

    Attributes:
        mean: The difference.
        low: Lower end of its 95 % confidence interval; None if a side has a single seed.
        high: Upper end of the interval.
        p: Probability of a difference as large by chance; after `holm`, corrected for the number of comparisons. None
            if a side has fewer than `MIN_SEEDS` seeds.
        seeds: Number of seeds of each side.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: tuple[int, int]

    @property
    def shown(self) -> bool | None:
        """Whether a difference is shown, with 5 % of error in all comparisons together; None for too few seeds."""
        return None if self.p is None else self.p < 1 - CONFIDENCE


def welch(values: Collection[float], baseline: Collection[float]) -> Difference | None:
    """The difference between the means of two sets of values; None if one of them is empty.

    Args:
        values: Values of a row, one for each seed.
        baseline: Values of the row that it is compared with.
    """
    if not values or not baseline:
        return None
    mean, sizes = statistics.fmean(values) - statistics.fmean(baseline), (len(values), len(baseline))
    if min(sizes) < 2:
        return Difference(mean, None, None, None, sizes)
    from scipy.special import stdtr, stdtrit  # takes a third of a second, which tables without seeds need not wait for

    parts = [statistics.variance(side) / len(side) for side in (values, baseline)]
    error = math.sqrt(sum(parts))
    if error == 0:  # the seeds of each side agree to the last digit
        return Difference(mean, mean, mean, float(mean == 0) if min(sizes) >= MIN_SEEDS else None, sizes)
    freedom = sum(parts) ** 2 / sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error)) if min(sizes) >= MIN_SEEDS else None
    return Difference(mean, mean - half, mean + half, p, sizes)


def holm(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """Corrects the probabilities of several differences for their number (Holm 1979)."""
    tested = sorted((d.p, place) for place, d in enumerate(differences) if d is not None and d.p is not None)
    corrected, largest = list(differences), 0.0
    for rank, (p, place) in enumerate(tested):
        largest = min(1.0, max(largest, p * (len(tested) - rank)))
        difference = differences[place]
        assert difference is not None
        corrected[place] = dataclasses.replace(difference, p=largest)
    return corrected
