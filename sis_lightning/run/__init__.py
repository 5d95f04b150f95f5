"""Runs: what a configuration describes, how it is trained, tested and resumed, and what it leaves on disk.

`Run` is imported when it is first asked for, so that records and histories can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sis_lightning.run.run import Run

__all__ = ["Run"]


def __getattr__(name: str) -> Any:
    if name == "Run":
        from sis_lightning.run.run import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
