"""Exact resume: a resumed run computes the same, to the bit, as a run that was never interrupted.

A checkpoint is written before a training batch or before a validation: at both points everything that came before is
completed. On resume the counts of Lightning's loops are set to what they were there, whatever Lightning's own restart
makes of them; the data continues with the next sample (`EpochSampler.start`); every step draws its random numbers from
a seed of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)

from sis_lightning import lightning_internals as internals
from sis_lightning.datamodules.samplers import sample_seed
from sis_lightning.errors import DataError, UsageError, UserError
from sis_lightning.files import sync_folder
from sis_lightning.late_values import LateValue
from sis_lightning.run.environment import Environment
from sis_lightning.run.recipe import effective_changes
from sis_lightning.run.record import StartWeights
from sis_lightning.run.reporting.loggers import MetricsCSV, TensorBoard, require_folder
from sis_lightning.run.resume.checkpoints import (
    RUN,
    Checkpoint,
    ResumePoint,
    SafeCheckpointIO,
    in_thread,
    resume_point,
)
from sis_lightning.run.resume.signals import StopRequest


class Stopped(UserError):  # noqa: N818 - like KeyboardInterrupt, it is no error
    """The run was asked to stop, wrote a checkpoint, and can be resumed; exits as if the signal had killed it."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number


class ExactResume(Callback):
    """Writes checkpoints from which a run resumes to the bit, and stops on signals.

    It writes `step-N.ckpt` (the newest `keep` of them) and `last.ckpt`, which is the newest of them or the run's end.

    Args:
        folder: Folder of the checkpoints.
        every: Steps between two checkpoints; one more is written before each validation.
        seed: Seed of the run.
        config: Resolved configuration, as plain data; each checkpoint holds it.
        report: Is called with lines to print, on every rank.
        reached: Is called with (step, epoch) on rank 0 whenever a checkpoint was written.
        requeue: Requeues the job, given the step; returns a sentence to print.
        environment: Returns the environment, given the device that computes; each checkpoint holds those of all starts.
        command: Command line of the start, without folders of this machine.
        keep: Number of `step-N.ckpt` to keep, at least 2.

    Attributes:
        last_good: The newest checkpoint that was completely written.
        ended: Whether the training came to its end, instead of to a limit of time.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        seed: int,
        config: dict[str, Any],
        report: Callable[[str], None],
        reached: Callable[[int, int], None],
        requeue: Callable[[int], str],
        environment: Callable[[torch.device], Environment],
        command: Sequence[str] = (),
        keep: int = 2,
    ) -> None:
        self.folder, self.every, self.seed, self.config = folder, every, seed, config
        self.report, self.reached, self.requeue, self.keep = report, reached, requeue, max(2, keep)
        self.request = StopRequest()
        self.last_good: Path | None = None
        self.ended = False
        self._environment, self._command = environment, list(command)
        self._environments: list[Environment] = []
        self._point: Literal["", "batch", "validation", "end"] = ""
        self._pending: ResumePoint | None = None
        self._saved_at = -1
        self._asked: LateValue | None = None
        self._point_of_ranks: tuple[Any, ...] = ()
        self._trained_on: list[str] = []
        #: The weights that the run starts from; whoever loads them says so.
        self.start_weights: StartWeights | None = None
        self._listing: Future[str] | None = None
        self._changed: list[str] = []
        self._devices: list[int] = []

    # The hooks of Lightning, in the order of a run.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Moves itself before all other callbacks, also before those that Lightning puts first.

        What others do and log in a hook belongs after the checkpoint that this one writes there.
        """
        self._environments = [self._environment(trainer.strategy.root_device)]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(other for other in callbacks if other is not self)]  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Checkpoint) -> None:
        """Prepares the return to the very point at which the checkpoint was written."""
        if trainer.state.fn != "fit":
            return
        point = resume_point(checkpoint)
        if point is None:  # such as the one that LearningRateFinder writes and restores
            return
        if point.point == "end":
            trainer.datamodule.position = (point.epoch, 0)  # type: ignore[attr-defined]
        else:
            self._pending = point
        # What LearningRateFinder found is in the checkpoint; searched for again, it would be another rate.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [other for other in callbacks if not isinstance(other, LearningRateFinder)]  # type: ignore[attr-defined]
        self._saved_at = point.batches
        self._trained_on = point.trained_on
        self.start_weights = point.start_weights
        now = self._environments
        self._environments = [*point.environments, *(entry for entry in now if entry not in point.environments)]
        keys = [key for key, _, _ in effective_changes(point.config, self.config)]
        self._changed = list(dict.fromkeys([*point.changed, *keys]))
        self._devices = point.devices
        self._point_of_ranks = (point.point, point.step, point.batches)
        self.last_good = Path(str(trainer.ckpt_path))
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.resume(point.csv_rows)
        if point.world_size != trainer.world_size:
            self.report(
                f"The checkpoint was written on {point.world_size} device(s), and is resumed on {trainer.world_size}: "
                "from the same sample, but no longer bit-identical."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a run that was killed in its last validation reach it: all steps are done, so Lightning would stop."""
        if self._pending is not None and self._pending.point == "validation":
            internals.lift_max_steps(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals from Lightning, and notes which data the run trains on.

        Raises:
            DataError: If the ranks resume from different checkpoints, as on disks that they do not share.
        """
        self.request.listen()
        if trainer.is_global_zero:
            # Beside the first steps: a million files take minutes to list.
            data = trainer.datamodule  # type: ignore[attr-defined]
            self._listing = in_thread(lambda: data.listing("train"), daemon=True)
        if trainer.world_size > 1:
            points: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(points, self._point_of_ranks)
            if len(set(points)) > 1:
                raise DataError(
                    f"the ranks resume from different checkpoints, {points} (point, step, batches):\n"
                    f"  do all of them see the same {self.folder}?"
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seeds the random numbers that callbacks draw before the first batch."""
        self._seed(internals.batch_progress(trainer).total.ready, trainer.global_rank, 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a batch: returns to the checkpoint's point, or writes a checkpoint; then seeds the step."""
        self._return(trainer, "batch")
        if (files := _files(trainer)) is not None:
            files.check()
        internals.keep_sums(trainer)
        progress = internals.batch_progress(trainer)
        done = progress.current.ready - 1
        # In the middle of an accumulation there are gradients that no checkpoint holds.
        if done % trainer.accumulate_grad_batches == 0:
            number = self._agreed(trainer)
            due = trainer.global_step % self.every == 0 and progress.total.ready > 1
            if number or due:
                self._save(trainer, "batch")
            if number:
                self._stop(trainer, number)
        self._seed(progress.total.ready - 1, trainer.global_rank)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a checkpoint: a validation can take longer than a cluster waits after its signal."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._return(trainer, "validation")
        # A run that is resumed before a validation which only the stop of this start brought would not come to it.
        if not internals.accumulates(trainer) and internals.validation_is_due(trainer):
            self._save(trainer, "validation")
        self._seed(internals.batch_progress(trainer).total.ready, trainer.global_rank, 2)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stops in a validation too: the checkpoint was written before it.

        The ranks may have different numbers of batches here, so that they cannot agree: the first rank stops for all.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self.request.number:
            return
        if trainer.is_global_zero:
            try:
                self._stop(trainer, self.request.number)
            finally:
                internals.kill_other_ranks(trainer)  # they wait for this rank

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `last.ckpt` at the end of the training.

        If a limit of time ended it, the newest checkpoint stays `last.ckpt`, so that the run can be resumed.
        """
        if self._asked is not None:
            self._asked.read()  # no collective may be left open
        self.request.deafen()  # before Lightning restores the handlers that it found
        self.ended = _has_ended(trainer)
        if not self.ended:
            then = (
                f"resumes from {self.last_good}" if self.last_good else "starts from the beginning: no checkpoint yet"
            )
            self.report(f"The run stopped before its end; --resume auto {then}.")
            return
        self._point = "end"
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if (files := _files(trainer)) is not None:
            files.finish()
        trainer.strategy.barrier()
        self.last_good = self.folder / "last.ckpt"
        self._point = ""
        if trainer.is_global_zero:
            self.reached(trainer.global_step, trainer.current_epoch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the signal handlers."""
        self.request.deafen()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the signal handlers, and waits for the checkpoint that is being written."""
        self.request.deafen()
        if (files := _files(trainer)) is not None:
            with contextlib.suppress(UserError):  # the exception is the reason that people should read
                files.finish()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Checkpoint) -> None:
        """Adds the `ResumePoint`, and makes Lightning's state one from which it neither skips nor repeats a batch.

        Other checkpoints, such as `best.ckpt`, are not written at a point from which a run can be resumed.
        """
        if not self._point:
            return
        self._note_listing()
        for logger in trainer.loggers:
            logger.save()
        logged: list[Any] = [internals.logged_values(trainer)]
        logged[0]["should_stop"] &= not _time_is_over(trainer)  # the resumed run has more of it
        if trainer.world_size > 1:  # each device has sums of its own
            every = [None] * trainer.world_size
            dist.all_gather_object(every, logged[0])
            logged = every
        if (files := _files(trainer)) is not None:
            known = (logger for logger in trainer.loggers if isinstance(logger, (MetricsCSV, TensorBoard)))
            files.logs = [path for logger in known for path in logger.files()]
        csv = [logger.rows for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
        events = [logger.size for logger in trainer.loggers if isinstance(logger, TensorBoard)]
        checkpoint[RUN] = ResumePoint(
            point=self._point,
            progress=trainer.fit_loop.state_dict(),
            batches=internals.batch_progress(trainer).total.completed,
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            world_size=trainer.world_size,
            devices=list(dict.fromkeys([*self._devices, trainer.world_size])),
            csv_rows=csv[0] if csv else 0,
            tensorboard_bytes=events[0] if events else 0,
            config=self.config,
            trained_on=self._trained_on,
            command=self._command,
            environments=self._environments,
            changed=self._changed,
            start_weights=self.start_weights,
            logged=logged,
        ).model_dump()
        internals.keep_saved_position(checkpoint, self._point)

    # How it is done.

    def _note_listing(self) -> None:
        """Waits until the training data is listed, and notes which it is."""
        if self._listing is None:
            return
        listing, self._listing = self._listing, None
        data = listing.result()
        if self._trained_on and data not in self._trained_on:
            self.report("The training data is not what it was before: this is no longer the same run.")
        self._trained_on = list(dict.fromkeys([*self._trained_on, data]))

    def _return(self, trainer: Trainer, point: str) -> None:
        """Sets all counts as they were, at the first point after a resume."""
        if self._pending is None:
            return
        if self._pending.point != point:
            raise UsageError(
                f"the checkpoint was written before a {self._pending.point}, not before a {point} as now.\n"
                "  Keep trainer.check_val_every_n_epoch and trainer.val_check_interval as they were"
            )
        internals.restore_progress(trainer, self._pending.progress)
        if len(self._pending.logged) == trainer.world_size:
            internals.restore_logged_values(trainer, self._pending.logged[trainer.global_rank])
        self._pending = None
        internals.restore_max_steps(trainer)

    def _save(self, trainer: Trainer, point: Literal["batch", "validation"]) -> None:
        batches = internals.batch_progress(trainer).total.completed
        if batches == self._saved_at and point == "batch":
            return
        if self.last_good is not None and self.last_good.parent == self.folder:
            require_folder(self.folder)
        path = self.folder / f"step-{trainer.global_step:07d}.ckpt"
        self._point = point
        try:
            trainer.save_checkpoint(path)
        finally:
            self._point = ""
        self._saved_at, self.last_good = batches, path
        if trainer.is_global_zero:
            publish = functools.partial(self._publish, path, trainer.global_step, trainer.current_epoch)
            files = _files(trainer)
            publish() if files is None else files.then(publish)

    def _publish(self, path: Path, step: int, epoch: int) -> None:
        """Makes a checkpoint that is on disk the newest of the run."""
        link = self.folder / ".last.ckpt.partial"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
            link.replace(self.folder / "last.ckpt")
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
            link.replace(self.folder / "last.ckpt")
        others = sorted(other for other in self.folder.glob("step-*.ckpt") if other != path)
        for old in others[: 1 - self.keep]:
            old.unlink(missing_ok=True)
        sync_folder(self.folder)
        self.reached(step, epoch)

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any device got; the same on all of them."""
        if trainer.world_size == 1:
            return self.request.number
        # Sent now and read one step later, so that nothing waits for a GPU that still works.
        asked, number = self._asked, torch.tensor(self.request.number, device=trainer.strategy.root_device)
        self._asked = LateValue(number, dist.all_reduce(number, op=dist.ReduceOp.MAX, async_op=True))
        return int(asked.read()) if asked is not None else 0

    def _stop(self, trainer: Trainer, number: int) -> None:
        if (files := _files(trainer)) is not None:
            files.finish()
        if not trainer.validating:
            trainer.strategy.barrier()  # Lightning kills the first rank, which writes, when another has ended
        what = f"stopped by {signal.Signals(number).name} at step {trainer.global_step:,}; saved {self.last_good}."
        then = "The same command with --resume auto resumes there."
        if number == signal.SIGUSR1 and trainer.is_global_zero:
            then = self.requeue(trainer.global_step)
        raise Stopped(number, f"{what}\n  {then}")

    def _seed(self, *parts: int) -> None:
        seed = sample_seed(self.seed, *parts)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


def _files(trainer: Trainer) -> SafeCheckpointIO | None:
    """What writes the checkpoints; None if the strategy has its own way."""
    files = trainer.strategy.checkpoint_io
    return files if isinstance(files, SafeCheckpointIO) else None


#: Callbacks with which a resumed run would differ from an uninterrupted one, and why.
_NOT_EXACT: dict[type[Callback], str] = {
    StochasticWeightAveraging: (
        "it replaces the learning rate schedule and adds an epoch, which no checkpoint restores.\n"
        "  Average the weights with EMAWeightAveraging or WeightAveraging instead, which resume exactly"
    ),
    GradientAccumulationScheduler: (
        "it changes the accumulation at the start of an epoch only, but a run may be resumed within one.\n"
        "  Give a fixed trainer.accumulate_grad_batches"
    ),
    BatchSizeFinder: (
        "it may find another batch size at each start, so that the samples differ.\n  Give a fixed data.batch_size"
    ),
    ModelPruning: (
        "its masks are in no checkpoint.\n  Prune a trained network instead: sis_lightning.load(RUN) returns it"
    ),
}


def refuse_inexact(callbacks: Sequence[Callback]) -> None:
    """Refuses callbacks with which no run can be resumed exactly.

    Raises:
        UsageError: Names the callback, the reason, and what to use instead.
    """
    for callback in callbacks:
        for kind, reason in _NOT_EXACT.items():
            if isinstance(callback, kind):
                raise UsageError(
                    f"trainer.callbacks has {type(callback).__name__}, with which no run resumes exactly:\n  {reason}"
                )


def _has_ended(trainer: Trainer) -> bool:
    """Whether the training ended by its schedule or by a callback such as EarlyStopping, not by `max_time`."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps != -1 and trainer.global_step >= steps:
        return True
    if epochs not in (None, -1) and internals.epochs_completed(trainer) >= epochs:
        return True
    return not _time_is_over(trainer)


def _time_is_over(trainer: Trainer) -> bool:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    remaining = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    return any(seconds is not None and seconds <= 0 for seconds in remaining)
