"""The resources of the machine that this process may use. Imports nothing slow."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
