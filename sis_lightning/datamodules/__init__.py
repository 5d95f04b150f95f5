"""Data sets in their published layouts, as LightningDataModules."""

from sis_lightning.datamodules.base import Batch, Sample, SISDataModule, Source
from sis_lightning.datamodules.classification import CIFAR100DataModule, ImageFolderDataModule
from sis_lightning.datamodules.detection import AnnotatedDataModule, COCODetectionDataModule, VOCDetectionDataModule
from sis_lightning.datamodules.keypoints import COCOKeypointsDataModule
from sis_lightning.datamodules.segmentation import VOCSegmentationDataModule

__all__ = [
    "AnnotatedDataModule",
    "Batch",
    "CIFAR100DataModule",
    "COCODetectionDataModule",
    "COCOKeypointsDataModule",
    "ImageFolderDataModule",
    "SISDataModule",
    "Sample",
    "Source",
    "VOCDetectionDataModule",
    "VOCSegmentationDataModule",
]
