"""From a config to a network: ResNet, ResNeXt, Res2Net and Res2NeXt bodies, with an operator in each 3×3."""

from sis_lightning.backbones.body import (
    Backbone,
    Classifier,
    FeatureInfo,
    Placement,
    create_backbone,
    create_classifier,
)
from sis_lightning.backbones.config import BackboneConfig, backbone_config
from sis_lightning.backbones.detection import create_detector
from sis_lightning.backbones.smp import SMPEncoder, create_segmenter, register_encoder
from sis_lightning.backbones.weights import load_backbone_weights, load_timm_weights, load_torchvision_weights

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Classifier",
    "FeatureInfo",
    "Placement",
    "SMPEncoder",
    "backbone_config",
    "create_backbone",
    "create_classifier",
    "create_detector",
    "create_segmenter",
    "load_backbone_weights",
    "load_timm_weights",
    "load_torchvision_weights",
    "register_encoder",
]
