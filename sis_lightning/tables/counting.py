"""Counts the model of a run."""

from __future__ import annotations

from sis_lightning.models.complexity import Complexity, measure
from sis_lightning.run.run import Run


def count_run(run: Run, name: str, size: int | None = None) -> Complexity:
    """Counts parameters and multiply-accumulates of a run's backbone and whole model, for one image.

    Args:
        run: The run. Its task is built, but does not change.
        name: Name of the row.
        size: Side of the image in px; the size that the run trains on by default.

    Raises:
        UsageError: If no size is given and the run's DataModule does not know one.
    """
    kind = type(run.task).__name__.removesuffix("Task").lower()
    image_size = (size, size) if size else run.image_size
    return measure(run.task.model, image_size, name=name, kind=kind)
