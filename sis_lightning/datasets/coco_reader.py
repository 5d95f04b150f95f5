"""The reader and validator of COCO's annotation files. Needs no torch.

All rules for COCO's entries are here. Rules for image files (a file name, a file of this name, a width and a height)
hold if the images are going to be read; all others hold for training, evaluation and the check of a data set alike.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sis_lightning.datasets.annotations import (
    Annotations,
    Defect,
    check_boxes,
    file_names,
    load_json,
    rows_of_numbers,
    shortened,
)
from sis_lightning.datasets.annotations_cache import cached
from sis_lightning.datasets.coco_columns import Columns, count_distinct, decode
from sis_lightning.datasets.constants import COCO_KEYPOINTS
from sis_lightning.datasets.paths import PathArray
from sis_lightning.datasets.skeleton import Skeleton
from sis_lightning.errors import DataError

_NORMALISED = "they look like fractions of the image's sides, but COCO's values are in px"
_FAR_OUTSIDE = "a keypoint with v 1 or 2 is outside of the image by more than half of its longer side"
_NO_AREA = "area is 0: the similarity of keypoints is divided by it, so no keypoint would ever be right"
_ROUNDING = 1e-3  # by which the sum of a normalised x and width may exceed 1

Kind = Literal["bbox", "segm", "keypoints"]
Entry = dict[str, Any]


def read_coco(
    source: Path | Mapping[str, Any],
    images: Path | None = None,
    kind: Kind = "bbox",
    *,
    split: str = "",
    category: str | None = None,
) -> Annotations:
    """Reads an annotation file of COCO: instances, person_keypoints, or image_info without annotations.

    Args:
        source: The JSON file, or its content, which is not changed.
        images: The folder of the image files; None if they are not going to be read.
        kind: Further values that are read of each annotation: `segm` its mask, `keypoints` its keypoints.
        split: Name of the split, for results files.
        category: With `keypoints`, the only category that is read; None for all that have keypoints, or `person` if
            theirs differ.

    Returns:
        The annotations. What is wrong with single entries is in `defects`. If an annotation has no `area`, it is that
        of its mask (`segm`), else width × height of its box, which `notes` say.

    Raises:
        DataError: If there is no such file, it is not of this format at all, or has no such category.
    """
    if isinstance(source, Path) and kind != "segm":
        try:
            known = cached(source, f"{kind} {category}", lambda: _read(source, kind, category))
        except OSError:
            known = _read_entries(source, load_json(source), kind, category)  # says what is wrong
    elif isinstance(source, Path):
        known = _read_entries(source, load_json(source), kind, category)
    else:
        known = _read_entries(Path("ground truth"), source, kind, category)
    known.splits = [(split,)] * len(known)
    if images is not None:
        _find_images(known, images)
    if images is not None or kind == "segm":
        known.defects = [
            *(
                Defect(known.source, f"image {known.image_ids[index]}", "width or height is missing")
                for index in np.flatnonzero((known.sizes <= 0).any(axis=1)).tolist()
            ),
            *known.defects,
        ]
    return known


def _read(path: Path, kind: Kind, category: str | None) -> Annotations:
    columns = decode(path, kind == "keypoints")
    # What the quick way does not know is read entry by entry, which finds and names what is wrong.
    if columns is None or (category is not None and columns.class_names != (category,)):
        return _read_entries(path, load_json(path), kind, category)
    return _judge(path, columns, [])


def _find_images(known: Annotations, folder: Path) -> None:
    """Finds the images in their folder, and lists those that are not there."""
    names: Sequence[str] = known.paths.names()
    for index, name in enumerate(names):
        if not name:
            raise DataError(f"{known.source}: entry {index} of 'images' has no 'file_name'")
    names, lost, note = _names_in(folder, names)
    missing = [Defect(folder / names[index], f"image {known.image_ids[index]}", "no such file") for index in lost]
    if len(set(names)) < len(names):  # its predictions would overwrite each other, and it would be scored twice
        first: dict[str, int] = {}
        for image, name in zip(known.image_ids, names, strict=True):
            if first.setdefault(name, image) != image:
                missing.append(
                    Defect(known.source, f"image {image}", f"its file {name} is that of image {first[name]}")
                )
    known.defects = [*missing, *known.defects]
    if note:
        known.notes = {"file names": f"{note} to find them in {folder}", **known.notes}
    prefix = os.path.join(folder, "")  # noqa: PTH118  a Path for each of 118,000 images takes longer than the rest
    known.paths = PathArray(prefix + name for name in names)
    known.folder = folder


def _read_entries(path: Path, content: Any, kind: Kind, category: str | None) -> Annotations:
    """Reads the content of a file entry by entry, and names every defect."""
    lists = _entries(content, path)
    defects: list[Defect] = []
    listed = _unique(lists["images"], "image", path, defects)
    index_of = {image["id"]: index for index, image in enumerate(listed)}
    sizes = rows_of_numbers([[image.get("width"), image.get("height")] for image in listed], 2)
    categories = sorted(_unique(lists["categories"], "category", path, defects), key=lambda item: int(item["id"]))
    others: set[Any] = set()
    if kind == "keypoints" and categories:
        chosen = _with_keypoints(categories, category, path)
        others = {item["id"] for item in categories} - {item["id"] for item in chosen}
        categories = chosen
    label_of = {item["id"]: label for label, item in enumerate(categories)}
    places = {id(row): place for place, row in enumerate(lists["annotations"])}

    def describe(row: Entry) -> str:
        number = f"annotation {shortened(row['id'])}" if "id" in row else "an annotation without id"
        return f"{number} of image {shortened(row.get('image_id'))} (entry {places[id(row)]} of 'annotations')"

    rows: list[Entry] = []
    for row in _unique(lists["annotations"], "annotation", path, defects):
        if not _known(row.get("image_id"), index_of):
            what = f"its image {shortened(row.get('image_id'))} is not listed under 'images'"
            defects.append(Defect(path, describe(row), what))
        elif _known(row.get("category_id"), others):
            continue
        elif not _known(row.get("category_id"), label_of):
            what = f"unknown category {shortened(row.get('category_id'))}: it is not listed under 'categories'"
            defects.append(Defect(path, describe(row), what))
        else:
            rows.append(row)
    flags = [row.get("iscrowd", 0) for row in rows]
    sound = np.array([_is_flag(flag) for flag in flags], dtype=np.bool_)
    for place in np.flatnonzero(~sound).tolist():
        what = f"iscrowd is {shortened(flags[place])}, must be 0, 1, true or false"
        defects.append(Defect(path, describe(rows[place]), what))
    columns = Columns(
        names=[str(image.get("file_name", "")) for image in listed],
        image_ids=[image["id"] for image in listed],
        sizes=np.nan_to_num(sizes, nan=0, posinf=0, neginf=0).astype(np.int64),
        class_names=tuple(str(item.get("name", item["id"])) for item in categories),
        category_ids=tuple(int(item["id"]) for item in categories),
        image=np.array([index_of[row["image_id"]] for row in rows], dtype=np.int64),
        labels=np.array([label_of[row["category_id"]] for row in rows], dtype=np.int64),
        extents=rows_of_numbers([row.get("bbox") for row in rows], 4),
        areas=rows_of_numbers([row.get("area", 0) for row in rows], 0),
        lacking=np.array(["area" not in row for row in rows], dtype=np.bool_),
        ignored=np.array([_is_flag(flag) and bool(flag) for flag in flags], dtype=np.bool_),
        sound=sound,
        where=lambda place: describe(rows[place]),
        annotated="annotations" in content,
    )
    if kind == "segm":
        columns.segmentations = np.empty(len(rows), dtype=np.object_)
        columns.segmentations[:] = [row.get("segmentation") for row in rows]
    if kind == "keypoints":
        columns.skeleton = _skeleton(categories[0] if categories else {}, rows, path)
        count = len(columns.skeleton.names)
        columns.keypoints = rows_of_numbers([row.get("keypoints") for row in rows], 3 * count).reshape(-1, count, 3)
        visible = np.count_nonzero(columns.keypoints[..., 2] > 0, axis=1).tolist()
        stated = [row.get("num_keypoints", found) for row, found in zip(rows, visible, strict=True)]
        columns.num_keypoints = rows_of_numbers(stated, 0)
    return _judge(path, columns, defects)


def _with_keypoints(categories: list[Entry], name: str | None, path: Path) -> list[Entry]:
    """The categories whose keypoints are read: those that state some, or all if none does."""
    chosen = [item for item in categories if item.get("keypoints")] or categories
    stated = [item.get("keypoints") for item in chosen]
    if name is None and stated.count(stated[0]) < len(stated):  # one array cannot hold both
        name = "person" if any(item.get("name") == "person" for item in chosen) else None
        if name is None:
            raise DataError(f"{path}: {several_categories([str(item.get('name')) for item in chosen])}")
    if name is None:
        return chosen
    for item in categories:
        if item.get("name") == name:
            return [item]
    raise DataError(f"{path}: no category '{name}' among its {len(categories)}")


def several_categories(names: Sequence[str]) -> str:
    """What is wrong if it is not clear which category's keypoints are meant."""
    found = ", ".join(f"'{name}'" for name in names[:5])
    return f"{len(names)} categories may have keypoints ({found}): `category` must name the one to read"


def _skeleton(category: Entry, rows: Sequence[Entry], path: Path) -> Skeleton:
    """The keypoints that a category states; without names, as many as the first annotation has."""
    names, edges, sigmas = (category.get(key) or () for key in ("keypoints", "skeleton", "sigmas"))
    where = f"{path}: category {shortened(category.get('name'))}"
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: keypoints is {shortened(names)}, not a list of names")
    if not isinstance(edges, (list, tuple)) or not all(
        isinstance(edge, (list, tuple)) and all(isinstance(end, int) for end in edge) for edge in edges
    ):
        raise DataError(f"{where}: skeleton is {shortened(edges)}, not a list of pairs of numbers")
    if not isinstance(sigmas, (list, tuple)) or not all(isinstance(sigma, (int, float)) for sigma in sigmas):
        raise DataError(f"{where}: sigmas is {shortened(sigmas)}, not a list of numbers")
    lists = [row["keypoints"] for row in rows if isinstance(row.get("keypoints"), list)]
    # Without names and annotations, such as COCO's image_info: COCO's own.
    count = len(lists[0]) // 3 if lists else 0 if names else len(COCO_KEYPOINTS)
    try:
        return Skeleton.from_category(names, edges, sigmas, count)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _judge(path: Path, columns: Columns, defects: list[Defect]) -> Annotations:
    """Applies the rules for entries, whichever way these were read."""
    sound, extents, areas = columns.sound.copy(), columns.extents, columns.areas.copy()
    sizes_of = columns.sizes[columns.image]
    notes: dict[str, str] = {}

    def check(fine: NDArray[np.bool_], what: str) -> None:
        defects.extend(Defect(path, columns.where(place), what) for place in np.flatnonzero(~fine).tolist())
        np.logical_and(sound, fine, out=sound)

    boxes = extents.copy()
    boxes[:, 2:] += boxes[:, :2]
    if columns.segmentations is None:
        negative = (extents[:, 2:] < 0).any(axis=1)
        boxes[negative, 2:] = np.minimum(boxes[negative, 2:], np.nextafter(boxes[negative, :2], -np.inf))
        sound &= check_boxes(boxes, sizes_of, lambda place: (path, columns.where(place)), defects)
        if are_normalised(extents[:, :2], boxes[:, 2:]):
            defects.append(Defect(path, "", f"all {len(boxes):,} boxes are within 0…1: {_NORMALISED}"))
    else:
        faults = [mask_fault(mask, size) for mask, size in zip(columns.segmentations, sizes_of, strict=True)]
        defects += [Defect(path, columns.where(place), fault) for place, fault in enumerate(faults) if fault]
        sound &= np.array([not fault for fault in faults], dtype=np.bool_)
    check(np.isfinite(areas), "area is not a finite number")
    check(~(areas < 0), "area is negative")
    if columns.keypoints is not None and columns.num_keypoints is not None:
        keypoints, stated = columns.keypoints, columns.num_keypoints
        points, flags = keypoints[..., :2], np.ascontiguousarray(keypoints[..., 2])
        with np.errstate(invalid="ignore", over="ignore"):
            fine: NDArray[np.bool_] = np.isfinite(keypoints.sum(axis=(1, 2)))
        fine &= np.all((flags == 0) | (flags == 1) | (flags == 2), axis=1)
        check(fine, f"keypoints are not {keypoints.shape[1]} × (x, y, v) with v 0, 1 or 2")
        annotated = fine[:, None] & (flags > 0)
        visible: NDArray[np.bool_] = np.any(annotated, axis=1)
        check(np.isfinite(stated), "num_keypoints is not a finite number")
        check(~((stated == 0) & visible), "num_keypoints is 0, but keypoints have v 1 or 2: they would not count")
        found = points[annotated]
        if are_normalised(found, found) and (found % 1).any():
            defects.append(Defect(path, "", f"all keypoints are within 0…1: {_NORMALISED}"))
        check(~_far_outside(points, annotated, sizes_of), _FAR_OUTSIDE)
        check(~((areas == 0) & ~columns.lacking & visible & ~columns.ignored), _NO_AREA)
    derived = columns.lacking & sound
    if derived.any():
        areas[derived] = extents[derived, 2] * extents[derived, 3]
        of = "width × height of their boxes"
        if columns.segmentations is not None:
            of = "the areas of their masks"
            for place in np.flatnonzero(derived).tolist():
                areas[place] = mask_area(columns.segmentations[place], sizes_of[place])
        notes["areas"] = f"{int(derived.sum()):,} objects have no 'area' in the file: {of} are taken"
    if columns.segmentations is None:
        kept = sound & ~columns.ignored
        twice = _repeated(columns.image[kept], columns.labels[kept], extents[kept])
        if twice:
            notes["boxes twice"] = f"{twice:,} boxes are in the file more than once for one image and class"
    chosen = slice(None) if sound.all() else sound  # without a copy if nothing is left out
    return Annotations(
        source=path,
        class_names=columns.class_names,
        category_ids=columns.category_ids,
        paths=PathArray(columns.names),
        image_ids=columns.image_ids,
        sizes=columns.sizes,
        image=columns.image[chosen],
        boxes=boxes[chosen],
        labels=columns.labels[chosen],
        ignored=columns.ignored[chosen],
        keypoints=None if columns.keypoints is None else columns.keypoints[chosen],
        areas=areas[chosen],
        num_keypoints=None
        if columns.num_keypoints is None
        else np.nan_to_num(columns.num_keypoints[chosen]).astype(np.int64),
        extents=extents[chosen],
        segmentations=None if columns.segmentations is None else columns.segmentations[chosen],
        defects=defects,
        notes=notes,
        annotated=columns.annotated,
        skeleton=columns.skeleton,
    )


def _repeated(image: NDArray[np.int64], labels: NDArray[np.int64], extents: NDArray[np.float64]) -> int:
    """Number of boxes that are there again for one image and class, by hashes: sorting whole rows takes seconds."""
    mixed = image.astype(np.uint64) << np.uint64(20) ^ labels.astype(np.uint64)
    for values in (extents + 0.0).T:  # + 0.0 makes 0 of -0
        mixed = (mixed ^ np.ascontiguousarray(values).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return len(mixed) - count_distinct(mixed)


def _entries(content: Any, path: Path) -> dict[str, list[Entry]]:
    """The three lists of an annotation file, of objects with ids."""
    if not isinstance(content, Mapping) or not {"images", "categories"} <= content.keys():
        raise DataError(f"{path}: not an annotation file of COCO, which has 'images', 'annotations' and 'categories'")
    lists = {key: content.get(key, []) for key in ("images", "categories", "annotations")}
    needed = {"images": ("id",), "categories": ("id",), "annotations": ()}
    for key, entries in lists.items():
        if not isinstance(entries, list):
            raise DataError(f"{path}: '{key}' is not a list of objects")
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: '{key}' is not a list of objects: entry {place} is {shortened(entry)}")
            for name in needed[key]:
                if name not in entry:
                    raise DataError(f"{path}: entry {place} of '{key}' has no '{name}'")
            if not isinstance(entry.get("file_name", ""), str):
                found = shortened(entry["file_name"])
                raise DataError(f"{path}: entry {place} of '{key}': file_name is {found}, not text")
            kinds = (int, str) if key == "annotations" else int
            if not isinstance(entry.get("id", 0), kinds):
                found = shortened(entry["id"])
                raise DataError(f"{path}: entry {place} of '{key}': the id is {found}, not a whole number")
            if isinstance(entry.get("id"), int) and not -(2**63) <= entry["id"] < 2**63:
                raise DataError(
                    f"{path}: entry {place} of '{key}': the id {shortened(entry['id'])} is beyond 64 bits,\n"
                    "  which no tool for COCO's format reads: number the entries again"
                )
    return lists


def _is_flag(value: Any) -> bool:
    """Whether a value is 0, 1, true or false; the words '0' and 'false' would count as true."""
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def are_normalised(low: NDArray[np.float64], high: NDArray[np.float64]) -> bool:
    """Whether all corners or points are within 0…1, so that they are fractions of the image's sides and not px."""
    return bool(len(low) and low.min() >= 0 and 0 < high.max() <= 1 + _ROUNDING)  # False for NaN


def _far_outside(
    points: NDArray[np.float64], annotated: NDArray[np.bool_], sizes: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether an annotated point of each row (N, K, 2) is farther outside of the image than half of its longer side."""
    limits = np.where((sizes > 0).all(axis=1, keepdims=True), sizes, np.inf)
    margin = limits.max(axis=1) / 2
    far = np.zeros(len(points), dtype=np.bool_)
    for axis in (0, 1):
        values = points[..., axis]
        low = np.where(annotated, values, 0).min(axis=1, initial=0)
        high = np.where(annotated, values, 0).max(axis=1, initial=0)
        far |= (low < -margin) | (high > limits[:, axis] + margin)
    return far


def _missing(names: Sequence[str], folder: Path, found: set[str]) -> list[int]:
    """Indices of the images that have no file; `found` are the names of the files directly in the folder."""
    return [
        index
        for index, name in enumerate(names)
        # Names may hold folders; only then is the disk asked for each.
        if name not in found and not ("/" in name and (folder / name).is_file())
    ]


def _names_in(folder: Path, names: Sequence[str]) -> tuple[Sequence[str], list[int], str]:
    """Finds the image files, also if all names begin with a folder of the exporting tool's.

    Returns:
        The names as they are in the folder, the indices of those that have no file, and a note, empty if the names of
        the file are right.
    """
    found = file_names(folder)
    lost = _missing(names, folder, found)
    if not lost:
        return names, lost, ""
    best, note = names, ""
    plain = [name.replace("\\", "/") for name in names]
    folders = {tuple(name.split("/")[:-1]) for name in plain}
    first, last = min(folders), max(folders)  # what these have in common, all in between have
    for count in range(min(len(first), len(last)) + 1):
        if first[:count] != last[:count]:
            break
        prefix = "".join(f"{part}/" for part in first[:count])
        shorter = [name.removeprefix(prefix) for name in plain]
        absent = _missing(shorter, folder, found)
        if len(absent) < len(lost):
            best, lost = shorter, absent
            begin = f"'{prefix}' is stripped from the file names" if prefix else ""
            slashes = "backslashes in the file names are read as slashes" if plain != list(names) else ""
            note = ", ".join(filter(None, (begin, slashes)))
    return best, lost, note


def _unique(entries: Iterable[Entry], kind: str, path: Path, defects: list[Defect]) -> list[Entry]:
    seen: set[Any] = set()
    kept = []
    for place, entry in enumerate(entries):
        number = entry.get("id")
        if number in seen:
            defects.append(Defect(path, f"{kind} {number} (entry {place})", "this id is given twice"))
            continue
        if number is not None:
            seen.add(number)
        kept.append(entry)
    return kept


def _known(number: Any, known: Container[Any]) -> bool:
    return isinstance(number, (int, float)) and number in known


def mask_fault(segmentation: Any, size: NDArray[np.int64]) -> str:
    """Finds the fault in the mask of an annotation: polygons, or a run-length encoding of either kind.

    Args:
        segmentation: The value from the file.
        size: Width and height of the image in px.

    Returns:
        A sentence; empty if nothing is wrong.
    """
    width, height = (int(side) for side in size)
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        if segmentation.get("size") != [height, width] or sum(segmentation["counts"]) != width * height:
            return f"segmentation's RLE is not of an image of {height}×{width} (height × width)"
        return ""
    if isinstance(segmentation, dict):
        return rle_fault(segmentation, size)
    polygons = segmentation if isinstance(segmentation, list) else []
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(_is_finite, polygon)):
            return f"segmentation's polygon {shortened(polygon)} is not at least three points x, y"
    return "" if polygons else f"segmentation is {shortened(segmentation)}, neither polygons nor RLE"


def rle_fault(segmentation: Any, size: NDArray[np.int64]) -> str:
    """Finds the fault in a compressed run-length encoding, as results files have them.

    Args:
        segmentation: The value from the file.
        size: Width and height of the image in px.

    Returns:
        A sentence; empty if nothing is wrong.
    """
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if not isinstance(counts, (str, bytes)):
        return f"segmentation is {shortened(segmentation)}, not compressed RLE; pycocotools.mask.encode makes it"
    width, height = (int(side) for side in size)
    if list(segmentation.get("size", ())) != [height, width]:
        return f"segmentation's size is {segmentation.get('size')}, its image's height and width {[height, width]}"
    # A character has five bits of a number and one that says whether more follow. pycocotools reads past the end of
    # counts whose last character says so.
    if not counts or (ord(counts[-1]) if isinstance(counts, str) else counts[-1]) - 48 not in range(32):
        return "segmentation's counts are cut off"
    from pycocotools import mask

    area, maximum = int(mask.area(segmentation)), width * height
    return f"segmentation's counts are damaged: {area} px of {maximum}" if area > maximum else ""


def mask_area(segmentation: Any, size: NDArray[np.int64]) -> float:
    """The area in px² of a sound mask in any of COCO's encodings, in an image of this width and height."""
    from pycocotools import mask

    width, height = (int(side) for side in size)
    if isinstance(segmentation, list):
        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return float(mask.area(segmentation))


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float, np.number)) and math.isfinite(value)
    except OverflowError:
        return False
