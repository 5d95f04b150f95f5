"""Exact resume: a run that was killed goes on as if it had not been.

A checkpoint is taken at one of two points, at which all that came before is done with: before a training batch, or
before a validation. What Lightning counts is then put back at the same point, whatever its own restart made of it;
the data goes on from the next sample (`EpochSampler.start`), and every step draws from a seed of its own.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from sis_lightning.config.compose import FREE_TO_CHANGE, changes
from sis_lightning.datamodules.base import sample_seed
from sis_lightning.errors import DataError, UsageError, UserError
from sis_lightning.run.checkpoints import RUN, Checkpoint, sync_folder
from sis_lightning.run.loggers import MetricsCSV
from sis_lightning.run.signals import StopRequest


class Stopped(UserError):  # noqa: N818 - as KeyboardInterrupt, it is no error
    """The run was asked to stop, saved, and can be gone on with; exits as if the signal had killed it."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number


class ExactResume(Callback):
    """Takes checkpoints that a run goes on from to the bit, and stops on signals.

    Files: `step-N.ckpt` (the newest `keep`), and `last.ckpt`, which is the newest of them, or the run's end.

    Attributes:
        last_good: The newest file that is surely whole.
        ended: Whether the schedule came to its end, rather than to a limit of time.

    Args:
        folder: Where checkpoints lie.
        every: Steps between checkpoints; one is taken before each validation too.
        seed: Of the run.
        config: Resolved, as plain data: kept in each checkpoint.
        report: Gets lines for people, on rank 0.
        requeue: Puts the job back into its cluster's queue, given the step; returns what it did, for people.
        code: That trains (`results.records.code`): of every start, kept in each checkpoint.
        keep: How many `step-N.ckpt` stay; at least 2.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        seed: int,
        config: dict[str, Any],
        report: Callable[[str], None],
        requeue: Callable[[int], str],
        code: dict[str, Any],
        keep: int = 2,
    ) -> None:
        self.folder, self.every, self.seed, self.config = folder, every, seed, config
        self.report, self.requeue, self.keep = report, requeue, max(2, keep)
        self._code = [code]
        self.request = StopRequest()
        self._point = ""
        self._resumed: dict[str, Any] | None = None
        self._saved_at = -1
        self._max_steps: int | None = None
        self._asked: tuple[torch.Tensor, Any] | None = None
        self.last_good: Path | None = None
        self.ended = False
        self._point_of_ranks: tuple[Any, ...] = ()
        self._trained_on: list[str] = []
        self._changed: list[str] = []
        self._devices: list[int] = []

    # What Lightning calls, in the order of a run.

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Checkpoint) -> None:
        """Readies the return to the very point at which the checkpoint was taken."""
        if trainer.state.fn != "fit":
            return
        run = checkpoint[RUN]
        if run["point"] == "end":
            trainer.datamodule.position = (run["epoch"], 0)  # type: ignore[attr-defined]
        else:
            self._resumed = run
        self._saved_at = run["batches"]
        self._trained_on = run.get("trained_on", [])
        self._code = [*(known for known in run.get("code", []) if known not in self._code), *self._code]
        keys = [key for key, _, _ in changes(run["config"], self.config) if not key.startswith(FREE_TO_CHANGE)]
        self._changed = list(dict.fromkeys([*run.get("changed", []), *keys]))
        self._devices = run.get("devices", [run["world_size"]])
        self._point_of_ranks = (run["point"], run["step"], run["batches"])
        self.last_good = Path(str(trainer.ckpt_path))
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.resume(run["csv_rows"])
        if run["world_size"] != trainer.world_size:
            self.report(
                f"taken on {run['world_size']} device(s), gone on with on {trainer.world_size}: from the same sample, "
                "but no longer bit-identical"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a run that was killed in its last validation come to it: Lightning counts its steps, and would stop."""
        loop = trainer.fit_loop.epoch_loop
        if self._resumed and self._resumed["point"] == "validation":
            self._max_steps, loop.max_steps = loop.max_steps, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals from Lightning; notes which data it trains on.

        Raises:
            DataError: Where the ranks would go on from different checkpoints, as on disks that not all of them share.
        """
        self.request.listen()
        if trainer.is_global_zero:
            data = trainer.datamodule.listing("train")  # type: ignore[attr-defined]
            if self._trained_on and data not in self._trained_on:
                self.report("the training data is not what it was before: no longer the same run")
            self._trained_on = list(dict.fromkeys([*self._trained_on, data]))
        if trainer.world_size > 1:
            points: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(points, self._point_of_ranks)
            if len(set(points)) > 1:
                raise DataError(
                    f"the ranks go on from different checkpoints, {points} (point, step, batches):\n"
                    f"  do all of them see the same {self.folder}?"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a batch: returns to the checkpoint's point, or takes one; then seeds the step."""
        self._return(trainer, "batch")
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.ready - 1
        # In mid-accumulation there are gradients that no checkpoint holds.
        if done % trainer.accumulate_grad_batches == 0:
            number = self._agreed(trainer)
            due = trainer.global_step % self.every == 0 and progress.total.ready > 1
            if number or due:
                self._save(trainer, "batch")
            if number:
                self._stop(trainer, number)
        self._seed(progress.total.ready - 1, trainer.global_rank)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a validation: it can take longer than a cluster waits after its signal."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._return(trainer, "validation")
        if not trainer.fit_loop._should_accumulate():
            self._save(trainer, "validation")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stops in a validation too: the checkpoint was taken before it (in mid-accumulation, some batches before).

        The ranks have not all as many batches here, so that they cannot agree: the first stops for all.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self.request.number:
            return
        if trainer.is_global_zero:
            try:
                self._stop(trainer, self.request.number)
            finally:
                launcher = trainer.strategy.launcher
                if isinstance(launcher, _SubprocessScriptLauncher):  # they wait for this rank
                    launcher.kill(signal.SIGKILL)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of the schedule: `last.ckpt`, which `test` takes.

        Where it was a limit of time that ended the run, the last checkpoint stays what it can be gone on from.
        """
        if self._asked is not None:
            self._asked[1].wait()
        self.request.deafen()  # before Lightning, which signals were taken from, puts back what was there before it
        self.ended = _has_ended(trainer)
        if not self.ended:
            then = f"goes on from {self.last_good}" if self.last_good else "begins anew: no checkpoint was due yet"
            self.report(f"stopped before its end; --resume auto {then}")
            return
        self._point = "end"
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self.last_good = self.folder / "last.ckpt"
        self._point = ""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self.request.deafen()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self.request.deafen()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Checkpoint) -> None:
        """Adds what a resume needs; makes Lightning's state one that it restarts from without skipping or repeating.

        Other checkpoints, such as `best.ckpt`, are not taken at a point that can be gone on from.
        """
        if not self._point:
            return
        loops = checkpoint["loops"]["fit_loop"]
        progress = trainer.fit_loop.epoch_loop.batch_progress
        for logger in trainer.loggers:
            logger.save()
        csv = [logger.rows for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
        checkpoint[RUN] = {
            "point": self._point,
            "progress": trainer.fit_loop.state_dict(),
            "batches": progress.total.completed,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "world_size": trainer.world_size,
            "devices": list(dict.fromkeys([*self._devices, trainer.world_size])),
            "csv_rows": csv[0] if csv else 0,
            "config": self.config,
            "trained_on": self._trained_on,
            "code": self._code,
            "changed": self._changed,
        }
        batches = loops["epoch_loop.batch_progress"]
        if self._point == "batch":
            for part in ("total", "current"):
                batches[part] = dict.fromkeys(batches[part], batches[part]["completed"])
            # Else the epoch would count as done before its last batch.
            batches["is_last_batch"] = False
        if self._point == "validation":
            # As Lightning writes a validation's first batch, on which it starts the validation over.
            validation = loops["epoch_loop.val_loop.batch_progress"]
            count = validation["total"]["completed"]
            validation["total"] = {"ready": count + 1, "started": count + 1, "processed": count, "completed": count}
            validation["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    # How it is done.

    def _return(self, trainer: Trainer, point: str) -> None:
        """At the first point after a resume: all counts as they were."""
        if self._resumed is None:
            return
        if self._resumed["point"] != point:
            raise UsageError(
                f"the checkpoint was taken before a {self._resumed['point']}, where this configuration has a {point}:\n"
                "  keep trainer.check_val_every_n_epoch and trainer.val_check_interval as they were"
            )
        state = self._resumed["progress"]
        _put_back(trainer.fit_loop, state)
        self._resumed = None
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps

    def _save(self, trainer: Trainer, point: str) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        batches = progress.total.completed
        if batches == self._saved_at and point == "batch":
            return
        path = self.folder / f"step-{trainer.global_step:07d}.ckpt"
        self._point = point
        try:
            trainer.save_checkpoint(path)
        finally:
            self._point = ""
        self._saved_at, self.last_good = batches, path
        if trainer.is_global_zero:
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

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any device got; the same on all."""
        if trainer.world_size == 1:
            return self.request.number
        # Asked now and read a step later, so that no GPU waits for it.
        asked, number = self._asked, torch.tensor(self.request.number, device=trainer.strategy.root_device)
        self._asked = number, dist.all_reduce(number, op=dist.ReduceOp.MAX, async_op=True)
        if asked is None:
            return 0
        asked[1].wait()
        return int(asked[0])

    def _stop(self, trainer: Trainer, number: int) -> None:
        what = f"stopped by {signal.Signals(number).name} at step {trainer.global_step:,}; saved {self.last_good}."
        then = "The same command with --resume auto goes on from there."
        if number == signal.SIGUSR1 and trainer.is_global_zero:
            then = self.requeue(trainer.global_step)
        raise Stopped(number, f"{what}\n  {then}")

    def _seed(self, batch: int, rank: int) -> None:
        seed = sample_seed(self.seed, batch, rank)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


def _has_ended(trainer: Trainer) -> bool:
    """Whether a run came to its end, by its schedule or by a callback that sees no use in more, not to `max_time`."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps != -1 and trainer.global_step >= steps:
        return True
    if epochs not in (None, -1) and trainer.fit_loop.epoch_progress.current.completed >= epochs:
        return True
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    remaining = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    return not any(seconds is not None and seconds <= 0 for seconds in remaining)


def _put_back(loop: _Loop, state: dict[str, Any], prefix: str = "") -> None:
    """Loads the counts of a loop and of all within it, without the restart that Lightning makes of it."""
    loop._load_from_state_dict(state.copy(), prefix)
    for name, inner in vars(loop).items():
        if isinstance(inner, _Loop):
            _put_back(inner, state, f"{prefix}{name}.")
