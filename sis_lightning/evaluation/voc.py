"""Pascal VOC's average precision, and the devkit's detection files. Needs no torch."""

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
# As in the devkit's Python port: by rounding, a recall of exactly 3/10, 6/10 or 7/10 is below its point.
_ELEVEN_POINTS = np.arange(0.0, 1.1, 0.1)
_SLACK = 1e-9  # px by which a box's side may be negative through rounding


class VOCGroundTruth:
    """The ground truth of one split, and the average precision of detections against it.

    By both rules a detection belongs to the object of its class and image with which it has the largest IoU. Of several
    detections of one object, the one with the highest score is a true positive and all others are false positives.
    Equal scores keep the order of the rows.

    Args:
        annotations: Images and objects.
        rule: `devkit`: difficult objects count neither for nor against a detection, and the IoU must be greater than
            `iou` (as in the Python port of the devkit that py-faster-rcnn and detectron2 use; the MATLAB original also
            accepts an equal one). `toolkit` (Padilla et al.): difficult objects count like all others, and the IoU may
            be equal.
        iou: Threshold of the IoU, in 0…1.

    Raises:
        DataError: If an entry has a defect without a remedy; the message names it.
    """

    def __init__(self, annotations: Annotations, rule: Rule = "devkit", iou: float = 0.5) -> None:
        annotations.require_sound()
        self.annotations, self.rule, self.iou = annotations, rule, iou

    def score(self, rows: Sequence[Row], image_ids: Collection[Any] | None = None) -> dict[str, float]:
        """Computes the average precision of each class, and its mean over the classes that have objects.

        Args:
            rows: Detections in COCO's result format: `image_id` (VOC's image name), `category_id` (the label 0…K-1),
                `score`, and `bbox` [x, y, w, h] in continuous coordinates.
            image_ids: The images that are scored; None for all.

        Returns:
            `AP50_voc07` (mean precision at 11 recalls) and `AP50_voc12` (area under the curve, VOC2010 and later), then
            `AP50_voc07/CLASS` and `AP50_voc12/CLASS`, in 0…1; NaN for a class without objects. The 50 is 100 · `iou`.

        Raises:
            KeyError: If a row's image is not an image of the ground truth.
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
        metrics: dict[str, float] = {}
        for place, year in enumerate(("07", "12")):
            of_class = [pair[place] for pair in precisions]
            name = f"AP{100 * self.iou:g}_voc{year}"
            present = [value for value in of_class if not math.isnan(value)]
            metrics[name] = float(np.mean(present)) if present else math.nan
            metrics |= {f"{name}/{known}": value for known, value in zip(truth.class_names, of_class, strict=True)}
        return metrics

    def _judge(
        self, image: NDArray[np.int64], labels: NDArray[np.int64], boxes: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which detections, in descending order of their scores, are true positives, and which count at all."""
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
    """Average precision as the mean over 11 recalls, and as the area under the curve.

    Args:
        hits: Whether each detection that counts is a true positive (N,), in descending order of their scores.
        positives: Number of objects to find.

    Returns:
        VOC2007's and VOC2010's average precision, in 0…1; NaN if there is nothing to find.
    """
    if not positives:
        return math.nan, math.nan
    found = np.cumsum(hits)
    recall, precision = found / positives, found / np.arange(1, len(hits) + 1)
    # The best precision at this recall or any higher one, 0 beyond the last.
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    eleven = envelope[np.searchsorted(recall, _ELEVEN_POINTS, "left")].mean()
    area = np.sum(np.diff(recall, prepend=0.0) * envelope[:-1])
    return float(eleven), float(area)


def _overlap(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """The IoU (N,) of boxes (N, 4), pair by pair; 0 if they do not overlap."""
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    common: NDArray[np.float64] = sides.clip(min=0).prod(axis=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (others[:, 2:] - others[:, :2]).prod(axis=1) - common
    return common / np.where(common > 0, union, 1.0)


def write_comp4(rows: Sequence[Row], class_names: Sequence[str], folder: Path, split: str) -> None:
    """Writes detections in the format of the devkit and VOC's server: `comp4_det_SPLIT_CLASS.txt` for every class.

    Lines are `name score xmin ymin xmax ymax`, pixels counted from 1 and the last one included. Numbers have all digits
    of a float64: scores are read back as they are, and so are coordinates that were float32 (adding 1 to these is
    exact; others change in their last digit).

    Args:
        rows: Detections as `VOCGroundTruth.score` takes them.
        class_names: Class names by label.
        folder: The folder to write to, which is created if it does not exist.
        split: Name of the split, for the names of the files.
    """
    lines: list[list[str]] = [[] for _ in class_names]
    for row in rows:
        x, y, width, height = (float(value) for value in row["bbox"])
        corners = f"{x + 1!r} {y + 1!r} {x + width!r} {y + height!r}"
        lines[row["category_id"]].append(f"{row['image_id']} {float(row['score'])!r} {corners}\n")
    for name, text in zip(class_names, lines, strict=True):
        write_text(folder / f"comp4_det_{split}_{name}.txt", "".join(text))


def read_comp4(folder: Path, annotations: Annotations) -> list[Row]:
    """Reads the devkit's detection files, `CLASS.txt` or `comp4_det_SPLIT_CLASS.txt`.

    Args:
        folder: The folder of the files; a class without a file has no detections.
        annotations: The ground truth, which says what the classes and images are.

    Returns:
        Rows as `VOCGroundTruth.score` takes them.

    Raises:
        DataError: If there is no such file at all, or a line is not a detection; the message names file and line.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; VOC's detections are one file per class, CLASS.txt")
    label_of = {name: label for label, name in enumerate(annotations.class_names)}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.txt")):
        # Class names may contain _ themselves, so the longest class name that fits is meant.
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
        raise DataError(f"{folder} has no detection files: CLASS.txt or comp4_det_SPLIT_CLASS.txt")
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
                raise _bad_line(path, number, line, "xmax or ymax is before xmin or ymin")
            if image not in known:
                raise _bad_line(
                    path, number, line, f"image {image!r} is not one of the {len(known)} of the ground truth"
                )
            bbox = [x, y, max(xmax - x, 0.0), max(ymax - y, 0.0)]
            rows.append({"image_id": image, "category_id": label_of[name], "score": score, "bbox": bbox})
    return rows


def _bad_line(path: Path, number: int, line: str, fault: str) -> DataError:
    return DataError(f"{path}, line {number}: {fault}: {line.strip()[:100]!r}")
