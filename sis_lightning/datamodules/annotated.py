"""What the DataModules of images with boxes share."""

from __future__ import annotations

from torchvision import tv_tensors
from torchvision.transforms import v2

from sis_lightning.datasets.base import Sample
from sis_lightning.errors import UsageError

_flip = v2.RandomHorizontalFlip()


def flip_image_and_boxes(sample: Sample) -> Sample:
    """Flips an image with its boxes horizontally, with a probability of 1/2."""
    size = tuple(sample["image"].shape[1:])
    boxes = tv_tensors.BoundingBoxes(sample["boxes"], format="XYXY", canvas_size=size)
    image, boxes = _flip(sample["image"], boxes)
    return {**sample, "image": image, "boxes": boxes}


def checked_limit(limit: int | None) -> int | None:
    """The number of images that are used of a split.

    Raises:
        UsageError: If it is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}, must be at least 1, or null for all images")
    return limit
