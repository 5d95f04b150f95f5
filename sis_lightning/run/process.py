"""Settings of the process in which a run is started."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import warnings
from collections.abc import Iterator

# Each is about something that is done on purpose here, or that a message of the run says better.
_EXPECTED_WARNINGS = (
    r".*does not have many workers.*",
    r".*when using `ckpt_path`, callbacks used to create the checkpoint need to be provided.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*The dirpath has changed from .* therefore `best_model_score`.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*your dataloader is not resumable.*",
    r".*The `srun` command is available on your system but is not used.*",
)


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Silences expected warnings and Lightning's log for a run, and lets the process keep freed memory."""
    threading.excepthook = _told_elsewhere
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    keep_freed_memory()
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            threading.excepthook = threading.__excepthook__
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _told_elsewhere(arguments: threading.ExceptHookArgs) -> None:
    """Prints the traceback of a thread's exception, unless the main thread raises it too, as it does TensorBoard's."""
    thread = arguments.thread
    if not (thread is not None and type(thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(arguments)


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory for its next step, instead of returning it to the system.

    A step on a CPU frees and allocates tens of megabytes again and again, and each page that comes back from the system
    costs a fault. With another allocator than glibc's, or if the environment configures it, nothing is changed.

    Returns:
        Whether the allocator was changed.
    """
    if any(key.startswith("MALLOC_") for key in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))
