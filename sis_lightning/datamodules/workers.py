"""The worker processes of data loaders: which signals they answer, how they fail, and how they end.

Workers have nothing to save, so nobody has to wait for them when their process ends, whatever the reason.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import multiprocessing
import multiprocessing.queues
import multiprocessing.util  # registers its own function for the exit, which has to run after ours
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sis_lightning.errors import DataError

#: Exit codes of a worker that cannot hand over a batch, see `run.library_errors`.
TOO_MANY_OPEN_FILES, NO_SHARED_MEMORY = 71, 72
NO_SHARED_MEMORY_MESSAGE = (
    "the shared memory (/dev/shm), by which workers send batches, is full\n"
    "  Give a container more of it (docker run --shm-size 8g), or choose --data.num_workers 0"
)
#: Fewer do not suffice for the batches under way; a loader that runs out of them prints tracebacks of torch's threads.
_LEAST_OPEN_FILES = 128
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED_MEMORY = 2**20  # bytes: a photograph
_GRACE = 0.3  # seconds


def initialize(_: int) -> None:
    """Sets up a worker; for the `worker_init_fn` of a DataLoader."""
    # A cluster's signals reach workers too, but only the run answers them, and it still needs its workers then.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A thread sends the batches. By default it drops one that it cannot send, for which the run would wait for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_leave)  # type: ignore[attr-defined]


def require_resources() -> None:
    """Checks that workers can send batches at all, and lets this process have as many open files as the system allows.

    Raises:
        DataError: If the shared memory is full, or the limit of open files is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than its hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_OPEN_FILES:
        raise DataError(too_many_open_files())
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free < _LEAST_SHARED_MEMORY:
        raise DataError(NO_SHARED_MEMORY_MESSAGE)


def too_many_open_files() -> str:
    """The message for a process that may not open as many files as it needs."""
    return (
        f"too many open files: this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}\n"
        "  Enter `ulimit -n 4096` before the command, or choose fewer --data.num_workers"
    )


def _leave(error: BaseException, _: Any) -> None:
    """Ends the worker whose batch could not be sent; the exit code gives the reason to the run."""
    text = str(error)
    if (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)) or "Too many open files" in text:
        os._exit(TOO_MANY_OPEN_FILES)
    if "shared memory" in text or "No space left on device" in text:
        os._exit(NO_SHARED_MEMORY)
    multiprocessing.util.get_logger().error("a batch cannot be sent", exc_info=error)
    os._exit(1)


# If the system refuses to start workers, torch's iterator is left without this attribute, which its destructor reads.
_MultiProcessingDataLoaderIter._shutdown = True


@atexit.register
def end_workers() -> None:
    """Ends the workers that are still alive when their process ends.

    Python sends SIGTERM to them and then waits without a limit, but workers ignore this signal.
    """
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if not children:
        return
    with contextlib.suppress(ValueError):  # outside of the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as killed
    for child in children:
        child.terminate()
    for child in children:
        child.join(_GRACE)
        if child.is_alive():
            child.kill()
            child.join()
