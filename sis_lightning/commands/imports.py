"""Imports of torch and Lightning in less time: of the seconds before the first step, nearly all are theirs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def quick_imports() -> Iterator[None]:
    """While it is open, the first import of torch, torchvision and Lightning takes two thirds of its time.

    Two things are left out. The garbage collector searches the millions of objects that these packages make again and
    again, though imports leave next to no garbage; they are set aside for good, so that no later search, and no worker
    process, touches them. And torchmetrics, which Lightning needs, imports `scipy.signal` only to give an old name back
    to it; without that, `scipy.signal` is imported by whoever uses it.
    """
    if "torch" in sys.modules or not gc.isenabled():  # of little use, and what is garbage by now must not be set aside
        yield
        return
    gc.disable()
    try:
        with _without_scipy_signal():
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _without_scipy_signal() -> Iterator[None]:
    name = "scipy.signal"
    if name in sys.modules:
        yield
        return
    placeholder = ModuleType(name)
    placeholder.hamming = None  # type: ignore[attr-defined]  # the name that torchmetrics would give back
    sys.modules[name] = placeholder
    try:
        yield
    finally:
        if sys.modules.get(name) is placeholder:
            del sys.modules[name]
