"""The directory of a run: who may write into it, and from which checkpoint a fit resumes."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sis_lightning.errors import DataError, UsageError
from sis_lightning.run import history
from sis_lightning.run.recipe import effective_changes
from sis_lightning.run.resume.checkpoints import ResumePoint, newest_checkpoint, own_checkpoints, resume_point
from sis_lightning.tasks.checkpoint_files import read_checkpoint

_held: list[tuple[FileLock, Path, list[Path]]] = []


def lock(folder: Path) -> None:
    """Reserves `folder` for this process until `unlock`, or until the process ends, however it ends.

    Raises:
        UsageError: If another fit holds the lock.
        DataError: If the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    # Not by the mere existence of a file on disks without locks: a killed job's file would bar every other host.
    # A timeout of a second, since `status` holds the lock for an instant.
    file_lock = FileLock(folder / ".lock", timeout=1, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file_lock.acquire()
    except Timeout:
        raise UsageError(
            f"another fit is writing into {folder}: wait for it, or choose another directory (--run_dir DIR)"
        ) from None
    except NotImplementedError:  # a disk without locks
        return
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP):
            return
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    _held.append((file_lock, folder, made))


def unlock() -> None:
    """Releases all locks of this process, and removes folders that were made for them and stayed empty."""
    while _held:
        file_lock, folder, made = _held.pop()
        file_lock.release()
        if made and folder.is_dir() and [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()


def remove_run(folder: Path) -> None:
    """Removes what fit, test and predict wrote; a job's script and output stay."""
    for part in ("checkpoints", "csv", "tensorboard", "images", "predictions", "test_results"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for path in (folder / "test.json", folder / history.FILE, *folder.glob("config*.yaml")):
        path.unlink(missing_ok=True)


def set_aside(folder: Path, path: Path, point: ResumePoint, report: Callable[[str], None]) -> None:
    """Renames the checkpoints that a resumed run would overwrite: later ones, and those that cannot be read.

    Args:
        folder: The run's directory.
        path: The checkpoint from which it is resumed.
        point: The resume point in that checkpoint.
        report: Is called with a line for each file that is renamed.
    """
    checkpoints = folder / "checkpoints"
    foreign = path.resolve().parent != checkpoints.resolve()
    best = checkpoints / "best.ckpt"
    for other in [*own_checkpoints(checkpoints), *([best] if best.is_file() else [])]:
        if not foreign and other.samefile(path):
            continue
        try:
            content = read_checkpoint(other, mmap=True)
        except DataError:
            keep = True
        else:
            later = resume_point(content)
            keep = foreign or (other != best and (later is None or later.batches > point.batches))
        if keep:
            report(f"kept {other} as {_rename_aside(other).name}")


def _rename_aside(path: Path) -> Path:
    """Renames a file to one that ends in `.set-aside`, beside those that were set aside before."""
    aside, number = path.with_name(f"{path.name}.set-aside"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{number}.set-aside")
    return path.rename(aside)


def find_resume_point(
    folder: Path, resume: str, config: dict[str, Any], changed: bool, report: Callable[[str], None]
) -> tuple[Path, ResumePoint] | None:
    """The checkpoint from which a fit resumes, and its resume point.

    Args:
        folder: The run's directory.
        resume: `auto` (the directory's run, if there is one), `never`, or a checkpoint file.
        config: The fit's resolved configuration.
        changed: Whether to resume under another configuration than the checkpoint's.
        report: Is called with lines to print: files that are skipped, options that differ.

    Returns:
        None if the fit starts from the beginning.

    Raises:
        UsageError: If the directory holds a run that is not to be resumed, or the configuration differs.
        DataError: If the checkpoint is missing, damaged, or has no resume point, or none of the run's can be read.
    """
    checkpoints = folder / "checkpoints"
    if resume == "never":
        if own_checkpoints(checkpoints) or (checkpoints / "best.ckpt").exists():
            raise UsageError(
                f"{folder} holds a run already.\n"
                "  Resume it: --resume auto. Use another directory: --run_dir DIR.\n"
                "  Start from the beginning and lose the old run: --overwrite true."
            )
        return None
    path = newest_checkpoint(checkpoints, report) if resume == "auto" else Path(resume)
    if path is None:
        return None
    point = resume_point(read_checkpoint(path, mmap=True))
    if point is None:
        raise DataError(f"{path} holds weights for test and predict, but a run cannot be resumed from it")
    shown = [f"  {key}: {before!r} before, {now!r} now" for key, before, now in effective_changes(point.config, config)]
    if shown and not changed:
        more = [f"  and {len(shown) - 2} more"] if len(shown) > 2 else []
        raise UsageError(
            "\n".join([f"{path} was written under another configuration:", *shown[:2], *more])
            + "\n  Resume it all the same: --resume_changed true."
        )
    if shown:
        report("\n".join(["resuming under a changed configuration, no longer the same run:", *shown]))
    return path, point
