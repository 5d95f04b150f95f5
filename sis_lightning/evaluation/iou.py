"""Mean intersection over union as Pascal VOC defines it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix


class DatasetIoU(MulticlassConfusionMatrix):
    """IoU per class and their mean, from one confusion matrix over all pixels of the split.

    A class that occurs neither in the truth nor in the predictions has no IoU (NaN) and does not count in the mean.
    Void pixels count nowhere. Counts are integers: the figures depend neither on the batch size nor on the number of
    devices.

    Args:
        class_names: By id.
        void: The id that is not annotated.
    """

    def __init__(self, class_names: Sequence[str], void: int = 255) -> None:
        super().__init__(num_classes=len(class_names), ignore_index=void, validate_args=False)
        self.class_names = list(class_names)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """`miou`, `pixel_accuracy` and `iou/CLASS`, each in 0…1."""
        confusion = super().compute().double()
        hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        iou = torch.where(union > 0, hits / union, torch.nan)
        accuracy = hits.sum() / confusion.sum()
        named = {f"iou/{name}": value for name, value in zip(self.class_names, iou, strict=True)}
        return {"miou": iou.nanmean(), "pixel_accuracy": accuracy, **named}
