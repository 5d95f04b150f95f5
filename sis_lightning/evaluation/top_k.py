"""Top-1 and top-5 accuracy of classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from sis_lightning.errors import UsageError


class TopKEvaluator(Metric):
    """Share of images whose class is among the k most probable ones, and the error in percent that papers report.

    Args:
        num_classes: Number of classes.
        ks: Values of k; those that are not below `num_classes` are left out.

    Raises:
        UsageError: If an argument is invalid.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, num_classes: int, ks: Sequence[int] = (1, 5)) -> None:
        super().__init__()
        if num_classes < 2 or not all(k >= 1 for k in ks):
            raise UsageError(f"num_classes is {num_classes} (at least 2), ks {list(ks)} (each at least 1)")
        self.num_classes, self.ks = num_classes, tuple(k for k in ks if k < num_classes)
        self.add_state("correct", torch.zeros(len(self.ks), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Adds a batch.

        Args:
            predictions: Logits or probabilities (N, num_classes).
            targets: Labels (N,), 0…num_classes-1.
        """
        for place, k in enumerate(self.ks):
            found = predictions.argmax(dim=1, keepdim=True) if k == 1 else predictions.topk(k, dim=1).indices
            self.correct[place] += (found == targets[:, None]).sum()
        self.total += len(targets)

    def compute(self) -> dict[str, Tensor]:
        """Computes the metrics: `topK` in 0…1 and `topK_error_percent` in 0…100 for each k."""
        metrics: dict[str, Tensor] = {}
        for k, correct in zip(self.ks, self.correct, strict=True):
            accuracy = correct.float() / self.total.float()
            metrics |= {f"top{k}": accuracy, f"top{k}_error_percent": 100 * (1 - accuracy)}
        return metrics
