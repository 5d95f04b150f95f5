"""Pascal VOC's average precision, and the devkit's files of detections. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sis_lightning.datasets.annotations import Annotations
from sis_lightning.errors import DataError, nearest
from sis_lightning.files import write_text

Rule = Literal["devkit", "toolkit"]
Row = dict[str, Any]
# As the devkit's Python port has them: a recall of exactly 3/10, 6/10 or 7/10 falls short of its point by rounding.
_ELEVEN_POINTS = np.arange(0.0, 1.1, 0.1)
_SLACK = 1e-9  # px of rounding by which a box's side may be negative


class VOCTruth:
    """The ground truth of one split, and the average precision of detections against it.

    In both rules a detection belongs to the object of its class and image that it overlaps most; of several that belong
    to one object, that of the highest score hits and all others are false. Equal scores keep the order of the rows.

    Args:
        annotations: Images and objects.
        rule: `devkit`: difficult objects are neither to be found nor held against a detection, and the IoU must be
            greater than `iou` (as in the Python port of the devkit that py-faster-rcnn and detectron2 use; the original
            in MATLAB takes an equal one too). `toolkit` (Padilla et al.): difficult objects count as all others, and
            the IoU may be equal.
        iou: In 0…1.
    """

    def __init__(self, annotations: Annotations, rule: Rule = "devkit", iou: float = 0.5) -> None:
        self.annotations, self.rule, self.iou = annotations, rule, iou

    def score(self, rows: Sequence[Row], image_ids: Collection[Any] | None = None) -> dict[str, float]:
        """Average precision, as the mean over the classes that have objects, and of each class.

        Args:
            rows: Detections in COCO's result format: `image_id` (VOC's name), `category_id` (the label), `score`, and
                `bbox` [x, y, w, h] in continuous coordinates.
            image_ids: The images that are scored; all for None.

        Returns:
            `AP50_voc07` (mean precision at 11 recalls) and `AP50_voc12` (area under the curve, VOC2010 and later), then
            `AP50_voc07/CLASS` and `AP50_voc12/CLASS`, in 0…1; NaN for a class without objects. The 50 is that of `iou`.

        Raises:
            KeyError: For a row of an image that the truth does not have.
        """
        truth = self.annotations
        wanted = np.array([image_ids is None or name in image_ids for name in truth.image_ids], dtype=np.bool_)
        index_of = {name: index for index, name in enumerate(truth.image_ids)}
        image = np.array([index_of[row["image_id"]] for row in rows], dtype=np.int64)
        labels = np.array([row["category_id"] for row in rows], dtype=np.int64)
        scores = np.array([row["score"] for row in rows], dtype=np.float64)
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        order = np.argsort(-scores, kind="stable")
        order = order[wanted[image[order]]]
        hits, counted = self._judge(image[order], labels[order], boxes[order])

        objects = wanted[truth.image] & ~(truth.ignored & (self.rule == "devkit"))
        positives = np.bincount(truth.labels[objects], minlength=len(truth.class_names))
        precisions = [
            average_precision(hits[counted & (labels[order] == label)], int(count))
            for label, count in enumerate(positives)
        ]
        figures = {}
        for place, year in enumerate(("07", "12")):
            of_class = [pair[place] for pair in precisions]
            name = f"AP{100 * self.iou:g}_voc{year}"
            present = [value for value in of_class if not math.isnan(value)]
            figures[name] = float(np.mean(present)) if present else math.nan
            figures |= {f"{name}/{known}": value for known, value in zip(truth.class_names, of_class, strict=True)}
        return figures

    def _judge(
        self, image: NDArray[np.int64], labels: NDArray[np.int64], boxes: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which detections, given by descending score, hit an object, and which count at all."""
        truth = self.annotations
        # Every detection with every object of its class in its image, as one list of pairs.
        keys, true_keys = labels * len(truth) + image, truth.labels * len(truth) + truth.image
        by_key = np.argsort(true_keys, kind="stable")
        first = np.searchsorted(true_keys[by_key], keys, "left")
        count = np.searchsorted(true_keys[by_key], keys, "right") - first
        detection = np.repeat(np.arange(len(keys)), count)
        within = np.arange(len(detection)) - np.repeat(np.cumsum(count) - count, count)
        candidate = by_key[np.repeat(first, count) + within]
        overlap = _overlap(boxes[detection], truth.boxes[candidate])

        # The largest overlap of each detection; of equal ones the object that the file lists first.
        ranked = np.lexsort((candidate, -overlap, detection))
        paired, start = np.unique(detection[ranked], return_index=True)
        largest = ranked[start]
        enough = overlap[largest] > self.iou if self.rule == "devkit" else overlap[largest] >= self.iou
        paired, target = paired[enough], candidate[largest[enough]]

        hits, counted = np.zeros(len(keys), dtype=np.bool_), np.ones(len(keys), dtype=np.bool_)
        _, earliest = np.unique(target, return_index=True)
        hits[paired[earliest]] = True
        if self.rule == "devkit":
            counted[paired[truth.ignored[target]]] = False
        return hits, counted


def average_precision(hits: NDArray[np.bool_], positives: int) -> tuple[float, float]:
    """Average precision at 11 recalls, and under the curve.

    Args:
        hits: (N,) of the detections that count, by descending score.
        positives: How many objects there are to find.

    Returns:
        VOC2007's and VOC2010's figure, in 0…1; NaN where there is nothing to find.
    """
    if not positives:
        return math.nan, math.nan
    found = np.cumsum(hits)
    recall, precision = found / positives, found / np.arange(1, len(hits) + 1)
    # The best precision at this recall or any higher one, falling to 0 behind the last.
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    eleven = envelope[np.searchsorted(recall, _ELEVEN_POINTS, "left")].mean()
    area = np.sum(np.diff(recall, prepend=0.0) * envelope[:-1])
    return float(eleven), float(area)


def _overlap(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """The IoU (N,) of boxes (N, 4) pair by pair; 0 where they do not meet."""
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    common: NDArray[np.float64] = sides.clip(min=0).prod(axis=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (others[:, 2:] - others[:, :2]).prod(axis=1) - common
    return common / np.where(common > 0, union, 1.0)


def write_comp4(rows: Sequence[Row], annotations: Annotations, folder: Path, split: str) -> None:
    """Writes detections as the devkit and VOC's server take them: `comp4_det_SPLIT_CLASS.txt` for every class.

    Lines are `name score xmin ymin xmax ymax`, pixels counted from 1 and the last included. Numbers have all digits of
    a float64: scores come back as they are, and so do coordinates that were float32 (adding 1 is then exact; others
    change in their last digit).

    Args:
        rows: As `VOCTruth.score` takes them.
        annotations: Knows the classes.
        folder: Is made where it does not exist.
        split: For the names of the files.
    """
    lines: list[list[str]] = [[] for _ in annotations.class_names]
    for row in rows:
        x, y, width, height = (float(value) for value in row["bbox"])
        corners = f"{x + 1!r} {y + 1!r} {x + width!r} {y + height!r}"
        lines[row["category_id"]].append(f"{row['image_id']} {float(row['score'])!r} {corners}\n")
    for name, text in zip(annotations.class_names, lines, strict=True):
        write_text(folder / f"comp4_det_{split}_{name}.txt", "".join(text))


def read_comp4(folder: Path, annotations: Annotations) -> list[Row]:
    """Reads the devkit's files of detections, `CLASS.txt` or `comp4_det_SPLIT_CLASS.txt`.

    Args:
        folder: A class that has no file there has no detections.
        annotations: Knows the classes and images.

    Returns:
        Rows as `VOCTruth.score` takes them.

    Raises:
        DataError: Where there is no such file at all, or one has a bad line; names file and line.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; VOC's detections are one file a class, CLASS.txt")
    label_of = {name: label for label, name in enumerate(annotations.class_names)}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.txt")):
        # A class may itself have a _ in its name, so that the longest one that fits is meant.
        competition, rest = path.stem.startswith("comp"), "_" + path.stem
        fitting = [name for name in label_of if name == path.stem or (competition and rest.endswith(f"_{name}"))]
        if not fitting:
            word = path.stem.rpartition("_")[2] if competition else path.stem
            raise DataError(f"{path}: not named by a class: {nearest(word, label_of)}")
        name = max(fitting, key=len)
        if name in files:
            raise DataError(f"{path}: {files[name].name} holds class '{name}' already")
        files[name] = path
    if not files:
        raise DataError(f"{folder} has no file of detections: CLASS.txt or comp4_det_SPLIT_CLASS.txt")
    known = set(annotations.image_ids)
    rows: list[Row] = []
    for name, path in files.items():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path}: not a text file") from None
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            image, *words = line.rsplit(maxsplit=5)
            image = image.strip()
            try:
                score, xmin, ymin, xmax, ymax = (float(word) for word in words)
            except ValueError:
                raise _bad_line(path, number, line, "not 'name score xmin ymin xmax ymax'") from None
            if not all(map(math.isfinite, (score, xmin, ymin, xmax, ymax))):
                raise _bad_line(path, number, line, "not finite")
            x, y = xmin - 1, ymin - 1
            if xmax - x < -_SLACK or ymax - y < -_SLACK:
                raise _bad_line(path, number, line, "xmax or ymax lies before xmin or ymin")
            if image not in known:
                raise _bad_line(path, number, line, f"image {image!r} is not one of the {len(known)} of the truth")
            bbox = [x, y, max(xmax - x, 0.0), max(ymax - y, 0.0)]
            rows.append({"image_id": image, "category_id": label_of[name], "score": score, "bbox": bbox})
    return rows


def _bad_line(path: Path, number: int, line: str, fault: str) -> DataError:
    return DataError(f"{path}, line {number}: {fault}: {line.strip()[:100]!r}")
