"""ImageNet, ILSVRC 2012."""

from __future__ import annotations

from pathlib import Path

from sis_lightning.datamodules.image_folder import ImageFolderDataModule
from sis_lightning.datasets.base import ImageDataset
from sis_lightning.datasets.constants import Split
from sis_lightning.datasets.imagenet import LAYOUT, ImageNetDataset, imagenet_home


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet: 1.28 million training and 50,000 validation images in 1,000 classes, in one of its two usual layouts.

    Training and evaluation are those of `ImageFolderDataModule`, with `crop: resized` a random part of 8-100 % of the
    area, resized to `image_size`, and a random horizontal flip; evaluation at the centre of the image, of which the
    shorter side is 8/7 `image_size` (256 for 224). The val split is also the test split, as in the papers.

    Args:
        root: Folder with the data, see `sis_lightning.datasets.ImageNetDataset`.
        loading: `image_size`, `crop` (`pad` for the small images of ImageNet-32 and ImageNet-64), `batch_size`,
            `num_workers` and the other arguments of `ImageFolderDataModule`.

    Raises:
        UsageError: If an argument is invalid.
        DataError: In `setup`, if something is missing; in a run, if an image is unreadable.
    """

    @property
    def home(self) -> Path:
        """The folder with the data: `root`, or the folder `ilsvrc` in it."""
        return imagenet_home(self.root)

    def dataset(self, split: Split) -> ImageDataset:
        """The training images, or the validation images for val and test."""
        return ImageNetDataset(self.root, split, self.image_size if self.crop == "pad" else None)

    def layout(self) -> str:
        """The folders and files of both layouts."""
        return LAYOUT.format(root=self.root)
