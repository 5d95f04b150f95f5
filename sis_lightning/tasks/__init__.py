"""The four vision tasks as LightningModules on one backbone factory."""

from sis_lightning.tasks.base import BaseTask
from sis_lightning.tasks.classification import ClassificationTask
from sis_lightning.tasks.detection import DetectionTask
from sis_lightning.tasks.keypoints import KeypointTask
from sis_lightning.tasks.loading import load, predict
from sis_lightning.tasks.predictions import (
    ClassificationPrediction,
    DetectionPrediction,
    KeypointPrediction,
    Prediction,
    SegmentationPrediction,
)
from sis_lightning.tasks.segmentation import SegmentationTask

__all__ = [
    "BaseTask",
    "ClassificationPrediction",
    "ClassificationTask",
    "DetectionPrediction",
    "DetectionTask",
    "KeypointPrediction",
    "KeypointTask",
    "Prediction",
    "SegmentationPrediction",
    "SegmentationTask",
    "load",
    "predict",
]
