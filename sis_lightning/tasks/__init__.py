"""The vision tasks as LightningModules, all on the one backbone factory."""

from sis_lightning.tasks.base import BaseTask
from sis_lightning.tasks.classification import ClassificationTask
from sis_lightning.tasks.detection import DetectionTask
from sis_lightning.tasks.keypoints import KeypointTask
from sis_lightning.tasks.segmentation import SegmentationTask

__all__ = ["BaseTask", "ClassificationTask", "DetectionTask", "KeypointTask", "SegmentationTask"]
