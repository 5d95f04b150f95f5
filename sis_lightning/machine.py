"""What this process may use of the machine that it runs on. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import os


def usable_cores() -> int:
    """The cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Whether this process now keeps freed memory for its next step, instead of giving it back to the system.

    A step on a CPU frees and takes tens of megabytes again and again; each page that comes back from the system costs a
    fault. With another allocator than glibc's, or where the environment has settings for it, nothing is changed.
    """
    if any(key.startswith("MALLOC_") for key in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))
