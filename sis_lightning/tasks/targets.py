"""Checks of the images and targets of batches, and of class weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sis_lightning.datasets.base import Batch
from sis_lightning.errors import UsageError


def stacked_images(batch: Batch) -> Tensor:
    """The images (N, C, H, W) of a training batch.

    Raises:
        UsageError: If they are a list, since their sizes differ.
    """
    images = batch["image"]
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else "a list, as of different sizes"
        raise UsageError(f"the images of a training batch must be one tensor (N, C, H, W), but they are {found}")
    return images


def require_labels(labels: Tensor, first: int, last: int) -> None:
    """Checks the range of labels, if they are on the CPU, where that costs nothing.

    Raises:
        UsageError: If one is outside of it.
    """
    if labels.device.type == "cpu" and labels.numel():
        lowest, highest = (int(value) for value in labels.aminmax())
        if lowest < first or highest > last:
            wrong = lowest if lowest < first else highest
            raise UsageError(f"a label of the batch is {wrong}, must be in {first}…{last}: see num_classes")


def class_weight_tensor(weights: Sequence[float], num_classes: int) -> Tensor:
    """Per-class loss weights (K,), float32.

    Raises:
        UsageError: If there are not as many weights as classes, or one is negative or not finite.
    """
    tensor = torch.tensor([float(weight) for weight in weights])
    if len(tensor) != num_classes or not (torch.isfinite(tensor) & (tensor >= 0)).all() or not tensor.any():
        raise UsageError(
            f"class_weights is {list(weights)}, must be {num_classes} numbers of at least 0, one for each class"
        )
    return tensor
