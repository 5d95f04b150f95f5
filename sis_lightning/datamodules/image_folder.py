"""Images sorted into a folder for each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torchvision.transforms import v2

from sis_lightning.datamodules.base import ImageTransform, SISDataModule, Transform
from sis_lightning.datamodules.flips import RandomCropAndFlip
from sis_lightning.datasets.base import ImageDataset
from sis_lightning.datasets.constants import Split
from sis_lightning.datasets.folder import LAYOUT, ImageFolderDataset
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.errors import UsageError
from sis_lightning.option_effects import Effect


class ImageFolderDataModule(SISDataModule):
    """Your own images: `root/train/CLASS/*.jpg`, and the same in `root/val` or `root/test`.

    Training with `crop: pad` (for small images that all have `image_size` already, like CIFAR's): padding of
    `image_size` / 8 with the mean colour, random crop. With `crop: resized` (for photographs): a random part of 8-100 %
    of the area with proportions of 3:4-4:3, resized. Both: random horizontal flip, on uint8. Evaluation: the images as
    they are (`pad`), or the shorter side resized to 8/7 `image_size` and the centre cropped (`resized`). Classes are
    the names of the folders, sorted.

    Args:
        root: Folder that contains `train/`, and `val/` or `test/`.
        image_size: Side in px of the square images that the network takes.
        crop: Training crop. `pad` pads images of side `image_size` with the mean colour, and crops them randomly;
            `resized` crops a random part of an image, and resizes it.
        loading: `batch_size`, `num_workers` and the other arguments of `SISDataModule`.

    Raises:
        UsageError: If an argument is invalid.
        DataError: In `setup`, if folders are missing, classes are empty or differ between splits; in a run, if an image
            is unreadable, or of another size although `crop` is `pad`.
    """

    option_effects: ClassVar[Mapping[str, Effect]] = {"image_size": Effect.RESULT, "crop": Effect.RESULT}

    def __init__(
        self, root: str, image_size: int = 224, crop: Literal["pad", "resized"] = "resized", **loading: Any
    ) -> None:
        super().__init__(root, **loading)
        if image_size < 8:
            raise UsageError(f"image_size is {image_size}, must be at least 8")
        self.image_size, self.crop = (image_size, image_size), crop
        if crop == "pad":
            colour = self.mean_colour(DatasetMeta.mean)
            self._augmentation: Callable[[Any], Any] = RandomCropAndFlip(image_size, image_size // 8, colour)
            self._preparation = v2.Resize((image_size, image_size), antialias=True)
        else:
            resized = v2.RandomResizedCrop(image_size, antialias=True)
            self._augmentation = v2.Compose([resized, v2.RandomHorizontalFlip()])
            shorter = round(image_size * 8 / 7)
            self._preparation = v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(image_size)])

    def dataset(self, split: Split) -> ImageDataset:
        """The folder of a split. Uses `val` for a missing `test`, and vice versa."""
        return ImageFolderDataset(self.root, split, self.image_size if self.crop == "pad" else None)

    def describe(self, meta: DatasetMeta) -> DatasetMeta:
        """Adds the image size, and how images are brought to it."""
        resize: Literal["stretch", "center_crop"] = "stretch" if self.crop == "pad" else "center_crop"
        return dataclasses.replace(super().describe(meta), image_size=self.image_size, resize=resize)

    def layout(self) -> str:
        """The folders of the classes."""
        return LAYOUT.format(root=self.root)

    @property
    def train_transform(self) -> Transform:
        """Crops and flips the image."""
        return ImageTransform(self._augmentation)

    @property
    def eval_transform(self) -> Transform:
        """Brings the image to `image_size`."""
        return ImageTransform(self._preparation)
