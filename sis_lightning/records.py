"""What a run measured, as evidence: on which data, with which weights, by which code and configuration.

`test` writes a record, and nothing else does. It carries a checksum of itself, so that one that was edited afterwards
is told from one that was measured. Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sis_lightning import __version__
from sis_lightning.errors import DataError
from sis_lightning.files import write_text

Record = dict[str, Any]
_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "segmentation-models-pytorch", "pycocotools", "numpy")
_SCHEMA = 1


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


def write_record(path: Path, content: dict[str, Any]) -> Record:
    """Adds to what was measured when, by which code and on which machine, and a checksum; writes it.

    Args:
        path: Of the file.
        content: `metrics`, `data`, `config`, `checkpoint` and so on: plain data without NaN.
    """
    record: Record = {
        "schema": _SCHEMA,
        **content,
        "code": {"sis_lightning": __version__, **_commit()},
        "versions": {package: version(package) for package in _PACKAGES if _installed(package)},
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    record["checksum"] = digest(record)
    write_text(path, json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return record


def read_record(path: Path) -> Record:
    """Reads a record.

    Raises:
        DataError: Where it is none, of another release's form, or was edited after it was measured.
    """
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(record, dict) or "checksum" not in record or "metrics" not in record:
        raise DataError(f"{path}: not a record of sis-lightning test")
    if record.get("schema") != _SCHEMA:
        raise DataError(f"{path}: a record of form {record.get('schema')}, this release reads {_SCHEMA}: test again")
    if digest({key: value for key, value in record.items() if key != "checksum"}) != record["checksum"]:
        raise DataError(f"{path}: edited after it was measured (its checksum is another): test again")
    return record


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _commit() -> dict[str, Any]:
    """The commit of the code, and whether it was changed since; nothing where it is not a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            line = ["git", "-C", str(here), *arguments]
            result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # A package that is installed below another project's checkout is not that project's code.
    if git("ls-files", "--error-unmatch", str(here / "__init__.py")) is None:
        return {}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", str(here)))}
