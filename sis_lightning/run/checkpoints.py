"""Checkpoints that are on disk whole or not at all, and the newest of a run that really loads."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from sis_lightning.errors import DataError

Checkpoint = dict[str, Any]

#: Under this key of a checkpoint lies what a resume needs beyond Lightning's own.
RUN = "run"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, to disk, and renames it: a kill at any byte leaves the last one whole.

    torch's format is a zip with a CRC-32 of every record, which `read_checkpoint` verifies.
    """

    def save_checkpoint(self, checkpoint: Checkpoint, path: Any, storage_options: Any = None) -> None:
        """Writes `path`.

        Raises:
            DataError: Where the disk is full or not to be written; the last checkpoint is still there.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer wraps what the disk says
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or _reason(error)
            raise DataError(
                f"{path} could not be written: {reason}\n  The checkpoints before it are still there: "
                "make room, and go on with --resume auto."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = None) -> Any:
        """Reads `path`, plain data alone."""
        return torch.load(path, map_location=map_location, weights_only=True)


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def sync_folder(folder: Path) -> None:
    """Brings a rename to disk, where the system lets folders be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads and verifies a checkpoint of ours.

    Raises:
        DataError: Where the file is missing, torn, altered, or of another kind: which.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()
        if broken is not None:
            raise DataError(f"{path}: damaged (checksum of '{broken}')")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes zipfile and torch raise
        size = path.stat().st_size
        raise DataError(f"{path}: damaged, {size:,} bytes ({type(error).__name__}: {error})"[:300]) from None
    if not isinstance(content, dict) or "state_dict" not in content or "global_step" not in content:
        raise DataError(f"{path}: not a checkpoint of ours")
    return content


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint with the most steps among a run's that loads and can be gone on from.

    Args:
        folder: The run's `checkpoints/`.
        report: Gets a line for each file that is skipped.
    """
    found: list[tuple[int, bool, Path]] = []
    for path in sorted(folder.glob("*.ckpt")):
        if path.name == "best.ckpt":
            continue
        try:
            content = read_checkpoint(path)
        except DataError as error:
            report(f"skipped {error}")
            continue
        if RUN not in content:
            report(f"skipped {path}: it cannot be gone on from (written by an older release)")
            continue
        found.append((content[RUN]["batches"], path.name == "last.ckpt", path))
    return max(found)[2] if found else None
