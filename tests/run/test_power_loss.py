"""A machine that loses its power: the file system holds only what was written to the disk by then."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Disk:
    """An ext4 file system in a file, of which `cut` keeps what has reached the file: what a power failure leaves."""

    def __init__(self, folder: Path) -> None:
        self.image, self.place = folder / "disk.img", folder / "disk"
        self.place.mkdir()

    def make(self) -> bool:
        """Whether this machine allows it."""
        lines = [
            ["truncate", "--size=100M", str(self.image)],
            ["mkfs.ext4", "-q", "-F", str(self.image)],
            # Nothing is written in the background, in the middle of a copy.
            ["mount", "-o", "loop,commit=600", str(self.image), str(self.place)],
        ]
        if any(shutil.which(line[0]) is None for line in lines):
            return False
        return all(subprocess.run(line, capture_output=True, check=False).returncode == 0 for line in lines)

    def cut(self, process: int) -> None:
        """Stops a process, and puts the state of the disk in the place of the file system."""
        os.kill(process, signal.SIGSTOP)
        threads = Path(f"/proc/{process}/task")
        while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in threads.glob("*/stat")):
            time.sleep(0.01)  # one that waits for the disk does so to the end
        left = self.image.with_suffix(".left")
        shutil.copyfile(self.image, left)
        self.unmount()
        subprocess.run(["mount", "-o", "loop", str(left), str(self.place)], check=True, capture_output=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.place)], check=False, capture_output=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    if not disk.make():
        disk.unmount()
        pytest.skip("may not mount a file system in a file here")
    yield disk
    disk.unmount()


def test_a_run_resumes_exactly_after_a_power_failure(command, small, tmp_path, disk):
    options = [*small("seg_voc", steps=24), "--checkpoint_every", "1", "--trainer.check_val_every_n_epoch", "2"]
    line = [sys.executable, "-m", "sis_lightning", "fit", *options, "--run_dir", str(disk.place / "run")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        assert run.stdout is not None
        while "step     13/24" not in run.stdout.readline():
            assert run.poll() is None
        disk.cut(run.pid)
        run.kill()
    left = {path.name for path in (disk.place / "run/checkpoints").glob("*.ckpt")}
    assert "last.ckpt" in left
    assert command("fit", *options, "--run_dir", "whole").code == 0
    again = command("fit", *options, "--run_dir", disk.place / "run", "--resume", "auto")
    assert again.code == 0, again.err
    assert "skipped" not in again.out
    folders = (Path("whole"), disk.place / "run")
    one, other = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for folder in folders)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert len({(folder / "csv/fit/metrics.csv").read_text() for folder in folders}) == 1
    points = []
    for folder in folders:
        events = EventAccumulator(str(folder / "tensorboard/fit")).Reload()
        points.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    assert str(points[0]) == str(points[1])  # NaN equals nothing
