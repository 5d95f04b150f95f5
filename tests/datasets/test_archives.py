"""Data on disk equals its published archives, byte by byte, or the file that differs is named."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from sis_lightning.datasets.download import Archive, extract, md5, verify_files
from sis_lightning.errors import DataError
from sis_lightning.run.run import Run

#: ImageNet's archives are archives of archives, which `check-data` does not open: its data is never called verified.
NESTED = ("cls_imagenet",)
TASKS = sorted(path.stem for path in (Path(__file__).parents[2] / "tasks").glob("*.yaml") if path.stem not in NESTED)


@pytest.fixture(params=TASKS)
def published(request, synthetic, tmp_path, publish) -> tuple[str, Path, Path]:
    """A task, a copy of the synthetic data, and the archives that it is as if published in."""
    shutil.copytree(synthetic, tmp_path / "copy")
    publish(request.param, tmp_path / "archives")
    return request.param, tmp_path / "copy", tmp_path / "archives"


def test_only_data_that_equals_the_archives_is_verified(published, command):
    task, copy, folder = published
    line = ["check-data", "--config", f"tasks/{task}.yaml", "--data.root", copy, "--annotations-only"]
    assert "verified" not in command(*line).out
    result = command(*line, "--archives", folder)
    assert result.code == 0, result.err
    assert re.search(r"verified by .*\n +test: \[[0-9a-f]{64}\]\n +train: \[[0-9a-f]{64}\]\n$", result.out)
    # One byte of one file.
    module = Run.from_arguments(["--config", f"tasks/{task}.yaml", "--data.root", str(copy)]).datamodule
    module.setup("fit")
    module.setup("test")
    # Of annotations, another byte is found before, as it makes them unreadable.
    for victim in sorted(path for path in module.datasets["test"].files() if path.suffix in (".jpg", ".png"))[:1]:
        good = victim.read_bytes()
        victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        changed = command(*line, "--archives", folder)
        assert changed.code == 1
        assert victim.name in changed.err
        assert "is not the published file" in changed.err
        assert "verified" not in changed.out
        victim.write_bytes(good)
    # Another archive by the same name, and none.
    archive = next(folder.iterdir())
    archive.write_bytes(archive.read_bytes() + b" ")
    other = command(*line, "--archives", folder)
    assert other.code == 1
    assert f"{archive.name}: MD5 is" in other.err
    archive.unlink()
    missing = command(*line, "--archives", folder)
    assert missing.code == 1
    assert f"{archive.name} is missing" in missing.err
    assert "http" in missing.err


def test_files_that_are_in_no_archive_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").write_bytes(b"x")
    (tmp_path / "a/y.jpg").write_bytes(b"y")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a/x.jpg", b"x")
    archive = Archive("https://example.org/a.zip", md5(tmp_path / "a.zip"), "a")
    verify_files([tmp_path / "a/x.jpg"], tmp_path, [archive], tmp_path)
    with pytest.raises(DataError, match=r"y\.jpg and so on, 1 file\(s\), are in none of a\.zip"):
        verify_files(sorted((tmp_path / "a").iterdir()), tmp_path, [archive], tmp_path)


def test_data_without_published_archives_cannot_be_verified(command, tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "mine" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "mine" / split / name / "x.png")
    line = ["check-data", "--config", "tasks/cls_cifar100.yaml", "--data", "image_folder", "--data.root", "mine"]
    result = command(*line, "--archives", ".")
    assert result.code == 2
    assert "not of a published data set" in result.err


def test_two_archives_are_merged_into_one_folder(tmp_path):
    """VOC 2007 comes in two."""
    for name, file in (("trainval", "a.jpg"), ("test", "b.jpg")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for path, content in ((f"kit/2007/pictures/{file}", b"1"), (f"kit/2007/{name}.txt", b"2")):
                entry = tarfile.TarInfo(path)
                entry.size = 1
                archive.addfile(entry, io.BytesIO(content))
        extract(tmp_path / f"{name}.tar", tmp_path, "kit/2007")
    found = {path.relative_to(tmp_path / "kit").as_posix() for path in (tmp_path / "kit").rglob("*") if path.is_file()}
    assert found == {"2007/pictures/a.jpg", "2007/pictures/b.jpg", "2007/trainval.txt", "2007/test.txt"}
    assert not list(tmp_path.glob(".*unpacking"))
