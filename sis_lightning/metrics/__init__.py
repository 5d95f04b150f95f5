"""Metrics over whole splits, as the benchmarks define them."""

from sis_lightning.metrics.segmentation import DatasetIoU

__all__ = ["DatasetIoU"]
