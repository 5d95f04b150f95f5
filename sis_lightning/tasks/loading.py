"""Trained tasks from checkpoints and run folders, without a configuration."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from sis_lightning.errors import DataError, UsageError
from sis_lightning.operators import operator_class
from sis_lightning.tasks.base import TASK_CLASS, BaseTask, weights_deferred
from sis_lightning.tasks.checkpoint_files import find_checkpoint, read_checkpoint


def load(
    path: str | Path, *, which: Literal["last", "best"] = "last", map_location: Any = "cpu", **changes: Any
) -> BaseTask:
    """Loads a trained task, ready to predict.

    The checkpoint says of which class it is, how the network was built and what its classes are called. Operators that
    a user registered are found if the module that registers them was imported, if `$SIS_OPERATORS` names it, or if its
    package has an entry point in `sis_lightning.operators`.

    Args:
        path: Folder of a run, its `checkpoints` folder, or a checkpoint.
        which: Checkpoint of a folder: `last`, or `best` by the validation metric.
        map_location: Device of the weights, such as `"cuda"`.
        changes: Constructor arguments of the task that replace those in the checkpoint, to train it further: with
            `num_classes=3`, the network starts from all weights but those of its last layer.

    Returns:
        The task in evaluation mode. It can be trained again: `Trainer.fit` switches to training mode.

    Raises:
        DataError: If there is no checkpoint, or it is damaged, of another kind or of another network.
        UsageError: If it uses an operator that is not registered here, or a changed argument is invalid.
    """
    for key in ("weights", "backbone_weights"):
        if key in changes:
            raise UsageError(f"load takes no {key}: the weights are those of the checkpoint")
    if which not in ("last", "best"):
        raise UsageError(f"which is {which!r}, must be 'last' or 'best'")
    file = find_checkpoint(Path(path).expanduser(), which)
    content = read_checkpoint(file)
    cls = _class_of(content, file)
    saved = dict(content.get("hyper_parameters", {}))
    operator_class(saved.get("backbone", {}).get("operator", "conv"))
    changed = {key for key, value in changes.items() if value != saved.get(key)}
    outdated = {field for key in changed & _META_OF.keys() for field in _META_OF[key]}
    saved["meta"] = {key: value for key, value in (saved.get("meta") or {}).items() if key not in outdated} or None
    try:
        # Weights that the checkpoint replaces must not cost the caller random numbers; a new head draws from them.
        with weights_deferred(), torch.random.fork_rng(devices=[], enabled=not changes):
            task = cls(**{**saved, **changes})
    except TypeError as error:
        if changes:
            raise UsageError(f"{cls.__name__}: {error}") from None
        raise DataError(
            f"{file}: {cls.__name__} cannot be built with the options in it, which may be of another version ({error})"
        ) from None
    if changes:
        task.start_from(content["state_dict"], str(file))
    else:
        task.on_load_checkpoint(content)
        try:
            task.load_state_dict(content["state_dict"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{file}: its weights do not fit {cls.__name__}: {reason}"[:400]) from None
    return task.to(map_location).eval()


#: Fields of the saved `meta` that are no longer valid if a constructor argument changes.
_META_OF = {
    "num_classes": ("class_names", "category_ids"),
    "num_keypoints": ("keypoint_names", "flip_pairs", "skeleton", "sigmas"),
    "in_channels": ("mean", "std"),
}


def predict(path: str | Path, images: Any, **options: Any) -> Any:
    """Predicts images with a trained task: `load(path).predict(images)`.

    For many calls, load the task once.

    Args:
        path: Folder of a run, or a checkpoint, as for `load`.
        images: Path of an image or of a folder of images, PIL image, or uint8 tensor (C, H, W); or a sequence of these.
        options: Further arguments of the task's `predict`, such as `batch_size`, or `boxes` for keypoints.

    Returns:
        One `Prediction` for one image, a list of them for several.

    Raises:
        DataError: If the checkpoint or an image is missing or damaged.
    """
    return load(path).predict(images, **options)


def _class_of(content: dict[str, Any], file: Path) -> type[BaseTask]:
    name = content.get(TASK_CLASS)
    if not isinstance(name, str):
        raise DataError(f"{file}: it does not say of which task it is: not a checkpoint of sis-lightning's tasks")
    module, _, qualified = name.rpartition(".")
    try:
        cls: Any = sys.modules.get(module) or import_module(module)
        cls = getattr(cls, qualified)
    except (ImportError, AttributeError, ValueError):
        raise DataError(
            f"{file}: it is of the class {name}, which cannot be imported here\n"
            f"  Import or define it, and call {qualified}.load_from_checkpoint(path)."
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, BaseTask)):
        raise DataError(f"{file}: {name} is not a task")
    return cls
