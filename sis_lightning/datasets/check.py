"""Summaries of Datasets: what they contain, and everything that is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from rich.table import Table

from sis_lightning.datasets.base import ImageDataset, Sample
from sis_lightning.datasets.constants import IMAGE_ENDINGS
from sis_lightning.datasets.images import orientation
from sis_lightning.errors import DataError
from sis_lightning.machine import usable_cores
from sis_lightning.text_tables import table_to_text

# COCO's limits between small, medium and large objects, in px².
_SMALL, _LARGE = 32**2, 96**2


@dataclass
class DatasetSummary:
    """The contents of one split; `print` shows them as a table.

    Attributes:
        split: Name of the split.
        images: Number of images.
        sizes: Width and height in px of each image that was read.
        classes: Number of objects of each class (of images, for classification and segmentation).
        areas: Area of each box in px².
        turned: Number of images whose EXIF orientation is not upright.
        notes: Objects that training leaves out, and further facts, by a short label.
        defects: Every defect, as text with file and entry.
    """

    split: str
    images: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)
    areas: list[float] = field(default_factory=list)
    turned: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        table = Table(title=f"{self.split}: {self.images:,} images", title_justify="left", show_header=False)
        if self.sizes:
            sides = np.array(self.sizes)
            low, middle, high = np.percentile(sides, (0, 50, 100), axis=0).astype(int)
            text = f"{low[0]}…{high[0]} × {low[1]}…{high[1]}, median {middle[0]} × {middle[1]}"
            table.add_row("width × height", text)
        if self.areas:
            areas = np.array(self.areas)
            small, large = int((areas < _SMALL).sum()), int((areas >= _LARGE).sum())
            parts = f"{small:,} small, {len(areas) - small - large:,} medium, {large:,} large (32², 96² px)"
            table.add_row("objects", f"{len(areas):,}: {parts}")
        for label, note in self.notes.items():
            table.add_row(label, note)
        if self.classes:
            counted = ", ".join(f"{name} {count:,}" for name, count in self.classes.most_common())
            table.add_row(f"{len(self.classes)} classes", counted)
        table.add_row("defects", f"{len(self.defects):,}")
        return "\n".join([table_to_text(table, width=118).rstrip("\n"), *(f"  {defect}" for defect in self.defects)])


def summarize(dataset: ImageDataset, split: str, *, decode: bool = True) -> DatasetSummary:
    """Summarises a Dataset.

    Args:
        dataset: The Dataset.
        split: Name of the split in the summary.
        decode: Whether all images (and masks) are read too, on all cores.
    """
    summary = DatasetSummary(split, notes=dict(dataset.notes), defects=[str(defect) for defect in dataset.defects])
    if decode:
        _read_all(dataset, summary)
        summary.turned = sum(orientation(path) != 1 for path in dataset.files() if path.suffix.lower() in IMAGE_ENDINGS)
        absent = [name for name in dataset.meta.class_names if not summary.classes[name]]
        if absent and summary.classes:
            shown = ", ".join(absent[:10]) + (", …" if len(absent) > 10 else "")
            summary.notes["occurs nowhere"] = f"{len(absent)} of {len(dataset.meta.class_names)} classes: {shown}"
        if summary.turned:
            summary.notes["EXIF"] = f"{summary.turned:,} images have an orientation, which upright: true follows"
    else:
        summary.images = len(dataset)
    try:
        if split == "train":
            dataset.require_targets()
        else:
            dataset.require_scores()
    except DataError as error:
        if str(error) not in summary.defects:  # a damaged mask was listed already
            summary.defects.append(str(error))
    return summary


def summarize_splits(
    splits: Mapping[Any, Callable[[], ImageDataset]], *, decode: bool = True
) -> Iterator[DatasetSummary]:
    """Summarises the splits of a data set, one after the other; two names of one split once.

    Args:
        splits: Functions that make the Dataset of each split, by its name; a DataError becomes the split's only defect.
        decode: Whether all images (and masks) are read too, on all cores.
    """
    seen = set()
    for split, make in splits.items():
        try:
            dataset = make()
        except DataError as error:
            yield DatasetSummary(split, defects=[str(error)])
            continue
        same = (tuple(dataset.files()), getattr(dataset, "evaluation", None))
        if same not in seen:
            seen.add(same)
            yield summarize(dataset, split, decode=decode)


def _read_all(dataset: ImageDataset, summary: DatasetSummary) -> None:
    def attempt(check: Callable[[], Sample]) -> Sample | str:
        try:
            return check()
        except DataError as error:
            return str(error)

    checks = dataset.checks()
    # Decoding releases Python's lock, so threads are enough; in hundreds, as ten thousand images would fill memory.
    with ThreadPoolExecutor(usable_cores()) as pool:
        while batch := list(islice(checks, 100)):
            for result in pool.map(attempt, batch):
                summary.images += 1
                if isinstance(result, str):
                    summary.defects.append(result)
                else:
                    _count(result, summary, dataset.meta.class_names)


def _count(sample: Sample, summary: DatasetSummary, names: tuple[str, ...]) -> None:
    height, width = sample["image"].shape[1:]
    summary.sizes.append((width, height))
    if "boxes" in sample:
        summary.classes.update(names[label - 1] for label in sample["labels"].tolist())
        sides = sample["boxes"][:, 2:] - sample["boxes"][:, :2]
        summary.areas += sides.prod(dim=1).tolist()
    elif "mask" in sample:
        summary.classes.update(names[number] for number in sample["mask"].unique().tolist() if number < len(names))
    elif "label" in sample:
        summary.classes[names[sample["label"]]] += 1
