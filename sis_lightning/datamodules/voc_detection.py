"""Detection on Pascal VOC's years."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sis_lightning.datamodules.base import SISDataModule, Transform
from sis_lightning.datamodules.flips import flip_image_and_boxes
from sis_lightning.datasets.base import ImageDataset
from sis_lightning.datasets.constants import Split
from sis_lightning.datasets.detection_dataset import check_limit
from sis_lightning.datasets.download import voc_archives
from sis_lightning.datasets.voc import DETECTION_LAYOUT, VOCDetectionDataset, parse_split, voc_home
from sis_lightning.errors import UsageError
from sis_lightning.option_effects import Effect


class VOCDetectionDataModule(SISDataModule):
    """Pascal VOC's boxes: 20 classes, any union of years and splits.

    Training: random horizontal flip; batches of upright or of wide images; without difficult objects (as Girshick's
    py-faster-rcnn). The metric is the devkit's: average precision at IoU 0.5 by VOC 2007's 11 points and by VOC 2012's
    area; difficult objects count neither for nor against a detection. The detector resizes images.

    Args:
        root: Folder that holds `VOCdevkit/VOC2007/` and so on (or these folders themselves).
        train_splits: Training splits as `YEAR/SPLIT`, by the lists in `ImageSets/Main/`.
        test_splits: Splits of validation and test.
        classes: Names of the classes; None for VOC's 20.
        limit: Number of images with objects, the first ones of every split, for trials; None for all images.
        loading: `batch_size`, `num_workers` and the other arguments of `SISDataModule`; the download has both years.

    Raises:
        UsageError: If an argument is invalid.
        DataError: In `setup`, if files are missing or have defects without a remedy; in a run, if an image is
            unreadable or of another size than its annotation says.
    """

    archives = voc_archives("2007", "2007-test", "2012")
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "train_splits": Effect.RESULT,
        "test_splits": Effect.RESULT,
        "classes": Effect.RESULT,
        "limit": Effect.RESULT,
    }

    def __init__(
        self,
        root: str,
        train_splits: Sequence[str] = ("2007/trainval", "2012/trainval"),
        test_splits: Sequence[str] = ("2007/test",),
        classes: list[str] | None = None,
        limit: int | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(root, **loading)
        for name, splits in (("train_splits", train_splits), ("test_splits", test_splits)):
            if isinstance(splits, str) or not splits:
                raise UsageError(f"{name} must be a list of at least one YEAR/SPLIT, such as [2012/trainval]")
            for split in splits:
                try:
                    parse_split(split)
                except UsageError as error:
                    raise UsageError(f"{name}: {error}") from None
        self.train_splits, self.test_splits = tuple(train_splits), tuple(test_splits)
        self.classes, self.limit = classes, check_limit(limit)
        if limit:
            self.notes["limit"] = f"the first {limit} images with objects of each split"

    @property
    def home(self) -> Path:
        """The folder of the first training year."""
        return voc_home(self.root, self.train_splits[0].partition("/")[0])

    def dataset(self, split: Split) -> ImageDataset:
        """The images of a split with their boxes."""
        training = split == "train"
        splits = self.train_splits if training else self.test_splits
        return VOCDetectionDataset(self.root, splits, self.classes, evaluation=not training, limit=self.limit)

    def layout(self) -> str:
        """VOC's folders, and where they are published."""
        return DETECTION_LAYOUT.format(year=self.train_splits[0].partition("/")[0], root=self.root)

    @property
    def train_transform(self) -> Transform:
        """Flips image and boxes with probability 1/2."""
        return flip_image_and_boxes
