"""Lightning's argument parser for the options of a run, with short errors that name the option.

jsonargparse nests a parser for every class, and wraps the message of an inner parser into ten lines of its own. Each
parser here therefore shortens its message and marks it, so that the outer ones find it and add their key.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Iterator
from importlib import import_module
from inspect import isabstract
from typing import Any

# Lightning's own calls of jsonargparse's older names are not the user's to mend. Read when jsonargparse is imported.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined] # its __all__ is computed
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from sis_lightning.datamodules import SISDataModule
from sis_lightning.errors import UsageError, nearest
from sis_lightning.run.library_errors import MARKS
from sis_lightning.run.options import RunOptions
from sis_lightning.tasks import BaseTask

#: Arguments of tasks that are for Python alone: a run has `model.backbone.operator`, and the DataModule's meta data.
NOT_OPTIONS = ("operator", "meta")
_MARKED = re.compile("\x02([^\x02\x03]*)\x03")


class Parser(LightningArgumentParser):
    """Lightning's parser without abbreviations, whose errors are short and name the nearest right word."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raises UsageError instead of printing the usage and leaving."""
        raise UsageError(MARKS.format(explain(message, self))) from ex


@functools.cache
def run_parser() -> Parser:
    """The parser of everything that describes a run. It parses and resolves, and builds nothing."""
    parser = Parser(description="All options of a run.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with options; may be repeated.")
    parser.add_class_arguments(RunOptions)
    for part in ("trainer", "model", "data"):
        _add_part(parser, part)
    return parser


@functools.cache
def part_parser(part: str) -> Parser:
    """The parser of the options of one part of a run alone: `trainer`, `model` or `data`."""
    parser = Parser()
    _add_part(parser, part)
    return parser


def build(part: str, config: dict[str, Any]) -> Any:
    """Builds one part of a run from its resolved options.

    Args:
        part: `model`, `data` or `trainer`.
        config: The part's options as plain data, as a run's `config.yaml` holds them under its name.

    Returns:
        The model or DataModule; for `trainer` the arguments of Trainer, its callbacks and loggers built.
    """
    parser = part_parser(part)
    # A copy, since jsonargparse changes what it parses in place.
    return parser.instantiate_classes(parser.parse_object({part: copy.deepcopy(config)}))[part]


def _add_part(parser: Parser, part: str) -> None:
    if part == "trainer":
        # For its signature alone: names, types and defaults.
        parser.add_class_arguments(Trainer, part, instantiate=False, fail_untyped=False, sub_configs=True)
    elif part == "model":
        parser.add_subclass_arguments(BaseTask, part, fail_untyped=False, skip=set(NOT_OPTIONS))
    else:
        parser.add_subclass_arguments(SISDataModule, part, fail_untyped=False)


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Shortens a message of jsonargparse to what is wrong and the nearest valid name.

    Args:
        message: The message that jsonargparse passes to `error`.
        parser: The parser that passes it.
    """
    key_match = re.match(r'Parser key "([\w.]+)":\s*', message)
    key = key_match.group(1).removeprefix("config.") if key_match else ""
    inner = _MARKED.search(message)
    if inner:
        return f"{key}.{inner.group(1)}" if key and key != "config" else inner.group(1)
    text = " ".join(message[key_match.end() if key_match else 0 :].split())
    if unknown := re.search(r"unrecognized arguments: --([\w.-]+)|Option '([\w.]+)' is not accepted", text, re.I):
        name = unknown.group(1) or unknown.group(2)
        return f"{name}: there is no such key; {nearest(name, _keys(parser))}"
    if literals := re.findall(r"Literal\[(.*?)\]", text):
        known = list(dict.fromkeys(choice.strip(" '") for part in literals for choice in part.split(",")))
        value = text.rpartition("value: ")[2]
        hint = nearest(value, known)
        return f"{key} is {value}, must be one of {', '.join(known)}" + (f"; {hint}" if hint.startswith("did") else "")
    if attribute := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        module, name = attribute.groups()
        return f"{key}: {module} has no '{name}'; {nearest(name, _classes_of(key) or dir(import_module(module)))}"
    if path := re.search(r"Expected a dot import path string: (\S+)", text):
        return f"{key}: there is no class '{path.group(1)}'; {nearest(path.group(1), _classes_of(key))}"
    if mismatch := re.search(r"Expected a (?:<class '([\w.]+)'>|(\S+)).*?(?:Got|Given) value: (.*)", text):
        return f"{key} is {mismatch.group(3)}, must be {mismatch.group(1) or mismatch.group(2)}"
    return f"{key}: {text}" if key else text


def _keys(parser: LightningArgumentParser) -> list[str]:
    """The options of a parser."""
    keys = parser.get_defaults(skip_validation=True).keys(branches=True)
    return [key for key in keys if not key.endswith(".help") and key != "config"]


#: The classes that an option takes, by the last part of its key: where they are found, and their base.
_KINDS = {
    "optimizer": ("torch.optim", "Optimizer"),
    "lr_scheduler": ("torch.optim.lr_scheduler", "LRScheduler"),
    "callbacks": ("lightning.pytorch.callbacks", "Callback"),
    "logger": ("lightning.pytorch.loggers", "Logger"),
    "profiler": ("lightning.pytorch.profilers", "Profiler"),
    "strategy": ("lightning.pytorch.strategies", "Strategy"),
    "accelerator": ("lightning.pytorch.accelerators", "Accelerator"),
    "plugins": ("lightning.pytorch.plugins", ""),
}


def _classes_of(key: str) -> list[str]:
    """Names of the classes that an option takes."""
    last = key.rpartition(".")[2]
    if last in ("model", "data"):
        root: type[Any] = BaseTask if last == "model" else SISDataModule
        return sorted(cls.__name__ for cls in _subclasses(root))
    if last not in _KINDS:
        return []
    module, base_name = _KINDS[last]
    found = vars(import_module(module))
    base: type = dict(found).get(base_name, object)
    return sorted(
        name
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and not name.startswith("_")
    )


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    cls: type[Any]
    for cls in base.__subclasses__():
        if not isabstract(cls) and not cls.__name__.startswith("_"):
            yield cls
        yield from _subclasses(cls)
