"""Reads the annotations of COCO and Pascal VOC as arrays, and finds what is wrong with them. Needs no torch.

Coordinates are continuous: an image spans 0…width and 0…height, a box is x1, y1, x2, y2 with its area
(x2 - x1) · (y2 - y1). COCO's boxes are of this kind; VOC's, which count pixels from 1 and include the last, become so
when 1 is taken from xmin and ymin.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from sis_lightning.datasets.constants import COCO_JOINTS
from sis_lightning.errors import DataError

_OVERHANG = 1.0  # px that a box may reach over the border before it counts as a defect: COCO's are rounded


@dataclass(frozen=True)
class Defect:
    """Something wrong in a data set.

    Attributes:
        file: Where.
        where: Which image, annotation or line of it; empty for the whole file.
        what: What is wrong.
        remedy: What training does: `clipped` to the image, `dropped` as COCO's own tools do, or nothing, as it stops.
    """

    file: Path
    where: str
    what: str
    remedy: Literal["", "clipped", "dropped"] = ""

    def __str__(self) -> str:
        where = f", {self.where}" if self.where else ""
        remedy = f" (training: {self.remedy})" if self.remedy else ""
        return f"{self.file}{where}: {self.what}{remedy}"


@dataclass
class Annotations:
    """The images and objects of one split.

    Objects lie in the order of their images; those that training cannot use are left out and counted in `dropped`.

    Attributes:
        source: The file or folder that was read.
        class_names: By label, 0…K-1.
        category_ids: COCO's number of each label; for VOC the label itself.
        paths: The pictures.
        image_ids: COCO's number of each picture; VOC's name.
        sizes: (I, 2) width and height, 0 where the annotations do not say.
        image: (N,) index of each object's picture.
        boxes: (N, 4).
        labels: (N,).
        ignored: (N,) COCO's crowds and VOC's difficult objects.
        keypoints: (N, 17, 3) x, y, v, where they were asked for.
        defects: What is wrong.
        dropped: How many objects were left out, by reason.
        annotated: False where the file has no annotations at all, as of COCO's test sets.
    """

    source: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    paths: list[Path]
    image_ids: list[Any]
    sizes: NDArray[np.int64]
    image: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    keypoints: NDArray[np.float64] | None = None
    defects: list[Defect] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    annotated: bool = True

    def __post_init__(self) -> None:
        order = np.argsort(self.image, kind="stable")
        self._select(order)

    def _select(self, which: NDArray[Any]) -> None:
        self.image, self.boxes = self.image[which], self.boxes[which]
        self.labels, self.ignored = self.labels[which], self.ignored[which]
        if self.keypoints is not None:
            self.keypoints = self.keypoints[which]
        self._starts = np.searchsorted(self.image, np.arange(len(self.paths) + 1))

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.paths)

    def objects(self, index: int) -> slice:
        """Where the objects of picture `index` lie in the arrays."""
        return slice(int(self._starts[index]), int(self._starts[index + 1]))

    def first(self, count: int | None) -> Annotations:
        """The same with the first `count` pictures alone that have objects, or annotated joints; None for all."""
        if count is None:
            return self
        counted = ~self.ignored
        if self.keypoints is not None:
            counted &= np.any(self.keypoints[..., 2] > 0, axis=1)
        chosen = np.unique(self.image[counted])[:count]
        objects = np.isin(self.image, chosen)
        return Annotations(
            self.source,
            self.class_names,
            self.category_ids,
            [self.paths[index] for index in chosen.tolist()],
            [self.image_ids[index] for index in chosen.tolist()],
            self.sizes[chosen],
            np.searchsorted(chosen, self.image[objects]),
            self.boxes[objects],
            self.labels[objects],
            self.ignored[objects],
            None if self.keypoints is None else self.keypoints[objects],
            self.defects,
            self.dropped,
            self.annotated,
        )

    def keep_class(self, name: str) -> None:
        """Leaves out all other classes.

        Raises:
            DataError: Where there is no such class.
        """
        if name not in self.class_names:
            raise DataError(f"{self.source}: no category '{name}' among its {len(self.class_names)}")
        label = self.class_names.index(name)
        self._select(self.labels == label)
        self.labels = np.zeros_like(self.labels)
        self.class_names, self.category_ids = (name,), (self.category_ids[label],)

    def drop(self, which: NDArray[np.bool_], reason: str) -> None:
        """Leaves objects out."""
        if which.any():
            self.dropped[reason] += int(which.sum())
            self._select(~which)

    def clip(self) -> None:
        """Cuts boxes to their pictures, and leaves out what then has no area."""
        known = self.sizes[self.image]
        limits = np.where(known > 0, known, np.inf)
        self.boxes = np.clip(self.boxes, 0, np.concatenate([limits, limits], axis=1))
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        self.drop(np.any(sides <= 0, axis=1), "boxes of no area")


def read_coco(path: Path, pictures: Path, *, keypoints: bool = False) -> Annotations:
    """Reads an annotation file of COCO (instances, person_keypoints, or image_info without any annotations).

    Args:
        path: The JSON.
        pictures: The folder that its `file_name`s are in.
        keypoints: Reads 17 keypoints of every annotation too.

    Raises:
        DataError: Where there is no such file, or it is not of this format at all; everything else is in `defects`.
    """
    content = _load_coco(path)
    defects: list[Defect] = []
    images = _unique(content["images"], "image", path, defects)
    index_of = {image["id"]: index for index, image in enumerate(images)}
    there = _listing(pictures)
    names = [str(image.get("file_name", "")) for image in images]
    for image, name in zip(images, names, strict=True):
        # Names may hold folders; only then is the disk asked for each.
        if name not in there and not ("/" in name and (pictures / name).is_file()):
            defects.append(Defect(pictures / name, f"image {image['id']}", "no such file"))
    sizes = _numbers([[image.get("width"), image.get("height")] for image in images], 2)
    sizeless = np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)).all(axis=1)).tolist()
    defects += [Defect(path, f"image {images[index]['id']}", "width or height is missing") for index in sizeless]
    categories = sorted(_unique(content["categories"], "category", path, defects), key=lambda item: int(item["id"]))
    label_of = {category["id"]: label for label, category in enumerate(categories)}

    rows = []
    for row in _unique(content.get("annotations", []), "annotation", path, defects):
        if row.get("image_id") not in index_of:
            defects.append(Defect(path, _named(row), f"of image {row.get('image_id')!r}, which is not listed"))
        elif row.get("category_id") not in label_of:
            defects.append(Defect(path, _named(row), f"unknown category {row.get('category_id')!r}"))
        else:
            rows.append(row)
    boxes = _numbers([row.get("bbox") for row in rows], 4)
    boxes[:, 2:] += boxes[:, :2]
    owners = np.array([index_of[row["image_id"]] for row in rows], dtype=np.int64)
    whole = np.nan_to_num(sizes, nan=0, posinf=0, neginf=0).astype(np.int64)
    sound = _check_boxes(boxes, whole[owners], lambda place: (path, _named(rows[place])), defects)
    joints = None
    if keypoints:
        joints = _numbers([row.get("keypoints") for row in rows], 3 * len(COCO_JOINTS)).reshape(-1, len(COCO_JOINTS), 3)
        broken = ~np.isfinite(joints).all(axis=(1, 2)) | ~np.isin(joints[..., 2], (0, 1, 2)).all(axis=1)
        for place in np.flatnonzero(broken).tolist():
            what = f"keypoints are not {len(COCO_JOINTS)} × (x, y, v) with v 0, 1 or 2"
            defects.append(Defect(path, _named(rows[place]), what))
        sound &= ~broken
    return Annotations(
        path,
        tuple(str(category["name"]) for category in categories),
        tuple(int(category["id"]) for category in categories),
        [pictures / name for name in names],
        [image["id"] for image in images],
        whole,
        owners[sound],
        boxes[sound],
        np.array([label_of[row["category_id"]] for row in rows], dtype=np.int64)[sound],
        np.array([bool(row.get("iscrowd", 0)) for row in rows], dtype=np.bool_)[sound],
        None if joints is None else joints[sound],
        defects,
        annotated="annotations" in content,
    )


def load_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: Where it is not there, not to be read, or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None


def _load_coco(path: Path) -> dict[str, Any]:
    content = load_json(path)
    if not isinstance(content, dict) or not {"images", "categories"} <= content.keys():
        raise DataError(f"{path}: not an annotation file of COCO, which has 'images', 'annotations' and 'categories'")
    for key, needed in (("images", ("id", "file_name")), ("categories", ("id", "name")), ("annotations", ())):
        entries = content.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: '{key}' is not a list of objects")
        for place, entry in enumerate(entries):
            lacking = [name for name in needed if name not in entry]
            if lacking:
                raise DataError(f"{path}: entry {place} of '{key}' has no '{lacking[0]}'")
            for name in ("id", "image_id", "category_id"):
                if not isinstance(entry.get(name, 0), int):
                    raise DataError(f"{path}: entry {place} of '{key}': {name} is {entry[name]!r}, no whole number")
    return content


def _unique(entries: Iterable[dict[str, Any]], kind: str, path: Path, defects: list[Defect]) -> list[dict[str, Any]]:
    seen: set[Any] = set()
    kept = []
    for entry in entries:
        number = entry.get("id")
        if number in seen:
            defects.append(Defect(path, f"{kind} {number}", "this id is given twice"))
            continue
        if number is not None:
            seen.add(number)
        kept.append(entry)
    return kept


def _named(row: dict[str, Any]) -> str:
    return f"annotation {row.get('id', 'without an id')} of image {row.get('image_id')}"


def _numbers(rows: Sequence[Any], width: int) -> NDArray[np.float64]:
    """An array (len(rows), width); NaN where a row is not `width` numbers."""
    try:
        whole = np.array(rows)
        if whole.shape == (len(rows), width) and whole.dtype.kind in "iuf":
            return whole.astype(np.float64)
    except (TypeError, ValueError):
        pass
    values = np.full((len(rows), width), np.nan)
    for place, row in enumerate(rows):
        try:
            numbers = np.array(row)
        except ValueError:
            continue
        if numbers.shape == (width,) and numbers.dtype.kind in "iuf":
            values[place] = numbers
    return values


def _listing(folder: Path) -> set[str]:
    # One listing: ten thousand look-ups are slow on a network's file system.
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _check_boxes(
    boxes: NDArray[np.float64],
    sizes: NDArray[np.int64],
    where: Callable[[int], tuple[Path, str]],
    defects: list[Defect],
) -> NDArray[np.bool_]:
    """Lists what is wrong with boxes, with the file and place that `where` says; returns which are numbers at all."""
    finite: NDArray[np.bool_] = np.all(np.isfinite(boxes), axis=1)
    flat = finite & (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    limits = np.where(sizes > 0, sizes, np.inf)
    outside = finite & ~flat & ((boxes[:, 2:] <= 0) | (boxes[:, :2] >= limits)).any(axis=1)
    over = (boxes[:, :2] < -_OVERHANG) | (boxes[:, 2:] > limits + _OVERHANG)
    reaching = finite & ~flat & ~outside & over.any(axis=1)
    for which, what, remedy in (
        (~finite, "the box is not four finite numbers", ""),
        (flat, "the box has no area", "dropped"),
        (outside, "the box lies outside of the image", "dropped"),
        (reaching, "the box reaches over the image's border", "clipped"),
    ):
        for place in np.flatnonzero(which).tolist():
            x1, y1, x2, y2 = boxes[place]
            size = "×".join(str(side) for side in sizes[place])
            values = f": x {x1:g}…{x2:g}, y {y1:g}…{y2:g}, image {size}"
            defects.append(Defect(*where(place), what + values, remedy))  # type: ignore[arg-type]
    return finite


def read_voc(homes_and_names: Sequence[tuple[Path, Sequence[str]]], class_names: Sequence[str]) -> Annotations:
    """Reads Pascal VOC's XML.

    Args:
        homes_and_names: Folders with `Annotations/` and `JPEGImages/`, each with the names of its images.
        class_names: By label.

    Raises:
        DataError: Where a file is not XML at all; everything else is in `defects`.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    defects: list[Defect] = []
    paths: list[Path] = []
    sizes: list[tuple[int, int]] = []
    objects: list[tuple[int, int, bool, list[float], str, Path]] = []
    for home, names in homes_and_names:
        there, described = _listing(home / "JPEGImages"), _listing(home / "Annotations")
        for name in names:
            picture, file = home / "JPEGImages" / f"{name}.jpg", home / "Annotations" / f"{name}.xml"
            paths.append(picture)
            sizes.append((0, 0))
            if picture.name not in there:
                defects.append(Defect(picture, "", "no such file"))
            if file.name not in described:
                defects.append(Defect(file, "", "no such file"))
                continue
            tree = _parse_xml(file)
            sizes[-1] = (_whole(tree.findtext("size/width")), _whole(tree.findtext("size/height")))
            for place, node in enumerate(tree.findall("object"), start=1):
                known = (node.findtext("name") or "").strip()
                if known not in label_of:
                    defects.append(Defect(file, f"object {place}", f"unknown class {known!r}"))
                    continue
                box = [_float(node.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
                difficult = (node.findtext("difficult") or "0").strip() == "1"
                objects.append((len(paths) - 1, label_of[known], difficult, box, f"object {place}, {known}", file))
    boxes = np.array([item[3] for item in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, :2] -= 1
    image = np.array([item[0] for item in objects], dtype=np.int64)
    wide = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    sound = _check_boxes(boxes, wide[image], lambda place: (objects[place][5], objects[place][4]), defects)
    return Annotations(
        homes_and_names[0][0] if homes_and_names else Path(),
        tuple(class_names),
        tuple(range(len(class_names))),
        paths,
        [path.stem for path in paths],
        wide,
        image[sound],
        boxes[sound],
        np.array([item[1] for item in objects], dtype=np.int64)[sound],
        np.array([item[2] for item in objects], dtype=np.bool_)[sound],
        None,
        defects,
    )


def _parse_xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{file}: not valid XML ({error})") from None


def _float(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return math.nan


def _whole(text: str | None) -> int:
    value = _float(text)
    return int(value) if math.isfinite(value) else 0


def voc_names(home: Path, split: str) -> Iterator[str]:
    """The names of a list below `ImageSets/Main/`.

    Raises:
        DataError: Where there is no such list.
    """
    path = home / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        known = sorted(item.stem for item in path.parent.glob("*.txt") if "_" not in item.stem)
        raise DataError(f"{path} does not exist" + (f"; there are: {', '.join(known)}" if known else ""))
    yield from (line.split()[0] for line in path.read_text().splitlines() if line.strip())
