"""Files that are there whole or not at all, and digests that tell what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sis_lightning.errors import DataError


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file beside its place, to disk, and then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file must not share what lies beside it.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # as where the disk is full


def digest(content: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_files(files: Iterable[Path], root: Path) -> str:
    """SHA-256 of files' names below `root` and of every byte in them, whatever their order.

    Raises:
        DataError: Where one cannot be read.
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


def digest_listing(files: Iterable[Path], root: Path) -> str:
    """SHA-256 of the names below `root` and the sizes of all files, and of every byte of some.

    For data sets that take minutes to read: of the sixteen largest files, as annotations are, and of 512 spread evenly.

    Raises:
        DataError: Where one cannot be read.
    """
    ordered = sorted(files)
    try:
        sizes = {path: path.stat().st_size for path in ordered}
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    read = {*sorted(ordered, key=lambda path: -sizes[path])[:16], *ordered[:: max(1, len(ordered) // 512)]}
    names = {path: path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name for path in ordered}
    return digest([sorted([names[path], sizes[path]] for path in ordered), digest_files(read, root)])
