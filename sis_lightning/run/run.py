"""One run: its resolved configuration, its directory, and the task and DataModule that the configuration describes.

runs/TASK/BACKBONE-OPERATOR/seedN/
    config.yaml         everything resolved; config-2.yaml and so on of later starts
    checkpoints/        step-N.ckpt (the newest two), last.ckpt, best.ckpt
    history.json        when the run was started, and how each start ended
    csv/, tensorboard/  the logs of fit, test, …
    images/             predictions beside the ground truth, one figure per validation
    predictions/        what predict wrote
    test.json           what test measured, on which data, with which weights: a record with a checksum
    test_results/       the detections or keypoints that were scored, in the format of COCO's or VOC's servers
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng

from sis_lightning.backbones import backbone_config
from sis_lightning.config.compose import resolve
from sis_lightning.config_files import read_yaml
from sis_lightning.datamodules import SISDataModule
from sis_lightning.errors import DataError, UsageError
from sis_lightning.option_effects import Effect, effects_of
from sis_lightning.run.library_errors import explained
from sis_lightning.run.options import RunOptions
from sis_lightning.run.parser import build, run_parser
from sis_lightning.run.recipe import changes, declared_effect
from sis_lightning.tasks import BaseTask
from sis_lightning.tasks.base import weights_deferred
from sis_lightning.tasks.checkpoint_files import read_checkpoint
from sis_lightning.tasks.loading import load


class Run:
    """A run as its configuration describes it; nothing is trained, and no Trainer is built.

    Task and DataModule are built when they are first asked for. Random numbers of the caller are left as they are.

    Args:
        layers: The composed configuration: nested plain data, as `sis_lightning.config.compose.compose` returns it.
        options: Command-line options that override it, such as `--data.batch_size=4`.

    Attributes:
        config: Everything resolved, as plain data, exactly as the run's `config.yaml` holds it.
        options: The options of the run itself.

    Raises:
        UsageError: If an option does not exist, or its value is invalid.
    """

    def __init__(self, layers: Mapping[str, Any], options: Sequence[str] = ()) -> None:
        parser = run_parser()
        with explained():
            parsed = parser.parse_args(["--config", yaml.safe_dump(dict(layers)), *options])
            config: dict[str, Any] = yaml.safe_load(parser.dump(parsed, skip_none=False))
        self.config = config
        names = [field.name for field in dataclasses.fields(RunOptions)]
        self.options = RunOptions(**{name: config[name] for name in names})
        self._folder: Path | None = None

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Run:
        """The run that `sis-lightning fit` would start with such arguments.

        Args:
            arguments: Arguments as on the command line, such as `["--config", "tasks/seg_voc.yaml"]`.

        Raises:
            UsageError: If a file or option does not exist, or a value is invalid.
        """
        return cls(*resolve(list(arguments)))

    @classmethod
    def from_folder(cls, folder: Path | str) -> Run:
        """The run whose directory it is, by its `config.yaml`.

        Raises:
            DataError: If there is no run in it.
            UsageError: If its configuration is not one of this release.
        """
        path = Path(folder) / "config.yaml"
        if not path.is_file():
            raise DataError(f"{folder}: no run in it (no config.yaml)")
        run = cls(read_yaml(path))
        run._folder = Path(folder)
        return run

    @property
    def directory(self) -> Path:
        """The directory that the run writes into."""
        if self._folder is not None:
            return self._folder
        return (
            Path(self.options.run_dir) if self.options.run_dir else self.family / f"seed{self.options.seed_everything}"
        )

    @property
    def family(self) -> Path:
        """The folder with the runs of all seeds: `runs/TASK/BACKBONE-OPERATOR`."""
        return Path("runs", self.options.task, self.slug)

    @property
    def slug(self) -> str:
        """A short name of the backbone, such as `res2net50-26w4s-basic`."""
        with explained(self.config):
            return backbone_config(self.config["model"]["init_args"]["backbone"]).slug

    @property
    def pretraining(self) -> Path | None:
        """Directory of the run of the same backbone and seed 0 that `backbone_weights: run:TASK` names, if it does."""
        kind, _, task = str(self.config["model"]["init_args"].get("backbone_weights")).partition(":")
        return Path("runs", task, self.slug, "seed0") if kind == "run" else None

    @functools.cached_property
    def task(self) -> BaseTask:
        """The task, with the weights that the seed gives it.

        Raises:
            UsageError: If its arguments are invalid.
        """
        with isolate_rng(), explained(self.config), weights_deferred():
            seed = self.options.seed_everything
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            task: BaseTask = build("model", self.config["model"])
        if self.pretraining is not None:
            task.backbone_weights = str(self.pretraining)
        return task

    @functools.cached_property
    def datamodule(self) -> SISDataModule:
        """The DataModule; its data is not read before `setup`.

        Raises:
            UsageError: If its arguments are invalid.
        """
        with isolate_rng(), explained(self.config):
            data: SISDataModule = build("data", self.config["data"])
        return data

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in px of the images that the network trains on; of detection, of the largest.

        Raises:
            UsageError: If neither the DataModule nor the task knows it.
        """
        size: tuple[int, int] | None = getattr(self.datamodule, "image_size", None)
        size = size or getattr(self.task, "image_size", None)
        if size is None:
            raise UsageError(
                f"{type(self.datamodule).__name__} has no image_size: images keep their own sizes; give a size"
            )
        return size

    def checkpoint(self, which: Path | str | None = None) -> Path:
        """The checkpoint whose weights a command takes.

        Args:
            which: `last` (of this run; also for None), `best`, or a file.

        Raises:
            DataError: If it is missing, unreadable, or holds another network: the message names what differs.
        """
        return self.read_checkpoint(which)[0]

    def read_checkpoint(self, which: Path | str | None = None) -> tuple[Path, dict[str, Any]]:
        """The checkpoint as `checkpoint` finds and checks it, and its content, whose tensors stay in the file."""
        named = which in (None, "last", "best")
        path = self.directory / "checkpoints" / f"{which or 'last'}.ckpt" if named else Path(str(which))
        if not path.is_file():
            raise DataError(
                f"no checkpoint {path}: run 'sis-lightning fit' with the same options first, or give --ckpt_path FILE"
            )
        content = read_checkpoint(path, mmap=True)
        saved, weights = content.get("hyper_parameters"), content["state_dict"]
        if saved is None:
            raise DataError(f"{path}: not a checkpoint of a task of sis-lightning: it has no hyper_parameters")
        effects = effects_of(type(self.task))
        asked = dict(self.task.hparams)
        common = saved.keys() & asked.keys()
        differences = [
            (key, old, new)
            for key, old, new in changes({key: saved[key] for key in common}, {key: asked[key] for key in common})
            if declared_effect(effects, key.split(".")) is Effect.NETWORK
        ]
        if differences:
            shown = [
                f"  model.{key}: {old!r} in the checkpoint, {new!r} asked for"
                for key, old, new in sorted(differences)[:3]
            ]
            raise DataError(
                "\n".join([f"{path} is of another network:", *shown])
                + "\n  Give the options that it was trained with, or its run's config.yaml as --config."
            )
        expected = self.task.state_dict()
        other = [key for key in (*expected, *weights) if key not in expected or key not in weights]
        other += [key for key in expected if key in weights and expected[key].shape != weights[key].shape]
        if other:
            raise DataError(
                f"{path} is of another network: {len(other)} of its weights are missing, unknown or of another shape,\n"
                f"  such as {other[0]}. Give the options that it was trained with."
            )
        return path, content

    def load(self, which: Path | str | None = None) -> BaseTask:
        """A trained task of its own, as `sis_lightning.load` returns it; `task` stays untrained.

        Args:
            which: `last` (also for None), `best`, or a file.

        Raises:
            DataError: If the checkpoint is missing, unreadable, or holds another network.
        """
        return load(self.checkpoint(which))
