"""Semantic segmentation on Pascal VOC 2012, with SBD's masks if they are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from sis_lightning.datamodules.base import SISDataModule, Transform
from sis_lightning.datasets.base import ImageDataset, Sample
from sis_lightning.datasets.constants import IMAGENET_MEAN, VOID, Split
from sis_lightning.datasets.download import voc_archives
from sis_lightning.datasets.voc import SEGMENTATION_LAYOUT, VOCSegmentationDataset, voc_home
from sis_lightning.errors import UsageError
from sis_lightning.option_effects import Effect


class RandomScale(v2.Transform):  # type: ignore[misc]
    """Resizes image and mask by one random factor of the image's own size.

    Args:
        scale_range: Minimum and maximum factor.
    """

    def __init__(self, scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.scale_range = scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the size (H, W)."""
        low, high = self.scale_range
        factor = low + (high - low) * torch.rand(()).item()
        height, width = transforms.get_size(next(item for item in flat_inputs if isinstance(item, Tensor)))
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes: bilinear for images, nearest by pixel centres for masks (torchvision's own is half a pixel off)."""
        if isinstance(inpt, tv_tensors.Mask):
            exact = transforms.InterpolationMode.NEAREST_EXACT
            ids = transforms.resize_image(inpt.as_subclass(Tensor)[None], params["size"], interpolation=exact)[0]
            return tv_tensors.wrap(ids, like=inpt)
        return transforms.resize(inpt, size=params["size"], antialias=True)


@dataclass(frozen=True)
class ImageAndMaskTransform:
    """Applies a transform to image and mask of a sample alike.

    Attributes:
        transform: A transform of an image and a mask, such as those of `torchvision.transforms.v2`.
    """

    transform: Callable[[Any, Any], tuple[Any, Any]]

    def __call__(self, sample: Sample) -> Sample:
        """Returns the sample with the transformed image and mask."""
        image, mask = self.transform(sample["image"], sample["mask"])
        return {**sample, "image": image, "mask": mask}


class VOCSegmentationDataModule(SISDataModule):
    """Segmentation on Pascal VOC 2012: 21 classes including background; pixels with the id 255 (void) are ignored.

    Training: random resizing by a factor in `scale`, random crop of `crop_size` (padded with the mean colour and
    void), random horizontal flip (DeepLabv3+, Chen et al. 2018), all on uint8. Evaluation: whole images and masks at
    their original size. Splits: `train_aug` (10,582 images, with `SegmentationClassAug/` of SBD) if it is there, else
    `train` (1,464 images); val and test are `val` (1,449 images).

    Your own data in the same layout: name its classes with `classes`.

    Args:
        root: Folder that contains `VOCdevkit/VOC2012/`, `VOC2012/`, or directly the content of `VOC2012/`.
        crop_size: Height and width of the training crops in px.
        scale: Minimum and maximum of the random factor by which training images are resized.
        classes: Names of the classes in the order of their mask ids, background first. None: VOC's 21.
        train_split: Name of a list in `ImageSets/Segmentation/`, such as `train`; or `auto`: `train_aug` if the folder
            `SegmentationClassAug/` exists, and `train` otherwise.
        mask_values: What the masks have for each class, in the order of `classes`: numbers such as `[0, 255]`, or
            colours such as `[[0, 0, 0], [128, 0, 0]]`. None: the ids 0, 1, …, and 255 for void.
        void_values: With `mask_values`, the numbers or colours of pixels that are not annotated (void).
        loading: `batch_size`, `num_workers` and the other arguments of `SISDataModule`; `download` fetches 2 GB.

    Raises:
        UsageError: If an argument is invalid.
        DataError: In `setup`, if folders, lists, images or masks are missing; in a run, if an image is unreadable, or
            a mask has another size than its image or an id that is no class.
    """

    archives = voc_archives("2012")
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "crop_size": Effect.RESULT,
        "scale": Effect.RESULT,
        "classes": Effect.RESULT,
        "train_split": Effect.RESULT,
        "mask_values": Effect.RESULT,
        "void_values": Effect.RESULT,
    }

    def __init__(
        self,
        root: str,
        crop_size: int = 513,
        scale: tuple[float, float] = (0.5, 2.0),
        classes: list[str] | None = None,
        train_split: str = "auto",
        mask_values: list[int | list[int]] | None = None,
        void_values: list[int | list[int]] | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(root, **loading)
        if crop_size < 16:
            raise UsageError(f"crop_size is {crop_size}, must be at least 16")
        if not 0 < scale[0] <= scale[1]:
            raise UsageError(f"scale is {list(scale)}, must be [low, high] with 0 < low <= high")
        self.image_size = (crop_size, crop_size)
        self.classes, self.train_split = classes, train_split
        self.mask_values, self.void_values = mask_values, void_values or ()
        colour = list(self.mean_colour(IMAGENET_MEAN))
        self._augmentation = v2.Compose(
            [
                RandomScale(scale),
                v2.RandomCrop(crop_size, pad_if_needed=True, fill={tv_tensors.Image: colour, tv_tensors.Mask: VOID}),
                v2.RandomHorizontalFlip(),
            ]
        )

    @property
    def home(self) -> Path:
        """The folder with `JPEGImages/`."""
        return voc_home(self.root, "2012", itself=True)

    def dataset(self, split: Split) -> ImageDataset:
        """The images and masks of a split; `val` for val and test."""
        name = self.train_split if split == "train" else "val"
        return VOCSegmentationDataset(self.root, name, self.classes, self.mask_values, self.void_values)

    def layout(self) -> str:
        """VOC's folders, and where they are published."""
        return SEGMENTATION_LAYOUT.format(root=self.root)

    @property
    def train_transform(self) -> Transform:
        """Scales, crops and flips image and mask alike."""
        return ImageAndMaskTransform(self._augmentation)
