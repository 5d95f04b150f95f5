"""The networks of the four tasks, each a plain `nn.Module` on a backbone."""

from sis_lightning.models.classifier import Classifier, create_classifier
from sis_lightning.models.detector import create_detector
from sis_lightning.models.pose import PoseNet
from sis_lightning.models.segmenter import SMPEncoder, create_segmenter, register_encoder

__all__ = [
    "Classifier",
    "PoseNet",
    "SMPEncoder",
    "create_classifier",
    "create_detector",
    "create_segmenter",
    "register_encoder",
]
