"""Checkpoint files: found by a run's folder, and read only if they are intact."""

from __future__ import annotations

import errno
import hashlib
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sis_lightning.backbones.weights import load_tensors, why_not_loaded
from sis_lightning.errors import DataError, nearest


class UnreadableCheckpointError(DataError):
    """A checkpoint that the system failed to read, such as with an I/O error: the file itself may be whole."""


def find_checkpoint(path: Path, which: str = "last") -> Path:
    """Finds the checkpoint that a path means.

    Args:
        path: A checkpoint, a run's folder, or the folder of its checkpoints.
        which: Name of the checkpoint in a folder: `last` or `best`.

    Raises:
        DataError: If there is none; the message lists what is there, or the nearest names.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = f"; {nearest(path.name, beside)}" if beside else f"; the folder {path.parent} does not exist either"
        raise DataError(f"{path}: there is no such checkpoint or run folder{hint}")
    for folder in (path, path / "checkpoints"):
        if (folder / f"{which}.ckpt").is_file():
            return folder / f"{which}.ckpt"
    there = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.ckpt"))
    hint = f"it holds {', '.join(there[:5])}: name one of these" if there else "there is no .ckpt file in it"
    raise DataError(f"{path}: no checkpoint {which}.ckpt in this folder; {hint}")


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, in the order of their names; it does not depend on the file that they are from."""
    content = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of this package as plain data, and verifies the checksum of every record.

    Args:
        path: The file.
        mmap: Whether tensors are read from the file only when they are used.

    Raises:
        DataError: If the file is missing, damaged, or of another kind.
        UnreadableCheckpointError: If the system fails to read it, so that nobody knows whether it is whole.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a file")
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()
        if broken is not None:
            raise DataError(f"{path}: damaged (checksum of '{broken}')")
        content = load_tensors(path, mmap=mmap)
    except DataError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file") from None
    except MemoryError:
        raise UnreadableCheckpointError(f"{path}: cannot be read (the memory does not suffice)") from None
    except Exception as error:  # a damaged file makes zipfile and torch raise almost anything
        failure = _failure_of_disk(path, error)
        if failure is not None:
            raise UnreadableCheckpointError(f"{path}: cannot be read ({failure})") from None
        size = path.stat().st_size
        raise DataError(
            f"{path}: damaged, or not a checkpoint ({size:,} bytes; {why_not_loaded(error)})"[:300]
        ) from None
    if not isinstance(content, dict) or "state_dict" not in content or "global_step" not in content:
        raise DataError(f"{path}: not a checkpoint of sis-lightning: it has no state_dict or no global_step")
    return content


def _failure_of_disk(path: Path, error: Exception) -> str | None:
    """Why the system could not read a file; None if it can read it all, so that its content is what is wrong."""
    # A damaged zip makes zipfile seek to impossible offsets, which is EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return error.strerror or str(error)
    try:  # torch hides the system's error in one of its own
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    except OSError as failure:
        return failure.strerror or str(failure)
    return None
