"""Data sets in their published layouts, as LightningDataModules."""

from sis_lightning.datamodules.base import Batch, Sample, SISDataModule, Source
from sis_lightning.datamodules.classification import CIFAR100DataModule, ImageFolderDataModule
from sis_lightning.datamodules.segmentation import VOCSegmentationDataModule

__all__ = [
    "Batch",
    "CIFAR100DataModule",
    "ImageFolderDataModule",
    "SISDataModule",
    "Sample",
    "Source",
    "VOCSegmentationDataModule",
]
