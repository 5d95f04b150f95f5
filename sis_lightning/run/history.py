"""A run's history: when it was started, how far each start came and how it ended, in `history.json` of its directory.

Imports nothing heavy.
"""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, TypeAdapter, ValidationError

from sis_lightning.errors import DataError
from sis_lightning.files import write_text

FILE = "history.json"
#: Environment variable with the file that a job's script looks for; see `requeue`.
REQUEUE_FILE = "SIS_REQUEUE_FILE"
#: Maximum number of consecutive starts without a step.
STARTS_WITHOUT_A_STEP = 3


class Start(BaseModel):
    """One start of a run.

    Attributes:
        began: Time in ISO 8601, UTC.
        host: Name of the machine.
        job: Job number in SLURM; None outside of it.
        from_step: Optimizer steps that were done before this start.
        step: Optimizer steps done, by the newest checkpoint or at the end.
        epoch: Epochs completed at that time.
        ended: Time of the end; None while it is running, and if it was killed.
        how: How it ended: `finished`, `stopped early`, `requeued`, a signal's or an error's name; None as for `ended`.
    """

    began: str
    host: str
    job: str | None = None
    from_step: int
    step: int
    epoch: int = 0
    ended: str | None = None
    how: str | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds that it ran; None if it was killed, so that nobody knows."""
        if self.ended is None:
            return None
        return (datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.began)).total_seconds()


_STARTS = TypeAdapter(list[Start])


def job_id() -> str | None:
    """This job as SLURM's commands name it: for an array, the element."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def read_history(run: Path) -> list[Start]:
    """All starts of a run, the oldest first.

    Args:
        run: The run's directory.

    Raises:
        DataError: If the file is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return []
    try:
        return _STARTS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: not a run history ({error.errors()[0]['msg']})") from None


def _write(run: Path, starts: Sequence[Start]) -> None:
    write_text(run / FILE, json.dumps([start.model_dump() for start in starts], indent=1) + "\n")


def begin(run: Path, step: int, epoch: int = 0) -> None:
    """Appends an entry that begins at this step and epoch."""
    start = Start(began=_now(), host=socket.gethostname(), job=job_id(), from_step=step, step=step, epoch=epoch)
    _write(run, [*read_history(run), start])


def reach(run: Path, step: int, epoch: int) -> None:
    """Sets the step and epoch that the newest start has reached."""
    _update(run, step=step, epoch=epoch)


def end(run: Path, how: str) -> None:
    """Sets the end of the newest start."""
    _update(run, ended=_now(), how=how)


def _update(run: Path, **values: object) -> None:
    starts = read_history(run)
    if starts:
        _write(run, [*starts[:-1], starts[-1].model_copy(update=values)])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def requeue(run: Path, step: int, max_restarts: int) -> str:
    """Puts this job back into SLURM's queue; or lets its script do so when all processes have ended.

    The scripts of `submit` name a file in `SIS_REQUEUE_FILE`, which is made then. Jobs with other scripts are requeued
    at once.

    A job is not requeued if it was requeued `max_restarts` times already, or if `STARTS_WITHOUT_A_STEP` starts in a row
    made no step: it would be requeued for ever. On a busy cluster one start may well spend its whole time on imports.

    Args:
        run: The run's directory.
        step: Optimizer steps done by now.
        max_restarts: Maximum number of requeues of a job.

    Returns:
        A sentence that says whether the job is requeued, and why not.
    """
    job = job_id()
    if job is None or not re.fullmatch(r"\d+(_\d+)?", job):
        return "Not in a SLURM job, so nothing was requeued."
    count = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if count >= max_restarts:
        return f"Job {job} was requeued {count} times already, and is not requeued again."
    starts = read_history(run)
    idle = 0
    for start in reversed(starts):
        if (step if start is starts[-1] else start.step) > start.from_step:
            break
        idle += 1
    if idle >= STARTS_WITHOUT_A_STEP:
        return f"Job {job} made no step in its last {idle} starts, and is not requeued: give it more --time."
    note = f"restart {count + 1}"
    if idle:
        note += f"; no step since its start, try {idle} of {STARTS_WITHOUT_A_STEP}"
    end(run, "requeued")
    if asked := os.environ.get(REQUEUE_FILE):
        Path(asked).touch()
        return f"Job {job} is requeued by its script ({note})."
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:  # such as in a container without SLURM's commands
        end(run, "requeue failed")
        return f"scontrol cannot be run here ({error.strerror}): submit the job again, and it resumes."
    if result.returncode:
        end(run, "requeue failed")
        return f"scontrol requeue {job} failed: {result.stderr.strip()}"
    return f"Job {job} is requeued ({note})."


def is_running(run: Path) -> bool:
    """Whether a fit holds the lock of the run's directory, on this or another machine of a shared disk."""
    lock = run / ".lock"
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0, fallback_to_soft=False):
            return False
    except (PermissionError, NotImplementedError):  # another user's, or a disk without locks: nobody can tell
        return False
    except (Timeout, OSError):
        return True


def newest_metrics(run: Path) -> dict[str, str]:
    """The newest value of each column of the run's `metrics.csv`."""
    path = run / "csv" / "fit" / "metrics.csv"
    newest: dict[str, str] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                newest.update({key: value for key, value in row.items() if value})
    return newest
