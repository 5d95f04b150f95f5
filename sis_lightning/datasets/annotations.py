"""The objects of a data set's images as arrays, and their defects. Needs no torch.

Coordinates are continuous: an image spans 0…width and 0…height, and a box x1, y1, x2, y2 has the area
(x2 - x1) · (y2 - y1). COCO's boxes are of this kind. VOC's count pixels from 1 and include the last one; they become
continuous by taking 1 from xmin and ymin.

The rules for what is sound are in one place for each format: `coco_reader`, `voc_reader` and, for boxes of both,
`check_boxes` here. Training, evaluation and the check of a data set all read by them. A defect without a remedy stops
all three.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sis_lightning.datasets.paths import PathArray
from sis_lightning.datasets.skeleton import Skeleton
from sis_lightning.errors import DataError

#: Ground truth of one image as evaluators take it; see `Annotations.ground_truth`.
GroundTruth = dict[str, Any]

_OVERHANG = 1.0  # px by which a box may reach over the border before it counts as a defect: COCO's are rounded


@dataclass(frozen=True)
class Defect:
    """A defect of a data set.

    Attributes:
        file: The file that has the defect.
        where: The image, annotation or line in the file; empty for the whole file.
        what: A description of the defect.
        remedy: The remedy in training: `clipped` to the image, `dropped` as COCO's own tools do, or empty: it stops.
    """

    file: Path
    where: str
    what: str
    remedy: Literal["", "clipped", "dropped"] = ""

    def __str__(self) -> str:
        where = f", {self.where}" if self.where else ""
        remedy = f" (training: {self.remedy})" if self.remedy else ""
        return f"{self.file}{where}: {self.what}{remedy}"


def require_sound(defects: Iterable[Defect]) -> None:
    """Stops if there are defects without a remedy.

    Raises:
        DataError: If there is one; the message has the first of them and their number.
    """
    fatal = [defect for defect in defects if not defect.remedy]
    if fatal:
        count = f"\n  {len(fatal)} defects of this severity; `defects` lists them all." if len(fatal) > 1 else ""
        raise DataError(f"{fatal[0]}{count}")


@dataclass
class Annotations:
    """The images and objects of one split.

    Objects are in the order of their images, and within an image in the order of the file. Entries with defects that
    have no remedy are left out of the arrays.

    Attributes:
        source: The file or folder that was read.
        class_names: Class names by label, 0…K-1.
        category_ids: COCO's id of each label; for VOC the label itself.
        paths: The image files.
        image_ids: COCO's id of each image; for VOC its name.
        sizes: Width and height of each image in px (I, 2); 0 if the annotations do not say.
        image: Index of each object's image (N,).
        boxes: Boxes x1, y1, x2, y2 in px (N, 4), not clipped to the image.
        labels: Label of each object (N,), 0…K-1.
        ignored: Whether each object counts neither for nor against a detection (N,): COCO's crowds, VOC's difficult
            objects.
        keypoints: Keypoints x, y, visibility (N, K, 3), visibility being 0 (not annotated), 1 (hidden) or 2 (visible);
            None if they were not read.
        areas: Area of each object in px² as the file has it (N,); None for the area of its box.
        num_keypoints: Number of annotated keypoints as the file has it (N,).
        extents: COCO's boxes x, y, width, height as the file has them (N, 4): x2 - x1 may differ from the width in the
            last bit.
        segmentations: COCO's polygons or run-length encoded mask of each object (N,); None if they were not read.
        splits: Names of the splits that list each image, for results files.
        defects: The defects of the files.
        dropped: Number of objects that were left out, by reason.
        notes: Facts that people should know and that are no defects, by a short label, such as values that the file
            lacks and that were computed.
        annotated: False if the file has no annotations at all, as those of COCO's test sets.
        folder: The folder to which the names of images are relative; None if their names are their ids.
        skeleton: The K keypoints; None if they were not read.
    """

    source: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    paths: PathArray
    image_ids: list[Any]
    sizes: NDArray[np.int64]
    image: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    keypoints: NDArray[np.float64] | None = None
    areas: NDArray[np.float64] | None = None
    num_keypoints: NDArray[np.int64] | None = None
    extents: NDArray[np.float64] | None = None
    segmentations: NDArray[np.object_] | None = None
    splits: list[tuple[str, ...]] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: dict[str, str] = field(default_factory=dict)
    annotated: bool = True
    folder: Path | None = None
    skeleton: Skeleton | None = None

    def __post_init__(self) -> None:
        self.splits = self.splits or [("",)] * len(self.paths)
        if (np.diff(self.image) < 0).any():
            self._select(np.argsort(self.image, kind="stable"))
        self._index()

    def _select(self, which: NDArray[Any]) -> None:
        for name in PER_OBJECT:
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, values[which])
        self._index()

    def _index(self) -> None:
        self._starts = np.searchsorted(self.image, np.arange(len(self.paths) + 1))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    @property
    def object_count(self) -> int:
        """Number of objects that count for training: all but crowds or difficult ones."""
        return int(np.count_nonzero(~self.ignored))

    @property
    def visible_keypoint_count(self) -> int:
        """Number of annotated keypoints of these objects; 0 if keypoints were not read."""
        return 0 if self.keypoints is None else int(np.count_nonzero(self.keypoints[~self.ignored, :, 2] > 0))

    def objects(self, index: int) -> slice:
        """The range of the objects of image `index` in the arrays."""
        return slice(int(self._starts[index]), int(self._starts[index + 1]))

    def copy(self) -> Annotations:
        """A copy that can be clipped and reduced without a change of the original."""
        copied = copy.copy(self)  # with the same arrays, which are replaced but never changed in place
        copied.dropped = self.dropped.copy()
        return copied

    def first(self, count: int | None) -> Annotations:
        """A copy with the first `count` images that have objects, or annotated keypoints if these were read.

        Args:
            count: Number of images; None for all images, those without objects included.
        """
        if count is None:
            return self.copy()
        counted = ~self.ignored
        if self.keypoints is not None:
            counted &= np.any(self.keypoints[..., 2] > 0, axis=1)
        return self._of_images(np.unique(self.image[counted])[:count])

    def _of_images(self, chosen: NDArray[np.int64]) -> Annotations:
        objects = np.isin(self.image, chosen)
        of_objects: dict[str, Any] = {
            name: None if (values := getattr(self, name)) is None else values[objects] for name in PER_OBJECT
        }
        return Annotations(
            source=self.source,
            class_names=self.class_names,
            category_ids=self.category_ids,
            paths=self.paths[chosen],
            image_ids=[self.image_ids[index] for index in chosen.tolist()],
            sizes=self.sizes[chosen],
            splits=[self.splits[index] for index in chosen.tolist()],
            defects=self.defects,
            dropped=self.dropped.copy(),
            notes=self.notes,
            annotated=self.annotated,
            folder=self.folder,
            skeleton=self.skeleton,
            **{**of_objects, "image": np.searchsorted(chosen, self.image[objects])},
        )

    def choose_classes(self, classes: Sequence[str] | Mapping[str, Sequence[str]]) -> None:
        """Leaves out all other classes, and merges classes into one.

        Args:
            classes: Class names, in the order of their new labels; or, for each new class, the names of the classes
                that it consists of. A merged class has the category id of the first of them.

        Raises:
            DataError: If there is no such class, or one is chosen twice.
        """
        groups = classes if isinstance(classes, Mapping) else {name: [name] for name in classes}
        chosen = [name for names in groups.values() for name in names]
        for name in chosen:
            if name not in self.class_names:
                near = difflib.get_close_matches(name, self.class_names, 1)
                hint = f": did you mean '{near[0]}'?" if near else ""
                raise DataError(f"{self.source}: no category '{name}' among its {len(self.class_names)}{hint}")
            if chosen.count(name) > 1:
                raise DataError(f"{self.source}: category '{name}' is chosen twice")
        label_of = np.full(len(self.class_names), -1, dtype=np.int64)
        for label, names in enumerate(groups.values()):
            label_of[[place for place, name in enumerate(self.class_names) if name in names]] = label
        first = [self.class_names.index(names[0]) for names in groups.values()]
        self.labels = label_of[self.labels]
        self.drop(self.labels < 0, "objects of other classes")
        self.class_names, self.category_ids = tuple(groups), tuple(self.category_ids[label] for label in first)

    def with_objects(self) -> Annotations:
        """A copy without the images that have no objects, which it counts in `dropped`."""
        kept = np.unique(self.image)
        copied = self._of_images(kept)
        if len(kept) < len(self):
            copied.dropped["images without objects"] += len(self) - len(kept)
        return copied

    def drop(self, which: NDArray[np.bool_], reason: str) -> None:
        """Leaves objects out, and counts them in `dropped`.

        Args:
            which: Whether each object is left out (N,).
            reason: The key in `dropped`.
        """
        if which.any():
            self.dropped[reason] += int(which.sum())
            self._select(~which)

    def clip(self) -> None:
        """Clips boxes to their images, and leaves out those that then have no area."""
        known = self.sizes[self.image]
        limits = np.where(known > 0, known, np.inf)
        clipped = np.clip(self.boxes, 0, np.concatenate([limits, limits], axis=1))
        if not np.array_equal(clipped, self.boxes):
            self.boxes = clipped
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        self.drop(np.any(sides <= 0, axis=1), "boxes of no area")

    def name(self, index: int) -> str:
        """The name of image `index`, which no other has: its path below the folder, with its ending, or its id."""
        if self.folder is None:
            return str(self.image_ids[index])
        path = PurePath(os.path.normpath(self.paths[index]))
        folder = PurePath(os.path.normpath(self.folder))
        # A path that leads out of the folder must not do so in the names of the files that are written.
        return path.relative_to(folder if path.is_relative_to(folder) else path.anchor).as_posix().replace("../", "")

    def names(self) -> list[str]:
        """The name of each image."""
        return [self.name(index) for index in range(len(self))]

    def ground_truth(self, index: int) -> GroundTruth:
        """Returns the ground truth that predictions for an image are scored against.

        Args:
            index: Index of the image.

        Returns:
            `image_id`; `source`, the names of the splits that list the image; `annotated`, False if the file has no
            annotations; and of its n objects, in the order of the file, `boxes` (n, 4) x1, y1, x2, y2 in px, not
            clipped, float64, `labels` (n,) 1…K, `ignored` (n,), `areas` (n,) in px²; for COCO `extents` (n, 4) x, y,
            width, height as in the file; with keypoints `keypoints` (n, K, 3) and `num_keypoints` (n,).
        """
        objects = self.objects(index)
        boxes = self.boxes[objects]
        sides = boxes[:, 2:] - boxes[:, :2]
        truth: GroundTruth = {
            "image_id": self.image_ids[index],
            "source": self.splits[index],
            "annotated": self.annotated,
            "boxes": boxes,
            "labels": self.labels[objects] + 1,
            "ignored": self.ignored[objects],
            "areas": sides.prod(axis=1) if self.areas is None else self.areas[objects],
        }
        for name in ("extents", "keypoints", "num_keypoints"):
            values = getattr(self, name)
            if values is not None:
                truth[name] = values[objects]
        return truth

    def require_sound(self) -> None:
        """Stops if there are defects without a remedy.

        Raises:
            DataError: If there is one; the message has the first of them and their number.
        """
        require_sound(self.defects)


#: Names of the arrays that have an entry for each object.
PER_OBJECT = (
    *("image", "boxes", "labels", "ignored", "keypoints", "areas", "num_keypoints", "extents", "segmentations"),
)


def check_boxes(
    boxes: NDArray[np.float64],
    sizes: NDArray[np.int64],
    where: Callable[[int], tuple[Path, str]],
    defects: list[Defect],
) -> NDArray[np.bool_]:
    """Lists the defects of boxes.

    Args:
        boxes: Boxes x1, y1, x2, y2 in px (N, 4).
        sizes: Width and height of each box's image in px (N, 2); 0 if unknown.
        where: Gives the file of a box and its place in the file.
        defects: The list that defects are added to.

    Returns:
        Whether each box is sound, or has only defects with a remedy (N,).
    """
    finite: NDArray[np.bool_] = np.all(np.isfinite(boxes), axis=1)
    with np.errstate(invalid="ignore"):
        negative = finite & (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
        flat = finite & ~negative & (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
        limits = np.where(sizes > 0, sizes, np.inf)
        outside = finite & ~negative & ~flat & ((boxes[:, 2:] <= 0) | (boxes[:, :2] >= limits)).any(axis=1)
        over = (boxes[:, :2] < -_OVERHANG) | (boxes[:, 2:] > limits + _OVERHANG)
        reaching = finite & ~negative & ~flat & ~outside & over.any(axis=1)
    for which, what, remedy in (
        (~finite, "the box is not four finite numbers", ""),
        (negative, "the box has a negative width or height", ""),
        (flat, "the box has no area", "dropped"),
        (outside, "the box is outside of the image", "dropped"),
        (reaching, "the box reaches over the image's border", "clipped"),
    ):
        for place in np.flatnonzero(which).tolist():
            x1, y1, x2, y2 = boxes[place]
            size = "×".join(str(side) for side in sizes[place])
            values = f": x {x1:g}…{x2:g}, y {y1:g}…{y2:g}, image {size}"
            defects.append(Defect(*where(place), what + values, remedy))  # type: ignore[arg-type]
    return finite & ~negative


def rows_of_numbers(rows: Sequence[Any], width: int) -> NDArray[np.float64]:
    """Numbers from a file as one array.

    Args:
        rows: Values from the file, which should be sequences of `width` numbers (numbers, for width 0).
        width: Length of each row; 0 for single numbers.

    Returns:
        (len(rows), width), or (len(rows),) for width 0; NaN in rows that are anything else.
    """
    shape = (width,) if width else ()
    try:
        whole = np.array(rows)
        if whole.shape == (len(rows), *shape) and whole.dtype.kind in "iuf":
            return whole.astype(np.float64)
    except (TypeError, ValueError):
        pass
    values = np.full((len(rows), *shape), np.nan)
    for place, row in enumerate(rows):
        try:
            numbers = np.array(row)
            if numbers.shape == shape and numbers.dtype.kind in "iuf":
                values[place] = numbers
            elif numbers.shape == shape and numbers.dtype == object:  # whole numbers of more than 64 bits
                values[place] = np.array([float(number) for number in numbers.ravel()]).reshape(shape)
        except (OverflowError, TypeError, ValueError):
            continue
    return values


def file_names(folder: Path) -> set[str]:
    """Names of the files in a folder; empty if there is no such folder.

    One listing is quicker than ten thousand look-ups on a network file system.
    """
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def load_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: If it does not exist, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None


def shortened(value: Any) -> str:
    """A value from a file as it can be shown in a message: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
