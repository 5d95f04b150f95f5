"""Prints a summary at the start of a run; writes figures of predictions, and predictions."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from rich.text import Text
from torch import nn

from sis_lightning.datamodules import Batch
from sis_lightning.errors import UsageError
from sis_lightning.files import write_text
from sis_lightning.lightning_internals import total_steps
from sis_lightning.models.deploy import deploy
from sis_lightning.run.reporting.progress import console
from sis_lightning.tasks import BaseTask


class Announcement(Callback):
    """Prints at the start of a fit what will happen: data, network, images per step, learning rate, length."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints on rank 0."""
        task, data = pl_module, trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(task, BaseTask):
            return
        # Both set up the loaders, which all ranks do together.
        steps, images = total_steps(trainer), task.images_per_step
        if not trainer.is_global_zero:
            return
        batch, devices = data.batch_size, trainer.world_size
        rates = sorted(
            {
                group["lr"] if not task.warmup_steps else group["initial_lr"]
                for optimizer in trainer.optimizers
                for group in optimizer.param_groups
            }
        )
        counts = {split: len(dataset) for split, dataset in data.datasets.items()}
        scaled = f" (linear rule from batch {task.lr_batch_size})" if task.lr_batch_size else ""
        start = f"after {task.warmup_steps} steps of warm-up" if task.warmup_steps else "at the start"
        for label, text in {
            "run": trainer.default_root_dir,
            "data": f"{data.root}: {data.identity()}; " + ", ".join(f"{n:,} {split}" for split, n in counts.items()),
            "model": f"{_millions(task)} parameters, {_millions(task.backbone)} of them in the backbone",
            "backbone": task.backbone.describe(),
            "batch": f"{images} images per step = {batch // devices} on each of {devices} device(s) "
            f"× {trainer.accumulate_grad_batches} accumulated",
            "lr": ", ".join(f"{rate:g}" for rate in rates) + f" {start}{scaled}",
            "length": f"{int(steps):,} steps" if isfinite(steps) else f"no limit of steps{_time_limit(trainer)}",
            **data.notes,
            **task.notes,
        }.items():
            console.print(Text.assemble((f"{label:>13}", "bold"), f"  {text}"))


def _time_limit(trainer: Trainer) -> str:
    """The time after which a run without a limit of steps ends, if it has one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    limits = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    seconds = min((seconds for seconds in limits if seconds is not None), default=None)
    return ", until it is stopped" if seconds is None else f", {round(seconds):,} s (trainer.max_time)"


class Deploy(Callback):
    """Replaces the network by its deployed (fused) form after the checkpoint's weights were loaded."""

    def _deploy(self, trainer: Trainer, pl_module: LightningModule) -> None:
        deploy(pl_module, inplace=True)

    on_validation_start = on_test_start = on_predict_start = _deploy


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"


class PlotPredictions(Callback):
    """Draws the first batch of each validation beside its ground truth, into `images/` and TensorBoard."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draws the first batch of a validation, on rank 0."""
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero or not isinstance(pl_module, BaseTask):
            return
        path = Path(trainer.default_root_dir) / "images" / f"step_{trainer.global_step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pl_module.plot(batch, outputs["outputs"]).savefig(path, dpi=80)
        with Image.open(path) as drawn:
            pixels = np.asarray(drawn.convert("RGB"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("predictions", pixels, trainer.global_step, dataformats="HWC")


@dataclass
class _Row:
    """What the tables say of one image."""

    written: dict[str, Any]
    columns: dict[str, float]
    size: tuple[int, ...]
    annotations: list[dict[str, Any]] = field(default_factory=list)


class WritePredictions(Callback):
    """Writes predictions into a folder: the files of each image, `predictions.json` and `predictions.csv`.

    Args:
        folder: The folder.
        coco: Whether they are also written as a COCO file, `coco.json`.
    """

    def __init__(self, folder: Path, *, coco: bool = False) -> None:
        self.folder, self.partial, self.coco = folder, folder.with_name(f"{folder.name}.partial"), coco
        self.rows: list[_Row] = []
        self.categories: list[dict[str, Any]] = []
        self.began = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes a folder beside; earlier predictions stay until the new ones are complete."""
        if trainer.is_global_zero:
            if not (self.folder / "predictions.json").is_file() and self.folder.is_dir() and any(self.folder.iterdir()):
                raise UsageError(f"{self.folder} holds files that predict did not write: choose another --output")
            shutil.rmtree(self.partial, ignore_errors=True)  # of a predict that was killed
            self.partial.mkdir(parents=True)
        trainer.strategy.barrier()
        self.began = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the files of a batch's images."""
        notes = {key: text for key, text in trainer.datamodule.notes.items() if key == "person boxes"}  # type: ignore[attr-defined]
        for prediction in outputs:
            written = {**prediction.write(self.partial), **notes}
            row = _Row(written, prediction.columns(), tuple(prediction.image.shape[1:]))
            if self.coco:
                self.categories = prediction.coco_categories()
                row.annotations = prediction.coco_annotations()
            self.rows.append(row)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes what was written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects the rows of all ranks, and writes both tables on rank 0 in the order of the names."""
        rows = self.rows
        if dist.is_available() and dist.is_initialized():
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        if not trainer.is_global_zero:
            return
        rows = sorted(rows, key=lambda row: str(row.written["name"]))
        write_text(self.partial / "predictions.json", json.dumps([row.written for row in rows], indent=1) + "\n")
        lines = [
            {key: value for key, value in row.written.items() if not isinstance(value, dict | list)} for row in rows
        ]
        lines = [{**line, **row.columns} for line, row in zip(lines, rows, strict=True)]
        table = io.StringIO()
        writer = csv.DictWriter(table, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        write_text(self.partial / "predictions.csv", table.getvalue())
        if self.coco:
            write_text(self.partial / "coco.json", json.dumps(_coco(rows, self.categories)) + "\n")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)
        seconds = max(1e-9, time.monotonic() - self.began)
        console.print(f"{len(rows):,} predictions in {self.folder} ({len(rows) / seconds:.3g} images/s)")


def _coco(rows: Sequence[_Row], categories: list[dict[str, Any]]) -> dict[str, Any]:
    """Predictions as the content of a COCO file."""
    images = [
        {"id": number, "file_name": row.written["name"], "height": row.size[0], "width": row.size[1]}
        for number, row in enumerate(rows, start=1)
    ]
    found = [{"image_id": number, **one} for number, row in enumerate(rows, start=1) for one in row.annotations]
    annotations = [{"id": number, **one} for number, one in enumerate(found, start=1)]
    return {"images": images, "categories": categories, "annotations": annotations}
