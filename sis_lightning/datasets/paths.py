"""Paths of many files in little memory. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray


class PathArray(Sequence[Path]):
    """Paths as one array of bytes; a `Path` is made when it is read.

    A `Path` object per image takes several hundred bytes, and every loader worker would copy all of them, as reading an
    object of Python changes its count of references.

    Args:
        paths: The paths.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self._names: NDArray[np.bytes_] = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)

    @classmethod
    def from_bytes(cls, names: NDArray[np.bytes_]) -> PathArray:
        """The paths of such an array."""
        made = cls([])
        made._names = names
        return made

    def to_bytes(self) -> NDArray[np.bytes_]:
        """The paths as one array of bytes, in the encoding of the file system."""
        return self._names

    def names(self) -> list[str]:
        """The paths as text."""
        return [os.fsdecode(name) for name in self._names.tolist()]

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice | NDArray[np.int64]) -> PathArray: ...

    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> Path | PathArray:
        """A path, or, for a slice or an array of indices, several."""
        if isinstance(index, (slice, np.ndarray)):
            return PathArray.from_bytes(self._names[index])
        return Path(os.fsdecode(self._names[index]))
