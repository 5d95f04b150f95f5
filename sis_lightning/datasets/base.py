"""The base of all Datasets: samples, defects, files and the description of the data set."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sis_lightning.datasets.annotations import Defect, require_sound
from sis_lightning.datasets.images import ImageReader
from sis_lightning.datasets.meta import DatasetMeta

Sample = dict[str, Any]
Batch = dict[str, Any]


class ImageDataset(Dataset[Sample], ABC):
    """A map-style Dataset of images with their targets, in the order of the files.

    Item `index` is a dict with `image`, an RGB image (3, H, W) of uint8, `name`, a string that no other sample has, and
    the targets that the subclass names.

    Attributes:
        meta: Class names, mean, standard deviation and further facts that a task needs.
        defects: Defects that were found while the files were listed.
        notes: Facts on the data for the record of a run, by a short label.
        reader: How image files become tensors. Set it before samples are read.
    """

    meta: DatasetMeta
    reader: ImageReader = ImageReader()

    def __init__(self) -> None:
        self.defects: Sequence[Defect] = ()
        self.notes: dict[str, str] = {}

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Reads a sample.

        Raises:
            DataError: If a file is missing or damaged, or image and target do not fit each other.
        """

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """All files that the samples are read from."""

    def checks(self) -> Iterator[Callable[[], Sample]]:
        """Functions that together read everything once; each raises DataError if its part is damaged."""
        return (functools.partial(self.__getitem__, index) for index in range(len(self)))

    def require_sound(self) -> None:
        """Stops if there are defects for which training has no remedy.

        Raises:
            DataError: If there is one; the message has the first of them and their number.
        """
        require_sound(self.defects)

    def require_targets(self) -> None:
        """Checks that there is something to learn from, in a moment: without decoding images.

        Raises:
            DataError: If no sample has a target.
        """

    def require_scores(self) -> None:
        """Checks that metrics on these samples mean something, in a moment: without decoding images.

        Raises:
            DataError: If they would be of their best value for want of a second class.
        """

    def groups(self) -> Sequence[int] | None:
        """A number for each sample if training batches should hold samples of one number only, else None."""
        return None


def collate(samples: list[Sample]) -> Batch:
    """Makes a batch of samples; for the `collate_fn` of a DataLoader.

    Args:
        samples: Dicts with the same keys.

    Returns:
        For each key a stacked tensor if the values are whole numbers or tensors of one shape, else the list of values:
        images of different sizes stay a list.
    """
    batch: Batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if isinstance(values[0], int):
            batch[key] = torch.tensor(values)
        elif isinstance(values[0], Tensor):
            values = [value.as_subclass(Tensor) for value in values]
            batch[key] = torch.stack(values) if len({value.shape for value in values}) == 1 else values
        else:
            batch[key] = values
    return batch
