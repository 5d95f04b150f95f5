"""One factory for ResNet, ResNeXt, Res2Net and Res2NeXt backbones, with an operator in each 3×3 convolution."""

from sis_lightning.backbones.config import BackboneConfig, backbone_config, list_backbones
from sis_lightning.backbones.resnet import Backbone, FeatureInfo, Placement, create_backbone

__all__ = [
    "Backbone",
    "BackboneConfig",
    "FeatureInfo",
    "Placement",
    "backbone_config",
    "create_backbone",
    "list_backbones",
]
