"""What a checkout and signatures say about records: whether their commits exist, and who signed them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from sis_lightning.errors import UsageError
from sis_lightning.tables.judge import Evidence, environments


def unknown_commits(evidence: Sequence[Evidence]) -> list[str]:
    """Records whose commit is no ancestor of this checkout's, each with that commit.

    Args:
        evidence: The records.

    Returns:
        Sentences; none where the package is installed, or the clone is shallow, so that nobody can tell.
    """
    if _git("rev-parse", "--is-shallow-repository") != "false":
        return []
    found: dict[str, bool] = {}
    problems = []
    for piece in evidence:
        for commit in {entry.code.commit for entry in environments(piece.record)} - {None}:
            name = str(commit)
            if name not in found:
                found[name] = _git("merge-base", "--is-ancestor", name, "HEAD") is not None
            if not found[name]:
                problems.append(f"{piece.name}: its commit {name[:12]} is not in the history of this checkout")
    return problems


def unsigned(records: Path, key: Path) -> list[str]:
    """Records that are not signed with a key, by minisign's signature beside each (`NAME.json.minisig`).

    Args:
        records: Folder of records.
        key: File with the public key.

    Raises:
        UsageError: If minisign is not installed, or there is no such key.
    """
    if not key.is_file():
        raise UsageError(f"--public-key {key}: there is no such file")
    problems = []
    for path in sorted(records.glob("*.json")):
        line = ["minisign", "-V", "-q", "-p", str(key), "-m", str(path)]
        try:
            result = subprocess.run(line, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UsageError("--public-key needs minisign, which is not installed here") from None
        if result.returncode:
            problems.append(f"{path.name}: not signed with {key}: {(result.stderr or result.stdout).strip()}")
    return problems


def _git(*arguments: str) -> str | None:
    """What git prints in the package's checkout; None if it fails, or there is none."""
    line = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
