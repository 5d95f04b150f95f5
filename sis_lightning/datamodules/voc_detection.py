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
    """Detection on Pascal VOC: 20 classes, on any combination of years and splits.

    Training: random horizontal flip; each batch holds either portrait or landscape images; difficult objects are left
    out (as in Girshick's py-faster-rcnn). The metrics are those of the devkit: average precision at IoU 0.5, by the 11
    recalls of VOC 2007 and by the area under the curve of VOC 2012. Difficult objects count neither for nor against a
    detection. The detector resizes images.

    Args:
        root: Folder that contains `VOCdevkit/VOC2007/` and so on, or directly `VOC2007/` and so on.
        train_splits: Training splits as `YEAR/SPLIT`, where SPLIT is the name of a list in `ImageSets/Main/`.
        test_splits: Splits for validation and test, in the same form.
        classes: Names of the classes. None: VOC's 20.
        limit: Number of images to use from each split, for trials: the first ones that have objects. None: all images.
        loading: `batch_size`, `num_workers` and the other arguments of `SISDataModule`; `download` fetches both years.

    Raises:
        UsageError: If an argument is invalid.
        DataError: In `setup`, if files are missing or have defects that cannot be repaired; in a run, if an image is
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
