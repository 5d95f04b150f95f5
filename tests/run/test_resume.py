"""Runs that are killed, truncated, moved and resumed: identical to the bit, or refused clearly."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sis_lightning.datamodules.samplers import EpochSampler
from sis_lightning.errors import DataError
from sis_lightning.run.history import begin, reach, read_history, requeue
from sis_lightning.run.record import OptionChange, read_record
from sis_lightning.run.reporting.loggers import MetricsCSV, TensorBoard
from sis_lightning.run.resume.checkpoints import RUN, ResumePoint, SafeCheckpointIO, newest_checkpoint, own_checkpoints
from sis_lightning.run.resume.signals import StopRequest
from sis_lightning.tasks.checkpoint_files import UnreadableCheckpointError, read_checkpoint

ROOT = Path(__file__).parents[2]
RUNS = Path("runs/seg_voc/res2net14-4w4s-basic-8ch/seed0")


def test_twenty_kills_over_the_four_tasks_leave_no_trace(tmp_path):
    line = [
        sys.executable,
        "-m",
        "sis_lightning.bench.soak",
        "--kills",
        "20",
        "--each",
        "5",
        "--steps",
        "10",
        "--out",
        str(tmp_path),
    ]
    result = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["kills"] >= 20
    assert (report["differences"], report["differing"]) == (0, [])


# checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small checkpoint."""
    path = tmp_path_factory.mktemp("checkpoints") / "step-0000003.ckpt"
    point = ResumePoint(
        **{"point": "batch", "progress": {}, "batches": 3, "step": 3, "epoch": 0, "world_size": 1, "devices": [1]},
        **{"csv_rows": 0, "config": {}, "trained_on": [], "command": [], "environments": [], "changed": []},
    )
    content = {"state_dict": {"w": torch.arange(300.0)}, "global_step": 3, RUN: point.model_dump()}
    SafeCheckpointIO().save_checkpoint(content, path)
    return path


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_or_harmless(whole, tmp_path_factory, place, bit):
    content = bytearray(whole.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path = tmp_path_factory.mktemp("flipped") / "a.ckpt"
    path.write_bytes(content)
    try:
        got = read_checkpoint(path)
    except DataError as error:
        assert "a.ckpt" in str(error)  # noqa: PT017 - either of two outcomes is right
        return
    assert torch.equal(got["state_dict"]["w"], torch.arange(300.0))
    assert (got["global_step"], got[RUN]["batches"]) == (3, 3)


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_refused(whole, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("truncated") / "a.ckpt"
    path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with pytest.raises(DataError, match=r"a\.ckpt: damaged"):
        read_checkpoint(path)


def test_the_newest_intact_checkpoint_is_chosen_whatever_the_clock_says(whole, tmp_path):
    lines: list[str] = []
    for step in (3, 7, 9):
        content = torch.load(whole, weights_only=True)
        content[RUN]["batches"] = step
        SafeCheckpointIO().save_checkpoint(content, tmp_path / f"step-{step:07d}.ckpt")
    os.utime(tmp_path / "step-0000003.ckpt", (4e9, 4e9))  # the clock was moved back in between
    assert newest_checkpoint(tmp_path, lines.append) == tmp_path / "step-0000009.ckpt"
    assert lines == []
    assert own_checkpoints(tmp_path) == [tmp_path / f"step-000000{step}.ckpt" for step in (3, 7, 9)]
    (tmp_path / "step-0000009.ckpt").write_bytes(b"")
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "step-0000007.ckpt").read_bytes()[:-900])
    torch.save({"weights": 1}, tmp_path / "step-0000099.ckpt")
    assert newest_checkpoint(tmp_path, lines.append) == tmp_path / "step-0000007.ckpt"
    assert len(lines) == 3
    assert all("skipped" in line for line in lines)
    assert newest_checkpoint(tmp_path / "empty", lines.append) is None
    # With none that is whole, each is named with its reason.
    for step in (3, 7):
        (tmp_path / f"step-000000{step}.ckpt").write_bytes(b"PK")
    with pytest.raises(DataError) as refused:
        newest_checkpoint(tmp_path, lines.append)
    text = str(refused.value)
    assert len(text.splitlines()) == 5
    assert all(path.name in text for path in own_checkpoints(tmp_path))
    assert "damaged" in text
    assert len(lines) == 3


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    def fails(folder: Path) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    monkeypatch.setattr(Path, "iterdir", fails)
    with pytest.raises(UnreadableCheckpointError, match="cannot be read \\(Input/output error\\)"):
        newest_checkpoint(tmp_path, print)


@pytest.fixture
def unreadable(tmp_path) -> Path:
    """A file that opens, and whose reading fails with EIO, as on a failing disk."""
    path = Path("/proc/self/mem")
    try:
        path.read_bytes()
    except OSError as error:
        if error.errno == errno.EIO:
            return path
    pytest.skip("no file here whose reading fails")


def test_a_failing_disk_is_told_from_damage(whole, unreadable, tmp_path, monkeypatch):
    (tmp_path / "step-0000009.ckpt").symlink_to(unreadable)
    with pytest.raises(UnreadableCheckpointError, match=r"9\.ckpt: cannot be read \(Input/output error\)"):
        read_checkpoint(tmp_path / "step-0000009.ckpt")
    # The older one is whole, but the newest may be, too.
    shutil.copy(whole, tmp_path / "step-0000003.ckpt")
    with pytest.raises(UnreadableCheckpointError, match=r"--resume \S*step-0000003\.ckpt"):
        newest_checkpoint(tmp_path, print)

    def out_of_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("torch.load", out_of_memory)
    with pytest.raises(UnreadableCheckpointError, match="memory"):
        read_checkpoint(whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_why(small_disk):
    path = small_disk / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(10)}, "global_step": 1}, path)
    with pytest.raises(DataError, match=r"last\.ckpt could not be written: No space left on device"):
        SafeCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(200_000)}, "global_step": 2}, path)
    assert read_checkpoint(path)["global_step"] == 1
    assert [file.name for file in small_disk.iterdir()] == ["last.ckpt"]


# logs


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 9), min_size=1), min_size=1, max_size=12),
    saves=st.lists(st.integers(0, 11)),
    kept=st.integers(0, 12),
    lost=st.integers(0, 12),
)
def test_a_resumed_log_loses_no_row_and_doubles_none(tmp_path_factory, rows, saves, kept, lost):
    folder = tmp_path_factory.mktemp("log")

    def write(log: MetricsCSV, first: int, last: int) -> None:
        for step in range(first, last):
            log.log_metrics(rows[step], step)
            if step in saves:
                log.save()
        log.save()

    undisturbed = MetricsCSV(folder / "a")
    write(undisturbed, 0, len(rows))
    kept = min(kept, len(rows))
    killed = MetricsCSV(folder / "b")
    write(killed, 0, kept)
    assert killed.rows == kept
    write(killed, kept, min(len(rows), kept + lost))  # written after the checkpoint, and lost with the run
    resumed = MetricsCSV(folder / "b")
    resumed.resume(kept)
    write(resumed, kept, len(rows))

    def values(path: Path) -> list[dict[str, str]]:
        import csv

        with path.open(newline="") as file:
            return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]

    assert values(resumed.path) == values(undisturbed.path)
    # Into another directory: its file has none of the rows before.
    moved = MetricsCSV(folder / "c")
    moved.resume(kept)
    write(moved, kept, len(rows))
    assert moved.rows == len(values(moved.path)) == len(rows) - kept


@settings(max_examples=25, deadline=None)
@given(
    written=st.integers(1, 8),
    kept=st.integers(0, 8),
    back=st.sampled_from([0, 1, 10**6]),
    torn=st.integers(0, 40),
    again=st.booleans(),
)
def test_resumed_events_lose_no_point_and_double_none(tmp_path_factory, written, kept, back, torn, again):
    folder = tmp_path_factory.mktemp("events")
    kept = min(kept, written)
    now = time.time()

    def log(keep: int | None, first: int, last: int, clock: float) -> list[int]:
        logger, sizes = TensorBoard(folder, "fit", keep), []
        with mock.patch("tensorboard.summary.writer.event_file_writer.time.time", return_value=clock):
            sizes.append(logger.experiment and logger.size)
            for step in range(first, last):
                logger.log_metrics({"loss": 0.5 * step, "val/miou": 0.25 * step}, step)
                sizes.append(logger.size)
            logger.finalize("failed")
        return sizes

    sizes = log(0, 0, written, now)
    if torn:  # what a machine that failed has left of the last event
        path = max((folder / "fit").iterdir())
        with path.open("ab") as file:
            file.write(path.read_bytes()[-60 : -60 + torn])
    if again:  # a start that was killed before its first checkpoint
        log(sizes[kept], kept, written, now - back)
    log(sizes[kept], kept, 10, now - 2 * back)
    events = EventAccumulator(str(folder / "fit")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(n, 0.5 * n) for n in range(10)]
    assert [event.step for event in events.Scalars("val/miou")] == list(range(10))
    # A checkpoint of an earlier release does not say how much there was: nothing is removed.
    log(None, 10, 11, now)
    events = EventAccumulator(str(folder / "fit")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(11))
    # Another run starts from the beginning.
    log(0, 0, 1, now)
    assert [event.step for event in EventAccumulator(str(folder / "fit")).Reload().Scalars("loss")] == [0]


# data


@given(
    length=st.integers(1, 40),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    done=st.integers(0, 12),
    grouped=st.booleans(),
)
def test_the_data_continues_with_the_next_sample(length, world, epoch, done, grouped):
    groups = [index % 2 for index in range(length)] if grouped else None
    batch = 2 * world
    done = min(done, length // batch)
    for rank in range(world):
        whole = EpochSampler(length, 5, rank, world, groups, batch)
        whole.set_epoch(epoch)
        rest = EpochSampler(length, 5, rank, world, groups, batch, start=(epoch, done * batch))
        assert list(rest) == list(whole)[2 * done :]
        rest.set_epoch(epoch + 1)
        whole.set_epoch(epoch + 1)
        assert list(rest) == list(whole)
        assert len(rest) == len(whole)


# whole runs


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@contextlib.contextmanager
def start(options: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, which does not outlive the test."""
    line = [sys.executable, "-u", "-m", "sis_lightning", "fit", *map(str, options)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder) as run:
        try:
            yield run
        finally:
            run.kill()


def read_until(run: subprocess.Popen[str], word: str) -> str:
    text = ""
    while word not in text:
        line = run.stdout.readline()
        assert line, text
        text += line
    return text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_the_run_resumes(command, small, tmp_path, number):
    options = [*small("seg_voc", steps=40), "--resume", "auto", "--trainer.check_val_every_n_epoch", "2"]
    assert command("fit", *options, "--run_dir", "undisturbed").code == 0
    with start([*options, "--run_dir", "run"], tmp_path) as run:
        read_until(run, "step      3/40")
        run.send_signal(number)
        rest = run.stdout.read()
        assert run.wait() == 128 + number, rest
    assert f"stopped by {number.name} at step" in rest
    assert "Traceback" not in rest
    stopped = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert 3 <= stopped["global_step"] < 40
    assert read_history(tmp_path / "run")[-1].how == number.name
    again = command("fit", *options, "--run_dir", "run")
    assert again.code == 0, again.err
    assert same(weights(tmp_path / "run"), weights(tmp_path / "undisturbed"))
    logs = [(tmp_path / name / "csv" / "fit" / "metrics.csv").read_text() for name in ("run", "undisturbed")]
    assert logs[0] == logs[1]
    starts = read_history(tmp_path / "run")
    assert [start.how for start in starts] == [number.name, "finished"]
    assert starts[1].from_step == stopped["global_step"]
    assert {path.name for path in (tmp_path / "run").glob("config*.yaml")} == {"config.yaml", "config-2.yaml"}
    # A third start finds nothing to do.
    third = command("fit", *options, "--run_dir", "run")
    assert third.code == 0, third.err
    assert "is finished: 40 steps" in third.out


def test_a_run_under_nohup_ignores_sighup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest()
        request.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        request.deafen()
        assert request.number == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_twice_stops_at_once(small, tmp_path):
    (tmp_path / "impatience.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class TwoInterrupts(Callback):\n"
        "    def on_train_batch_end(self, trainer, *arguments):\n"
        "        if trainer.global_step == 2:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
    )
    callback = ["--trainer.callbacks", "impatience.TwoInterrupts", "--trainer.check_val_every_n_epoch", "100"]
    with start([*small("seg_voc", steps=2000), "--run_dir", "run", *callback], tmp_path) as run:
        text = run.stdout.read()
        assert run.wait() == 130, text
    assert "step      1/2000" in text
    assert "saved" not in text
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert read_history(tmp_path / "run")[-1].how == "SIGINT"


def test_a_damaged_checkpoint_is_skipped_in_favour_of_the_newest_intact_one(command, small, tmp_path):
    options = [*small("seg_voc", steps=6), "--resume", "auto", "--checkpoint_every", "1", "--run_dir", "run"]
    assert command("fit", *options).code == 0
    want = weights(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert len(list(folder.glob("step-*.ckpt"))) == 2
    newest = sorted(folder.glob("step-*.ckpt"))[-1]
    damaged = {path.name: path.read_bytes()[:5000] for path in (folder / "last.ckpt", newest, folder / "best.ckpt")}
    for name, content in damaged.items():
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    (folder / "last.ckpt.set-aside").write_bytes(b"of an earlier resume")
    again = command("fit", *options)
    assert again.code == 0, again.err
    assert again.out.count("skipped") == 2
    assert same(weights(tmp_path / "run"), want)
    aside = {path.name: path.read_bytes() for path in folder.glob("*.set-aside")}
    assert aside == {
        "last.ckpt.set-aside": b"of an earlier resume",
        "last.ckpt.2.set-aside": damaged["last.ckpt"],
        f"{newest.name}.set-aside": damaged[newest.name],
        "best.ckpt.set-aside": damaged["best.ckpt"],
    }
    assert all(name in again.out for name in aside if "2" in name)


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a run that a test of the same process can read."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_run_whose_checkpoints_cannot_be_read_is_not_started_again(command, small, tmp_path, unreadable):
    options = [*small("seg_voc", steps=6), "--checkpoint_every", "1", "--run_dir", "run"]
    assert command("fit", *options).code == 0
    folder = tmp_path / "run" / "checkpoints"
    files = own_checkpoints(folder)
    assert len(files) == 3
    copy = shutil.copy(files[1], tmp_path / "copy.ckpt")
    for path in files:
        content = path.read_bytes()[:5000]
        path.unlink()
        path.write_bytes(content)
    before = tree(tmp_path / "run")
    refused = command("fit", *options, "--resume", "auto")
    assert refused.code == 1
    assert "none of the run's 3 checkpoint(s) can be read; nothing was written" in refused.err
    assert all(f"{path.name}: damaged" in refused.err.replace("\n", "") for path in files)
    assert len(refused.err.strip().splitlines()) <= 6
    assert tree(tmp_path / "run") == before
    # The disk fails to read one, and the others are whole.
    for path in files:
        shutil.copy(copy, path)
    files[-1].unlink()
    files[-1].symlink_to(unreadable)
    before = tree(tmp_path / "run")
    refused = command("fit", *options, "--resume", "auto")
    assert refused.code == 1
    assert f"{files[-1].name}: cannot be read (Input/output error)" in refused.err
    assert tree(tmp_path / "run") == before
    # The user decides to do without it: it stays beside the run.
    resumed = command("fit", *options, "--resume", files[0])
    assert resumed.code == 0, resumed.err
    assert (folder / f"{files[-1].name}.set-aside").is_symlink()


def test_a_resume_from_another_run_keeps_the_checkpoints_of_this_one(command, small, tmp_path):
    options = [*small("seg_voc", steps=4), "--checkpoint_every", "1"]
    for name in ("one", "two"):
        assert command("fit", *options, "--run_dir", name).code == 0
    folder = tmp_path / "two" / "checkpoints"
    before = {f"{path.name}.set-aside": path.read_bytes() for path in folder.glob("*.ckpt")}
    step = own_checkpoints(tmp_path / "one" / "checkpoints")[1]
    result = command("fit", *options, "--run_dir", "two", "--resume", step)
    assert result.code == 0, result.err
    assert {path.name: path.read_bytes() for path in folder.glob("*.set-aside")} == before


def test_a_run_is_not_resumed_by_mistake(command, small, tmp_path):
    options = [*small("seg_voc", steps=5), "--run_dir", "run"]
    assert command("fit", *options).code == 0
    refused = command("fit", *options)
    assert refused.code == 2
    assert "holds a run already" in refused.err
    assert "--resume auto" in refused.err
    changed = command("fit", *options, "--resume", "auto", "--data.crop_size", 48, "--model.background_weight", 0.5)
    assert changed.code == 2
    assert "data.init_args.crop_size: 32 before, 48 now" in changed.err
    assert "background_weight: 0.2 before, 0.5 now" in changed.err
    longer = [*small("seg_voc", steps=7), "--run_dir", "run", "--resume", "auto"]
    assert command("fit", *longer).code == 2
    both = command("fit", *options, "--resume", "auto", "--overwrite", "true")
    assert both.code == 2
    assert "leave one of the two out" in both.err
    missing = command("fit", *options, "--resume", "gone.ckpt")
    assert missing.code == 1
    assert "gone.ckpt: no such file" in missing.err
    best = command("fit", *options, "--resume", "run/checkpoints/best.ckpt")
    assert best.code == 1
    assert "a run cannot be resumed from it" in best.err
    weights_alone = command("fit", *options, "--ckpt_path", "run/checkpoints/last.ckpt")
    assert weights_alone.code == 2
    assert "--resume" in weights_alone.err
    fewer = command("fit", *options, "--resume", "auto", "--data.num_workers", 1, "--trainer.devices", 1)
    assert fewer.code == 0, fewer.err  # these options change nothing in the result
    # From another run's file, into a new directory.
    other = command("fit", *small("seg_voc", steps=5), "--run_dir", "new", "--resume", "run/checkpoints/last.ckpt")
    assert other.code == 0, other.err


@pytest.mark.parametrize("task", ["seg_voc", "det_coco"])
def test_a_run_that_was_killed_in_its_last_validation_finishes(command, small, tmp_path, task):
    """All steps are done then, so that Lightning would take it for finished, without its last metrics."""
    options = [*small(task, steps=4), "--run_dir", "run", "--resume", "auto", "--checkpoint_every", "1"]
    assert command("fit", *options).code == 0
    run = tmp_path / "run"
    logged, ended = (run / "csv/fit/metrics.csv").read_text(), read_checkpoint(run / "checkpoints/last.ckpt")
    newest = max((run / "checkpoints").glob("step-*.ckpt"))
    assert read_checkpoint(newest)[RUN]["point"] == "validation"
    (run / "checkpoints/last.ckpt").unlink()
    os.link(newest, run / "checkpoints/last.ckpt")
    result = command("fit", *options)
    assert result.code == 0, result.err
    assert "length  4 steps" in result.out
    assert "validation at step 4" in result.out
    again = read_checkpoint(run / "checkpoints/last.ckpt")
    assert again[RUN]["point"] == "end"
    assert (run / "csv/fit/metrics.csv").read_text() == logged
    for name, weights in ended["state_dict"].items():
        assert torch.equal(weights, again["state_dict"][name])
    assert read_history(run)[-1].how == "finished"
    # TensorBoard displays each validation once, at the number of steps done before it.
    events = EventAccumulator(str(run / "tensorboard" / "fit")).Reload()
    metric = "val/miou" if task == "seg_voc" else "val/AP"
    steps = [event.step for event in events.Scalars(metric)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]


def test_the_first_configuration_is_kept(command, small, tmp_path):
    options = [*small("seg_voc", steps=4), "--run_dir", "run", "--resume", "auto", "--checkpoint_every", "1"]
    assert command("fit", *options).code == 0
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    resumed = command("fit", *options, "--resume_changed", "true", "--model.background_weight", 0.4)
    assert resumed.code == 0, resumed.err
    assert "no longer the same run" in resumed.out
    first, second = (
        yaml.safe_load((tmp_path / "run" / name).read_text())["model"]["init_args"]["background_weight"]
        for name in ("config.yaml", "config-2.yaml")
    )
    assert (first, second) == (0.2, 0.4)
    # The record of a test says so too.
    tested = command("test", *options, "--model.background_weight", 0.4)
    assert tested.code == 0, tested.err
    training = read_record(tmp_path / "run" / "test.json").training
    assert training.changed == ["model.init_args.background_weight"]


def test_the_training_data_is_recorded_across_a_resume(command, small, synthetic, tmp_path):
    shutil.copytree(synthetic, tmp_path / "mine")
    options = [*small("seg_voc", steps=4), "--data.root", "mine", "--run_dir", "run", "--checkpoint_every", "1"]
    assert command("fit", *options).code == 0
    assert command("test", *options).code == 0
    before = read_record(tmp_path / "run" / "test.json")
    assert len(before.data.trained_on) == 1
    assert before.curves["train/loss"][-1][0] == 4
    assert before.tested_otherwise == {}
    # Resumed on other files of the same names.
    for path in (tmp_path / "mine").rglob("VOC2012/JPEGImages/*.jpg"):
        path.write_bytes(path.read_bytes() + b" ")
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    resumed = command("fit", *options, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "The training data is not what it was before" in resumed.out
    assert command("test", *options, "--trainer.limit_test_batches", 1).code == 0
    after = read_record(tmp_path / "run" / "test.json")
    assert after.data.trained_on[0] == before.data.trained_on[0]
    assert len(after.data.trained_on) == 2
    assert after.data.fingerprint != before.data.fingerprint
    (change,) = after.tested_otherwise.items()
    assert change == ("trainer.limit_test_batches", OptionChange(trained=None, tested=1))


def test_two_fits_do_not_share_a_directory(command, small, tmp_path):
    with start([*small("seg_voc", steps=2000), "--run_dir", "run"], tmp_path) as run:
        read_until(run, "step      2/2000")
        second = command("fit", *small("seg_voc", steps=2000), "--run_dir", "run", "--resume", "auto")
        assert second.code == 2
        assert "another fit is writing into run" in second.err
    third = command("fit", *small("seg_voc", steps=3), "--run_dir", "run", "--overwrite", "true")
    assert third.code == 0, third.err


def test_a_full_disk_stops_a_run_with_a_reason(command, small, small_disk):
    result = command("fit", *small("seg_voc", steps=6), "--run_dir", small_disk / "run", "--checkpoint_every", 1)
    assert result.code == 1
    assert "No space left on device" in result.err
    assert "Traceback" not in result.err


def test_a_read_only_run_directory(command, small, tmp_path, small_disk):
    options = [*small("seg_voc", steps=4), "--run_dir", small_disk / "run", "--resume", "auto"]
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = command("fit", *options)
    assert result.code == 1
    assert f"{small_disk}/run: cannot be written (Read-only file system)" in result.err
    assert "Traceback" not in result.err


def test_overwrite_leaves_nothing_of_the_run_before(command, small, tmp_path):
    options = [*small("seg_voc", steps=4), "--run_dir", "run"]
    for number in (4, 3):
        extra = ["--overwrite", "true", "--model.background_weight", f"0.{number}"]
        assert command("fit", *options, *extra).code == 0
    assert len(read_history(tmp_path / "run")) == 1
    assert [path.name for path in (tmp_path / "run").glob("config*.yaml")] == ["config.yaml"]
    test = command("test", *options)
    assert test.code == 0, test.err
    assert json.loads((tmp_path / "run" / "test.json").read_text())["training"]["restarts"] == 0


def test_overwrite_loses_nothing_if_the_new_run_cannot_start(command, small, tmp_path):
    options = [*small("seg_voc", steps=3), "--run_dir", "run"]
    assert command("fit", *options).code == 0
    nowhere = ["--data.root", tmp_path / "gone", "--data.synthetic", "null"]
    for wrong in (nowhere, *([] if torch.cuda.is_available() else [["--trainer.accelerator", "gpu"]])):
        refused = command("fit", *options, "--overwrite", "true", *wrong)
        assert refused.code in (1, 2), refused.out
        assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
        assert len(read_history(tmp_path / "run")) == 1


def test_a_limit_of_time_is_not_the_end(command, small, tmp_path):
    options = [*small("seg_voc", steps=400), "--run_dir", "run", "--resume", "auto"]
    options += ["--trainer.check_val_every_n_epoch", "1000"]
    stopped = command("fit", *options, "--trainer.max_time", "00:00:00:02", "--checkpoint_every", "1")
    assert stopped.code == 0, stopped.err
    assert "stopped before its end" in stopped.out
    assert read_history(tmp_path / "run")[-1].how == "stopped early"
    again = command("fit", *options, "--resume_changed", "true")
    assert again.code == 0, again.err
    assert read_history(tmp_path / "run")[-1].from_step > 0
    assert read_history(tmp_path / "run")[-1].how == "finished"
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 400


def test_going_back_sets_aside_what_came_later(command, small, tmp_path):
    options = [*small("seg_voc", steps=8), "--run_dir", "run", "--checkpoint_every", "1"]
    assert command("fit", *options).code == 0
    want, folder = weights(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    early = sorted(folder.glob("step-*.ckpt"))[0]
    result = command("fit", *options, "--resume", early)
    assert result.code == 0, result.err
    assert {path.name for path in folder.glob("*.set-aside")} >= {"last.ckpt.set-aside"}
    assert early.is_file() or len(list(folder.glob("step-*.ckpt"))) == 2
    assert same(weights(tmp_path / "run"), want)


def test_another_validation_schedule_is_refused_in_words(command, small, tmp_path):
    options = [*small("seg_voc", steps=12), "--run_dir", "run", "--resume", "auto"]
    assert command("fit", *options).code == 0
    folder = tmp_path / "run" / "checkpoints"
    for path in (folder / "last.ckpt", sorted(folder.glob("step-*.ckpt"))[-1]):
        path.unlink()
    assert read_checkpoint(*folder.glob("step-*.ckpt"))[RUN]["point"] == "validation"
    changed = ["--trainer.check_val_every_n_epoch", "5", "--resume_changed", "true"]
    refused = command("fit", *options, *changed)
    assert refused.code == 2, refused.out
    assert "Keep trainer.check_val_every_n_epoch" in refused.err


def test_a_one_cycle_schedule_is_not_made_longer_by_a_resume(command, small, tmp_path):
    options = [*small("cls_cifar100", steps=6), "--run_dir", "run", "--checkpoint_every", "1"]
    one_cycle = ["--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr", "0.1"]
    cut = [*one_cycle, "--model.lr_scheduler.total_steps", 6]
    assert command("fit", *options, *cut).code == 0
    longer = [*one_cycle, "--model.lr_scheduler.total_steps", 9, "--trainer.max_steps", 9]
    refused = command("fit", *options, *longer, "--resume", "auto", "--resume_changed", "true")
    assert refused.code == 2, refused.out
    assert "ends at step 6, the run at 9" in refused.err
    assert "the checkpoint, which brings its own schedule" in refused.err


def test_a_directory_that_cannot_be_written(command, small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = command("fit", *small("seg_voc"), "--run_dir", "file/run")
    assert result.code == 1
    assert "cannot be written" in result.err


def test_two_devices_resume_to_the_bit_and_one_from_the_same_sample(small, tmp_path):
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    options = [*small("seg_voc", steps=12), "--resume", "auto", "--checkpoint_every", "1"]

    def call(*more: str) -> str:
        with start([*options, *more], tmp_path) as run:
            text = run.stdout.read()
            assert run.wait() == 0, text
        return text

    call("--run_dir", "undisturbed", *ranks)
    call("--run_dir", "run", *ranks)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "last.ckpt").unlink()
    for path in sorted(folder.glob("step-*.ckpt"))[1:]:
        path.unlink()
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    call("--run_dir", "run", *ranks)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "undisturbed"))
    text = call("--run_dir", "alone")
    assert "no longer bit-identical" in text
    content = read_checkpoint(tmp_path / "alone" / "checkpoints" / "last.ckpt")
    assert content["global_step"] == 12
    assert content[RUN]["devices"] == [2, 1]


# requeueing


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """A command of that name that writes down its arguments."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "asked"


def test_a_job_is_requeued_a_bounded_number_of_times(scontrol, tmp_path, monkeypatch):
    assert "Not in a SLURM job" in requeue(tmp_path, 5, 3)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    begin(tmp_path, 4)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))  # such as in a container without SLURM's commands
    assert "scontrol cannot be run here" in requeue(tmp_path, 5, 3)
    assert read_history(tmp_path)[-1].how == "requeue failed"
    monkeypatch.setenv("PATH", path)
    assert not scontrol.exists()
    assert "requeued (restart 1)" in requeue(tmp_path, 5, 3)
    assert read_history(tmp_path)[-1].how == "requeued"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert "3 times already" in requeue(tmp_path, 9, 3)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    requeue(tmp_path, 9, 3)
    assert scontrol.read_text().split("\n") == ["requeue 17", "requeue 16_2", ""]


def test_a_job_that_makes_no_step_is_retried_some_times(scontrol, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    begin(tmp_path, 4)
    assert "no step since its start, try 1 of 3" in requeue(tmp_path, 4, 100)
    begin(tmp_path, 4)
    assert "try 2 of 3" in requeue(tmp_path, 4, 100)
    begin(tmp_path, 4)
    assert "made no step in its last 3 starts, and is not requeued" in requeue(tmp_path, 4, 100)
    assert scontrol.read_text().split("\n") == ["requeue 17", "requeue 17", ""]
    # A step in between starts the count again.
    begin(tmp_path, 4)
    reach(tmp_path, 5, 0)
    begin(tmp_path, 5)
    assert "try 1 of 3" in requeue(tmp_path, 5, 100)
