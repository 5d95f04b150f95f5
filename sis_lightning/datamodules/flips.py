"""Random horizontal flips of images with boxes."""

from __future__ import annotations

from torchvision import tv_tensors
from torchvision.transforms import v2

from sis_lightning.datasets.base import Sample

_flip = v2.RandomHorizontalFlip()


def flip_image_and_boxes(sample: Sample) -> Sample:
    """Flips an image with its boxes horizontally, with probability 1/2."""
    size = tuple(sample["image"].shape[1:])
    boxes = tv_tensors.BoundingBoxes(sample["boxes"], format="XYXY", canvas_size=size)
    image, boxes = _flip(sample["image"], boxes)
    return {**sample, "image": image, "boxes": boxes}
