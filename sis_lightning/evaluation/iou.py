"""Mean intersection over union as Pascal VOC defines it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from sis_lightning.errors import UsageError


class IoUEvaluator(MulticlassConfusionMatrix):
    """IoU of each class and their mean, from one confusion matrix over all pixels of the split.

    A class that occurs neither in the ground truth nor in the predictions has no IoU (NaN) and does not count in the
    mean. Void pixels do not count at all. Counts are integers: the metrics depend neither on the batch size nor on the
    number of devices.

    Args:
        class_names: Class names by mask id.
        void: Mask id of pixels that are not annotated.
    """

    def __init__(self, class_names: Sequence[str], void: int = 255) -> None:
        super().__init__(num_classes=len(class_names), ignore_index=void, validate_args=False)
        self.class_names = list(class_names)

    def update(self, predictions: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]) -> None:
        """Adds the pixels of one or more images.

        Args:
            predictions: Predicted class ids (H, W) or (N, H, W) of any integer type, or a list of (H, W).
            targets: Ground truth of the same shapes, with `void` for pixels that are not annotated.

        Raises:
            UsageError: If the shapes differ, predictions are not class ids (but logits, for example), or an id at an
                annotated pixel is not that of a class.
        """
        if isinstance(predictions, Tensor) and isinstance(targets, Tensor):
            predictions, targets = [predictions], [targets]
        if len(predictions) != len(targets):
            raise UsageError(f"{len(predictions)} predictions for {len(targets)} images")
        for prediction, target in zip(predictions, targets, strict=True):
            if prediction.shape != target.shape or prediction.is_floating_point():
                found = f"{prediction.dtype} {tuple(prediction.shape)}".removeprefix("torch.")
                raise UsageError(
                    f"predictions are {found}, must be class ids of the shape of the targets, {tuple(target.shape)}: "
                    "of logits (N, K, H, W) take .argmax(dim=1)"
                )
            super().update(*self._checked(prediction.long(), target.long()))

    def _checked(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.class_names)
        outside = {
            name: (target != self.ignore_index) & ((ids < 0) | (ids >= count))
            for name, ids in (("predictions", prediction), ("targets", target))
        }
        if torch.stack(list(outside.values())).any():  # once, as a GPU must finish its work for it
            name, ids = ("targets", target) if outside["targets"].any() else ("predictions", prediction)
            raise UsageError(
                f"{name} have the class id {int(ids[outside[name]][0])}, must be 0…{count - 1} for {count} classes "
                f"(or {self.ignore_index} in the targets, for pixels that are not annotated)"
            )
        return prediction, target

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Computes the metrics: `miou`, `pixel_accuracy` and `iou/CLASS`, each in 0…1."""
        confusion = super().compute().double()
        hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        iou = torch.where(union > 0, hits / union, torch.nan)
        accuracy = hits.sum() / confusion.sum()
        named = {f"iou/{name}": value for name, value in zip(self.class_names, iou, strict=True)}
        return {"miou": iou.nanmean(), "pixel_accuracy": accuracy, **named}
