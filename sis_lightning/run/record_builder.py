"""Builds the record of a test run."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from sis_lightning.files import digest, digest_files
from sis_lightning.operators import operator_class
from sis_lightning.run import history
from sis_lightning.run.recipe import changed_recipe, recipe, settled
from sis_lightning.run.record import OptionChange, TestData, TestedCheckpoint, TestRecord, Training, environment
from sis_lightning.run.reporting.loggers import curves
from sis_lightning.run.resume.checkpoints import resume_point
from sis_lightning.run.run import Run
from sis_lightning.tasks.checkpoint_files import read_checkpoint


def custom_operators(run: Run) -> dict[str, type]:
    """The run's operator by its name, if it is not a built-in one."""
    name = run.task.backbone_config.operator
    operator = operator_class(name)
    return {} if operator.__module__ == operator_class("conv").__module__ else {name: operator}


def test_record(run: Run, trainer: Trainer) -> TestRecord:
    """The record of a test that has just ended.

    Args:
        run: The run.
        trainer: The Trainer after `test`.
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
            root=str(data.root),
            identity=data.identity(),
            fingerprint=data.fingerprint("test"),
            images=task.tested_images,
            trained_on=point.trained_on if point else [],
            notes=dict(data.notes),
        ),
        seed=trained.get("seed_everything"),
        config=trained,
        config_hash=digest(settled(trained)),
        recipe_hash=digest(recipe(trained)),
        tested_otherwise={key: OptionChange(trained=old, tested=new) for key, old, new in of_recipe},
        computed_otherwise={key: OptionChange(trained=old, tested=new) for key, old, new in of_numerics},
        checkpoint=TestedCheckpoint(
            file=str(path),
            sha256=digest_files([path], path.parent),
            step=content["global_step"],
            epoch=content["epoch"],
            finished=point is not None and point.point == "end",
        ),
        training=Training(
            restarts=max(0, len(starts) - 1),
            seconds=None if None in seconds else sum(second or 0 for second in seconds),
            # The maximum of all starts: batch norm of each device saw the fewest images then.
            devices=max(point.devices) if point else None,
            changed=point.changed if point else [],
            code=point.code if point else [],
            start_weights=point.start_weights if point else None,
        ),
        curves=curves(path.parent.parent, task.monitor),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **environment(custom_operators(run)),
    )


def _config_beside(checkpoint: Path, run: Run) -> dict[str, Any]:
    """The configuration of the run whose checkpoint it is; for a lone file, that of this command."""
    path = checkpoint.parent.parent / "config.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else run.config
    return content
