"""Semantic segmentation: DeepLabv3+ or any other decoder of segmentation-models-pytorch on our backbones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

from sis_lightning.backbones import BackboneConfig
from sis_lightning.datamodules import Batch
from sis_lightning.datasets.constants import VOID, voc_palette
from sis_lightning.errors import UsageError
from sis_lightning.evaluation.iou import DatasetIoU
from sis_lightning.models import Segmenter
from sis_lightning.tasks.base import BaseTask, Outputs


class SegmentationTask(BaseTask):
    """Labels every pixel: (N, 3, H, W) of any H, W → logits (N, num_classes, H, W); cross-entropy; mIoU of the split.

    Evaluation takes one image at a time at its original size, so that its figures do not depend on the batch size.

    Args:
        backbone: A file in `configs/backbones/` by its name (`sis50`), or its fields; four stages, imagenet stem.
        num_classes: With background.
        architecture: SMP's name: `deeplabv3plus`, `unet`, `fpn`, `upernet`, ….
        output_stride: Of the backbone: 8 or 16 for DeepLab, 32 for decoders that have none to choose.
        decoder: SMP's arguments for the decoder, such as `decoder_channels: 256`.
        background_weight: Weight of class 0 in the loss; the others have 1.
        training: How to train: `optimizer` and what else `BaseTask` takes.
    """

    monitor = "val/miou"
    free_settings = BaseTask.free_settings | {"background_weight"}

    def __init__(
        self,
        backbone: BackboneConfig,
        num_classes: int,
        architecture: str = "deeplabv3plus",
        output_stride: int = 16,
        decoder: dict[str, Any] | None = None,
        background_weight: float = 1.0,
        **training: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **training)
        if not 2 <= num_classes <= VOID or background_weight < 0:
            raise UsageError(
                f"model.num_classes is {num_classes} (2 to {VOID}: ids are bytes, {VOID} is void), "
                f"background_weight {background_weight} (at least 0)"
            )
        weight = torch.ones(num_classes)
        weight[0] = background_weight
        self.register_buffer("class_weight", weight, persistent=False)
        model = Segmenter(
            self.backbone_config, num_classes, architecture, output_stride=output_stride, decoder=decoder
        )
        self.finish(model, DatasetIoU(self.class_names, VOID))

    class_weight: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images (N, 3, H, W) of any size to logits (N, num_classes, H, W)."""
        logits: Tensor = self.model(images)
        return logits

    def name_classes(self, names: Sequence[str]) -> None:
        """The metrics name their figures too."""
        super().name_classes(names)
        self.val_metrics.class_names = self.test_metrics.class_names = self.class_names

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted cross-entropy over all pixels that are not void; 0 where all are."""
        # Pixels as rows, which in channels_last is how they lie: half the time of the image-shaped form on a CPU.
        logits = self(batch["image"]).float().permute(0, 2, 3, 1).reshape(-1, self.num_classes)
        target = batch["mask"].long().reshape(-1)
        total = F.cross_entropy(logits, target, self.class_weight, ignore_index=VOID, reduction="sum")
        weights = self.class_weight[target.where(target != VOID, 0)] * (target != VOID)
        return {"cross_entropy": total / weights.sum().clamp_min(1e-6)}

    def evaluate(self, batch: Batch, metrics: Metric | MetricCollection) -> Outputs:
        """Adds each image's pixels to the confusion matrix."""
        outputs = self.predict_step(batch)
        for output, mask in zip(outputs, batch["mask"], strict=True):
            metrics.update(output["mask"].long(), mask.long())
        return outputs

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Outputs:
        """`mask` (H, W) uint8 of each image: the likeliest class of every pixel."""
        return [{"mask": self(image[None])[0].argmax(dim=0).to(torch.uint8)} for image in batch["image"]]

    def write_prediction(self, image: Tensor, name: str, output: dict[str, Any], folder: Path) -> dict[str, Any]:
        """`masks/NAME.png` with class ids in VOC's palette, and `overlays/NAME.jpg`, at the image's size."""
        ids = output["mask"].cpu().numpy()
        mask = Image.fromarray(ids).convert("P")
        mask.putpalette(voc_palette())
        colours = np.asarray(mask.convert("RGB"), dtype=np.float32)
        picture = 255 * image.permute(1, 2, 0).numpy()
        painted = np.where(ids[..., None] > 0, 0.5 * picture + 0.5 * colours, picture).round().astype(np.uint8)
        paths = {"mask": folder / "masks" / f"{name}.png", "overlay": folder / "overlays" / f"{name}.jpg"}
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(paths["mask"])
        Image.fromarray(painted).save(paths["overlay"], quality=90)
        shares = np.bincount(ids.reshape(-1), minlength=self.num_classes) / ids.size
        found = {self.class_names[i]: round(float(shares[i]), 4) for i in np.flatnonzero(shares)}
        row: dict[str, Any] = {"name": name, **{key: str(path.relative_to(folder)) for key, path in paths.items()}}
        return {**row, "shares": found}

    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Up to four rows of image, truth and prediction in VOC's colours, with the names of the classes present."""
        count = min(4, len(outputs))
        figure = Figure(figsize=(9, 3 * count), layout="constrained")
        axes = figure.subplots(count, 3, squeeze=False)
        palette = np.array(voc_palette(), dtype=np.uint8).reshape(256, 3)
        for row, index in zip(axes, range(count), strict=True):
            truth, predicted = batch["mask"][index].cpu().numpy(), outputs[index]["mask"].cpu().numpy()
            row[0].imshow(self.displayable(batch["image"][index]).permute(1, 2, 0).numpy())
            row[1].imshow(palette[truth])
            row[2].imshow(palette[predicted])
            for axis, kind, ids in zip(row, ("image", "truth", "prediction"), (None, truth, predicted), strict=True):
                present = [] if ids is None else [i for i in np.unique(ids) if 0 < i < self.num_classes]
                names = ", ".join(self.class_names[i] for i in present[:4])
                axis.set_title(f"{kind}: {names}" if names else kind, fontsize=8)
                axis.set_axis_off()
        return figure
