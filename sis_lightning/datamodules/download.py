"""Fetches published archives: resumed where they broke off, checked, and never half there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock

from sis_lightning.errors import DataError

_CHUNK = 1 << 20


def md5(path: Path) -> str:
    """The MD5 of a file, as publishers give it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download(url: str, target: Path, checksum: str, *, attempts: int = 5) -> Path:
    """Fetches `url` into `target`; a broken transfer goes on from `target.part`, now or on the next call.

    Args:
        url: Where the archive is.
        target: Where it goes; there already with the right checksum, nothing is fetched.
        checksum: MD5, as published.
        attempts: How often a broken transfer is taken up again, a little later each time.

    Returns:
        `target`.

    Raises:
        DataError: Where the server cannot be reached or what it sends has another checksum.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):  # two runs on one shared disk fetch once
        return _download(url, target, checksum, attempts)


def _download(url: str, target: Path, checksum: str, attempts: int) -> Path:
    if target.is_file() and md5(target) == checksum:
        return target
    part = target.with_name(target.name + ".part")
    for attempt in range(attempts):
        try:
            _transfer(url, part)
            break
        except (OSError, urllib.error.URLError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                break  # nothing is left to send: the part is whole
            if attempt == attempts - 1:
                got = part.stat().st_size if part.exists() else 0
                raise DataError(
                    f"download of {url} broke off after {got:,} bytes: {error}\n"
                    f"  Run the command again to go on from there, or fetch it elsewhere and put it at {target}"
                ) from None
            time.sleep(min(0.5 * 2**attempt, 10))
    found = md5(part)
    if found != checksum:
        part.unlink()
        raise DataError(f"download of {url}: MD5 is {found}, published is {checksum}: not kept. Try again.")
    part.replace(target)
    return target


def extract(archive: Path, folder: Path, member: str) -> Path:
    """Unpacks a tar archive so that `folder / member` is there whole or not at all.

    Raises:
        DataError: Where the archive is damaged, would write outside of `folder`, or lacks `member`.
    """
    unpacked = folder / f".{archive.name}.unpacking"
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        shutil.rmtree(unpacked, ignore_errors=True)
        raise DataError(f"{archive}: cannot be unpacked ({error})") from None
    if not (unpacked / member).exists():
        shutil.rmtree(unpacked, ignore_errors=True)
        raise DataError(f"{archive}: holds no '{member}'")
    (folder / member).parent.mkdir(parents=True, exist_ok=True)
    (unpacked / member).replace(folder / member)
    shutil.rmtree(unpacked, ignore_errors=True)
    return folder / member


def _transfer(url: str, part: Path) -> None:
    """Appends what `part` lacks of `url`."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        with part.open("ab" if resumed else "wb") as file:
            received = 0
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    if length is not None and received < int(length):
        raise OSError(f"connection closed after {received:,} of {int(length):,} bytes")
