"""Lightning's argument parser, with errors that a person can act on.

jsonargparse nests a parser in a parser for every class, and wraps an inner one's message into ten lines of its own.
Each of ours therefore boils its message down and marks it, so that the outer ones find it again and add their key.
"""

from __future__ import annotations

import functools
import os
import re
from importlib import import_module
from typing import Any

# Lightning's own calls of jsonargparse's older names are not the user's to mend. Read when jsonargparse is imported.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

from jsonargparse import ActionConfigFile
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from sis_lightning.datamodules import SISDataModule
from sis_lightning.errors import UsageError, nearest
from sis_lightning.run.options import RunOptions
from sis_lightning.tasks import BaseTask

_MARKS = "\x02{}\x03"
_MARKED = re.compile("\x02([^\x02\x03]*)\x03")


class Parser(LightningArgumentParser):
    """Lightning's parser without abbreviations, whose errors are short and name the nearest right word."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raises UsageError instead of printing the usage and leaving."""
        raise UsageError(_MARKS.format(explain(message, self))) from ex


@functools.cache
def run_parser() -> Parser:
    """The parser of everything that describes a run. It parses and resolves, and builds nothing."""
    parser = Parser(description="Options of a run.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="File with options.")
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
    return parser.instantiate_classes(parser.parse_object({part: config}))[part]


def _add_part(parser: Parser, part: str) -> None:
    if part == "trainer":
        # For its signature alone: names, types and defaults.
        parser.add_class_arguments(Trainer, part, instantiate=False, fail_untyped=False, sub_configs=True)
    else:
        parser.add_subclass_arguments(BaseTask if part == "model" else SISDataModule, part, fail_untyped=False)


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Boils jsonargparse's message down to what is wrong and the nearest right word."""
    key_match = re.match(r'Parser key "([\w.]+)":\s*', message)
    key = key_match.group(1) if key_match else ""
    inner = _MARKED.search(message)
    if inner:
        return f"{key}.{inner.group(1)}" if key else inner.group(1)
    text = " ".join(message[key_match.end() if key_match else 0 :].split())
    if unknown := re.search(r"unrecognized arguments: --([\w.-]+)|Option '([\w.]+)' is not accepted", text, re.I):
        name = unknown.group(1) or unknown.group(2)
        return f"{name}: there is no such key; {nearest(name, _keys(parser))}"
    if literal := re.search(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)", text):
        known = [choice.strip(" '") for choice in literal.group(1).split(",")]
        value = literal.group(2)
        hint = nearest(value, known)
        return f"{key} is {value}, must be one of {', '.join(known)}" + (f"; {hint}" if hint.startswith("did") else "")
    if attribute := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        module, name = attribute.groups()
        return f"{key}: {module} has no '{name}'; {nearest(name, dir(import_module(module)))}"
    if path := re.search(r"Expected a dot import path string: (\S+)", text):
        classes = [cls.__name__ for base in (BaseTask, SISDataModule) for cls in base.__subclasses__()]
        return f"{key}: there is no class '{path.group(1)}'; {nearest(path.group(1), classes)}"
    if mismatch := re.search(r"Expected a (?:<class '([\w.]+)'>|(\S+)).*?(?:Got|Given) value: (.*)", text):
        return f"{key} is {mismatch.group(3)}, must be {mismatch.group(1) or mismatch.group(2)}"
    return f"{key}: {text}" if key else text


def _keys(parser: LightningArgumentParser) -> list[str]:
    """The keys of a parser and of its subcommands."""
    keys = []
    for action in parser._actions:
        keys.append(action.dest)
        if isinstance(action.choices, dict):
            keys += [inner.dest for sub in action.choices.values() for inner in sub._actions]
    return keys


def without_marks(error: UsageError) -> UsageError:
    """The error as the outermost parser shows it."""
    return UsageError(re.sub("[\x02\x03]", "", str(error)))
