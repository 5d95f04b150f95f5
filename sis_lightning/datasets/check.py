"""Walks a data set: what is in it, and everything that is wrong with it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sis_lightning.datamodules import AnnotatedDataModule, Sample, SISDataModule, Source
from sis_lightning.datamodules.base import Split
from sis_lightning.datasets.download import prove
from sis_lightning.errors import DataError, UsageError
from sis_lightning.machine import usable_cores

# COCO's limits between small, medium and large objects, in px².
_SMALL, _LARGE = 32**2, 96**2


@dataclass
class Census:
    """What one split holds.

    Attributes:
        split: Its name.
        images: How many.
        sizes: Width and height of each decoded image.
        classes: Objects (images, for classification and segmentation) of each class.
        areas: Of each box, in px².
        notes: What training leaves out, and so on.
        defects: What is wrong, as text with file and entry.
    """

    split: str
    images: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)
    areas: list[float] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)


def take_census(data: SISDataModule, *, pictures: bool = True) -> Iterator[Census]:
    """Walks the splits of a DataModule; the same one under two names once.

    Args:
        data: Not set up yet.
        pictures: Decodes all images (and masks) too, on all cores.
    """
    seen: list[tuple[int, list[str]]] = []
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        census = Census(split)
        try:
            source = data.source(split)
        except DataError as error:
            census.defects.append(str(error))
            yield census
            continue
        fingerprint = (len(source), [str(defect) for defect in source.defects])
        if split == "test" and fingerprint in seen:
            continue
        seen.append(fingerprint)
        census.defects += [str(defect) for defect in source.defects]
        census.notes, data.notes = dict(data.notes), {}
        if isinstance(data, AnnotatedDataModule) and split != "train":
            try:
                data.truth(split)  # what scores may be stricter than what trains
            except DataError as error:
                census.defects.append(f"cannot be scored: {error}")
        if pictures:
            _walk(source, census, data)
        else:
            census.images = len(source)
        yield census


def _walk(source: Source, census: Census, data: SISDataModule) -> None:
    def attempt(check: Callable[[], Sample]) -> Sample | str:
        try:
            return check()
        except DataError as error:
            return str(error)

    checks = source.checks()
    # Decoding leaves Python's lock, so that threads do; by the hundred, as ten thousand images fill memory.
    with ThreadPoolExecutor(usable_cores()) as pool:
        while batch := list(islice(checks, 100)):
            for result in pool.map(attempt, batch):
                census.images += 1
                if isinstance(result, str):
                    census.defects.append(result)
                else:
                    _count(result, census, data)


def _count(sample: Sample, census: Census, data: SISDataModule) -> None:
    height, width = sample["image"].shape[1:]
    census.sizes.append((width, height))
    names = data.class_names
    if "boxes" in sample:
        census.classes.update(names[label - 1] for label in sample["labels"].tolist())
        sides = sample["boxes"][:, 2:] - sample["boxes"][:, :2]
        census.areas += sides.prod(dim=1).tolist()
    elif "mask" in sample:
        census.classes.update(names[number] for number in sample["mask"].unique().tolist() if number < len(names))
    elif "label" in sample:
        census.classes[names[sample["label"]]] += 1


def to_text(census: Census) -> str:
    """What a person wants to see of a split: counts, sizes, classes, and every defect."""
    table = Table(title=f"{census.split}: {census.images:,} images", title_justify="left", show_header=False)
    if census.sizes:
        sides = np.array(census.sizes)
        low, middle, high = np.percentile(sides, (0, 50, 100), axis=0).astype(int)
        table.add_row("width × height", f"{low[0]}…{high[0]} × {low[1]}…{high[1]}, median {middle[0]} × {middle[1]}")
    if census.areas:
        areas = np.array(census.areas)
        small, large = int((areas < _SMALL).sum()), int((areas >= _LARGE).sum())
        parts = f"{small:,} small, {len(areas) - small - large:,} medium, {large:,} large (32², 96² px)"
        table.add_row("objects", f"{len(areas):,}: {parts}")
    for label, note in census.notes.items():
        table.add_row(label, note)
    if census.classes:
        counted = ", ".join(f"{name} {count:,}" for name, count in census.classes.most_common())
        table.add_row(f"{len(census.classes)} classes", counted)
    table.add_row("defects", f"{len(census.defects):,}")
    text = io.StringIO()
    Console(file=text, width=118).print(table)
    return text.getvalue() + "".join(f"  {defect}\n" for defect in census.defects)


def check_data(
    layers: dict[str, Any], options: list[str], *, pictures: bool = True, archives: Path | None = None
) -> int:
    """Prints the census of a run's data; returns how many defects there are.

    Args:
        layers: The composed YAML.
        options: What the command line lays over it.
        pictures: Decodes all images and masks.
        archives: Folder with the published archives, by which the data is proved.

    Raises:
        DataError: Where the data is not what the archives hold.
    """
    from sis_lightning.run.lightning_cli import run

    data = run(None, layers, options).datamodule
    assert isinstance(data, SISDataModule)
    total = 0
    for census in take_census(data, pictures=pictures):
        print(to_text(census), end="", flush=True)
        total += len(census.defects)
    print(f"{data.root}: {data.identity()}; " + (f"{total:,} defect(s)" if total else "nothing wrong"))
    if archives is not None:  # whatever is wrong with them, as published data sets have flaws too
        print(_proof(data, archives), end="")
    return total


def _proof(data: SISDataModule, folder: Path) -> str:
    """That the data is the published, and how a book of tables knows it by that."""
    if not data.archives:
        raise UsageError(f"--archives: {type(data).__name__} is of no published data set")
    data.setup("fit")
    data.setup("test")
    files = {path for split in ("train", "test") for path in data.sources[split].files()}
    prove(files, data.home, data.archives, folder)
    return (
        f"proved by {', '.join(archive.file for archive in data.archives)}; for the data set in results/paper.yaml:\n"
        f"    test: [{data.fingerprint('test')}]\n    train: [{data.listing('train')}]\n"
    )
