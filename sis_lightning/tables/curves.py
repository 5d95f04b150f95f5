"""Learning curves: smoothed, and summarised over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

#: The curve of each training batch, which is noisy; others are of whole splits.
NOISY = "train/loss"
#: Share of the points of a noisy curve that a mean is taken over.
WINDOW = 0.05


def over_seeds(
    found: Sequence[Mapping[int, float]], window: float = 0.0
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Summarises the curves of one metric over several seeds.

    Args:
        found: Value by step, for each seed.
        window: Share of the points around each, in [0, 1), over which a mean is taken as well.

    Returns:
        The steps that all seeds have, and for each step the mean, the lowest and the highest value, over the seeds and
        within the window.
    """
    steps = sorted(set.intersection(*({*curve} for curve in found))) if found else []
    if not steps:
        return [], np.empty(0), np.empty(0), np.empty(0)
    values = np.array([[curve[step] for step in steps] for curve in found])
    reach = int(window * len(steps) / 2)
    # At the ends the window has fewer points.
    around = [values[:, max(0, place - reach) : place + reach + 1] for place in range(len(steps))]
    mean, low, high = (np.array([function(part) for part in around]) for function in (np.mean, np.min, np.max))
    return steps, mean, low, high
