"""Published archives: their download (resumed after interruptions, checked), and comparison of files with them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock
from torchvision.datasets.voc import DATASET_YEAR_DICT

from sis_lightning.errors import DataError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """An archive as its publisher offers it.

    Attributes:
        url: Address of the archive.
        md5: Checksum of the archive.
        folder: Folder in the archive that holds the data set.
        fetched: Whether `download` of the DataModules includes it; it does not include very large archives.
    """

    url: str
    md5: str
    folder: str
    fetched: bool = True

    @property
    def file(self) -> str:
        """File name of the archive."""
        return self.url.rpartition("/")[2]


def voc_archives(*years: str) -> tuple[Archive, ...]:
    """Pascal VOC's archives.

    Args:
        years: Torchvision's names of the years: `2007`, `2007-test`, `2012`.
    """
    entries = [DATASET_YEAR_DICT[year] for year in years]
    return tuple(Archive(entry["url"], entry["md5"], entry["base_dir"]) for entry in entries)


def md5(path: Path) -> str:
    """MD5 of a file in hexadecimal digits, as publishers give it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download(url: str, target: Path, checksum: str, *, attempts: int = 5) -> Path:
    """Downloads a file; an interrupted transfer is resumed from `target.part`, in this call or the next one.

    Args:
        url: Address of the file.
        target: File to write. If it exists and has the right checksum, nothing is downloaded.
        checksum: MD5, as published.
        attempts: Number of attempts to complete an interrupted transfer, with growing delays.

    Returns:
        `target`.

    Raises:
        DataError: If the server cannot be reached, or what it sends has another checksum.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):  # two runs on one shared disk download once
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
                break  # nothing is left to send: the part is complete
            if attempt == attempts - 1:
                got = part.stat().st_size if part.exists() else 0
                raise DataError(
                    f"download of {url} broke off after {got:,} bytes: {error}\n"
                    f"  Run the command again to resume, or download it elsewhere and put it at {target}"
                ) from None
            time.sleep(min(0.5 * 2**attempt, 10))
    found = md5(part)
    if found != checksum:
        part.unlink()
        raise DataError(f"download of {url}: MD5 is {found}, published is {checksum}: not kept. Try again.")
    part.replace(target)
    return target


def extract(archive: Path, folder: Path, member: str) -> Path:
    """Unpacks a tar archive so that `folder / member` exists completely or not at all.

    Args:
        archive: The tar archive.
        folder: The folder to unpack into.
        member: Folder in the archive that must exist.

    Returns:
        `folder / member`.

    Raises:
        DataError: If the archive is damaged, would write outside of `folder`, or has no `member`.
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
        raise DataError(f"{archive}: has no '{member}'")
    (folder / member).parent.mkdir(parents=True, exist_ok=True)
    if (folder / member).is_dir():  # another archive of the same data set was unpacked before: VOC 2007 has two
        for path in sorted((unpacked / member).rglob("*")):
            target = folder / member / path.relative_to(unpacked / member)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                path.replace(target)
    else:
        (unpacked / member).replace(folder / member)
    shutil.rmtree(unpacked, ignore_errors=True)
    return folder / member


def verify_files(files: Iterable[Path], home: Path, archives: Sequence[Archive], folder: Path) -> None:
    """Checks that files are, byte by byte, those of published archives.

    Args:
        files: Files on disk; they are found in the archives by their own and their folder's name.
        home: The folder of the data set.
        archives: The archives in which the data set is published.
        folder: The folder that holds the archives.

    Raises:
        DataError: If an archive is missing or has another checksum, or a file is in none or differs.
    """
    wanted = {_name(path.relative_to(home) if path.is_relative_to(home) else path): path for path in files}
    for archive in archives:
        path = folder / archive.file
        if not path.is_file():
            raise DataError(f"{path} is missing, so the data cannot be verified. It is published at\n  {archive.url}")
        if (found := md5(path)) != archive.md5:
            raise DataError(f"{path}: MD5 is {found}, published is {archive.md5}: another archive, or a damaged one")
        for name, member in _members(path):
            own = wanted.pop(name, None) or wanted.pop(name.rpartition("/")[2], None)
            if own is None:
                continue
            with own.open("rb") as file:
                if hashlib.file_digest(file, "sha256").digest() != hashlib.file_digest(member, "sha256").digest():  # type: ignore[arg-type]
                    raise DataError(f"{own} is not the published file ({archive.file}: {name})")
    if wanted:
        names = ", ".join(archive.file for archive in archives)
        raise DataError(
            f"{min(wanted.values())} and so on, {len(wanted)} file(s), are in none of {names}.\n"
            "  Leave out the files that were added, or train on the published splits only."
        )


def _name(path: Path) -> str:
    """A file's name with its folder's, which does not depend on where an archive was unpacked."""
    return "/".join(path.parts[-2:])


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of an archive in its own order; each must be read before the next one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as member:
                        yield _name(Path(info.filename)), member
    else:
        with tarfile.open(path, "r|*") as tar:
            for entry in tar:
                content = tar.extractfile(entry)
                if entry.isfile() and content is not None:
                    yield _name(Path(entry.name)), content


def _transfer(url: str, part: Path) -> None:
    """Appends the rest of `url` to `part`."""
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
