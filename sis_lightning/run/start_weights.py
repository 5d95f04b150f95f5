"""The weights that a run starts from, and where they are from."""

from __future__ import annotations

from pathlib import Path

from sis_lightning.errors import DataError
from sis_lightning.files import digest
from sis_lightning.run.environment import portable
from sis_lightning.run.recipe import recipe
from sis_lightning.run.record import StartWeights
from sis_lightning.run.resume.checkpoints import resume_point
from sis_lightning.run.run import Run
from sis_lightning.tasks.checkpoint_files import read_checkpoint, tensors_digest


def load_start_weights(run: Run) -> StartWeights | None:
    """Loads the weights that a run's configuration names into its task.

    Args:
        run: A run that begins.

    Returns:
        What they are; None if the configuration names none.

    Raises:
        UsageError: If timm or torchvision does not have such weights.
        DataError: If they are missing, damaged or of another network, or of a run that has not finished.
    """
    task = run.task
    source = task.weights or task.backbone_weights
    if not source:
        return None
    given = run.config["model"]["init_args"]
    named = str(given.get("weights") or given.get("backbone_weights"))
    path = Path(source).expanduser()
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    point = None
    if run.pretraining is not None and not path.is_file():
        raise DataError(
            f"backbone_weights is {named}, but {run.pretraining} has no checkpoint: train it first, with\n"
            f"  sis-lightning fit --config tasks/{run.pretraining.parts[-3]}.yaml and the same --model.backbone"
        )
    if path.is_file() and path.suffix == ".ckpt":
        point = resume_point(read_checkpoint(path, mmap=True))
    if run.pretraining is not None and (point is None or point.point != "end"):
        where = f"step {point.step:,}" if point else "no checkpoint of a run"
        raise DataError(f"backbone_weights is {named}, but {run.pretraining} has not finished ({where}): wait for it")
    task.load_start_weights()
    return StartWeights(
        source=portable(named),
        sha256=tensors_digest(task.backbone.state_dict()),
        recipe_hash=digest(recipe(point.config)) if point else None,
        finished=point.point == "end" if point else None,
        trained_on=point.trained_on if point else [],
    )
