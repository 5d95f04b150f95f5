"""Image classification: global average pool and fully connected layer on the last map, cross-entropy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from sis_lightning.backbones import BackboneConfig
from sis_lightning.datamodules import Batch
from sis_lightning.errors import UsageError
from sis_lightning.models import Classifier
from sis_lightning.tasks.base import BaseTask, Outputs


class TopKAccuracy(MulticlassAccuracy):
    """Share of images whose class is among the k likeliest, and the error in percent that papers print."""

    def __init__(self, num_classes: int, k: int) -> None:
        super().__init__(num_classes, top_k=k, average="micro")
        self.k = k

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """`top{k}` in 0…1 and `top{k}_error_percent` in 0…100."""
        accuracy = super().compute()
        return {f"top{self.k}": accuracy, f"top{self.k}_error_percent": 100 * (1 - accuracy)}


class ClassificationTask(BaseTask):
    """Classifies whole images: (N, 3, H, W) → logits (N, num_classes); cross-entropy; top-1 and top-5.

    Args:
        backbone: A file in `configs/backbones/` by its name (`sis29`), or its fields.
        num_classes: Of the data set, at least 2.
        label_smoothing: Share of the target spread over all classes, 0…1.
        training: How to train: `optimizer` and what else `BaseTask` takes.
    """

    monitor = "val/top1"
    free_settings = BaseTask.free_settings | {"label_smoothing"}

    def __init__(
        self,
        backbone: BackboneConfig,
        num_classes: int,
        label_smoothing: float = 0.0,
        **training: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **training)
        if num_classes < 2:
            raise UsageError(f"model.num_classes is {num_classes}, a classification needs at least 2")
        self.label_smoothing = label_smoothing
        ks = [k for k in (1, 5) if k < num_classes]
        metrics = MetricCollection({f"top{k}": TopKAccuracy(num_classes, k) for k in ks}, compute_groups=False)
        self.finish(Classifier(self.backbone_config, num_classes), metrics)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised (N, 3, H, W) → logits (N, num_classes)."""
        logits: Tensor = self.model(images)
        return logits

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the batch."""
        logits = self(batch["image"])
        return {"cross_entropy": F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)}

    def evaluate(self, batch: Batch, metrics: Metric | MetricCollection) -> Outputs:
        """Top-k over the split."""
        logits = self(batch["image"]).float()
        metrics.update(logits, batch["label"])
        return self._outputs(logits)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Outputs:
        """`probabilities` (num_classes,) of each image."""
        return self._outputs(self(batch["image"]).float())

    def _outputs(self, logits: Tensor) -> Outputs:
        return [{"probabilities": probabilities} for probabilities in logits.softmax(dim=1)]

    def write_prediction(self, image: Tensor, name: str, output: dict[str, Any], folder: Path) -> dict[str, Any]:
        """A row with the likeliest class and the probability of every class; no file of its own."""
        probabilities = output["probabilities"].cpu()
        names = self.class_names
        best = int(probabilities.argmax())
        shares = {f"p({names[i]})": round(float(p), 6) for i, p in enumerate(probabilities)}
        return {"name": name, "class": names[best], "probability": round(float(probabilities[best]), 6), **shares}

    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Up to 16 images with the true and the predicted class, wrong ones in red."""
        count = min(16, len(outputs))
        figure = Figure(figsize=(8, 2.2 * -(-count // 4)), layout="constrained")
        axes = figure.subplots(-(-count // 4), 4, squeeze=False).reshape(-1)
        names = self.class_names
        for axis in axes:
            axis.set_axis_off()
        for index in range(count):
            probabilities = outputs[index]["probabilities"].cpu()
            best, true = int(probabilities.argmax()), int(batch["label"][index])
            axes[index].imshow(self.displayable(batch["image"][index]).permute(1, 2, 0).numpy())
            colour = "black" if best == true else "firebrick"
            title = f"{names[best]} {probabilities[best]:.2f}\ntrue: {names[true]}"
            axes[index].set_title(title, fontsize=8, color=colour)
        return figure
