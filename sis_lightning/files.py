"""Files that are written completely or not at all, and digests of their contents."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sis_lightning.errors import DataError


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, completely or not at all; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all: first to disk under another name, which is then renamed.

    Args:
        path: File to write; its folder is created.
        content: The bytes of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file must not share the temporary file.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)  # after an error, such as a full disk


def sync(path: Path) -> None:
    """Waits until what was written into a file is on disk, so that it is there after a power failure.

    Raises:
        OSError: If the system fails to write it.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until a folder's new and renamed entries are on disk, if the system can do so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest(content: Any) -> str:
    """Returns the SHA-256 of plain data; the order of keys does not matter."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_files(files: Iterable[Path], root: Path) -> str:
    """Returns the SHA-256 of the names and contents of files; their order does not matter.

    Args:
        files: The files.
        root: Folder to which the names are relative.

    Raises:
        DataError: If a file cannot be read.
    """
    parts = []
    for path in files:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        try:
            with path.open("rb") as file:
                parts.append(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def digest_listing(files: Iterable[str | Path], root: Path) -> str:
    """Returns the SHA-256 of the names and sizes of all files, and of the contents of some of them.

    For data sets that would take minutes to read: it reads the sixteen largest files, such as annotations, and 512
    evenly spaced ones.

    Args:
        files: The files; their order does not matter.
        root: Folder to which the names are relative.

    Raises:
        DataError: If a file cannot be read.
    """
    # As text: of a million files, a Path each takes longer than all the rest. The order is that of Paths, part by part.
    ordered = sorted((str(path) for path in files), key=lambda path: path.replace(os.sep, "\0"))
    try:
        sizes = {path: os.stat(path).st_size for path in ordered}  # noqa: PTH116  without a Path each
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    read = {*sorted(ordered, key=lambda path: -sizes[path])[:16], *ordered[:: max(1, len(ordered) // 512)]}
    prefix = str(root / "_")[:-1]  # empty for the current folder

    def name(path: str) -> str:
        inside = path.startswith(prefix) and (prefix or not path.startswith(os.sep))
        return path[len(prefix) :].replace(os.sep, "/") if inside else path.rpartition(os.sep)[2]

    return digest([sorted([name(path), sizes[path]] for path in ordered), digest_files(map(Path, read), root)])
