"""Whose a run's directory is, and what a fit that begins in it goes on from."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sis_lightning.config.compose import FREE_TO_CHANGE, changes
from sis_lightning.errors import DataError, UsageError
from sis_lightning.run.checkpoints import RUN, newest_checkpoint, read_checkpoint

_held: list[tuple[FileLock, Path, list[Path]]] = []


def claim(folder: Path) -> None:
    """Makes `folder` this process' own until `release`, or the process' end, however it ends.

    Raises:
        UsageError: Where another fit has it.
        DataError: Where it cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    # Not by mere existence of a file, where a disk has no locks: a killed job's would bar it on every other host.
    # A second, as whoever asks whether a fit runs here holds it for an instant.
    lock = FileLock(folder / ".lock", timeout=1, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"another fit is writing into {folder}: wait for it, or take another directory (--run_dir DIR)"
        ) from None
    except NotImplementedError:  # a disk without locks: nobody can be told from another
        return
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP):
            return
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    _held.append((lock, folder, made))


def release() -> None:
    """Gives all claimed directories up; those in which nothing was written are gone as they came."""
    while _held:
        lock, folder, made = _held.pop()
        lock.release()
        if made and [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()


def remove_run(folder: Path) -> None:
    """Removes what a fit and what came after it wrote; a job's script and output stay."""
    for part in ("checkpoints", "csv", "tensorboard", "pictures", "predictions", "test_results"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for path in (folder / "test.json", folder / "starts.json", *folder.glob("config*.yaml")):
        path.unlink(missing_ok=True)


def set_aside(folder: Path, path: Path, run: dict[str, Any]) -> None:
    """Renames what a run wrote after the checkpoint `path` of its own, from which it now takes another course."""
    if path.resolve().parent != (folder / "checkpoints").resolve():
        return
    for other in path.parent.glob("*.ckpt"):
        if other.name == "best.ckpt" or other.samefile(path):
            continue
        with contextlib.suppress(DataError):
            if read_checkpoint(other).get(RUN, {}).get("batches", 0) > run["batches"]:
                other.rename(other.with_name(f"{other.name}.set-aside"))


def point_to_resume(
    folder: Path, resume: str, config: dict[str, Any], changed: bool, report: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a fit goes on from, and what it holds of its run; None where it begins anew.

    Args:
        folder: The run's directory.
        resume: `auto` (the directory's run, if any), `never`, or a checkpoint.
        config: The fit's, resolved.
        changed: Whether to go on under another configuration than the checkpoint's.
        report: Gets lines for people: files that are skipped, settings that differ.

    Raises:
        UsageError: Where the directory has a run that is not to be gone on with, or the configuration differs: in what.
        DataError: Where the checkpoint is missing, damaged, or none that a fit can go on from.
    """
    checkpoints = folder / "checkpoints"
    if resume == "never":
        if any(checkpoints.glob("*.ckpt")):
            raise UsageError(
                f"{folder} holds a run already.\n"
                "  Go on with it: --resume auto. Another directory: --run_dir DIR.\n"
                "  Start afresh and lose the old one: --overwrite true."
            )
        return None
    path = newest_checkpoint(checkpoints, report) if resume == "auto" else Path(resume)
    if path is None:
        return None
    content = read_checkpoint(path)
    if RUN not in content:
        raise DataError(f"{path} holds weights for test and predict, but is not a point to go on from")
    run: dict[str, Any] = content[RUN]
    shown = [
        f"  {key}: {before!r} before, {now!r} now"
        for key, before, now in changes(run["config"], config)
        if not key.startswith(FREE_TO_CHANGE)
    ]
    if shown and not changed:
        more = [f"  and {len(shown) - 2} more"] if len(shown) > 2 else []
        raise UsageError(
            "\n".join([f"{path} was written under another configuration:", *shown[:2], *more])
            + "\n  Go on all the same: --resume_changed true."
        )
    if shown:
        report("\n".join(["going on under a changed configuration, no longer the same run:", *shown]))
    return path, run
