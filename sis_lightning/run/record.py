"""What a run measured, as evidence: on which data, with which weights, by which code and configuration.

`test` writes a record, and nothing else does. It carries a checksum of itself, so that one that was edited afterwards
is told from one that was measured. Imports nothing heavy.
"""

from __future__ import annotations

import inspect
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sis_lightning import __version__
from sis_lightning.errors import DataError
from sis_lightning.files import digest, digest_files, write_text

Record = dict[str, Any]
_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "segmentation-models-pytorch", "pycocotools", "numpy")
_SCHEMA = 1


def write_record(path: Path, content: dict[str, Any], operators: Mapping[str, type] | None = None) -> Record:
    """Adds to what was measured when, by which code and on which machine, and a checksum; writes it.

    Args:
        path: Of the file.
        content: `metrics`, `data`, `config`, `checkpoint` and so on: plain data without NaN.
        operators: That took part and are not ours.
    """
    record: Record = {
        "schema": _SCHEMA,
        **content,
        "code": code(operators or {}),
        "versions": {package: version(package) for package in _PACKAGES if _installed(package)},
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return write_sealed(path, record)


def read_record(path: Path) -> Record:
    """Reads a record.

    Raises:
        DataError: Where it is none, of another release's form, or was edited after it was measured.
    """
    record = read_sealed(path, "sis-lightning test")
    if "metrics" not in record:
        raise DataError(f"{path}: not a record of sis-lightning test")
    if record.get("schema") != _SCHEMA:
        raise DataError(f"{path}: a record of form {record.get('schema')}, this release reads {_SCHEMA}: test again")
    return record


def write_sealed(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Writes plain data with a checksum of itself; returns it with that."""
    sealed = {**content, "checksum": digest(content)}
    write_text(path, json.dumps(sealed, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return sealed


def read_sealed(path: Path, origin: str) -> dict[str, Any]:
    """Reads what `write_sealed` wrote.

    Args:
        path: Of the file.
        origin: The command that writes such files.

    Raises:
        DataError: Where it is none, or was edited since.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise DataError(f"{path}: not a record of {origin}")
    if digest({key: value for key, value in content.items() if key != "checksum"}) != content["checksum"]:
        raise DataError(f"{path}: edited after it was measured (its checksum is another): {origin} again")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def code(operators: Mapping[str, type]) -> dict[str, Any]:
    """The code that runs: its release, its commit and whether it was changed since, or a digest where it is installed.

    Args:
        operators: That take part and are not ours: of these, a digest of the file in which each is written.
    """
    sources = {name: inspect.getsourcefile(operator) for name, operator in operators.items()}
    digests = {name: digest_files([Path(file)], Path(file).parent) for name, file in sources.items() if file}
    return {"sis_lightning": __version__, **_commit(), **({"operators": digests} if operators else {})}


def _commit() -> dict[str, Any]:
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            line = ["git", "-C", str(here), *arguments]
            result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # A package that is installed below another project's checkout is not that project's code.
    if git("ls-files", "--error-unmatch", str(here / "__init__.py")) is None:
        return {"digest": digest_files([*here.rglob("*.py")], here)}
    # Where git does not answer, nobody can say that nothing was changed.
    return {"commit": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain", "--", str(here)) != ""}
