"""Data sets in their published layouts, as LightningDataModules."""

from sis_lightning.datamodules.base import SISDataModule
from sis_lightning.datamodules.cifar100 import CIFAR100DataModule
from sis_lightning.datamodules.coco_detection import COCODataModule, COCODetectionDataModule
from sis_lightning.datamodules.coco_keypoints import COCOKeypointsDataModule
from sis_lightning.datamodules.image_folder import ImageFolderDataModule
from sis_lightning.datamodules.imagenet import ImageNetDataModule
from sis_lightning.datamodules.voc_detection import VOCDetectionDataModule
from sis_lightning.datamodules.voc_segmentation import VOCSegmentationDataModule
from sis_lightning.datasets.base import Batch, Sample

__all__ = [
    "Batch",
    "CIFAR100DataModule",
    "COCODataModule",
    "COCODetectionDataModule",
    "COCOKeypointsDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "SISDataModule",
    "Sample",
    "VOCDetectionDataModule",
    "VOCSegmentationDataModule",
]
