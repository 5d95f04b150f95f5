"""Data sets on disk: map-style Datasets, readers, checks, downloads, and synthetic data in the same formats."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sis_lightning.datasets.base import ImageDataset, collate
    from sis_lightning.datasets.cifar import CIFAR100Dataset
    from sis_lightning.datasets.coco import COCODetectionDataset, COCOKeypointsDataset
    from sis_lightning.datasets.folder import ImageFolderDataset, UnlabelledDataset
    from sis_lightning.datasets.imagenet import ImageNetDataset
    from sis_lightning.datasets.meta import DatasetMeta
    from sis_lightning.datasets.voc import VOCDetectionDataset, VOCSegmentationDataset

# Imported at first use: readers and synthetic data do not need torch.
_HOME = {
    "CIFAR100Dataset": "cifar",
    "COCODetectionDataset": "coco",
    "COCOKeypointsDataset": "coco",
    "DatasetMeta": "meta",
    "ImageDataset": "base",
    "ImageFolderDataset": "folder",
    "ImageNetDataset": "imagenet",
    "UnlabelledDataset": "folder",
    "VOCDetectionDataset": "voc",
    "VOCSegmentationDataset": "voc",
    "collate": "base",
}

__all__ = [
    "CIFAR100Dataset",
    "COCODetectionDataset",
    "COCOKeypointsDataset",
    "DatasetMeta",
    "ImageDataset",
    "ImageFolderDataset",
    "ImageNetDataset",
    "UnlabelledDataset",
    "VOCDetectionDataset",
    "VOCSegmentationDataset",
    "collate",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sis_lightning.datasets' has no attribute {name!r}")
    return getattr(import_module(f"sis_lightning.datasets.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
