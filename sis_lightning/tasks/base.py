"""What every task shares: backbone, optimisation, metrics over whole splits, checks that a run can be trusted."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
)
from torchmetrics import Metric, MetricCollection, SumMetric

from sis_lightning.backbones import Backbone, BackboneConfig, backbone_config
from sis_lightning.backbones.weights import load_backbone_weights
from sis_lightning.datamodules import Batch, SISDataModule
from sis_lightning.errors import DataError, UsageError
from sis_lightning.evaluation.gathered import GatheredScores
from sis_lightning.models.export import Exportable

OptimizerCallable = Callable[[Iterable[Tensor]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]
Outputs = list[dict[str, Any]]


def enlarge(image: Tensor) -> tuple[Tensor, int, float]:
    """Readies an image (3, H, W) of 0…1 for drawing.

    Returns:
        It as uint8, by whole pixels enlarged so that its longer side has at least 480; by how much; and by how much
        lines and letters should be larger than on 640 px.
    """
    picture = (255 * image).round().to(torch.uint8)
    times = -(-480 // max(picture.shape[1:]))
    picture = picture.repeat_interleave(times, 1).repeat_interleave(times, 2)
    return picture, times, max(1.0, max(picture.shape[1:]) / 640)


class BaseTask(LightningModule, ABC):
    """A network on one of our backbones, with its loss, metrics and pictures.

    Args:
        backbone: A file in `configs/backbones/` by its name (`sis50`), or its fields; `--model.backbone.operator`
            changes the operator alone.
        num_classes: Of the data set; a run on data with another number is refused.
        optimizer: Class and arguments; the learning rate is meant for `lr_batch_size`.
        lr_scheduler: Class and arguments; none for a constant rate.
        lr_interval: What the scheduler counts: an `epoch` or a `step`.
        lr_batch_size: The effective batch size that the learning rate is meant for. With any other, the rate is scaled
            in proportion (the linear rule, Goyal et al. 2017). None: the rate is used as it is.
        warmup_steps: Steps over which the learning rate rises linearly from `warmup_start` of itself.
        warmup_start: Share of the learning rate at the first step of the warm-up.
        backbone_weights: A checkpoint of any task on the same backbone, or a state dict of torchvision's or timm's,
            that a fit starts from; None: from scratch.
        compile_mode: Of `torch.compile` for the backbone: `default`, `reduce-overhead` (CUDA graphs),
            `max-autotune`; None: as it is written. Minutes at the start for a quicker step.

    Raises:
        UsageError: Where data and task do not fit, or the batch is too small for batch norm.
        DataError: Where the loss is not finite.
    """

    #: Chooses the best checkpoint, unless the data set has a `headline`.
    monitor: str
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    #: Settings in which a checkpoint may differ from the run that takes it: they change neither weights nor meaning.
    free_settings: ClassVar[frozenset[str]] = frozenset(
        {"optimizer", "lr_scheduler", "lr_interval", "lr_batch_size", "warmup_steps", "warmup_start"}
        | {"backbone_weights", "compile_mode"}
    )
    model: nn.Module

    def __init__(
        self,
        backbone: BackboneConfig,
        num_classes: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        lr_batch_size: int | None = None,
        warmup_steps: int = 0,
        warmup_start: float = 0.001,
        backbone_weights: str | None = None,
        compile_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = None,
    ) -> None:
        super().__init__()
        self.backbone_config = backbone_config(backbone)
        if num_classes < 1:
            raise UsageError(f"model.num_classes is {num_classes}, must be at least 1")
        if warmup_steps < 0 or not 0 < warmup_start <= 1:
            raise UsageError(
                f"model.warmup_steps is {warmup_steps} (at least 0), warmup_start {warmup_start} (above 0, at most 1)"
            )
        self.num_classes = num_classes
        self.class_names = [str(i) for i in range(num_classes)]
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.lr_interval, self.lr_batch_size = lr_interval, lr_batch_size
        self.warmup_steps, self.warmup_start = warmup_steps, warmup_start
        self.backbone_weights, self.compile_mode = backbone_weights, compile_mode
        self.schedule_note = ""

    def finish(self, model: nn.Module, metrics: Metric | MetricCollection) -> None:
        """Called last by a subclass's `__init__` with its network and with the metrics of one split."""
        # Convolutions are quicker on it, on CPUs and GPUs alike; the DataModule sends images in the same layout.
        self.model = model.to(memory_format=torch.channels_last)
        self.val_metrics, self.test_metrics = metrics.clone(), metrics.clone()
        self.tested = SumMetric()
        self.save_hyperparameters()
        # Only plain data loads with weights_only=True; from the command line it is plain already.
        plain = {
            key: dataclasses.asdict(value) if isinstance(value, BackboneConfig) else value
            for key, value in self.hparams.items()
            if not callable(value)
        }
        self.hparams.clear()
        self.hparams.update(plain)
        self._hparams_initial = dict(plain)

    @property
    def backbone(self) -> Backbone:
        """The one body inside `model`, with the same keys and shapes in every task."""
        return next(module for module in self.model.modules() if isinstance(module, Backbone))

    @property
    def data(self) -> SISDataModule:
        """The DataModule of the run."""
        data: SISDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    @abstractmethod
    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss, scalars; their sum is minimised."""

    @abstractmethod
    def evaluate(self, batch: Batch, metrics: Metric | MetricCollection) -> Outputs:
        """Predicts a batch and updates the metrics with it; returns what `predict_step` would."""

    @abstractmethod
    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Outputs:
        """Predicts a batch: one mapping an image, in its order."""

    @abstractmethod
    def write_prediction(self, image: Tensor, name: str, output: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Writes one image's prediction below `folder`.

        Args:
            image: (3, H, W), 0…1.
            name: As the data set calls it.
            output: As `predict_step` returned.
            folder: Where to write.

        Returns:
            A row for `predictions.csv` and `predictions.json`.
        """

    @abstractmethod
    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Draws the first images of a batch: what was seen, what is true, what is predicted."""

    def exportable(self, height: int, width: int) -> Exportable:
        """Describes the network for `sis_lightning.export`, with images of this size as an example."""
        network: Exportable = self.model.exportable(height, width)  # type: ignore[operator]
        return dataclasses.replace(network, metadata={"task": type(self).__name__, "classes": self.class_names})

    def name_classes(self, names: Sequence[str]) -> None:
        """Takes the names of the classes: from the data, or from a checkpoint where the data has none."""
        self.class_names = list(names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the names of the classes where a folder of pictures has none."""
        if not self.data.class_names and "class_names" in checkpoint:
            self.name_classes(checkpoint["class_names"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the names of the classes; refuses weights that are not finite, so that the last good ones stay."""
        checkpoint["class_names"] = self.class_names
        broken = [name for name, weight in self.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise self._not_finite(f"{len(broken)} weights, such as {broken[0]}")

    def setup(self, stage: str) -> None:
        """Refuses data whose classes are not the network's; starts a fit from `backbone_weights`."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SISDataModule) and data.class_names and data.num_classes != self.num_classes:
            raise UsageError(
                f"the data in {data.root} has {data.num_classes} classes, the model {self.num_classes}: "
                f"set --model.num_classes {data.num_classes}"
            )
        if isinstance(data, SISDataModule) and data.class_names:
            self.name_classes(data.class_names)
        if self.compile_mode:
            self.backbone.compile(mode=self.compile_mode)
        if stage == "fit" and self.backbone_weights and not self.trainer.ckpt_path:  # a checkpoint has its own
            load_backbone_weights(self.backbone, self.backbone_weights)

    @property
    def effective_batch_size(self) -> int:
        """Images an optimizer step, over all devices."""
        return self.data.batch_size * self.trainer.accumulate_grad_batches

    def configure_optimizers(self) -> Any:
        """Optimizer and scheduler by the linear rule; notes a schedule that does not end with the run."""
        try:
            optimizer = self.make_optimizer(self.parameters())
        except ValueError as error:
            raise UsageError(f"model.optimizer: {error}") from error
        if self.lr_batch_size:
            for group in optimizer.param_groups:
                group["lr"] *= self.effective_batch_size / self.lr_batch_size
        schedulers: list[dict[str, Any]] = []
        if self.make_lr_scheduler is not None:
            scheduler = self.make_lr_scheduler(optimizer)
            self._check_horizon(scheduler)
            schedulers.append({"scheduler": scheduler, "interval": self.lr_interval})
        if self.warmup_steps:
            for entry in schedulers:
                if isinstance(entry["scheduler"], OneCycleLR):
                    raise UsageError(
                        "model.warmup_steps: OneCycleLR has a warm-up of its own (pct_start): leave it at 0"
                    )
                # Others multiply the rate that they find, as the warm-up does, so that they go together.
                if isinstance(entry["scheduler"], LambdaLR | CyclicLR | CosineAnnealingWarmRestarts):
                    kind = type(entry["scheduler"]).__name__
                    raise UsageError(f"model.warmup_steps: {kind} sets the rate anew at each step: leave it at 0")
            warmup = LinearLR(optimizer, self.warmup_start, total_iters=self.warmup_steps)
            schedulers.append({"scheduler": warmup, "interval": "step"})
        return [optimizer], schedulers

    def on_train_start(self) -> None:
        """Once more, as a checkpoint brings the horizon of its own schedule."""
        if self.make_lr_scheduler is not None and self.trainer.ckpt_path:
            self._check_horizon(self.trainer.lr_scheduler_configs[0].scheduler)

    def _check_horizon(self, scheduler: LRScheduler) -> None:
        names = ("total_iters", "total_steps", "T_max")
        horizon = next((int(getattr(scheduler, name)) for name in names if hasattr(scheduler, name)), None)
        length = self.trainer.estimated_stepping_batches if self.lr_interval == "step" else self.trainer.max_epochs
        if horizon is None or length in (None, -1, float("inf")) or int(length or 0) == horizon:
            return
        kind = type(scheduler).__name__
        text = f"the learning rate's schedule ({kind}) ends at {self.lr_interval} {horizon}, the run at {length}"
        if int(length or 0) > horizon and kind == "OneCycleLR":
            remedy = f"make model.lr_scheduler.init_args.total_steps {length}"
            if self.trainer.ckpt_path:
                remedy += ", and start anew: a checkpoint brings its own schedule"
            raise UsageError(f"{text}, where it cannot go on: {remedy}")
        self.schedule_note = text

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The summed loss, checked to be finite."""
        try:
            parts = self.training_loss(batch)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"batch norm needs more than one value a channel, a device has {len(batch['name'])} image(s) a step:\n"
                f"  set --data.batch_size to at least {2 * self.trainer.world_size}, or --model.backbone.norm gn"
            ) from None
        loss = torch.stack(list(parts.values())).sum()
        if not torch.isfinite(loss):
            values = ", ".join(f"{key} {value.item()}" for key, value in parts.items())
            raise self._not_finite(f"the loss ({values}) on {', '.join(map(str, batch['name'][:3]))}, …")
        size = len(batch["name"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        if len(parts) > 1:
            self.log_dict({f"train/{key}": value.detach() for key, value in parts.items()}, batch_size=size)
        return loss

    def _not_finite(self, what: str) -> DataError:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        saved = next((path for callback in callbacks if (path := getattr(callback, "last_good", None))), None)
        saved = saved or "none was written yet"
        return DataError(
            f"not finite at step {self.global_step} (epoch {self.current_epoch}): {what}\n"
            f"  last good checkpoint: {saved}\n"
            "  Try a lower learning rate, or gradient clipping (--trainer.gradient_clip_val 10)."
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Outputs]:
        """Updates the val metrics."""
        return {"outputs": self.evaluate(batch, self.val_metrics)}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Outputs]:
        """Updates the test metrics."""
        self.tested.update(len(batch["name"]))
        return {"outputs": self.evaluate(batch, self.test_metrics)}

    def on_validation_epoch_start(self) -> None:
        """Says what the split is scored against, where that is an annotation file."""
        if isinstance(self.val_metrics, GatheredScores):
            self.val_metrics.truth = functools.partial(self.data.truth, "val")

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        if isinstance(self.test_metrics, GatheredScores):
            self.test_metrics.truth = functools.partial(self.data.truth, "test")

    def on_validation_epoch_end(self) -> None:
        """Computes the val metrics once over the split."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Computes the test metrics once over the split; `tested_images` is how many it saw."""
        self.tested_images = int(self.tested.compute())
        self.tested.reset()
        self._log_metrics("test", self.test_metrics)

    def _log_metrics(self, split: str, metrics: Metric | MetricCollection) -> None:
        values = {f"{split}/{key}": value for key, value in metrics.compute().items()}
        metrics.reset()
        shown = self.monitor.partition("/")[2]
        for key, value in values.items():
            # Every rank computed the same from all ranks' counts.
            value = torch.as_tensor(value, dtype=torch.float32)
            self.log(key, value, prog_bar=key == f"{split}/{shown}", sync_dist=True)

    def displayable(self, image: Tensor) -> Tensor:
        """A normalised image (3, H, W) as 0…1 on the CPU."""
        return self.data.denormalize(image).cpu()
