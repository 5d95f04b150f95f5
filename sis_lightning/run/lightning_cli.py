"""What a run is: one fixed directory, its checkpoints and logs, and Lightning's command line over them.

runs/TASK/BACKBONE-OPERATOR/seedN/
    config.yaml         everything resolved; config-2.yaml and so on of later starts
    checkpoints/        step-N.ckpt (the newest two), last.ckpt, best.ckpt
    csv/, tensorboard/  the logs of fit, test, …
    pictures/           predictions beside the truth, one a validation
    predictions/        what predict wrote
    test.json           what test measured, on which data, with which weights: a sealed record
    test_results/       the boxes or keypoints that it measured, in the format of COCO's or VOC's servers
"""

from __future__ import annotations

import functools
import logging
import warnings
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from sis_lightning.config.compose import settled
from sis_lightning.datamodules import SISDataModule
from sis_lightning.errors import DataError, UsageError, UserError
from sis_lightning.evaluation.gathered import GatheredScores
from sis_lightning.files import digest, digest_files, write_text
from sis_lightning.machine import keep_freed_memory
from sis_lightning.operators import operator_class
from sis_lightning.run import directory
from sis_lightning.run import history as starts
from sis_lightning.run.callbacks import (
    Announcement,
    Deploy,
    PlotPredictions,
    ProgressBar,
    WritePredictions,
    console,
    progress,
)
from sis_lightning.run.checkpoints import RUN, SafeCheckpointIO
from sis_lightning.run.loggers import MetricsCSV, curves
from sis_lightning.run.parser import Parser, without_marks
from sis_lightning.run.record import code, write_record
from sis_lightning.run.resume import ExactResume, Stopped
from sis_lightning.tasks import BaseTask

# What these say is either done on purpose here or said better by us.
_EXPECTED_WARNINGS = (
    r".*LightningCLI's args parameter is intended to run from within Python.*",
    r".*does not have many workers.*",
    r".*when using `ckpt_path`, callbacks used to create the checkpoint need to be provided.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*The dirpath has changed from .* therefore `best_model_score`.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*your dataloader is not resumable.*",
    r".*The `srun` command is available on your system but is not used.*",
)


class RunCLI(LightningCLI):
    """Lightning's command line over our tasks: where a run lies, what it keeps, and which checkpoint is meant."""

    run_dir: Path
    #: The checkpoint that a fit goes on from, and what it says of its run.
    resumed: tuple[Path, dict[str, Any]] | None = None
    exact_resume: ExactResume
    trainer: Trainer
    model: LightningModule
    datamodule: LightningDataModule

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is ours."""
        parser.add_argument("--task", type=str, default="run", help="First folder of the run's directory below runs/.")
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="The run's directory, instead of the usual."
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="fit: removes an earlier run in the directory."
        )
        parser.add_argument(
            "--resume",
            type=str,
            default="never",
            help="fit: auto (the directory's run, if any), never, or a checkpoint.",
        )
        parser.add_argument(
            "--resume_changed", type=bool, default=False, help="fit: goes on under a changed configuration."
        )
        parser.add_argument(
            "--checkpoint_every", type=PositiveInt, default=500, help="fit: steps from one checkpoint to the next."
        )
        parser.add_argument(
            "--deploy", type=bool, default=False, help="validate, test, predict: by the network's inference form."
        )
        parser.add_argument(
            "--max_restarts", type=int, default=100, help="fit: how often a job goes back into SLURM's queue."
        )

    def _parse_ckpt_path(self) -> None:
        """Not as Lightning, which lets a checkpoint's settings replace those given, silently; see `checkpoint`."""

    def directory(self, seed: str | None = None) -> Path:
        """The run's directory; for an empty `seed` that of all seeds together."""
        assert isinstance(self.model, BaseTask)
        given = self._get(self.config, "run_dir")
        if given:
            return Path(given)
        last = f"seed{self._get(self.config, 'seed_everything')}" if seed is None else seed
        return Path("runs", str(self._get(self.config, "task")), self.model.backbone_config.slug, last)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Settles the run's directory, then adds loggers and callbacks that lie in it."""
        assert isinstance(self.model, BaseTask)
        self.run_dir = self.directory()
        log = str(self.subcommand)
        extra: dict[str, Any] = {"default_root_dir": str(self.run_dir), "plugins": [SafeCheckpointIO()]}
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            # Lightning's own requeues from within the signal, which has torn checkpoints.
            extra["plugins"].append(SLURMEnvironment(auto_requeue=False))
        if self.subcommand == "fit":
            self._settle_resume()
        else:
            extra["enable_checkpointing"] = False
        step = self.resumed[1]["step"] if self.resumed else 0
        if self.subcommand == "predict":
            extra["logger"] = False
        elif self._get(self.config_init, "trainer").get("logger") is None:
            extra["logger"] = [
                MetricsCSV(self.run_dir / "csv" / log),
                # Of what a killed run wrote after its last checkpoint, TensorBoard shows nothing.
                TensorBoardLogger(
                    self.run_dir / "tensorboard", name=log, version="", default_hp_metric=False, purge_step=step
                ),
            ]
        return super().instantiate_trainer(**{**kwargs, **extra})

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        """Adds the callbacks of every run."""
        task, data = self.model, self.datamodule
        assert isinstance(task, BaseTask)
        assert isinstance(data, SISDataModule)
        if data.headline:
            task.monitor = f"val/{data.headline}"
        if config.get("enable_progress_bar") is not False:
            callbacks.append(progress())
            config["enable_progress_bar"] = isinstance(callbacks[-1], ProgressBar)
        config["enable_model_summary"] = False  # Announcement says it
        if self.subcommand == "fit":
            folder = self.run_dir / "checkpoints"
            every, seed = self._get(self.config, "checkpoint_every"), self._get(self.config, "seed_everything")
            # First of all: what the others log of a step belongs behind its checkpoint.
            limit = self._get(self.config, "max_restarts")
            requeue = functools.partial(starts.requeue, self.run_dir, max_restarts=limit)
            self.exact_resume = ExactResume(
                folder, every, seed, self.resolved, say, requeue, code(self._others_operators())
            )
            callbacks.insert(0, self.exact_resume)
            callbacks += [
                Announcement(),
                PlotPredictions(),
                ModelCheckpoint(
                    dirpath=folder,
                    filename="best",
                    monitor=task.monitor,
                    mode=task.monitor_mode,
                    save_on_train_epoch_end=False,
                    enable_version_counter=False,
                ),
            ]
            if config.get("logger") is not False:
                callbacks.append(LearningRateMonitor(logging_interval="step"))
        elif self._get(self.config, "deploy"):
            callbacks.append(Deploy())
        if self.subcommand == "predict":
            callbacks.append(WritePredictions(self.run_dir / "predictions"))
        return super()._instantiate_trainer(config, callbacks)

    def _settle_resume(self) -> None:
        """Which checkpoint a fit goes on from, if any; the run's directory is this fit's alone from here on.

        Raises:
            UsageError, DataError: Of `claim` and `point_to_resume`.
        """
        resume, overwrite = str(self._get(self.config, "resume")), self._get(self.config, "overwrite")
        if self._get(self.config, "ckpt_path"):
            raise UsageError("fit takes no --ckpt_path: it goes on with --resume auto, or with --resume FILE")
        if overwrite and resume != "never":
            raise UsageError(f"--overwrite true removes what --resume {resume} would go on with: take one of the two")
        if first_rank():
            directory.claim(self.run_dir)
        if not overwrite:
            changed = self._get(self.config, "resume_changed")
            self.resumed = directory.point_to_resume(self.run_dir, resume, self.resolved, changed, say)

    @property
    def resolved(self) -> dict[str, Any]:
        """The configuration with everything resolved, as plain data."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        plain: dict[str, Any] = yaml.safe_load(text)
        return plain

    def _run_subcommand(self, subcommand: str) -> None:
        """Looks at the data before anything is written, where it need not be made or fetched first."""
        assert isinstance(self.datamodule, SISDataModule)
        if not self.datamodule.to_be_made:
            self.datamodule.setup(subcommand)
        if self.resumed and self.resumed[1]["point"] == "end" and not self._get(self.config, "resume_changed"):
            path, run = self.resumed
            say(f"{path.parent.parent} is finished: {run['step']:,} steps, {path}")
            return
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if subcommand == "fit" and first_rank():
                how = error.signal.name if isinstance(error, Stopped) else type(error).__name__
                known = starts.read_starts(self.run_dir)
                if known and known[-1]["how"] is None:  # a requeue has said so already
                    starts.end(self.run_dir, how)
            if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None  # Lightning makes an exit with code 1 of it
            raise
        if subcommand == "fit" and first_rank():
            starts.end(self.run_dir, "finished" if self.exact_resume.ended else "stopped early")

    def before_fit(self) -> None:
        """Keeps the resolved configuration of every start: `config.yaml` of the first, `config-2.yaml` and so on."""
        if self.trainer.is_global_zero:
            if self._get(self.config, "overwrite"):  # only now is it known that there will be another
                directory.remove_run(self.run_dir)
            if self.resumed:
                directory.set_aside(self.run_dir, *self.resumed)
            earlier = len(list(self.run_dir.glob("config*.yaml"))) if self.resumed else 0
            name = f"config-{earlier + 1}.yaml" if earlier else "config.yaml"
            write_text(self.run_dir / name, yaml.safe_dump(self.resolved, sort_keys=False))
            if not self.resumed:
                (self.run_dir / "starts.json").unlink(missing_ok=True)
            starts.begin(self.run_dir, self.resumed[1]["step"] if self.resumed else 0)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Settles which checkpoint is meant, and that it fits."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            kwargs["ckpt_path"] = str(self.resumed[0]) if self.resumed else None
        else:
            kwargs["ckpt_path"] = self.checkpoint(kwargs.get("ckpt_path"))
        kwargs["weights_only"] = True
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # they are on disk; of ten thousand photographs they would fill memory
        return kwargs

    def checkpoint(self, given: str | None) -> str:
        """The checkpoint whose weights a command takes.

        Args:
            given: `last` (of the run; also for None), `best`, or a file.

        Raises:
            DataError: Where it is missing, unreadable, or of another network: the settings that differ.
        """
        folder = self.directory() / "checkpoints"
        path = folder / f"{given or 'last'}.ckpt" if given in (None, "last", "best") else Path(str(given))
        if not path.is_file():
            raise DataError(
                f"no checkpoint {path}: run 'sis-lightning fit' with the same options first, or give --ckpt_path FILE"
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            saved, weights = content["hyper_parameters"], content["state_dict"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise DataError(
                f"{path}: not a checkpoint of ours, or damaged ({type(error).__name__}: {error})"[:400]
            ) from None
        assert isinstance(self.model, BaseTask)
        differences = _differences(saved, dict(self.model.hparams), self.model.free_settings)
        if differences:
            raise DataError(
                f"{path} is of another network:\n"
                + "\n".join(
                    f"  {key}: {old!r} in the checkpoint, {new!r} asked for" for key, old, new in differences[:3]
                )
                + "\n  Give the options that it was trained with, or its run's config.yaml as --config."
            )
        ours = self.model.state_dict()
        other = [key for key in (*ours, *weights) if key not in ours or key not in weights]
        other += [key for key in ours if key in weights and ours[key].shape != weights[key].shape]
        if other:
            raise DataError(
                f"{path} is of another network: {len(other)} of its weights are missing, unknown or of another shape,\n"
                f"  such as {other[0]}. Give the options that it was trained with."
            )
        say(f"checkpoint {path}, step {content['global_step']:,}")
        return str(path)

    def _config_beside(self, checkpoint: Path) -> dict[str, Any]:
        """The configuration of the run whose checkpoint it is; of a lone file, that of this command."""
        path = checkpoint.parent.parent / "config.yaml"
        content: dict[str, Any] = yaml.safe_load(path.read_text()) if path.is_file() else self.resolved
        return content

    def _others_operators(self) -> dict[str, type]:
        """The operator, where a user registered it."""
        assert isinstance(self.model, BaseTask)
        name = self.model.backbone_config.operator
        operator = operator_class(name)
        return {} if operator.__module__ == operator_class("conv").__module__ else {name: operator}

    def _evidence(self, identity: str) -> dict[str, Any]:
        """What a test's figures were measured with and on."""
        data, task = self.datamodule, self.model
        assert isinstance(data, SISDataModule)
        assert isinstance(task, BaseTask)
        path = Path(str(self.trainer.ckpt_path))
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        run = content.get(RUN, {})
        trained = run.get("config") or self._config_beside(path)
        begun = starts.read_starts(path.parent.parent if path.parent.name == "checkpoints" else self.run_dir)
        seconds = [starts.seconds(start) for start in begun]
        device = self.trainer.strategy.root_device
        before, now = settled(trained), settled(self.resolved)
        return {
            "task": str(self._get(self.config, "task")),
            "backbone": task.backbone_config.slug,
            "data": {
                **{"root": str(data.root), "identity": identity, "fingerprint": data.fingerprint("test")},
                **{"images": task.tested_images, "trained_on": run.get("trained_on", []), **data.notes},
            },
            "seed": trained.get("seed_everything"),
            "config": trained,
            "config_hash": digest(before),
            "tested_otherwise": {
                key: [before.get(key), now.get(key)]
                for key in sorted((before.keys() | now.keys()) - {"verbose"})
                if before.get(key) != now.get(key)
            },
            "checkpoint": {
                **{"file": str(path), "sha256": digest_files([path], path.parent)},
                **{"step": content["global_step"], "epoch": content["epoch"], "finished": run.get("point") == "end"},
            },
            "training": {
                "restarts": max(0, len(begun) - 1),
                # Nobody knows how long a start ran that was killed.
                "seconds": None if None in seconds else sum(second or 0 for second in seconds),
                # The most of all its starts: what batch norm of each device saw the least of.
                "devices": max(run["devices"]) if "devices" in run else run.get("world_size"),
                "changed": run.get("changed", []),
                "code": run.get("code", []),
            },
            "curves": curves(path.parent.parent, task.monitor),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }

    def after_test(self) -> None:
        """Keeps what was measured, on what and with which weights."""
        data, task = self.datamodule, self.model
        assert isinstance(data, SISDataModule)
        assert isinstance(task, BaseTask)
        if not self.trainer.is_global_zero:
            return
        identity = data.identity()
        metrics = {key: round(float(value), 8) for key, value in self.trainer.callback_metrics.items()}
        scores = task.test_metrics
        if isinstance(scores, GatheredScores):
            console.print(f"results in {data.write_results(scores.rows, self.run_dir / 'test_results')}")
        shown = task.monitor.replace("val/", "test/")
        # JSON has no NaN: a class that occurs nowhere has no IoU.
        figures = {key: value if isfinite(value) else None for key, value in metrics.items()}
        content = {"headline": shown, "metrics": figures, **self._evidence(identity)}
        write_record(self.run_dir / "test.json", content, self._others_operators())
        if not metrics:
            console.print("no annotations to score against, so no figures: the results are for the data set's server")
            return
        said = "".join(f"; {label}: {text}" for label, text in data.notes.items())
        console.print(f"{shown} {metrics.get(shown, float('nan')):.4f} on {identity} data{said}")


def first_rank() -> bool:
    """Whether this process speaks and writes for all."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def say(text: str) -> None:
    """Prints for people, once for all devices."""
    if first_rank():
        console.print(text)


def _differences(
    saved: dict[str, Any], asked: dict[str, Any], free: frozenset[str], prefix: str = "model"
) -> list[tuple[str, Any, Any]]:
    """The settings by which two networks differ, less those that are free to."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(saved.keys() & asked.keys() - free):
        old, new = saved[key], asked[key]
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, free, f"{prefix}.{key}")
        elif old != new and not key.startswith("_"):
            found.append((f"{prefix}.{key}", old, new))
    return found


def run(subcommand: str | None, layers: dict[str, Any], options: list[str]) -> RunCLI:
    """Runs `fit`, `validate`, `test` or `predict`.

    Args:
        subcommand: None builds model, data and trainer alone.
        layers: The composed YAML.
        options: What the command line lays over it.

    Raises:
        UsageError, DataError: With texts for people.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    keep_freed_memory()
    command = [subcommand] if subcommand else []
    if subcommand is None:  # what a run's config.yaml holds of its subcommand alone
        layers = {key: value for key, value in layers.items() if key not in ("ckpt_path", "weights_only", "verbose")}
        # Nothing is run: on a machine without the devices that a run asks for too.
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
        options = [*options, *(f"--trainer.{key}={value}" for key, value in {**here, "sync_batchnorm": False}.items())]
    try:
        return RunCLI(
            BaseTask,
            SISDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=Parser,
            args=[*command, "--config", yaml.safe_dump(layers), *options],
            run=subcommand is not None,
        )
    except MisconfigurationException as error:
        raise UsageError(str(error)) from error
    except UsageError as error:
        raise without_marks(error) from error
    except ValueError as error:
        # jsonargparse wraps what a class's constructor raises.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from error
    finally:
        directory.release()
