"""Evaluators of whole splits, as the benchmarks define their metrics, and scoring of results files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sis_lightning.evaluation.coco_evaluator import COCOEvaluator
    from sis_lightning.evaluation.files import Evaluation, evaluate
    from sis_lightning.evaluation.gathered import GatheredEvaluator
    from sis_lightning.evaluation.iou import IoUEvaluator
    from sis_lightning.evaluation.top_k import TopKEvaluator
    from sis_lightning.evaluation.voc_evaluator import VOCEvaluator

# Imported at first use: results files are scored without torch.
_HOME = {
    "COCOEvaluator": "coco_evaluator",
    "Evaluation": "files",
    "GatheredEvaluator": "gathered",
    "IoUEvaluator": "iou",
    "TopKEvaluator": "top_k",
    "VOCEvaluator": "voc_evaluator",
    "evaluate": "files",
}

__all__ = [
    "COCOEvaluator",
    "Evaluation",
    "GatheredEvaluator",
    "IoUEvaluator",
    "TopKEvaluator",
    "VOCEvaluator",
    "evaluate",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sis_lightning.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"sis_lightning.evaluation.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
