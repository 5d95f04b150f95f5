"""The vision tasks as LightningModules, all on the one backbone factory."""

from sis_lightning.tasks.base import BaseTask
from sis_lightning.tasks.classification import ClassificationTask
from sis_lightning.tasks.segmentation import SegmentationTask

__all__ = ["BaseTask", "ClassificationTask", "SegmentationTask"]
