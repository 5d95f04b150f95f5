"""Scale-in-scale (SIS) convolution operators, backbones with them, and four vision tasks in PyTorch Lightning.

Zhou, Fu, Liu, "SIS: A new multi-scale convolutional operator", JUSTC 2022, 52(4):7, doi 10.52396/JUSTC-2021-0188.

- Operators: `create_operator`, `list_operators`, `register_operator`, and `replace_convs` for any network.
- Networks: `create_backbone`, `list_backbones`, `Classifier`, `Segmenter`, `Detector`, `PoseNet`; `deploy`, `export`.
- Tasks: `ClassificationTask`, `SegmentationTask`, `DetectionTask`, `KeypointTask`; `load`, `predict` for trained ones.
- Data: Datasets such as `VOCSegmentationDataset` for plain PyTorch, DataModules, `DatasetMeta`, `write_synthetic`.
- Metrics: `IoUEvaluator`, `TopKEvaluator`, `COCOEvaluator`, `VOCEvaluator`, and `evaluate` for results files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sis_lightning.version import __version__

# Public names by the module in which they are. They are imported at first use: `sis-lightning --help` must not wait
# for torch.
_NAMES = {
    "operators": (
        "ReplacementReport",
        "SISOperator",
        "create_operator",
        "list_operators",
        "register_operator",
        "replace_convs",
    ),
    "backbones": ("Backbone", "BackboneConfig", "create_backbone", "list_backbones"),
    "backbones.weights": ("LoadedWeights", "load_backbone_weights", "load_model_weights"),
    "models": ("Classifier", "Detector", "PoseNet", "Segmenter", "register_encoder"),
    "models.deploy": ("deploy",),
    "models.export": ("export",),
    "datasets.meta": ("DatasetMeta",),
    "datasets.base": ("collate",),
    "datasets.cifar": ("CIFAR100Dataset",),
    "datasets.coco": ("COCODetectionDataset", "COCOKeypointsDataset"),
    "datasets.folder": ("ImageFolderDataset",),
    "datasets.voc": ("VOCDetectionDataset", "VOCSegmentationDataset"),
    "datasets.synthetic": ("write_synthetic",),
    "evaluation": ("COCOEvaluator", "IoUEvaluator", "TopKEvaluator", "VOCEvaluator", "evaluate"),
    "datamodules": (
        "CIFAR100DataModule",
        "COCODetectionDataModule",
        "COCOKeypointsDataModule",
        "ImageFolderDataModule",
        "VOCDetectionDataModule",
        "VOCSegmentationDataModule",
    ),
    "tasks": (
        "ClassificationPrediction",
        "ClassificationTask",
        "DetectionPrediction",
        "DetectionTask",
        "KeypointPrediction",
        "KeypointTask",
        "SegmentationPrediction",
        "SegmentationTask",
        "load",
        "predict",
    ),
    "errors": ("DataError", "UsageError"),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}

if TYPE_CHECKING:
    from sis_lightning.backbones import Backbone, BackboneConfig, create_backbone, list_backbones
    from sis_lightning.backbones.weights import LoadedWeights, load_backbone_weights, load_model_weights
    from sis_lightning.datamodules import (
        CIFAR100DataModule,
        COCODetectionDataModule,
        COCOKeypointsDataModule,
        ImageFolderDataModule,
        VOCDetectionDataModule,
        VOCSegmentationDataModule,
    )
    from sis_lightning.datasets.base import collate
    from sis_lightning.datasets.cifar import CIFAR100Dataset
    from sis_lightning.datasets.coco import COCODetectionDataset, COCOKeypointsDataset
    from sis_lightning.datasets.folder import ImageFolderDataset
    from sis_lightning.datasets.meta import DatasetMeta
    from sis_lightning.datasets.synthetic import write_synthetic
    from sis_lightning.datasets.voc import VOCDetectionDataset, VOCSegmentationDataset
    from sis_lightning.errors import DataError, UsageError
    from sis_lightning.evaluation import COCOEvaluator, IoUEvaluator, TopKEvaluator, VOCEvaluator, evaluate
    from sis_lightning.models import Classifier, Detector, PoseNet, Segmenter, register_encoder
    from sis_lightning.models.deploy import deploy
    from sis_lightning.models.export import export
    from sis_lightning.operators import (
        ReplacementReport,
        SISOperator,
        create_operator,
        list_operators,
        register_operator,
        replace_convs,
    )
    from sis_lightning.tasks import (
        ClassificationPrediction,
        ClassificationTask,
        DetectionPrediction,
        DetectionTask,
        KeypointPrediction,
        KeypointTask,
        SegmentationPrediction,
        SegmentationTask,
        load,
        predict,
    )

__all__ = [
    "Backbone",
    "BackboneConfig",
    "CIFAR100DataModule",
    "CIFAR100Dataset",
    "COCODetectionDataModule",
    "COCODetectionDataset",
    "COCOEvaluator",
    "COCOKeypointsDataModule",
    "COCOKeypointsDataset",
    "ClassificationPrediction",
    "ClassificationTask",
    "Classifier",
    "DataError",
    "DatasetMeta",
    "DetectionPrediction",
    "DetectionTask",
    "Detector",
    "ImageFolderDataModule",
    "ImageFolderDataset",
    "IoUEvaluator",
    "KeypointPrediction",
    "KeypointTask",
    "LoadedWeights",
    "PoseNet",
    "ReplacementReport",
    "SISOperator",
    "SegmentationPrediction",
    "SegmentationTask",
    "Segmenter",
    "TopKEvaluator",
    "UsageError",
    "VOCDetectionDataModule",
    "VOCDetectionDataset",
    "VOCEvaluator",
    "VOCSegmentationDataModule",
    "VOCSegmentationDataset",
    "__version__",
    "collate",
    "create_backbone",
    "create_operator",
    "deploy",
    "evaluate",
    "export",
    "list_backbones",
    "list_operators",
    "load",
    "load_backbone_weights",
    "load_model_weights",
    "predict",
    "register_encoder",
    "register_operator",
    "replace_convs",
    "write_synthetic",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sis_lightning' has no attribute {name!r}")
    value = getattr(import_module(f"sis_lightning.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
