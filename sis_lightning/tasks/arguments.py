"""Types of constructor arguments: wide for callers in Python, narrow for the command line.

In Python a backbone may be a name, a mapping or a `BackboneConfig`. The command line has resolved a name to fields
already, so that its parser, which reads these types when it runs, offers the fields alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sis_lightning.backbones import BackboneConfig
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.errors import UsageError

OptimizerCallable = Callable[[Iterable[Tensor]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]

if TYPE_CHECKING:
    BackboneLike = str | Mapping[str, Any] | BackboneConfig
    OptimizerLike = OptimizerCallable | Mapping[str, Any]
    LRSchedulerLike = LRSchedulerCallable | Mapping[str, Any]
    MetaLike = DatasetMeta | Mapping[str, Any]
else:
    BackboneLike = BackboneConfig
    OptimizerLike = OptimizerCallable
    LRSchedulerLike = LRSchedulerCallable
    MetaLike = dict[str, Any]


def as_callable(argument: str, value: Any) -> Any:
    """Makes a function of an optimizer or scheduler that is given as plain data.

    Args:
        argument: Name of the argument, for errors.
        value: A function; or a mapping of `class_path` (such as `torch.optim.SGD`) and `init_args`.

    Returns:
        A function of the parameters (for schedulers: of the optimizer).

    Raises:
        UsageError: If the class does not exist, or the value is neither.
    """
    if isinstance(value, Mapping) and set(value) <= {"class_path", "init_args"} and "class_path" in value:
        module, _, name = str(value["class_path"]).rpartition(".")
        try:
            cls = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            raise UsageError(f"{argument}: there is no class '{value['class_path']}'") from None
        return partial(cls, **(value.get("init_args") or {}))
    if not callable(value):
        raise UsageError(
            f"{argument} is {value!r}, must be a function, such as functools.partial(torch.optim.SGD, lr=0.1), "
            "or a mapping with class_path and init_args"
        )
    return value


def as_plain(value: Any) -> Any:
    """The inverse of `as_callable`, as far as there is one.

    Args:
        value: A mapping, or a `functools.partial` of a class with keyword arguments, as jsonargparse makes it too.

    Returns:
        `class_path` and `init_args`; None for a function that cannot be described so.
    """
    if isinstance(value, Mapping):
        return {key: dict(part) if isinstance(part, Mapping) else part for key, part in value.items()}
    if isinstance(value, partial):
        classes = [part for part in (value.func, *value.args) if isinstance(part, type)]
        if len(classes) == 1 and _is_plain(value.keywords):
            cls = classes[0]
            return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(value.keywords)}
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
