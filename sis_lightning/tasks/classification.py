"""Image classification: global average pooling and a fully connected layer on the backbone's last map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchvision.transforms import v2

from sis_lightning.datasets.base import Batch
from sis_lightning.errors import UsageError
from sis_lightning.evaluation import TopKEvaluator
from sis_lightning.models import Classifier
from sis_lightning.option_effects import Effect
from sis_lightning.tasks.arguments import BackboneLike
from sis_lightning.tasks.base import BaseTask
from sis_lightning.tasks.inference import Outputs
from sis_lightning.tasks.predictions import ClassificationPrediction
from sis_lightning.tasks.targets import class_weight_tensor, require_labels, stacked_images


class ClassificationTask(BaseTask):
    """Image classification with the cross-entropy loss, scored by top-1 and top-5 accuracy.

    Batches are those of `BaseTask`, with `image` (N, C, H, W) and the target `label` (N,), 0…K-1. `predict` returns
    `ClassificationPrediction`.

    Args:
        backbone: The backbone, given as the name of a file in `configs/backbones/` such as `"sis29"`, a mapping of
            `BackboneConfig`'s fields, or a `BackboneConfig`.
        num_classes: Number of classes K, at least 2.
        label_smoothing: Share of the target that is spread evenly over all classes, in 0…1.
        class_weights: Weight of each class in the loss (K values); None: all weights are 1.
        training: Further arguments of `BaseTask`: `operator`, `in_channels`, `optimizer`, `lr_scheduler`,
            `lr_interval`, `lr_batch_size`, `warmup_steps`, `warmup_start`, `backbone_weights`, `weights`,
            `freeze_backbone`, `compile_mode` and `meta`.

    Raises:
        UsageError: If an argument is invalid. It is also a ValueError.
    """

    primary_metric = "top1"
    target_keys = ("label",)
    option_effects: ClassVar[Mapping[str, Effect]] = {"label_smoothing": Effect.RESULT, "class_weights": Effect.RESULT}
    class_weight: Tensor | None

    def __init__(
        self,
        backbone: BackboneLike,
        num_classes: int,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        **training: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **training)
        if num_classes < 2:
            raise UsageError(f"num_classes is {num_classes}, a classification needs at least 2")
        if not 0 <= label_smoothing <= 1:
            raise UsageError(f"label_smoothing is {label_smoothing}, must be in 0…1")
        self.label_smoothing = label_smoothing
        weight = None if class_weights is None else class_weight_tensor(class_weights, num_classes)
        self.register_buffer("class_weight", weight, persistent=False)
        self.finish(Classifier(self.backbone_config, num_classes, in_channels=self.in_channels))

    def build_evaluator(self) -> Metric:
        """Top-1 and top-5 accuracy over a split."""
        return TopKEvaluator(self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images (N, C, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.model(images)
        return logits

    def check_targets(self, batch: Batch) -> None:
        """Checks that each image has a label, 0…K-1.

        Args:
            batch: A batch with `image` and `label`.

        Raises:
            UsageError: If the labels have another shape or range.
        """
        labels, count = batch["label"], len(batch["image"])
        if not isinstance(labels, Tensor) or labels.shape != (count,):
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise UsageError(f"label is {shape}, must be a tensor ({count},), one class id for each image")
        require_labels(labels, 0, self.num_classes - 1)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the cross-entropy of a batch: `image` (N, C, H, W) and `label` (N,)."""
        logits, weight = self(stacked_images(batch)), self.class_weight
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if weight is not None:
            weight = weight.to(logits.dtype)
        loss = F.cross_entropy(logits, batch["label"], weight, label_smoothing=self.label_smoothing)
        return {"cross_entropy": loss}

    def infer(self, batch: Batch) -> Outputs:
        """Predicts `probabilities` (num_classes,) of each image."""
        return self._outputs(self._logits(batch))

    def evaluate(self, batch: Batch, metrics: Metric) -> Outputs:
        """Predicts a batch with `label`, and updates top-1 and top-5 with it."""
        self._require(batch, "image", "label")
        self.check_targets(batch)
        logits = self._logits(batch)
        metrics.update(logits, batch["label"])
        return self._outputs(logits)

    def _logits(self, batch: Batch) -> Tensor:
        images = batch["image"]
        if isinstance(images, Tensor):
            logits: Tensor = self(images)
        else:  # of different sizes
            logits = torch.cat([self(image[None]) for image in images])
        return logits.float()

    def _outputs(self, logits: Tensor) -> Outputs:
        return [{"probabilities": probabilities} for probabilities in logits.softmax(dim=1)]

    def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Brings an image to the size of training, as `meta.image_size` and `meta.resize` say."""
        size, resize = self.meta.image_size, self.meta.resize
        if size is None or not resize:
            return sample
        if resize == "stretch":
            image = v2.functional.resize(sample["image"], list(size), antialias=True)
        else:
            image = v2.functional.resize(sample["image"], [round(min(size) * 8 / 7)], antialias=True)
            image = v2.functional.center_crop(image, list(size))
        return {**sample, "image": image}

    def _resizing(self) -> str:
        size, resize = self.meta.image_size, self.meta.resize
        if size is None or not resize:
            return ""
        height, width = size
        if resize == "stretch":
            return f"resized to {height}×{width} px"
        return f"shorter side resized to {round(min(size) * 8 / 7)} px, then the centre of {height}×{width} px"

    def predictions(self, batch: Batch, outputs: Outputs) -> list[ClassificationPrediction]:
        """Makes a `ClassificationPrediction` of each image's probabilities."""
        return [
            ClassificationPrediction(
                self.displayable(image), name, output["probabilities"].detach().float().cpu(), self.class_names
            )
            for image, name, output in zip(batch["image"], self.names_of(batch), outputs, strict=True)
        ]

    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Draws up to 16 images with the predicted and the true class; wrong ones have red captions."""
        count = min(16, len(outputs))
        figure = Figure(figsize=(8, 2.2 * -(-count // 4)), layout="constrained")
        axes = figure.subplots(-(-count // 4), 4, squeeze=False).reshape(-1)
        for axis in axes:
            axis.set_axis_off()
        for axis, prediction, label in zip(axes, self.predictions(batch, outputs), batch["label"], strict=False):
            axis.imshow(prediction.rgb.permute(1, 2, 0).numpy())
            color = "black" if prediction.label == int(label) else "firebrick"
            caption = f"{prediction.class_name} {prediction.probability:.2f}\ntrue: {self.class_names[int(label)]}"
            axis.set_title(caption, fontsize=8, color=color)
        return figure
