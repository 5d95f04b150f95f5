"""The description of a data set that a task needs: names, numbers and conventions. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sis_lightning.datasets.constants import IMAGENET_MEAN, IMAGENET_STD, flip_order
from sis_lightning.errors import UsageError, nearest

Resize = Literal["", "stretch", "center_crop"]
Protocol = Literal["", "coco", "voc"]
Backend = Literal["auto", "pycocotools", "faster-coco-eval"]


@dataclass(frozen=True)
class DatasetMeta:
    """Names, numbers and conventions of a data set.

    Every Dataset has one as `.meta`. A DataModule hands it to the task, which keeps it in its hyperparameters and so in
    every checkpoint: prediction needs no data set.

    Attributes:
        class_names: Names of the classes. The first is label 0 (classification), mask id 0 (segmentation) or label 1
            (detection and keypoints, where 0 is the background).
        category_ids: The data set's own id of each class, for results files; empty if it has none.
        mean: Mean of the training images by channel, in 0…1.
        std: Standard deviation of the training images by channel, in 0…1.
        primary_metric: Name of the metric that selects the best checkpoint; empty for the task's own.
        protocol: How detections are scored: `coco` or `voc`; empty for other tasks.
        keypoint_names: Names of the keypoints in their order; empty without keypoints.
        flip_pairs: Indices (left, right) of the keypoints that a horizontal flip exchanges.
        skeleton: Pairs of connected keypoints, counted from 0, for drawing.
        sigmas: Standard deviation of each keypoint for the object keypoint similarity (OKS).
        backend: The library that computes COCO's metrics: `pycocotools`, `faster-coco-eval`, or `auto` for the latter
            if it is installed. Both compute the same metrics.
        image_size: Height and width in px to which `predict` resizes an image (keypoints: the crop of a person); None
            if images keep their own sizes.
        resize: How `predict` resizes an image to `image_size`: `stretch` (both sides, whatever their proportions) or
            `center_crop` (the shorter side to 8/7 of `image_size`, then the centre); empty if it does not.
        value_range: The values in the image files that become 0 and 1, before mean and standard deviation; None for 0
            and 255 (or 65535 of 16 bits).
        max_detections: With the protocol `coco`, number of boxes per image and class that count.
    """

    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    primary_metric: str = ""
    protocol: Protocol = ""
    backend: Backend = "auto"
    keypoint_names: tuple[str, ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()
    sigmas: tuple[float, ...] = ()
    image_size: tuple[int, int] | None = None
    resize: Resize = ""
    value_range: tuple[float, float] | None = None
    max_detections: int = 100

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def flip_order(self) -> tuple[int, ...]:
        """For each keypoint, the index of the keypoint whose place it takes in a flipped image."""
        return flip_order(len(self.keypoint_names), self.flip_pairs)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data: strings, numbers, lists and None."""
        return {key: _lists(value) for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DatasetMeta:
        """The inverse of `to_dict`.

        Args:
            content: Values of some or all fields; the others have their defaults.

        Raises:
            UsageError: If a key is not a field.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in content:
            if key not in known:
                raise UsageError(f"DatasetMeta has no field '{key}': {nearest(key, known)}")
        return cls(**{key: _tuples(value) for key, value in content.items()})


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
