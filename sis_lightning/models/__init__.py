"""The networks of the four tasks, each a plain `nn.Module` on a backbone."""

from sis_lightning.models.classifier import Classifier
from sis_lightning.models.detector import Detector
from sis_lightning.models.pose import PoseNet
from sis_lightning.models.segmenter import Segmenter, register_encoder

__all__ = ["Classifier", "Detector", "PoseNet", "Segmenter", "register_encoder"]
