"""Starts a run: `fit`, `validate`, `test` or `predict`, with everything that a run keeps."""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichModelSummary
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler

from sis_lightning.datasets.base import ImageDataset
from sis_lightning.datasets.folder import UnlabelledDataset
from sis_lightning.errors import DataError, UsageError
from sis_lightning.files import write_text
from sis_lightning.run import directory, history, process
from sis_lightning.run.environment import environment, portable
from sis_lightning.run.library_errors import explained
from sis_lightning.run.parser import build
from sis_lightning.run.record import write_record
from sis_lightning.run.record_builder import custom_operators, test_record
from sis_lightning.run.reporting.callbacks import Announcement, Deploy, PlotPredictions, WritePredictions
from sis_lightning.run.reporting.loggers import MetricsCSV, TensorBoard, require_folder
from sis_lightning.run.reporting.progress import ProgressLines, console, first_rank, progress, say
from sis_lightning.run.resume.callback import ExactResume, Stopped, refuse_inexact
from sis_lightning.run.resume.checkpoints import BestCheckpoint, ResumePoint, SafeCheckpointIO
from sis_lightning.run.run import Run
from sis_lightning.run.start_weights import load_start_weights


def start(
    command: str, layers: Mapping[str, Any], options: Sequence[str] = (), typed: Sequence[str] | None = None
) -> None:
    """Parses a run's configuration, and runs a command on it.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        layers: The composed configuration, as `sis_lightning.config.compose.resolve` returns it.
        options: The command-line options that override it.
        typed: The arguments that `layers` and `options` were resolved from, for the record; None: `options`.

    Raises:
        UsageError: For options and combinations that are invalid.
        DataError: If data or a checkpoint is missing or damaged.
        Stopped: If a signal asked the run to stop.
    """
    with process.prepared():
        try:
            run = Run(layers, options)
            with explained(run.config):
                line = portable(["sis-lightning", command, *(options if typed is None else typed)])
                _Started(run, command, line).execute()
        finally:
            directory.unlock()


class _Started:
    """One command on one run."""

    def __init__(self, run: Run, command: str, line: Sequence[str]) -> None:
        self.run, self.command, self.command_line, self.folder = run, command, line, run.directory
        self.resumed: tuple[Path, ResumePoint] | None = None
        self.exact_resume: ExactResume | None = None
        self.best: ModelCheckpoint | None = None
        self.line: Callback | None = None

    def execute(self) -> None:
        """Checks everything that can be checked before anything is written, then runs the command."""
        run = self.run
        _refuse(run.config["trainer"])
        seed_everything(run.options.seed_everything, workers=True)
        task, data = run.task, run.datamodule
        if self.command == "fit":
            self._settle_resume()
        trainer = self._trainer()
        if not data.to_be_made:
            data.setup(self.command)
        if self.command == "fit":
            if self.resumed and self.resumed[1].point == "end" and not run.options.resume_changed:
                path, point = self.resumed
                say(f"{path.parent.parent} is finished: {point.step:,} steps, {path}")
                return
            self._fit(trainer)
            return
        path, content = run.read_checkpoint(run.options.ckpt_path)
        say(f"checkpoint {path}, step {content['global_step']:,}")
        if isinstance(self.line, ProgressLines):
            self.line.tested_step = content["global_step"]
        given: dict[str, Any] = {"datamodule": data, "ckpt_path": str(path), "weights_only": True}
        if self.command == "predict":
            # They are on disk; those of ten thousand photographs would fill the memory.
            trainer.predict(task, return_predictions=False, **given)
            _require_all_read(data.datasets["predict"])
        elif self.command == "validate":
            trainer.validate(task, verbose=run.options.verbose, **given)
            self._require_defined(trainer, task.monitor)
        else:
            trainer.test(task, verbose=run.options.verbose, **given)
            self._keep_record(trainer)
            self._require_defined(trainer, f"test/{task.monitor.partition('/')[2]}")
        _print_profile(trainer)

    def _settle_resume(self) -> None:
        """Locks the run's directory, and finds the checkpoint from which the fit resumes."""
        options = self.run.options
        if options.ckpt_path:
            raise UsageError("fit takes no --ckpt_path: a fit is resumed by --resume auto, or by --resume FILE")
        if options.overwrite and options.resume != "never":
            raise UsageError(
                f"--overwrite true removes what --resume {options.resume} would resume: leave one of the two out"
            )
        if first_rank():
            directory.lock(self.folder)
        if not options.overwrite:
            self.resumed = directory.find_resume_point(
                self.folder, options.resume, self.run.config, options.resume_changed, say
            )

    def _trainer(self) -> Trainer:
        """The Trainer, with the loggers and callbacks of every run."""
        given = dict(build("trainer", self.run.config["trainer"]))
        given["default_root_dir"] = str(self.folder)
        plugins = given.get("plugins") or []
        given["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), SafeCheckpointIO(background=True)]
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            # Lightning would requeue from within the signal handler, which has torn checkpoints.
            given["plugins"].append(SLURMEnvironment(auto_requeue=False))
        if self.command != "fit":
            given["enable_checkpointing"] = False
        if self.command == "predict":
            given["logger"] = False
        elif given.get("logger") is None:
            keep = self.resumed[1].tensorboard_bytes if self.resumed else 0
            given["logger"] = [
                MetricsCSV(self.folder / "csv" / self.command),
                TensorBoard(self.folder / "tensorboard", self.command, keep),
            ]
        callbacks = given.get("callbacks") or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        if given.get("enable_progress_bar") is not False:
            self.line = progress()
            callbacks.append(self.line)
            given["enable_progress_bar"] = console.is_terminal
        if given.pop("enable_model_summary", None):
            callbacks.append(RichModelSummary())
        given["enable_model_summary"] = False  # Lightning would else print one of its own
        callbacks += self._callbacks(given)
        if self.exact_resume is not None:
            # The first of all: what the others log of a step belongs after the step's checkpoint.
            callbacks.insert(0, self.exact_resume)
        trainer = Trainer(**{**given, "callbacks": callbacks})
        if self.command == "fit":
            refuse_inexact(trainer.callbacks)  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoard) and self.command == "fit":
                logger.steps_done = lambda: trainer.global_step
        return trainer

    def _callbacks(self, given: Mapping[str, Any]) -> list[Callback]:
        """The callbacks that a command has beside those of the configuration."""
        run, options = self.run, self.run.options
        if self.command == "predict":
            folder = Path(options.output) if options.output else self.folder / "predictions"
            writer = WritePredictions(folder, coco=options.coco_json)
            return [*([Deploy()] if options.deploy else []), writer]
        if self.command != "fit":
            return [Deploy()] if options.deploy else []
        checkpoints = self.folder / "checkpoints"
        self.exact_resume = ExactResume(
            checkpoints,
            options.checkpoint_every,
            options.seed_everything,
            run.config,
            say,
            functools.partial(history.reach, self.folder),
            functools.partial(history.requeue, self.folder, max_restarts=options.max_restarts),
            functools.partial(environment, custom_operators(run)),
            self.command_line,
        )
        self.best = BestCheckpoint(
            dirpath=checkpoints,
            filename="best",
            monitor=run.task.monitor,
            mode=run.task.monitor_mode,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        rates = [LearningRateMonitor(logging_interval="step")] if given.get("logger") is not False else []
        return [Announcement(), PlotPredictions(), self.best, *rates]

    def _fit(self, trainer: Trainer) -> None:
        """Trains, and keeps the history."""
        run = self.run
        assert self.exact_resume is not None
        if self.resumed:
            run.task.keep_own_weights()
        else:
            self.exact_resume.start_weights = load_start_weights(run)
        if trainer.is_global_zero:
            self._begin()
        began = time.monotonic()
        path = str(self.resumed[0]) if self.resumed else None
        try:
            trainer.fit(run.task, datamodule=run.datamodule, ckpt_path=path, weights_only=True)
        except BaseException as error:
            # Lightning makes an exit with code 1 of a KeyboardInterrupt.
            interrupted = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
            if first_rank():
                how = error.signal.name if isinstance(error, Stopped) else type(error).__name__
                how = signal.SIGINT.name if interrupted else how
                known = history.read_history(self.folder)
                if known and known[-1].how is None:  # a requeue has noted it already
                    history.end(self.folder, how)
                if isinstance(error, Exception) and not isinstance(error, Stopped):
                    self._remove_empty_run(trainer)
            if interrupted:
                raise KeyboardInterrupt from None
            if isinstance(error, FileNotFoundError) and error.filename:  # as TensorBoard's thread finds it, later
                lost = Path(os.fsdecode(error.filename)).absolute()
                if lost.is_relative_to(self.folder.absolute()):
                    require_folder(lost.parent)
            raise
        if first_rank():
            history.end(self.folder, "finished" if self.exact_resume.ended else "stopped early")
            self._summarise(trainer, time.monotonic() - began)
            _print_profile(trainer)
        self._require_defined(trainer, run.task.monitor)

    def _require_defined(self, trainer: Trainer, metric: str) -> None:
        """Fails, on all ranks alike, if the primary metric was computed but is not defined."""
        value = trainer.callback_metrics.get(metric)
        if value is not None and math.isnan(value):
            raise DataError(
                f"{metric} is not defined (nan): the {metric.partition('/')[0]} split has nothing to score\n"
                "  sis-lightning check-data, with the same options, tells what the split contains"
            )

    def _begin(self) -> None:
        """Writes the resolved configuration of this start: `config.yaml` of the first, `config-2.yaml` and so on."""
        folder = self.folder
        if self.run.options.overwrite:  # only now is it known that there will be another run
            directory.remove_run(folder)
        if self.resumed:
            directory.set_aside(folder, *self.resumed, say)
        earlier = len(list(folder.glob("config*.yaml"))) if self.resumed else 0
        name = f"config-{earlier + 1}.yaml" if earlier else "config.yaml"
        write_text(folder / name, yaml.safe_dump(self.run.config, sort_keys=False))
        if not self.resumed:
            (folder / history.FILE).unlink(missing_ok=True)
        point = self.resumed[1] if self.resumed else None
        history.begin(folder, point.step if point else 0, point.epoch if point else 0)

    def _remove_empty_run(self, trainer: Trainer) -> None:
        """Removes the configuration and history of a run that failed before its first step."""
        if not self.resumed and not trainer.global_step and not any(self.folder.glob("checkpoints/*.ckpt")):
            directory.remove_run(self.folder)

    def _summarise(self, trainer: Trainer, seconds: float) -> None:
        """Prints the newest and best metric, the checkpoints, and the next command."""
        assert self.best is not None
        assert self.exact_resume is not None
        metric = self.run.task.monitor
        last, best = trainer.callback_metrics.get(metric), self.best.best_model_score
        values = [f"{float(last):.4f} last"] if last is not None else []
        values += [f"{float(best):.4f} best"] if best is not None else []
        ended = "finished" if self.exact_resume.ended else "stopped early"
        console.print(
            f"{ended} after {trainer.global_step:,} steps, {_duration(seconds)}"
            + (f"; {metric} {', '.join(values)}" if values else "")
        )
        files = [str(path) for path in [self.exact_resume.last_good] if path]
        files += ["best.ckpt beside it"] if self.best.best_model_path else []
        if files:
            console.print(f"checkpoint: {', '.join(files)}")
        if self.exact_resume.ended:
            console.print(f"next: sis-lightning test --config {self.folder / 'config.yaml'}")

    def _keep_record(self, trainer: Trainer) -> None:
        """Writes the test's record and the results files, on the first rank."""
        if not trainer.is_global_zero:
            return
        run = self.run
        record = test_record(run, trainer, self.command_line)
        write_results = getattr(run.task.test_metrics, "write_results", None)
        if write_results is not None:
            console.print(f"results in {write_results(self.folder / 'test_results')}")
        write_record(self.folder / "test.json", record)
        if not record.metrics:
            console.print("no annotations to score against, so no metrics: the results are for the data set's server")
            return
        value = record.metrics.get(record.primary_metric)
        notes = "".join(f"; {label}: {text}" for label, text in record.data.notes.items())
        shown = "not defined" if value is None else f"{value:.4f}"
        console.print(f"{record.primary_metric} {shown} on {record.data.identity} data{notes}")


def _require_all_read(dataset: ImageDataset) -> None:
    """Fails after the predictions, on all ranks alike, if images were left out because they cannot be read."""
    bad = dataset.bad if isinstance(dataset, UnlabelledDataset) else {}
    if bad:
        listed = "; ".join(f"{name} ({fault})" for name, fault in bad.items())
        raise DataError(f"{len(dataset):,} images were predicted, {len(bad):,} cannot be read: {listed}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


def _print_profile(trainer: Trainer) -> None:
    """Prints the report of a profiler that Lightning would only log."""
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if isinstance(profiler, SimpleProfiler | AdvancedProfiler) and profiler.filename is None and first_rank():
        console.print(profiler.summary())


def _refuse(trainer: Mapping[str, Any]) -> None:
    """Refuses options of Trainer that cannot work in a run.

    Raises:
        UsageError: Names the option, and what to use instead.
    """
    if trainer.get("overfit_batches"):
        raise UsageError(
            "trainer.overfit_batches does not work with samplers that resume exactly.\n"
            "  Detection, keypoints: --config configs/overfit.yaml after the task and configs/demo.yaml.\n"
            "  Segmentation: --data.train_split with a list of four names in ImageSets/Segmentation.\n"
            "  Classification: --data image_folder, with a few images in each folder of a class"
        )
    if trainer.get("barebones"):
        raise UsageError(
            "trainer.barebones turns off checkpoints, logs and progress, which a run keeps: leave it out.\n"
            "  What they cost is measured by: sis-lightning bench --loop"
        )
    if trainer.get("enable_checkpointing") is False:
        raise UsageError("trainer.enable_checkpointing is false, but a run is tested and resumed by its checkpoints")
    if isinstance(trainer.get("val_check_interval"), str | dict):
        raise UsageError(
            f"trainer.val_check_interval is {trainer['val_check_interval']!r}, a time, but a resumed run validates\n"
            "  after the same steps as an uninterrupted one: give a number of batches, or a share of an epoch"
        )
    strategy = str(trainer.get("strategy") or "")
    if strategy.startswith(("fsdp", "deepspeed", "model_parallel")):
        raise UsageError(
            f"trainer.strategy is {strategy}, which splits a network over GPUs; these networks fit on one: use ddp"
        )
