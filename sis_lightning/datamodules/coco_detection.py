"""Detection on COCO, and what all DataModules of COCO's layout share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sis_lightning.datamodules.base import SISDataModule, Transform
from sis_lightning.datamodules.flips import flip_image_and_boxes
from sis_lightning.datasets.base import ImageDataset
from sis_lightning.datasets.coco import FILE_NAMES, LAYOUT, COCODetectionDataset, check_classes, coco_home
from sis_lightning.datasets.coco_reader import Kind
from sis_lightning.datasets.constants import Split
from sis_lightning.datasets.detection_dataset import check_limit
from sis_lightning.datasets.download import Archive
from sis_lightning.datasets.meta import Backend, DatasetMeta
from sis_lightning.errors import UsageError
from sis_lightning.option_effects import Effect

_COCO = "http://images.cocodataset.org"


class COCODataModule(SISDataModule):
    """The layout of COCO 2017: `annotations/KIND_SPLIT.json`, images in `SPLIT/`.

    Args:
        root: Folder that contains `annotations/`, or a folder `coco` with `annotations/`.
        train_split: Name of the training split, as in the names of its annotation file and image folder.
        val_split: Name of the validation split.
        test_split: Name of the test split; None: the same as `val_split`. For a split without annotations, such as
            `test-dev2017`, `test` computes no metrics, but writes a results file for COCO's evaluation server.
        evaluator: Library that computes the metrics: `pycocotools`, `faster-coco-eval`, which gives the same metrics
            faster, or `auto` for the latter if it is installed.
        limit: Number of images to use from each split, for trials: the first ones that have objects. None: all images.
        loading: `batch_size`, `num_workers` and the other arguments of `SISDataModule`.
    """

    #: The kind of annotations that are read.
    kind: ClassVar[Kind] = "bbox"
    # COCO publishes no checksums; PaddleDetection, fast.ai and others check their downloads by these.
    archives = (
        Archive(f"{_COCO}/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", "train2017", fetched=False),
        Archive(f"{_COCO}/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", "val2017", fetched=False),
        Archive(
            f"{_COCO}/annotations/annotations_trainval2017.zip",
            "f4bbac642086de4f52a3fdda2de5fa2c",
            "annotations",
            fetched=False,
        ),
    )
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "train_split": Effect.RESULT,
        "val_split": Effect.RESULT,
        "test_split": Effect.RESULT,
        "evaluator": Effect.NUMERICS,
        "limit": Effect.RESULT,
    }

    def __init__(
        self,
        root: str,
        train_split: str = "train2017",
        val_split: str = "val2017",
        test_split: str | None = None,
        evaluator: Backend = "auto",
        limit: int | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(root, **loading)
        self.splits: dict[Split, str] = {"train": train_split, "val": val_split, "test": test_split or val_split}
        self.evaluator, self.limit = evaluator, check_limit(limit)
        if limit:
            self.notes["limit"] = f"the first {limit} images with objects of each split"

    @property
    def home(self) -> Path:
        """The folder with `annotations/`."""
        return coco_home(self.root)

    def describe(self, meta: DatasetMeta) -> DatasetMeta:
        """Adds the library that computes the metrics."""
        return dataclasses.replace(super().describe(meta), backend=self.evaluator)

    def layout(self) -> str:
        """COCO's files, and its page of downloads."""
        return LAYOUT.format(name=FILE_NAMES[self.kind], root=self.root)


class COCODetectionDataModule(COCODataModule):
    """Detection on COCO: the ids of the 80 categories, among 1…90, become the labels 1…80 of the model.

    Training: random horizontal flip; each batch holds either portrait or landscape images; crowds and boxes of no
    area are left out, and images without objects, as in mmdetection. The metrics are computed by COCO's own code, for
    which detections on crowds count neither for nor against. The detector resizes images.

    Args:
        root: Folder that contains `annotations/`, or a folder `coco` with `annotations/`.
        classes: Names of the classes to detect, such as `[person, car]`, or merged classes, such as `{person: [person],
            vehicle: [car, bus, truck]}`. Objects of other classes are left out in all splits. None: all classes.
        empty_images: Whether training images without objects are kept; those of validation and test always are.
        max_detections: Number of boxes per image and class that count for the metrics; COCO's is 100. The network keeps
            `detector.box_detections_per_img` boxes of an image, 100 by default.
        files: `train_split`, `val_split`, `test_split`, `evaluator`, `limit`, and `batch_size`, `num_workers` and the
            other arguments of `SISDataModule`.

    Raises:
        UsageError: If an argument is invalid.
        DataError: In `setup`, if files are missing or have defects that cannot be repaired; in a run, if an image is
            unreadable or of another size than its annotation says.
    """

    option_effects: ClassVar[Mapping[str, Effect]] = {
        "classes": Effect.RESULT,
        "empty_images": Effect.RESULT,
        "max_detections": Effect.RESULT,
    }

    def __init__(
        self,
        root: str,
        classes: list[str] | dict[str, list[str]] | None = None,
        empty_images: bool = False,
        max_detections: int = 100,
        **files: Any,
    ) -> None:
        super().__init__(root, **files)
        if max_detections <= 10:
            raise UsageError(f"max_detections is {max_detections}, must be above 10")
        self.max_detections = max_detections
        self.classes = None if classes is None else check_classes(classes)
        self.empty_images = empty_images

    def describe(self, meta: DatasetMeta) -> DatasetMeta:
        """Adds the number of detections that count."""
        return dataclasses.replace(super().describe(meta), max_detections=self.max_detections)

    def dataset(self, split: Split) -> ImageDataset:
        """The images of a split with their boxes."""
        training = split == "train"
        return COCODetectionDataset(
            self.root,
            self.splits[split],
            evaluation=not training,
            limit=self.limit,
            classes=self.classes,
            empty_images=self.empty_images or not training,
        )

    @property
    def train_transform(self) -> Transform:
        """Flips image and boxes with probability 1/2."""
        return flip_image_and_boxes
