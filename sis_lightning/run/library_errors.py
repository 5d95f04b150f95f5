"""Makes short messages of the exceptions of Lightning, jsonargparse and torch that a mistake of the user causes.

A library's exception becomes a UsageError with one to five lines that names the option, if it was raised in the
library's own code. Everything else is a defect of this package, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from sis_lightning.datamodules.workers import (
    NO_SHARED_MEMORY,
    NO_SHARED_MEMORY_MESSAGE,
    TOO_MANY_OPEN_FILES,
    too_many_open_files,
)
from sis_lightning.errors import DataError, UsageError, UserError

_LIBRARIES = tuple(str(Path(str(module.__file__)).parent) for module in (jsonargparse, lightning))
_MISTAKES = (ValueError, TypeError, RuntimeError, ImportError, NotImplementedError)
# As torch says it of its workers; compilers of GPU kernels have a shared memory of another kind.
_SHARED_MEMORY_IS_FULL = re.compile(r"shared memory ?\(shm\)|workers are out of shared memory|file </torch_")
# As gloo and NCCL say it.
_LOST_PEER = re.compile(r"Connection (closed|reset) by peer|remote process exited or there was a network error")
#: The characters by which `run.parser` marks an inner parser's message.
MARKS = "\x02{}\x03"


@contextlib.contextmanager
def explained(config: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Raises UsageError or DataError in place of a library's exception for a mistake of the user.

    Args:
        config: The run's resolved configuration, by which the message names the option; None while it is parsed.

    Raises:
        UsageError: For options and combinations that a library refuses.
        DataError: If the memory of the device does not suffice, or workers fail for lack of memory or files.
    """
    try:
        yield
    except UserError as error:
        if "DataLoader worker (pid" in str(error):  # torch reports it by a signal, so even while a checkpoint is saved
            raise DataError(_of_loading(error)) from error
        text = re.sub("[\x02\x03]", "", str(error))
        if text == str(error):
            raise
        raise type(error)(text) from error
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"the device's memory does not suffice: {_shortened(str(error).partition('. ')[0])}\n"
            "  Choose a smaller --data.batch_size with more --trainer.accumulate_grad_batches, or bf16-mixed precision"
        ) from error
    except Exception as error:
        if cause := _our_own(error):  # jsonargparse wraps what the constructor of a class raises
            raise cause from error
        if reason := _of_loading(error):
            raise DataError(reason) from error
        if _LOST_PEER.search(str(error)):
            raise DataError(
                "this rank lost its connection to another one, which has ended: the message of that rank says why"
            ) from error
        if not isinstance(error, MisconfigurationException) and not (
            isinstance(error, _MISTAKES) and _raised_in_library(error)
        ):
            raise
        raise UsageError(_named(_reason(error), config or {})) from error


def _of_loading(error: BaseException) -> str:
    """The reason why data could not be loaded, if it is the machine's: a killed worker, or its limits; else empty."""
    text = " ".join(map(str, _chain(error)))
    died = re.search(r"DataLoader worker .*?(?:killed by signal: (\w[\w ]*)|exited unexpectedly)", text)
    code = re.search(r"exited unexpectedly with exit code (\d+)", text)
    if (code and int(code[1]) == TOO_MANY_OPEN_FILES) or "Too many open files" in text:
        return too_many_open_files()
    if (code and int(code[1]) == NO_SHARED_MEMORY) or _SHARED_MEMORY_IS_FULL.search(text):
        return NO_SHARED_MEMORY_MESSAGE
    if died:
        how = f"was killed by signal {died[1].strip()}" if died[1] else "has gone"
        return (
            f"a worker process that loads data {how}; most often the system's memory is full\n"
            "  Choose fewer --data.num_workers or a smaller --data.batch_size, or ask the cluster for more memory"
        )
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _our_own(error: BaseException) -> UserError | None:
    return next((cause for cause in _chain(error) if isinstance(cause, UserError)), None)


def _raised_in_library(error: BaseException) -> bool:
    """Whether the code that raised it, or the code that loads a missing package for it, is a library's."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    frames = [name for name in frames if not name.startswith("<")]
    return bool(frames) and frames[-1].startswith(_LIBRARIES)


def _reason(error: BaseException) -> str:
    """The message without the class path and the advice that jsonargparse and Lightning put around it."""
    if isinstance(error, MisconfigurationException | ImportError):
        return str(error)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return str(cause)


def _named(text: str, config: Mapping[str, Any]) -> str:
    """Puts the option in front of a message that is about it."""
    missing = re.search(r"Requirement '?`?([\w-]+)|No module named '([\w-]+)", text)
    package = (missing[1] or missing[2]) if missing else ""
    if package:
        text = f"the package {package} is not installed: pip install {package}"
    text = _shortened(text)
    given: dict[str, list[str]] = {}
    for key, value in config.get("trainer", {}).items():
        for item in value if isinstance(value, list) else [value]:
            name = str(item.get("class_path", "")).rpartition(".")[2] if isinstance(item, dict) else item
            if name not in (None, False, "", "auto"):
                given.setdefault(key, []).append(str(name))
    tests: list[Callable[[str, list[str]], object]] = [
        lambda _, names: package and any(package.lower() in name.lower() for name in names),
        lambda key, _: re.search(rf"\b{key}\b", text),
        lambda _, names: any(re.search(rf"\b{re.escape(name)}\b", text) for name in names if name.isidentifier()),
    ]
    for test in tests:
        for key, names in given.items():
            if test(key, names):
                return f"trainer.{key} is {', '.join(names)}: {text}"
    return text


def _shortened(text: str, lines: int = 4, width: int = 160) -> str:
    """A message in few lines, cut after a whole sentence if possible."""
    plain = " ".join(text.replace("`", "'").split())
    wrapped = textwrap.wrap(plain, width)
    if len(wrapped) <= lines:
        return "\n  ".join(wrapped)
    kept = " ".join(wrapped[:lines])
    sentence = kept.rpartition(". ")[0]
    return "\n  ".join(textwrap.wrap(f"{sentence}." if len(sentence) > width else f"{kept} …", width))
