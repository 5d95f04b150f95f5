"""The base of the Datasets with boxes: images with the objects of COCO's or VOC's annotation files."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors

from sis_lightning.datasets.annotations import Annotations
from sis_lightning.datasets.base import ImageDataset, Sample
from sis_lightning.datasets.images import turned
from sis_lightning.datasets.paths import PathArray
from sis_lightning.errors import DataError, UsageError


def check_limit(limit: int | None) -> int | None:
    """Checks the number of images that are used of a split.

    Args:
        limit: The number; None for all images.

    Returns:
        The same.

    Raises:
        UsageError: If it is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}, must be at least 1, or None for all images")
    return limit


class DetectionDataset(ImageDataset):
    """Images with the objects of an annotation file.

    Args:
        annotations: All images and objects of the split.
        evaluation: Whether samples are for scoring: they have `truth`, and ignored objects stay in `annotations`.
        limit: Number of images that have objects; only the first ones are used. None for all images.
        ignored_name: Name of the objects that count neither for nor against a detection.

    Attributes:
        annotations: The objects as training takes them: clipped to their images.
        all_objects: For evaluation, the annotations with all objects as the file has them; else None.

    Raises:
        UsageError: If `limit` is below 1.
    """

    def __init__(
        self, annotations: Annotations, *, evaluation: bool, limit: int | None, ignored_name: str = "crowds"
    ) -> None:
        super().__init__()
        check_limit(limit)
        self.evaluation = evaluation
        self.defects = annotations.defects
        self.notes.update(annotations.notes)
        chosen = annotations.first(limit)
        self.all_objects = chosen if evaluation else None
        self.annotations = chosen.copy()
        self.annotations.clip()
        if not evaluation:
            self.annotations.drop(self.annotations.ignored.copy(), ignored_name)
        self._note_dropped()

    def _note_dropped(self) -> None:
        if self.annotations.dropped:
            self.notes["without"] = ", ".join(
                f"{count:,} {reason}" for reason, count in self.annotations.dropped.items()
            )

    def __len__(self) -> int:
        return len(self.annotations)

    def files(self) -> Sequence[Path]:
        """The images and their annotation files."""
        return PathArray([*self.annotations.paths.names(), *self.annotation_files()])

    @abstractmethod
    def annotation_files(self) -> Sequence[Path]:
        """The annotation files."""

    def __getitem__(self, index: int) -> Sample:
        return self.detection_sample(index)

    def detection_sample(self, index: int) -> Sample:
        """Reads an image with its boxes; see `__getitem__` of the Datasets for detection."""
        known = self.annotations
        objects = known.objects(index)
        counted = ~known.ignored[objects]
        sample = {
            "image": self.read(index),
            "name": known.name(index),
            "boxes": torch.from_numpy(known.boxes[objects][counted]).float(),
            "labels": torch.from_numpy(known.labels[objects][counted]) + 1,
        }
        if self.all_objects is not None:
            sample["truth"] = self.all_objects.ground_truth(index)
        return sample

    def checks(self) -> Iterator[Callable[[], Sample]]:
        """Functions that read each existing image with its objects."""
        missing = {defect.file for defect in self.defects}
        for index, path in enumerate(self.annotations.paths):
            if path not in missing:
                yield functools.partial(DetectionDataset.detection_sample, self, index)

    def read(self, index: int) -> tv_tensors.Image:
        """Reads an image.

        Args:
            index: Index of the image, which for keypoints is not that of the sample.

        Returns:
            RGB of shape (3, H, W), uint8, or what `reader` makes.

        Raises:
            DataError: If the file is missing or damaged, or has another size than its annotation says.
        """
        path, size = self.annotations.paths[index], tuple(self.annotations.sizes[index].tolist())
        image = self.reader.read(path)
        found = (image.shape[2], image.shape[1])
        if size not in ((0, 0), found):
            raise DataError(
                f"{path}: {found[0]}×{found[1]} px, but {self.annotations.source} says {size[0]}×{size[1]}"
                + turned(path, found, (size[0], size[1]))
            )
        return image

    def require_targets(self) -> None:
        """Checks that there is an object to learn from.

        Raises:
            DataError: If there is none.
        """
        if not len(self.annotations.image):
            left = f" ({self.notes['without']} are left out)" if "without" in self.notes else ""
            raise DataError(
                f"{self.annotations.source}: no object to learn from in {len(self.annotations):,} images{left}"
            )

    def groups(self) -> Sequence[int] | None:
        """1 for portrait and 0 for landscape images: a batch is padded to its maximum width and height."""
        sizes = self.annotations.sizes
        groups: list[int] = (sizes[:, 0] < sizes[:, 1]).astype(np.int64).tolist()
        return groups
