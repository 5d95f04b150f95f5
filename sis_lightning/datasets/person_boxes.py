"""Boxes of persons from a detector's results, for top-down keypoint estimation. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sis_lightning.datasets.annotations import load_json
from sis_lightning.errors import DataError
from sis_lightning.files import digest_files

Boxes = NDArray[np.float64]  # (P, 5): x1, y1, x2, y2 in px, score


class PersonBoxes:
    """A detector's boxes of persons, by image.

    Args:
        path: A JSON file: results in COCO's format, or the `predictions.json` that `predict` of a detection task
            writes, of which class `person` is taken.
        min_score: Boxes with a lower score are left out.
        category: The category id of persons in COCO's format.

    Attributes:
        entries: For each image id, or image name, the boxes (P, 5) x1, y1, x2, y2 in px and score of each of its
            entries.
        description: The file with the number of boxes, for people.

    Raises:
        DataError: If the file is missing or of neither format, or a box is not finite numbers; the message names the
            entry.
    """

    def __init__(self, path: str | Path, min_score: float = 0.0, category: int = 1) -> None:
        self.path = Path(path)
        self.entries, dropped = read_person_boxes(self.path, min_score, category)
        count = sum(len(boxes) for entries in self.entries.values() for boxes in entries)
        without = f", without {dropped:,} of no area" if dropped else ""
        known = digest_files([self.path], self.path.parent)[:8] if self.path.is_file() else ""
        self.description = f"{path} ({count:,} of score ≥ {min_score:g}{without}{known and f'; SHA-256 {known}…'})"

    def of_images(self, image_ids: Sequence[Any], names: Sequence[str], source: object) -> dict[Any, Boxes]:
        """The boxes of a split's images.

        Args:
            image_ids: The id of each image.
            names: The name of each image, by which predictions of a detection task are found.
            source: File or folder that the split is read from, for the error.

        Returns:
            Boxes (P, 5) by image id.

        Raises:
            DataError: If there are boxes, but of none of these images, or if they may be those of several images.
        """
        ids = set(image_ids)
        by_id = {image: entries for image, entries in self.entries.items() if not isinstance(image, str)}
        found: dict[Any, Boxes] = {image: np.concatenate(by_id[image]) for image in by_id.keys() & ids}
        id_of = dict(zip(names, image_ids, strict=True))
        found |= {id_of[name]: boxes for name, boxes in self._matched(names).items()}
        if self.entries and not found:
            raise DataError(
                f"person_boxes {self.path}: none of its {len(self.entries)} images is in {source},\n"
                f"  such as {next(iter(self.entries))!r}: are they of another split?"
            )
        return found

    def of_names(self, names: Sequence[str], folder: object) -> dict[str, Boxes]:
        """The boxes of a folder's images.

        Args:
            names: The names of the images; COCO's files are named by their ids.
            folder: Folder that the images are read from, for the error.

        Returns:
            Boxes (P, 5) by name.

        Raises:
            DataError: If there are no boxes of any of these images, or if they may be those of several images.
        """
        numbers = {name: int(_stem(name)) for name in names if _stem(name).isdecimal()}
        found = {name: np.concatenate(self.entries[key]) for name, key in numbers.items() if key in self.entries}
        found |= self._matched(names)
        if not found:
            raise DataError(
                f"person_boxes {self.path}: it names none of the {len(names)} images in {folder}, such as '{names[0]}'"
            )
        return found

    def _matched(self, names: Sequence[str]) -> dict[str, Boxes]:
        """The boxes of images by their names: paths below the image folder, or, without folder or ending, the rest."""
        shorter: dict[str, list[str]] = {}
        for name in names:
            for short in {str(PurePosixPath(name).with_suffix("")), PurePosixPath(name).name, _stem(name)} - {name}:
                shorter.setdefault(short, []).append(name)
        whole = set(names)
        found: dict[str, list[Boxes]] = {}
        in_order = 0
        for key, entries in self.entries.items():
            candidates = [key] if key in whole else shorter.get(key, [])
            if key in whole:
                found[key] = entries
            elif candidates and len(candidates) == len(entries):
                # Files that name images without folder and ending, which have an entry for each image, in their order.
                in_order += len(entries) if len(entries) > 1 else 0
                for name, boxes in zip(candidates, entries, strict=True):
                    found.setdefault(name, []).append(boxes)
            elif candidates:
                raise DataError(
                    f"person_boxes {self.path}: {len(entries)} entries are named '{key}', which may be "
                    f"{' or '.join(candidates[:3])}:\n  name images by their paths, as predict writes them"
                )
        if in_order:
            self.description += f"; {in_order} entries have the name of several images and are taken in their order"
        return {name: np.concatenate(entries) for name, entries in found.items()}


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def read_person_boxes(path: Path, min_score: float = 0.0, category: int = 1) -> tuple[dict[Any, list[Boxes]], int]:
    """Reads the boxes of persons; see `PersonBoxes`.

    Returns:
        For each `image_id`, or image name of `predictions.json`, the boxes (P, 5) x1, y1, x2, y2 in px and score of
        each entry of the file; and the number of boxes of no area, which are left out.

    Raises:
        DataError: If the file is missing or of neither format, or a box is not finite numbers; the message names the
            entry.
    """
    rows = load_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: not a detector's results: a list of objects with image_id, category_id, bbox, score")
    entries: dict[Any, list[Boxes]] = {}
    persons: dict[Any, list[list[float]]] = {}
    dropped = 0
    for place, row in enumerate(rows):
        named = "objects" in row
        try:
            if named:
                image: Any = str(row["name"])
                boxes = [[*item["box"], item["score"]] for item in row["objects"] if item["class"] == "person"]
            else:
                image, (x, y, width, height) = row["image_id"], row["bbox"]
                boxes = [[x, y, x + width, y + height, row["score"]]] if row["category_id"] == category else []
            hash(image)
            numbers = [box for box in boxes if len(box) == 5 and all(map(math.isfinite, box))]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: entry {place} is not a detection ({type(error).__name__}: {error})") from None
        if len(numbers) < len(boxes):
            raise DataError(f"{path}: entry {place} is not a detection: its box and score are not five finite numbers")
        # Detectors write boxes of no area now and then.
        areas = [box for box in numbers if box[0] < box[2] and box[1] < box[3]]
        dropped += len(numbers) - len(areas)
        kept = [box for box in areas if box[4] >= min_score]
        if named:
            entries.setdefault(image, []).append(np.array(kept, dtype=np.float64).reshape(-1, 5))
        else:
            persons.setdefault(image, []).extend(kept)
    for image, boxes in persons.items():
        entries.setdefault(image, []).append(np.array(boxes, dtype=np.float64).reshape(-1, 5))
    return entries, dropped
