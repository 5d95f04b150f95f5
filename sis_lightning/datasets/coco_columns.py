"""COCO's annotation files as columns of values, before their entries are judged. Needs no torch.

`decode` reads a sound file of COCO's size within seconds, as it makes no dict for an entry. It gives up on all that is
unusual; `coco_reader` then reads the file entry by entry, and finds and names what is wrong.
"""

from __future__ import annotations

import gc
import mmap
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sis_lightning.datasets.constants import COCO_KEYPOINTS
from sis_lightning.datasets.skeleton import Skeleton
from sis_lightning.errors import DataError


@dataclass
class Columns:
    """The entries of an annotation file of COCO as arrays; annotations of unknown images or categories are left out.

    Attributes:
        names: `file_name` of each image; empty if it has none.
        image_ids: Id of each image.
        sizes: Width and height of each image in px (I, 2); 0 if the file does not say.
        class_names: Names of the categories in the order of their ids.
        category_ids: Their ids.
        image: Index of each annotation's image (N,).
        labels: Label of each annotation (N,), 0…K-1.
        extents: `bbox` of each annotation (N, 4); NaN if it is not four numbers.
        areas: `area` (N,), 0 if the file has none; NaN if it is no number.
        lacking: Whether the annotation has no `area` (N,).
        ignored: `iscrowd` (N,).
        sound: False where an entry has a defect that the arrays do not show (N,).
        where: Describes an annotation, by its index, for messages.
        annotated: Whether the file has annotations at all.
        keypoints: x, y, visibility (N, K, 3), NaN if they are not these numbers; None if they were not read.
        num_keypoints: `num_keypoints` as the file has it, else the number of visible keypoints; NaN if it is no number.
        segmentations: The value `segmentation` of each annotation (N,); None if they were not read.
        skeleton: The K keypoints; None if they were not read.
    """

    names: Sequence[str]
    image_ids: list[int]
    sizes: NDArray[np.int64]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    image: NDArray[np.int64]
    labels: NDArray[np.int64]
    extents: NDArray[np.float64]
    areas: NDArray[np.float64]
    lacking: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    sound: NDArray[np.bool_]
    where: Callable[[int], str]
    annotated: bool = True
    keypoints: NDArray[np.float64] | None = None
    num_keypoints: NDArray[np.float64] | None = None
    segmentations: NDArray[np.object_] | None = None
    skeleton: Skeleton | None = None


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str = ""
    width: float = 0
    height: float = 0


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str | None = None


class _PersonCategory(_Category, gc=False):
    keypoints: list[str] = []
    skeleton: list[tuple[int, int]] = []
    sigmas: list[float] = []


class _Box(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | msgspec.UnsetType = msgspec.UNSET
    iscrowd: bool | Literal[0, 1] = 0


_NOT_STATED = -(2**40)


class _Person(_Box, gc=False):
    keypoints: list[float] = []
    num_keypoints: int = _NOT_STATED


class _Boxes(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Box] | msgspec.UnsetType = msgspec.UNSET


class _Persons(msgspec.Struct):
    images: list[_Image]
    categories: list[_PersonCategory]
    annotations: list[_Person] | msgspec.UnsetType = msgspec.UNSET


def decode(path: Path, keypoints: bool) -> Columns | None:
    """Reads an annotation file of COCO whose entries have the usual types and refer to each other.

    Args:
        path: The JSON file.
        keypoints: Whether keypoints are read, of a file with one category.

    Returns:
        Its entries; None if anything is unusual.

    Raises:
        OSError: If the file cannot be read.
    """
    with _without_collector():
        try:
            with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                known = _Persons if keypoints else _Boxes
                file: _Boxes | _Persons = msgspec.json.decode(content, type=known)  # type: ignore[assignment]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):  # mmap: an empty file
            return None
        try:
            return _columns(file)
        # Whole numbers of more than 64 bits, lists of other lengths, or a skeleton that contradicts itself.
        except (OverflowError, ValueError, DataError):
            return None


@contextmanager
def _without_collector() -> Iterator[None]:
    """Switches Python's collector of circular references off, which would look through millions of new tuples."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _columns(file: _Boxes | _Persons) -> Columns | None:
    rows: Sequence[Any] = [] if isinstance(file.annotations, msgspec.UnsetType) else file.annotations
    count = len(rows)

    def column(name: str, dtype: type) -> NDArray[Any]:
        return np.fromiter(map(operator.attrgetter(name), rows), dtype=dtype, count=count)

    image_ids = np.array([image.id for image in file.images], dtype=np.int64)
    categories = sorted(file.categories, key=operator.attrgetter("id"))
    category_ids = np.array([category.id for category in categories], dtype=np.int64)
    ids, of_image, of_category = (column(name, np.int64) for name in ("id", "image_id", "category_id"))
    if any(count_distinct(values) < len(values) for values in (image_ids, category_ids, ids)):
        return None
    order = np.argsort(image_ids, kind="stable")
    image = _positions(image_ids[order], of_image)
    labels = _positions(category_ids, of_category)
    if image is None or labels is None:
        return None
    sizes = np.array([(entry.width, entry.height) for entry in file.images], dtype=np.float64).reshape(-1, 2)
    if ((sizes > 0).any(axis=1) != (sizes > 0).all(axis=1)).any():
        return None
    areas: list[Any] = [row.area for row in rows]
    lacking = np.zeros(count, dtype=np.bool_)
    if msgspec.UnsetType in set(map(type, areas)):
        lacking = np.fromiter((area is msgspec.UNSET for area in areas), dtype=np.bool_, count=count)
        areas = [0.0 if area is msgspec.UNSET else area for area in areas]

    def where(place: int) -> str:
        return f"annotation {ids[place]} of image {of_image[place]} (entry {place} of 'annotations')"

    columns = Columns(
        names=[entry.file_name for entry in file.images],
        image_ids=image_ids.tolist(),
        sizes=sizes.astype(np.int64),
        class_names=tuple(str(entry.id) if entry.name is None else entry.name for entry in categories),
        category_ids=tuple(category_ids.tolist()),
        image=order[image],
        labels=labels,
        extents=np.fromiter(
            chain.from_iterable(map(operator.attrgetter("bbox"), rows)), dtype=np.float64, count=4 * count
        ).reshape(-1, 4),
        areas=np.array(areas, dtype=np.float64),
        lacking=lacking,
        ignored=column("iscrowd", np.bool_),
        sound=np.ones(count, dtype=np.bool_),
        where=where,
        annotated=not isinstance(file.annotations, msgspec.UnsetType),
    )
    if isinstance(file, _Persons):
        if len(file.categories) != 1:
            return None
        category = file.categories[0]
        stated_count = len(rows[0].keypoints) // 3 if rows else 0 if category.keypoints else len(COCO_KEYPOINTS)
        columns.skeleton = Skeleton.from_category(category.keypoints, category.skeleton, category.sigmas, stated_count)
        keypoints = len(columns.skeleton.names)
        if not keypoints:
            return None
        lengths = np.fromiter((len(row.keypoints) for row in rows), dtype=np.int64, count=count)
        if (lengths != 3 * keypoints).any():
            return None
        values = np.fromiter(
            chain.from_iterable(map(operator.attrgetter("keypoints"), rows)),
            dtype=np.float64,
            count=3 * keypoints * count,
        ).reshape(-1, keypoints, 3)
        stated = column("num_keypoints", np.int64)
        visible = np.count_nonzero(values[..., 2] > 0, axis=1)
        columns.keypoints = values
        columns.num_keypoints = np.where(stated == _NOT_STATED, visible, stated).astype(np.float64)
    return columns


def count_distinct(values: NDArray[Any]) -> int:
    """Number of different values, by sorting: NumPy's `unique` takes ten times as long for hashed numbers."""
    ordered = np.sort(values)
    return min(len(ordered), 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1])))


def _positions(ordered: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The index of each value among the ordered ones; None if one is not among them."""
    if not len(ordered):
        return None if len(values) else np.zeros(0, dtype=np.int64)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return places if (ordered[places] == values).all() else None
