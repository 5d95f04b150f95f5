"""ImageNet, ILSVRC 2012."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sis_lightning.datamodules.image_folder import ImageFolderDataModule
from sis_lightning.datasets.base import ImageDataset
from sis_lightning.datasets.constants import Split
from sis_lightning.datasets.imagenet import LAYOUT, ImageNetDataset, imagenet_home
from sis_lightning.option_effects import Effect


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet: 1.28 million training and 50,000 validation images in 1,000 classes, in one of its two usual layouts.

    Training and evaluation are those of `ImageFolderDataModule` with `crop: resized`: a random part of 8-100 % of the
    area, resized to `image_size`, and a random horizontal flip; evaluation at the centre of the image, of which the
    shorter side is 8/7 `image_size` (256 for 224). The val split is also the test split, as in the papers.

    Args:
        root: Folder with the data, see `sis_lightning.datasets.ImageNetDataset`.
        image_size: Side in px of the square images that the network takes.
        loading: `batch_size`, `num_workers` and the other arguments of `SISDataModule`.

    Raises:
        UsageError: If an argument is invalid.
        DataError: In `setup`, if something is missing; in a run, if an image is unreadable.
    """

    option_effects: ClassVar[Mapping[str, Effect]] = {"image_size": Effect.RESULT}

    def __init__(self, root: str, image_size: int = 224, **loading: Any) -> None:
        super().__init__(root, image_size, "resized", **loading)

    @property
    def home(self) -> Path:
        """The folder with the data: `root`, or the folder `ilsvrc` in it."""
        return imagenet_home(self.root)

    def dataset(self, split: Split) -> ImageDataset:
        """The training images, or the validation images for val and test."""
        return ImageNetDataset(self.root, split)

    def layout(self) -> str:
        """The folders and files of both layouts."""
        return LAYOUT.format(root=self.root)
