"""Figures that need a whole split at once: results are gathered from all devices and scored in one place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

import torch.distributed as dist
from torchmetrics import Metric

Row = dict[str, Any]


class Truth(Protocol):
    """What results are scored against."""

    def score(self, rows: list[Row], image_ids: Collection[Any] | None = None) -> dict[str, float]:
        """The figures of `rows` (COCO's result format) over these images, or over all."""


class GatheredScores(Metric):
    """Collects result rows on every device; `compute` scores them once, each image once, the same on all devices.

    Attributes:
        truth: Gives what to score against; to be set before `compute`, and called where the scoring is done.
        rows: All devices' rows after `compute`, on rank 0.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.truth: Callable[[], Truth] | None = None
        self.rows: list[Row] = []
        self._rows_of: dict[Any, list[Row]] = {}

    def update(self, rows: Iterable[Row], image_ids: Iterable[Any]) -> None:
        """Adds the rows of some images; images without any rows count too."""
        for image in image_ids:
            self._rows_of[image] = []
        for row in rows:
            self._rows_of[row["image_id"]].append(row)

    def compute(self) -> dict[str, float]:
        """Scores the rows of all devices.

        Raises:
            RuntimeError: Where `truth` was not set.
        """
        if self.truth is None:
            raise RuntimeError("GatheredScores.truth was not set")
        shared = dist.is_available() and dist.is_initialized()
        parts: list[Any] = [self._rows_of]
        if shared:
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self._rows_of)
        answer: list[Any] = [None]
        if not shared or dist.get_rank() == 0:
            merged = {image: rows for part in parts for image, rows in part.items()}
            self.rows = [row for image in merged for row in merged[image]]
            try:
                answer = [self.truth().score(self.rows, set(merged))]
            except Exception as error:
                if not shared:
                    raise
                answer = [error]  # the other devices wait: they must hear of it
        if shared:
            dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        figures: dict[str, float] = answer[0]
        return figures

    def reset(self) -> None:
        """Forgets all rows; keeps the truth."""
        super().reset()
        self._rows_of = {}
