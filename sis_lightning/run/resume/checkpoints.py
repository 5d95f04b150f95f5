"""Checkpoints that are on disk completely or not at all, and the newest intact one of a run."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from sis_lightning.errors import DataError
from sis_lightning.files import sync, sync_folder
from sis_lightning.run.environment import Environment
from sis_lightning.run.record import StartWeights
from sis_lightning.tasks.checkpoint_files import UnreadableCheckpointError, read_checkpoint

Checkpoint = dict[str, Any]

#: The key of a checkpoint with its `ResumePoint`.
RUN = "run"


class ResumePoint(BaseModel):
    """The state that a resume needs beyond Lightning's own checkpoint, and facts of the training for a record.

    Attributes:
        version: Version of this layout.
        point: Where in the run the checkpoint was written: before a training batch, before a validation, or at the end.
        progress: State of Lightning's loops at that point.
        batches: Training batches done.
        step: Optimizer steps done.
        epoch: Epochs completed.
        world_size: Number of devices.
        devices: Every number of devices that the run had so far.
        csv_rows: Rows of `metrics.csv` that were written before.
        tensorboard_bytes: Bytes of TensorBoard's events that were written before; None if that is not known.
        config: Resolved configuration.
        trained_on: SHA-256 of the training split of each start.
        command: Command line of the newest start.
        environments: The different environments of the starts, in order.
        changed: Options that were changed on the way.
        start_weights: The weights that the run started from; None for random ones.
        logged: What Lightning has logged and holds in memory, for each device.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[2] = 2
    point: Literal["batch", "validation", "end"]
    progress: dict[str, Any]
    batches: int
    step: int
    epoch: int
    world_size: int
    devices: list[int]
    csv_rows: int
    tensorboard_bytes: int | None = None
    config: dict[str, Any]
    trained_on: list[str]
    command: list[str]
    environments: list[Environment]
    changed: list[str]
    start_weights: StartWeights | None = None
    logged: list[dict[str, Any]] = []


def resume_point(content: Checkpoint) -> ResumePoint | None:
    """The resume point in a checkpoint; None if it has none of this release, such as `best.ckpt`."""
    try:
        return ResumePoint.model_validate(content[RUN])
    except (KeyError, ValidationError):
        return None


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the best metric, which the task knows only once the data is set up."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the metric of the task, after the DataModule has handed over its `meta`."""
        self.monitor = str(getattr(pl_module, "monitor", self.monitor))
        super().setup(trainer, pl_module, stage)


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, flushes it to disk, and renames it.

    A kill at any byte therefore leaves the previous checkpoint intact. The format of torch is a zip with a CRC-32 of
    every record, which `read_checkpoint` verifies.

    Args:
        background: Whether the training goes on while a copy of the content is written. There is one copy at a time:
            the next checkpoint waits until it is on disk.

    Attributes:
        logs: Files whose rows a checkpoint counts, and which therefore must be on disk before it.
    """

    def __init__(self, *, background: bool = False) -> None:
        super().__init__()
        self.logs: Sequence[Path] = ()
        self._background = background
        self._newest: Future[None] | None = None

    def save_checkpoint(self, checkpoint: Checkpoint, path: Any, storage_options: Any = None) -> None:
        """Writes `path`, or begins to.

        Raises:
            DataError: If the disk is full or cannot be written, here or in an earlier call; the checkpoint before is
                still there.
        """
        self.finish()
        if self._background:
            checkpoint = _copied(checkpoint, {})
        self.then(functools.partial(_write, checkpoint, Path(path), list(self.logs)))

    def then(self, task: Callable[[], None]) -> None:
        """Does something once all that was begun is on disk, and not if that fails."""
        if not self._background:
            task()
            return
        before = self._newest

        def run() -> None:
            if before is not None:
                before.result()
            task()

        self._newest = in_thread(run, daemon=False)

    def finish(self) -> None:
        """Waits until all that was begun is on disk.

        Raises:
            DataError: If that failed.
        """
        newest, self._newest = self._newest, None
        if newest is not None:
            newest.result()

    def check(self) -> None:
        """Tells of a failure without waiting.

        Raises:
            DataError: If what was begun has failed by now.
        """
        if self._newest is not None and self._newest.done():
            self.finish()

    def teardown(self) -> None:
        """Waits until all is on disk."""
        self.finish()

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = None) -> Any:
        """Reads `path`; only plain data and tensors are accepted.

        Raises:
            UnreadableCheckpointError: If the system fails to read it.
        """
        self.finish()  # it may be this one
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except OSError as error:
            raise UnreadableCheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def in_thread(function: Callable[[], Any], *, daemon: bool) -> Future[Any]:
    """Begins to call a function in a thread of its own; not in an executor's, of which forked workers would know.

    Args:
        function: The function.
        daemon: Whether a process may end before the function does.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=daemon).start()
    return future


def _copied(value: Any, known: dict[int, Tensor]) -> Any:
    """A copy that the training does not change, its tensors on the CPU; a tensor that is there twice is copied once."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.detach().to("cpu", copy=True)
        return known[id(value)]
    if isinstance(value, dict):
        content = copy.copy(value)  # of its own type, and with the versions of modules that a state_dict has
        for key in content:
            content[key] = _copied(content[key], known)
        return content
    if type(value) in (list, tuple):
        return type(value)(_copied(item, known) for item in value)
    return copy.deepcopy(value)


def _write(checkpoint: Checkpoint, path: Path, logs: Sequence[Path]) -> None:
    """Writes a checkpoint beside its place, and renames it once the logs are on disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        for log in logs:
            sync(log)
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch wraps the system's error
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or _reason(error)
        raise DataError(
            f"{path} could not be written: {reason}\n  The checkpoints before it are still there: "
            "make room, and resume with --resume auto."
        ) from error


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def own_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that a run writes to resume from: `step-N.ckpt` and `last.ckpt`, sorted.

    Raises:
        UnreadableCheckpointError: If the system fails to list the folder.
    """
    try:  # not Path.glob, for which a folder that cannot be read is an empty one
        paths = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnreadableCheckpointError(
            f"{folder}: cannot be read ({error.strerror}), so that nobody knows what it holds; nothing was written.\n"
            "  Start again when the disk can be read."
        ) from None
    return [path for path in paths if path.name == "last.ckpt" or path.match("step-*.ckpt")]


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The intact checkpoint with the most steps from which a run can be resumed.

    Corrupt checkpoints are skipped in favour of the most recent intact one.

    Args:
        folder: The run's `checkpoints/`.
        report: Is called with a line for each file that is skipped.

    Returns:
        Its path; None if the run wrote no checkpoint yet.

    Raises:
        UnreadableCheckpointError: If the system fails to read one of them, since it may be the newest and whole.
        DataError: If there are checkpoints, but a run can be resumed from none of them.
    """
    found: list[tuple[int, bool, Path]] = []
    skipped: list[str] = []
    unreadable: list[str] = []
    for path in own_checkpoints(folder):
        try:
            point = resume_point(read_checkpoint(path, mmap=True))
        except UnreadableCheckpointError as error:
            unreadable.append(str(error))
        except DataError as error:
            if path.exists():  # another rank may have set it aside by now
                skipped.append(str(error))
        else:
            if point is None:
                skipped.append(f"{path}: a run cannot be resumed from it (written by another release)")
            else:
                found.append((point.batches, path.name == "last.ckpt", path))
    if unreadable:
        others = f"resume from another: --resume {max(found)[2]}" if found else "give a copy: --resume FILE"
        raise UnreadableCheckpointError(
            f"the system fails to read {len(unreadable)} checkpoint(s), which may be whole; nothing was written:\n"
            f"{_few(unreadable)}\n  Start again when the disk can be read, or {others}."
        )
    if skipped and not found:
        raise DataError(
            f"none of the run's {len(skipped)} checkpoint(s) can be read; nothing was written:\n{_few(skipped)}\n"
            "  Resume from a copy: --resume FILE. Start from the beginning and lose the run: --overwrite true."
        )
    for line in skipped:
        report(f"skipped {line}")
    return max(found)[2] if found else None


def _few(lines: Sequence[str], count: int = 3) -> str:
    """The lines indented, at most `count` of them; the last one then names the files of the others."""
    shown = [f"  {line}" for line in lines[:count]]
    names = [line.partition(":")[0].rpartition("/")[2] for line in lines[count:]]
    return "\n".join(shown) + (f"; so are {', '.join(names)}" if names else "")
