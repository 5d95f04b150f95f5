"""Processes end, with workers alive, on every way out; each is a process of its own, as users start it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Seconds after which a process counts as one that never ends. No test waits for them.
NEVER = 120
COMMAND = [sys.executable, "-m", "sis_lightning"]
LIVE_ITERATOR = """
import os, signal, sys
from sis_lightning import VOCSegmentationDataModule
data = VOCSegmentationDataModule(sys.argv[1], crop_size=33, batch_size=4, num_workers=1)
data.setup("fit")
batches = iter(data.train_dataloader())
next(batches)
print("workers", *open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split(), flush=True)
"""


def fit(synthetic: Path, run: Path, *options: object) -> list[str]:
    return [
        *[*COMMAND, "fit", "--config", str(ROOT / "tasks/seg_voc.yaml"), "--config", str(ROOT / "configs/demo.yaml")],
        *["--data.root", str(synthetic), "--run_dir", str(run), "--data.num_workers", "2", "--data.batch_size", "4"],
        *["--data.crop_size", "33", "--trainer.logger", "false"],
        *map(str, options),
    ]


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("raise ValueError('of the script')", 1),
        ("os.killpg(0, signal.SIGINT); signal.pause()", -signal.SIGINT),
        ("os.killpg(0, signal.SIGTERM); signal.pause()", -signal.SIGTERM),
    ],
)
def test_a_script_with_a_live_iterator_ends_and_so_do_its_workers(synthetic, ending, code):
    done = subprocess.run(
        [sys.executable, "-c", LIVE_ITERATOR + ending, str(synthetic)],
        capture_output=True,
        text=True,
        timeout=NEVER,
        start_new_session=True,
    )
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == (code in (1, -signal.SIGINT))
    pids = done.stdout.split("workers")[1].split()
    assert pids
    if (
        code != -signal.SIGTERM
    ):  # nothing of this process ran after that signal: torch's workers notice it by themselves
        assert not [pid for pid in pids if Path("/proc", pid).exists()]


def test_predict_ends_at_an_unreadable_image(synthetic, tmp_path):
    run = subprocess.run(
        fit(synthetic, tmp_path / "run", "--trainer.max_steps", 1, "--trainer.limit_val_batches", 1),
        capture_output=True,
        text=True,
        timeout=NEVER,
    )
    assert run.returncode == 0, run.stderr
    photos = tmp_path / "photos"
    photos.mkdir()
    for source in sorted(synthetic.glob("VOCdevkit/VOC2012/JPEGImages/*.jpg"))[:4]:
        shutil.copy(source, photos)
    (photos / "torn.jpg").write_bytes(source.read_bytes()[:900])
    options = ["--config", tmp_path / "run/config.yaml", "--data.predict_path", photos, "--data.num_workers", "1"]
    done = subprocess.run([*COMMAND, "predict", *map(str, options)], capture_output=True, text=True, timeout=NEVER)
    assert done.returncode == 1
    assert "torn.jpg" in done.stderr
    assert len(done.stderr.splitlines()) <= 5


@pytest.mark.parametrize("logger", ["null", "false"])
def test_a_removed_run_directory_ends_the_run(synthetic, tmp_path, logger):
    options = ["--trainer.logger", logger, "--checkpoint_every", 5, "--trainer.log_every_n_steps", 1]
    with subprocess.Popen(
        fit(synthetic, tmp_path / "run", *options), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
            assert process.stdout.readline()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # of what was written meanwhile
        _, errors = process.communicate(timeout=NEVER)
    assert process.returncode == 1, errors
    assert "was removed while the run writes into it" in errors
    assert len(errors.splitlines()) <= 3


def test_a_removed_file_of_a_log_is_told_as_the_removed_directory(synthetic, tmp_path):
    """TensorBoard's thread reports a removed file at some later event, by its name in bytes."""
    script = """if True:
        import shutil, sys
        from pathlib import Path
        from lightning.pytorch.loggers import TensorBoardLogger
        from sis_lightning.commands.main import main
        run = Path(sys.argv[1])
        def fail(self, metrics, step=None):
            shutil.rmtree(run)
            open(bytes(run / "tensorboard" / "fit" / "events"), "a")
        TensorBoardLogger.log_metrics = fail
        sys.exit(main(sys.argv[2:]))
    """
    run = tmp_path / "run"
    given = [*fit(synthetic, run), "--trainer.logger", "null", "--trainer.log_every_n_steps", "1"][len(COMMAND) :]
    done = subprocess.run([sys.executable, "-c", script, run, *given], capture_output=True, text=True, timeout=NEVER)
    assert done.returncode == 1
    assert f"{run}/tensorboard/fit was removed while the run writes into it" in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_a_killed_worker_is_named_in_a_sentence(synthetic, tmp_path):
    with subprocess.Popen(
        fit(synthetic, tmp_path / "run"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step"):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, errors = process.communicate(timeout=NEVER)
    assert process.returncode == 1
    assert errors.startswith("sis-lightning: a worker process that loads data was killed by signal Killed")
    assert "--data.num_workers" in errors
    assert len(errors.splitlines()) == 2


def test_too_few_open_files_are_named_in_a_sentence(synthetic, tmp_path):
    limited = ["bash", "-c", 'ulimit -n 40; exec "$@"', "bash", *fit(synthetic, tmp_path / "run")]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=NEVER)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "sis-lightning: too many open files: this process may have 40",
        "  Enter `ulimit -n 4096` before the command, or choose fewer --data.num_workers",
    ]


def test_full_shared_memory_is_named_in_a_sentence(synthetic, tmp_path):
    alone = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "bash"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a small /dev/shm")
    done = subprocess.run([*alone, *fit(synthetic, tmp_path / "run")], capture_output=True, text=True, timeout=NEVER)
    assert done.returncode == 1
    assert done.stderr.startswith("sis-lightning: the shared memory (/dev/shm), by which workers send batches, is full")
    assert len(done.stderr.splitlines()) == 2
