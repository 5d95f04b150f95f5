"""Scale-in-scale (SIS) convolution operators, one backbone factory, and four vision tasks in PyTorch Lightning.

Zhou, Fu, Liu, "SIS: A new multi-scale convolutional operator", JUSTC 2022, 52(4):7, doi 10.52396/JUSTC-2021-0188.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public names and where they live. They are imported on first use: `sis-lightning --help` must not wait for torch.
_HOME = {
    "create_operator": "operators",
    "register_operator": "operators",
    "list_operators": "operators",
    "replace_convs": "operators",
    "ReplacementReport": "operators",
    "SISOperator": "operators",
    "BackboneConfig": "backbones",
    "Backbone": "backbones",
    "create_backbone": "backbones",
    "list_backbones": "backbones",
    "Classifier": "models",
    "Segmenter": "models",
    "Detector": "models",
    "PoseNet": "models",
    "register_encoder": "models",
    "load_backbone_weights": "backbones.weights",
    "load_model_weights": "backbones.weights",
    "write_synthetic": "datasets.synthetic",
}

if TYPE_CHECKING:
    from sis_lightning.backbones import Backbone, BackboneConfig, create_backbone, list_backbones
    from sis_lightning.backbones.weights import load_backbone_weights, load_model_weights
    from sis_lightning.datasets.synthetic import write_synthetic
    from sis_lightning.models import Classifier, Detector, PoseNet, Segmenter, register_encoder
    from sis_lightning.operators import (
        ReplacementReport,
        SISOperator,
        create_operator,
        list_operators,
        register_operator,
        replace_convs,
    )

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Classifier",
    "Detector",
    "PoseNet",
    "ReplacementReport",
    "SISOperator",
    "Segmenter",
    "__version__",
    "create_backbone",
    "create_operator",
    "list_backbones",
    "list_operators",
    "load_backbone_weights",
    "load_model_weights",
    "register_encoder",
    "register_operator",
    "replace_convs",
    "write_synthetic",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sis_lightning' has no attribute {name!r}")
    return getattr(import_module(f"sis_lightning.{_HOME[name]}"), name)
