"""Builds the record of a test run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

from sis_lightning.files import digest
from sis_lightning.operators import operator_class
from sis_lightning.run import history
from sis_lightning.run.environment import environment, portable
from sis_lightning.run.recipe import changed_recipe, recipe, settled
from sis_lightning.run.record import OptionChange, TestData, TestedCheckpoint, TestRecord, Training
from sis_lightning.run.reporting.loggers import curves
from sis_lightning.run.resume.checkpoints import resume_point
from sis_lightning.run.run import Run
from sis_lightning.tasks.checkpoint_files import read_checkpoint, tensors_digest


def custom_operators(run: Run) -> dict[str, type]:
    """The run's operator by its name, if it is not a built-in one."""
    name = run.task.backbone_config.operator
    operator = operator_class(name)
    return {} if operator.__module__ == operator_class("conv").__module__ else {name: operator}


def test_record(run: Run, trainer: Trainer, command: Sequence[str]) -> TestRecord:
    """The record of a test that has just ended.

    Args:
        run: The run.
        trainer: The Trainer after `test`.
        command: The command line of the test.
    """
    data, task = run.datamodule, run.task
    path = Path(str(trainer.ckpt_path))
    content = read_checkpoint(path, mmap=True)
    point = resume_point(content)
    trained = point.config if point else _config_beside(path, run)
    folder = path.parent.parent if path.parent.name == "checkpoints" else run.directory
    starts = history.read_history(folder)
    seconds = [start.seconds for start in starts]
    metrics = {key: round(float(value), 8) for key, value in trainer.callback_metrics.items()}
    device = trainer.strategy.root_device
    of_recipe, of_numerics = changed_recipe(trained, run.config)
    return TestRecord(
        task=run.options.task,
        backbone=task.backbone_config.slug,
        primary_metric=task.monitor.replace("val/", "test/"),
        # JSON has no NaN: the IoU of a class that occurs nowhere is not defined.
        metrics={key: value if isfinite(value) else None for key, value in metrics.items()},
        data=TestData(
            root=portable(str(data.root)),
            identity=data.identity(),
            fingerprint=data.fingerprint("test"),
            images=task.tested_images,
            trained_on=point.trained_on if point else [],
            notes=portable(data.notes),
        ),
        seed=trained.get("seed_everything"),
        config=portable(trained),
        config_hash=digest(settled(trained)),
        recipe_hash=digest(recipe(trained)),
        tested_otherwise=_option_changes(of_recipe),
        computed_otherwise=_option_changes(of_numerics),
        checkpoint=TestedCheckpoint(
            file=portable(str(path)),
            sha256=tensors_digest(content["state_dict"]),
            step=content["global_step"],
            epoch=content["epoch"],
            finished=point is not None and point.point == "end",
            deployed=run.options.deploy,
        ),
        training=Training(
            restarts=max(0, len(starts) - 1),
            seconds=None if None in seconds else sum(second or 0 for second in seconds),
            # The maximum of all starts: batch norm of each device saw the fewest images then.
            devices=max(point.devices) if point else None,
            changed=point.changed if point else [],
            command=point.command if point else [],
            environments=point.environments if point else [],
            start_weights=point.start_weights if point else None,
        ),
        curves=_until(content["global_step"], curves(path.parent.parent, task.monitor)),
        command=portable(list(command)),
        environment=environment(custom_operators(run), device),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _option_changes(changes: Sequence[tuple[str, Any, Any]]) -> dict[str, OptionChange]:
    return {key: OptionChange(trained=portable(old), tested=portable(new)) for key, old, new in changes}


def _until(step: int, found: Mapping[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """Curves up to a step: the best checkpoint, or that of a killed run, is older than the logs."""
    return {metric: [point for point in curve if point[0] <= step] for metric, curve in found.items()}


def _config_beside(checkpoint: Path, run: Run) -> dict[str, Any]:
    """The configuration of the run whose checkpoint it is; for a lone file, that of this command."""
    path = checkpoint.parent.parent / "config.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else run.config
    return content
