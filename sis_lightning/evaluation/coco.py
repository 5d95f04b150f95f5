"""COCO's figures, as its own tools compute them. Needs no torch."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sis_lightning.datasets.annotations import load_json
from sis_lightning.datasets.constants import COCO_JOINTS
from sis_lightning.errors import DataError, UsageError

Kind = Literal["bbox", "segm", "keypoints"]
Evaluator = Literal["pycocotools", "faster-coco-eval"]
Row = dict[str, Any]


class Figure(NamedTuple):
    """One of COCO's figures.

    Attributes:
        name: Its short name.
        overlap: The IoU (OKS for keypoints) from which a detection counts.
        area: Of which objects: small is below 32² px, large from 96² px.
        detections: The most of an image and class that count, in the order of their scores.
    """

    name: str
    overlap: str
    area: str
    detections: int


_DETECTION = (
    Figure("AP", ".50:.95", "all", 100),
    Figure("AP50", ".50", "all", 100),
    Figure("AP75", ".75", "all", 100),
    Figure("APs", ".50:.95", "small", 100),
    Figure("APm", ".50:.95", "medium", 100),
    Figure("APl", ".50:.95", "large", 100),
    Figure("AR1", ".50:.95", "all", 1),
    Figure("AR10", ".50:.95", "all", 10),
    Figure("AR100", ".50:.95", "all", 100),
    Figure("ARs", ".50:.95", "small", 100),
    Figure("ARm", ".50:.95", "medium", 100),
    Figure("ARl", ".50:.95", "large", 100),
)
#: COCO's figures in its own order.
FIGURES: dict[Kind, tuple[Figure, ...]] = {
    "bbox": _DETECTION,
    "segm": _DETECTION,
    "keypoints": (
        Figure("AP", ".50:.95", "all", 20),
        Figure("AP50", ".50", "all", 20),
        Figure("AP75", ".75", "all", 20),
        Figure("APm", ".50:.95", "medium", 20),
        Figure("APl", ".50:.95", "large", 20),
        Figure("AR", ".50:.95", "all", 20),
        Figure("AR50", ".50", "all", 20),
        Figure("AR75", ".75", "all", 20),
        Figure("ARm", ".50:.95", "medium", 20),
        Figure("ARl", ".50:.95", "large", 20),
    ),
}
#: Where a row of COCO's result format holds what is scored.
RESULT_KEYS: dict[Kind, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
_KEYPOINT_VALUES = 3 * len(COCO_JOINTS)


class COCOTruth:
    """The ground truth of one split, and the scores of detections against it.

    Args:
        path: An annotation file of COCO, or its content, which stays as it is.
        kind: What is scored.
        evaluator: Which library computes.

    Attributes:
        image_ids: Of all images, ascending.
        category_ids: Of all categories, ascending.
        objects: How many there are, crowds included.
        has_truth: False for a file without annotations (COCO's image_info of the test sets), which only COCO's server
            can score.

    Raises:
        DataError: Where the file is not what COCO's tools can score; names the entry.
        UsageError: Where faster-coco-eval is asked for and not installed.
    """

    def __init__(self, path: Path | dict[str, Any], kind: Kind, evaluator: Evaluator = "pycocotools") -> None:
        source, content = ("truth", path) if isinstance(path, dict) else (str(path), load_json(path))
        self.kind, self.evaluator = kind, evaluator
        self._coco, self._evaluation = _tools(evaluator)
        dataset = _sound_truth(content, kind, source)
        self.has_truth = "annotations" in content
        self.objects = len(dataset["annotations"])
        self.image_ids: list[int] = sorted(image["id"] for image in dataset["images"])
        self.category_ids: list[int] = sorted(category["id"] for category in dataset["categories"])
        self.image_sizes = {image["id"]: [image.get("height"), image.get("width")] for image in dataset["images"]}
        self._truth = self._indexed(dataset)

    def _indexed(self, dataset: dict[str, Any]) -> Any:
        indexed = self._coco()
        indexed.dataset = dataset
        with redirect_stdout(io.StringIO()):
            indexed.createIndex()
        return indexed

    def score(self, rows: Sequence[Row], image_ids: Collection[int] | None = None) -> dict[str, float]:
        """COCO's figures of detections.

        Args:
            rows: Entries of COCO's result format: `image_id`, `category_id`, `score`, and `bbox` [x, y, w, h],
                `segmentation` (compressed RLE) or `keypoints` (51 numbers). Other keys do not count: a `bbox` beside a
                `segmentation` does not decide on its area. They stay as they are.
            image_ids: The images that are scored; all of the truth for None.

        Returns:
            The figures of `FIGURES[kind]` in 0…1, NaN where there is nothing to find; none at all without a truth.
        """
        if not self.has_truth:
            return {}
        names = [figure.name for figure in FIGURES[self.kind]]
        wanted = set(self.image_ids) if image_ids is None else set(image_ids).intersection(self.image_ids)
        if not wanted or not self.category_ids:
            return dict.fromkeys(names, math.nan)
        keys = ("image_id", "category_id", "score", RESULT_KEYS[self.kind])
        chosen = [{key: row[key] for key in keys} for row in rows if row["image_id"] in wanted]
        with redirect_stdout(io.StringIO()):
            # loadRes looks into the first row, so it needs one.
            found = self._truth.loadRes(chosen) if chosen else self._indexed({**self._truth.dataset, "annotations": []})
            evaluation = self._evaluation(self._truth, found, self.kind)
            evaluation.params.imgIds, evaluation.params.catIds = sorted(wanted), self.category_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = [float(value) for value in evaluation.stats[: len(names)]]
        return {name: value if value >= 0 else math.nan for name, value in zip(names, values, strict=True)}


def _tools(evaluator: Evaluator) -> tuple[Any, Any]:
    """The classes COCO and COCOeval of a library."""
    if evaluator == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    try:
        import faster_coco_eval
    except ImportError:
        raise UsageError(
            'faster-coco-eval is not installed: pip install "sis-lightning[fast]", or take pycocotools'
        ) from None
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def read_results(path: Path, truth: COCOTruth) -> list[Row]:
    """Reads a results file and checks it.

    Raises:
        DataError: Names the entry and what is wrong with it.
    """
    rows = load_json(path)
    check_results(rows, truth, str(path))
    return rows  # type: ignore[no-any-return]


def check_results(rows: Any, truth: COCOTruth, source: str = "results") -> None:
    """Checks result rows against the truth that they are to be scored with.

    Args:
        rows: What should be entries of COCO's result format.
        truth: Knows the images and categories, and what is scored.
        source: Names the rows in errors.

    Raises:
        DataError: Names the first entry (counted from 0) with the first kind of fault, its key and value.
    """
    key = RESULT_KEYS[truth.kind]
    if not isinstance(rows, list):
        raise DataError(f"{source}: not a list of results, each with image_id, category_id, score and {key}")
    where = f"{source}: entry"
    _require_keys(rows, ("image_id", "category_id", "score", key), where)
    _require_known(rows, "image_id", set(truth.image_ids), where, "is not an image of the truth")
    categories = truth.category_ids
    span = f" (its {len(categories)} lie in {categories[0]}…{categories[-1]})" if categories else ""
    _require_known(rows, "category_id", set(categories), where, f"is not a category of the truth{span}")
    _numbers(rows, "score", 0, where)
    if truth.kind == "bbox":
        _require_boxes(rows, where)
    elif truth.kind == "keypoints":
        _numbers(rows, "keypoints", _KEYPOINT_VALUES, where)
    else:
        for place, row in enumerate(rows):
            fault = _rle_fault(row["segmentation"], truth.image_sizes[row["image_id"]])
            if fault:
                raise DataError(f"{where} {place}: {fault}")


def _sound_truth(content: Any, kind: Kind, source: str) -> dict[str, Any]:
    """A copy of what COCO's tools need of an annotation file, which they then accept and may change."""
    if not isinstance(content, dict) or not {"images", "categories"} <= content.keys():
        raise DataError(f"{source}: not an annotation file of COCO, which has 'images', 'annotations' and 'categories'")
    lists = {key: content.get(key, []) for key in ("images", "categories", "annotations")}
    for key, entries in lists.items():
        if not isinstance(entries, list):
            raise DataError(f"{source}: '{key}' is not a list")
        _require_keys(entries, ("id",), f"{source}: '{key}' entry")
        _require_unique(entries, f"{source}: '{key}' entry", whole=key != "annotations")
    images = {image["id"]: image for image in lists["images"]}
    categories = {category["id"] for category in lists["categories"]}

    where = f"{source}: 'annotations' entry"
    found = lists["annotations"]
    needed = {"bbox": ("bbox",), "segm": ("segmentation",), "keypoints": ("bbox", "keypoints")}[kind]
    _require_keys(found, ("image_id", "category_id", "area", *needed), where)
    _require_known(found, "image_id", set(images), where, "is not listed under 'images'")
    _require_known(found, "category_id", categories, where, "is not listed under 'categories'")
    areas = _numbers(found, "area", 0, where)
    copies = [
        {
            # Numbered anew from 1: COCO's tools take an object 0 for one that nothing has found.
            "id": number,
            "image_id": int(annotation["image_id"]),
            "category_id": int(annotation["category_id"]),
            "iscrowd": int(bool(annotation.get("iscrowd", 0))),
            "area": area,
            **{key: annotation[key] for key in needed},
        }
        for number, (annotation, area) in enumerate(zip(found, areas.tolist(), strict=True), start=1)
    ]
    if "bbox" in needed:
        _require_boxes(found, where)
    if kind == "keypoints":
        joints = _numbers(found, "keypoints", _KEYPOINT_VALUES, where)
        visible = np.count_nonzero(joints[:, 2::3] > 0, axis=1)
        for copy, annotation, count in zip(copies, found, visible.tolist(), strict=True):
            copy["num_keypoints"] = annotation.get("num_keypoints", count)
    if kind == "segm":
        for image in images.values():
            sides = (image.get("height"), image.get("width"))
            if not all(isinstance(side, int) and side > 0 for side in sides):
                raise DataError(f"{source}: image {image['id']} has no height and width, which masks need")
        for place, annotation in enumerate(found):
            image = images[annotation["image_id"]]
            fault = _mask_fault(annotation["segmentation"], [image["height"], image["width"]])
            if fault:
                raise DataError(f"{where} {place}: {fault}")
    return {
        "info": {},
        "images": [dict(image) for image in lists["images"]],
        "categories": [dict(category) for category in lists["categories"]],
        "annotations": copies,
    }


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _require_keys(entries: list[Any], keys: tuple[str, ...], where: str) -> None:
    needed = set(keys)
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{where} {place} is {_shown(entry)}, not an object with {', '.join(keys)}")
        if not needed <= entry.keys():
            lacking = next(key for key in keys if key not in entry)
            raise DataError(f"{where} {place} has no '{lacking}'; it has {', '.join(map(repr, entry)) or 'nothing'}")


def _require_unique(entries: list[Row], where: str, whole: bool) -> None:
    seen = set()
    for place, entry in enumerate(entries):
        number = entry["id"]
        if not isinstance(number, int if whole else (int, float, str)):
            raise DataError(f"{where} {place}: the id is {_shown(number)}, not a whole number")
        if number in seen:
            raise DataError(f"{where} {place}: the id {number} is given twice")
        seen.add(number)


def _require_known(entries: list[Row], key: str, known: set[int], where: str, fault: str) -> None:
    for place, entry in enumerate(entries):
        value = entry[key]
        if not isinstance(value, (int, float, np.integer)) or value not in known:
            raise DataError(f"{where} {place}: {key} {_shown(value)} {fault}")


def _numbers(entries: list[Row], key: str, width: int, where: str) -> NDArray[np.float64]:
    """The finite numbers of a key: (N,) for width 0, else (N, width)."""
    values = [entry[key] for entry in entries]
    shape = (len(values), width) if width else (len(values),)
    if not values:
        return np.zeros(shape)
    try:
        array = np.array(values)
    except ValueError:  # of different lengths
        array = np.empty(0)
    sound = array.shape == shape and array.dtype.kind in "iuf"
    if not sound or not np.isfinite(array).all():
        for place, value in enumerate(values):
            numbers = value if width and isinstance(value, (list, tuple)) else [value]
            if len(numbers) != max(width, 1) or not all(_is_finite(number) for number in numbers):
                wanted = f"{width} finite numbers" if width else "a finite number"
                count = f" ({len(numbers)} values)" if width and len(numbers) != width else ""
                raise DataError(f"{where} {place}: {key} is {_shown(value)}{count}, not {wanted}")
    return array.astype(np.float64) if sound else np.array(values, dtype=np.float64)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float, np.number)) and math.isfinite(value)
    except OverflowError:
        return False


def _require_boxes(entries: list[Row], where: str) -> None:
    negative = np.flatnonzero((_numbers(entries, "bbox", 4, where)[:, 2:] < 0).any(axis=1))
    if len(negative):
        place = int(negative[0])
        shown = _shown(entries[place]["bbox"])
        raise DataError(f"{where} {place}: bbox {shown} has a negative width or height; it is [x, y, width, height]")


def _mask_fault(segmentation: Any, size: list[int]) -> str:
    """What keeps a ground truth's mask from being one: polygons, or RLE of either kind."""
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        if segmentation.get("size") != size or sum(segmentation["counts"]) != size[0] * size[1]:
            return f"segmentation's RLE is not of an image of {size[0]}×{size[1]} (height × width)"
        return ""
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, size)
    polygons = segmentation if isinstance(segmentation, list) else []
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(_is_finite, polygon)):
            return f"segmentation's polygon {_shown(polygon)} is not at least three points x, y"
    return "" if polygons else f"segmentation is {_shown(segmentation)}, neither polygons nor RLE"


def _rle_fault(segmentation: Any, size: list[int]) -> str:
    """What keeps a mask from being compressed RLE of an image of this height and width."""
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if not isinstance(counts, (str, bytes)):
        return f"segmentation is {_shown(segmentation)}, not compressed RLE; pycocotools.mask.encode makes it"
    if list(segmentation.get("size", ())) != size:
        return f"segmentation's size is {segmentation.get('size')}, its image's height and width {size}"
    # Five bits a character, the sixth says that more follow: behind the last, COCO's tools would read on.
    if not counts or (ord(counts[-1]) if isinstance(counts, str) else counts[-1]) - 48 not in range(32):
        return "segmentation's counts are cut off"
    from pycocotools import mask

    area = int(mask.area(segmentation))
    return f"segmentation's counts are damaged: {area} px of {size[0] * size[1]}" if area > size[0] * size[1] else ""
