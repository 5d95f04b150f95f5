"""Semantic segmentation on Pascal VOC 2012, with SBD's masks where they are there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from sis_lightning.datamodules.base import Sample, SISDataModule, Source, Split, open_image, read_image
from sis_lightning.datasets.annotations import Defect
from sis_lightning.datasets.constants import VOC_CLASSES, VOID
from sis_lightning.datasets.download import voc_archives
from sis_lightning.errors import DataError, UsageError


def read_mask(path: Path, classes: int) -> tv_tensors.Mask:
    """Decodes a palette or grey mask to class ids (H, W), uint8, `VOID` where nothing is annotated.

    Raises:
        DataError: Where the file is missing, damaged, in colours, or holds an id outside of the classes.
    """
    with open_image(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise DataError(f"{path}: mask of mode {image.mode}: class ids need a palette (P) or grey (L) PNG")
        ids = np.array(image, dtype=np.uint8)
    found = np.flatnonzero(np.bincount(ids.reshape(-1), minlength=256))
    outside = [int(i) for i in found if i >= classes and i != VOID]
    if outside:
        raise DataError(f"{path}: mask id {outside[0]} is outside of the classes 0…{classes - 1} and {VOID} (void)")
    return tv_tensors.Mask(torch.from_numpy(ids))


class RandomScale(v2.Transform):  # type: ignore[misc]
    """Resizes image and mask by one factor drawn from `scale_range`, relative to the image's own size."""

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
        """Bilinear for images; nearest by pixels' centres for masks (torchvision's own is half a pixel off)."""
        if isinstance(inpt, tv_tensors.Mask):
            exact = transforms.InterpolationMode.NEAREST_EXACT
            ids = transforms.resize_image(inpt.as_subclass(Tensor)[None], params["size"], interpolation=exact)[0]
            return tv_tensors.wrap(ids, like=inpt)
        return self._call_kernel(transforms.resize, inpt, size=params["size"], antialias=True)


class VOCSegmentationDataModule(SISDataModule):
    """Pascal VOC 2012: 21 classes with background, 255 for void.

    Training: one scale in 0.5-2.0 of the image's own size, random crop of `crop_size` (padded with the mean colour and
    void), horizontal flip (DeepLabv3+, Chen et al. 2018), all on uint8; then ImageNet's mean and standard deviation.
    Evaluation: whole images and masks at their original size. Splits: `train_aug` (10,582 images, with
    `SegmentationClassAug/` of SBD) where it is there, else `train` (1,464); val and test are `val` (1,449).

    Your own data in the same layout: name its classes with `classes`.

    Args:
        root: Folder that holds `VOCdevkit/VOC2012/` (or `VOC2012/`, or its content).
        crop_size: Side of the training crops, in px.
        scale: Range of the random scale.
        classes: Names of the classes by mask id, background first; none for VOC's 21.
        train_split: `auto`, or a list below `ImageSets/Segmentation/` by its name, such as `train`.
        loading: `batch_size`, `num_workers` and what else every DataModule takes; `download` fetches 2 GB.

    Raises:
        UsageError: For a crop or scale that cannot be.
        DataError: In `setup`, for missing folders, lists, images or masks; in a run, for an unreadable image, a mask of
            another size than its image, or with an id outside of the classes.
    """

    archives = voc_archives("2012")

    def __init__(
        self,
        root: str,
        crop_size: int = 513,
        scale: tuple[float, float] = (0.5, 2.0),
        classes: list[str] | None = None,
        train_split: str = "auto",
        **loading: Any,
    ) -> None:
        super().__init__(root, **loading)
        if crop_size < 16:
            raise UsageError(f"data.crop_size is {crop_size}, must be at least 16")
        if not 0 < scale[0] <= scale[1]:
            raise UsageError(f"data.scale is {list(scale)}, must be [low, high] with 0 < low <= high")
        self.class_names = tuple(classes or VOC_CLASSES)
        self.train_split = train_split
        colour = [round(255 * value) for value in self.mean]
        self.augmentation = v2.Compose(
            [
                RandomScale(scale),
                v2.RandomCrop(crop_size, pad_if_needed=True, fill={tv_tensors.Image: colour, tv_tensors.Mask: VOID}),
                v2.RandomHorizontalFlip(),
            ]
        )

    @property
    def home(self) -> Path:
        """Where `JPEGImages/` lies."""
        candidates: list[Path] = [self.root / self.archives[0].folder, self.root / "VOC2012", self.root]
        return next((folder for folder in candidates if (folder / "JPEGImages").is_dir()), candidates[0])

    def train_transform(self, sample: Sample) -> Sample:
        """Scale, crop and flip, image and mask alike."""
        image, mask = self.augmentation(sample["image"], sample["mask"])
        return {**sample, "image": image, "mask": mask}

    def source(self, split: Split) -> Source:
        """Lists the names of a split; every one must have its image and mask."""
        if not (self.home / "JPEGImages").is_dir():
            raise DataError(self.missing(f"{self.home / 'JPEGImages'} does not exist"))
        if split != "train":
            return self._listed("val", "SegmentationClass")
        if self.train_split not in ("auto", "train_aug", "trainaug"):
            return self._listed(self.train_split, "SegmentationClass")
        augmented = self.home / "SegmentationClassAug"
        if augmented.is_dir():
            lists = [name for name in ("train_aug", "trainaug") if self._list(name).is_file()]
            if lists:
                return self._listed(lists[0], augmented.name)
            # SBD and train together, less val: the 10,582 of train_aug.
            val = set(self._names("val"))
            names = sorted(path.stem for path in augmented.glob("*.png") if path.stem not in val)
            return _VOCSource(self.home, augmented.name, names, f"{augmented} less val", self.num_classes)
        if self.train_split != "auto":
            raise DataError(self.missing(f"{augmented} does not exist (SBD's masks in VOC's format)"))
        return self._listed("train", "SegmentationClass")

    def how_to_get(self) -> str:
        """The layout and its source."""
        return (
            f"Wanted: VOCdevkit/VOC2012/{{JPEGImages,SegmentationClass,ImageSets/Segmentation}} below {self.root},\n"
            f"  from {self.archives[0].url} (--data.download true)."
        )

    def _list(self, name: str) -> Path:
        return self.home / "ImageSets" / "Segmentation" / f"{name}.txt"

    def _names(self, name: str) -> list[str]:
        path = self._list(name)
        if not path.is_file():
            raise DataError(self.missing(f"{path} does not exist"))
        return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]

    def _listed(self, name: str, masks: str) -> Source:
        return _VOCSource(self.home, masks, self._names(name), str(self._list(name)), self.num_classes)


class _VOCSource(Source):
    """Images with masks, by name."""

    def __init__(self, home: Path, masks: str, names: list[str], listed_in: str, classes: int) -> None:
        self.defects = []
        # One listing of each folder: ten thousand look-ups are slow on a network's file system.
        there = {
            folder: {path.stem for path in (home / folder).glob("*" + ending)}
            for folder, ending in (("JPEGImages", ".jpg"), (masks, ".png"))
        }
        for folder, ending in (("JPEGImages", ".jpg"), (masks, ".png")):
            lacking = [name for name in names if name not in there[folder]]
            what = f"does not exist, but {listed_in} names it"
            self.defects += [Defect(home / folder / f"{name}{ending}", "", what) for name in lacking]
        stray = sorted(there[masks] - there["JPEGImages"] - set(names))
        self.defects += [
            Defect(home / masks / f"{name}.png", "", "no image belongs to it", "dropped") for name in stray
        ]
        self.images = [home / "JPEGImages" / f"{name}.jpg" for name in names]
        self.masks = [home / masks / f"{name}.png" for name in names]
        self.names, self.classes = names, classes

    def __len__(self) -> int:
        return len(self.names)

    def files(self) -> Sequence[Path]:
        return [*self.images, *self.masks]

    def checks(self) -> Iterator[Callable[[], Sample]]:
        """Every image that is there with its mask."""
        missing = {defect.file for defect in self.defects}
        for index, files in enumerate(zip(self.images, self.masks, strict=True)):
            if not missing.intersection(files):
                yield functools.partial(self.__getitem__, index)

    def __getitem__(self, index: int) -> Sample:
        image, mask = read_image(self.images[index]), read_mask(self.masks[index], self.classes)
        if image.shape[1:] != mask.shape:
            sizes = f"{mask.shape[1]}×{mask.shape[0]} px, its image {image.shape[2]}×{image.shape[1]}"
            raise DataError(f"{self.masks[index]}: the mask has {sizes}")
        return {"image": image, "mask": mask, "name": self.names[index]}
