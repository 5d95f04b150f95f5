"""What is known of a run's starts, in `starts.json` of its directory. Imports nothing heavy."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sis_lightning.errors import DataError
from sis_lightning.files import write_text

Start = dict[str, Any]


def job_id() -> str | None:
    """This job as SLURM's commands name it: of an array, the element."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def read_starts(run: Path) -> list[Start]:
    """All starts of a run, the oldest first.

    Raises:
        DataError: Where the file is damaged.
    """
    path = run / "starts.json"
    if not path.is_file():
        return []
    try:
        starts: list[Start] = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    return starts


def begin(run: Path, step: int) -> None:
    """Adds a start."""
    starts = read_starts(run)
    starts.append(
        {
            "began": _now(),
            "host": socket.gethostname(),
            "job": job_id(),
            "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "from_step": step,
            "ended": None,
            "how": None,
        }
    )
    write_text(run / "starts.json", json.dumps(starts, indent=1) + "\n")


def end(run: Path, how: str) -> None:
    """Says how the newest start ended."""
    starts = read_starts(run)
    if starts:
        starts[-1].update(ended=_now(), how=how)
        write_text(run / "starts.json", json.dumps(starts, indent=1) + "\n")


def seconds(start: Start) -> float | None:
    """How long a start ran; None where nobody knows, as it was killed."""
    if start["ended"] is None:
        return None
    return (datetime.fromisoformat(start["ended"]) - datetime.fromisoformat(start["began"])).total_seconds()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def requeue(run: Path, step: int, max_restarts: int) -> str:
    """Puts this job back into SLURM's queue; returns what was done, for people.

    Not where there is no job, where it was done `max_restarts` times already, or where this start made no step: it
    would go on so for ever.
    """
    job = job_id()
    if job is None or not re.fullmatch(r"\d+(_\d+)?", job):
        return "not in a SLURM job: nothing to put back into the queue"
    count = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if count >= max_restarts:
        return f"job {job} was put back into the queue {count} times already: not again"
    starts = read_starts(run)
    if starts and step <= starts[-1]["from_step"]:
        return f"job {job} made no step since its last start: not put back into the queue"
    end(run, "requeued")
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:  # as in a container that has not SLURM's commands
        end(run, "requeue failed")
        return f"scontrol cannot be run here ({error.strerror}): submit again, it goes on"
    if result.returncode:
        end(run, "requeue failed")
        return f"scontrol requeue {job} failed: {result.stderr.strip()}"
    return f"job {job} is back in the queue (restart {count + 1})"


def is_running(run: Path) -> bool:
    """Whether a fit holds the run's directory, on this or another machine of a shared disk."""
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


def last_row(run: Path) -> dict[str, str]:
    """The newest step and epoch in the run's metrics, and the newest value of each metric."""
    path = run / "csv" / "fit" / "metrics.csv"
    newest: dict[str, str] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                newest.update({key: value for key, value in row.items() if value})
    return newest
