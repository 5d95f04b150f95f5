"""COCO's metrics, as its own tools compute them. Needs no torch."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sis_lightning.datasets.annotations import Annotations, load_json, shortened
from sis_lightning.datasets.coco_reader import Kind, rle_fault
from sis_lightning.datasets.constants import COCO_SIGMAS
from sis_lightning.datasets.meta import Backend
from sis_lightning.errors import DataError, UsageError

Row = dict[str, Any]


class COCOMetric(NamedTuple):
    """One of COCO's metrics.

    Attributes:
        name: Its short name.
        overlap: The IoU (OKS for keypoints) from which a detection counts.
        area: The objects that count, by their area: small ones are below 32² px, large ones from 96² px.
        detections: Maximum number of detections per image and class that count, in descending order of their scores.
    """

    name: str
    overlap: str
    area: str
    detections: int


#: Number of boxes or masks per image and class that count for COCO.
MAX_DETECTIONS = 100
_DETECTION_METRICS = (
    COCOMetric("AP", ".50:.95", "all", 100),
    COCOMetric("AP50", ".50", "all", 100),
    COCOMetric("AP75", ".75", "all", 100),
    COCOMetric("APs", ".50:.95", "small", 100),
    COCOMetric("APm", ".50:.95", "medium", 100),
    COCOMetric("APl", ".50:.95", "large", 100),
    COCOMetric("AR1", ".50:.95", "all", 1),
    COCOMetric("AR10", ".50:.95", "all", 10),
    COCOMetric("AR100", ".50:.95", "all", 100),
    COCOMetric("ARs", ".50:.95", "small", 100),
    COCOMetric("ARm", ".50:.95", "medium", 100),
    COCOMetric("ARl", ".50:.95", "large", 100),
)
#: COCO's metrics, in its own order.
COCO_METRICS: dict[Kind, tuple[COCOMetric, ...]] = {
    "bbox": _DETECTION_METRICS,
    "segm": _DETECTION_METRICS,
    "keypoints": (
        COCOMetric("AP", ".50:.95", "all", 20),
        COCOMetric("AP50", ".50", "all", 20),
        COCOMetric("AP75", ".75", "all", 20),
        COCOMetric("APm", ".50:.95", "medium", 20),
        COCOMetric("APl", ".50:.95", "large", 20),
        COCOMetric("AR", ".50:.95", "all", 20),
        COCOMetric("AR50", ".50", "all", 20),
        COCOMetric("AR75", ".75", "all", 20),
        COCOMetric("ARm", ".50:.95", "medium", 20),
        COCOMetric("ARl", ".50:.95", "large", 20),
    ),
}
#: The key of COCO's result format that holds what is scored.
RESULT_KEYS: dict[Kind, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


class COCOGroundTruth:
    """The ground truth of one split, and the scores of detections against it.

    Args:
        annotations: Images and objects, as `read_coco` gives them.
        kind: The kind of results.
        backend: The library that computes the metrics; `auto` is faster-coco-eval if it is installed, else
            pycocotools.
        sigmas: Standard deviation of each keypoint for the object keypoint similarity; None for those that the
            annotations have, or COCO's.
        max_detections: Number of boxes or masks per image and class that count, at least 11; COCO's is 100.

    Raises:
        DataError: If an entry has a defect without a remedy; the message names it.
        UsageError: If faster-coco-eval is asked for and not installed, or an argument is invalid.
    """

    def __init__(
        self,
        annotations: Annotations,
        kind: Kind,
        backend: Backend = "auto",
        sigmas: Sequence[float] | None = None,
        max_detections: int = MAX_DETECTIONS,
    ) -> None:
        self.backend = _chosen(backend)
        self.max_detections = check_max_detections(max_detections)
        self._coco, self._evaluation = _tools(self.backend)
        annotations.require_sound()
        self.annotations, self.kind = annotations, kind
        if sigmas is None and annotations.skeleton is not None:
            sigmas = annotations.skeleton.sigmas
        # COCO's tools have COCO's own in themselves, which differ in the last bit from decimal ones.
        usual = sigmas is None or (len(sigmas) == len(COCO_SIGMAS) and np.allclose(sigmas, COCO_SIGMAS))
        self.sigmas = None if usual else np.array(sigmas)
        # Images are numbered from 1 in the order of their own ids, which may be larger than 64 bits or no numbers.
        order = _in_order(annotations.image_ids)
        self._number_of = {image: number for number, image in enumerate(order, start=1)}
        self._truth = self._indexed(_coco_content(annotations, kind, self._number_of))

    @property
    def metrics(self) -> dict[str, COCOMetric]:
        """COCO's metrics by name; with several classes also the AP of each, `AP/CLASS`."""
        found = dict(_metrics(self.kind, self.max_detections))
        if len(self.annotations.class_names) > 1:
            found |= {f"AP/{name}": found["AP"] for name in self.annotations.class_names}
        return found

    @property
    def image_ids(self) -> list[Any]:
        """Ids of all images, ascending."""
        return list(self._number_of)

    @property
    def keypoint_values(self) -> int:
        """How many numbers the keypoints of a result are: x, y and score of each."""
        keypoints = self.annotations.keypoints
        return 0 if keypoints is None else 3 * keypoints.shape[1]

    @property
    def annotated(self) -> bool:
        """False for images without annotations, such as COCO's test sets, which only COCO's server can score."""
        return self.annotations.annotated

    def _indexed(self, content: dict[str, Any]) -> Any:
        indexed = self._coco()
        indexed.dataset = content
        with redirect_stdout(io.StringIO()):
            indexed.createIndex()
        return indexed

    def score(self, rows: Sequence[Row], image_ids: Collection[Any] | None = None) -> dict[str, float]:
        """Computes COCO's metrics of detections.

        Args:
            rows: Entries of COCO's result format: `image_id`, `category_id`, `score`, and `bbox` [x, y, w, h],
                `segmentation` (compressed RLE) or `keypoints` (x, y, score of each: 51 numbers for COCO's). Other keys
                do not count: a `bbox` beside a `segmentation` does not decide on its area. The rows are not changed.
            image_ids: The images that are scored; None for all.

        Returns:
            The values of `metrics` in 0…1, NaN if there is nothing to find; no metrics at all if the images
            have no annotations.
        """
        if not self.annotated:
            return {}
        names = list(self.metrics)
        known = self._number_of
        wanted = set(known.values()) if image_ids is None else {known[image] for image in image_ids if image in known}
        categories = list(self.annotations.category_ids)
        if not wanted or not categories:
            return dict.fromkeys(names, math.nan)
        keys = ("category_id", "score", RESULT_KEYS[self.kind])
        chosen = [
            {"image_id": number, **{key: row[key] for key in keys}}
            for row in rows
            if (number := known.get(row["image_id"])) in wanted
        ]
        with redirect_stdout(io.StringIO()):
            # loadRes looks into the first row, so it needs one.
            found = self._truth.loadRes(chosen) if chosen else self._indexed({**self._truth.dataset, "annotations": []})
            evaluation = self._evaluation(self._truth, found, self.kind)
            evaluation.params.imgIds, evaluation.params.catIds = sorted(wanted), categories
            if self.sigmas is not None:
                evaluation.params.kpt_oks_sigmas = self.sigmas
            if self.kind != "keypoints":
                evaluation.params.maxDets = [1, 10, self.max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        return self._means(evaluation)

    def _means(self, evaluation: Any) -> dict[str, float]:
        """The metrics, as COCO's `summarize` takes the means; it knows neither single classes nor 300 detections."""
        parameters = evaluation.params
        # (thresholds, recalls, classes, areas, numbers of detections), and the same without recalls; -1: none to find.
        precision, recall = (np.asarray(evaluation.eval[key]) for key in ("precision", "recall"))
        thresholds = [round(float(threshold), 2) for threshold in parameters.iouThrs]
        areas, counts = list(parameters.areaRngLbl), list(parameters.maxDets)
        names = list(self.annotations.class_names)
        means = {}
        for name, metric in self.metrics.items():
            values = recall if metric.name.startswith("AR") else precision
            values = values[..., areas.index(metric.area), counts.index(metric.detections)]
            if metric.overlap != ".50:.95":
                values = values[[thresholds.index(float(metric.overlap))]]
            if "/" in name:
                values = values[..., names.index(name.partition("/")[2])]
            known = values[values > -1]
            means[name] = float(known.mean()) if known.size else math.nan
        return means


def check_max_detections(count: int) -> int:
    """Checks a number of detections per image and class.

    Returns:
        The same.

    Raises:
        UsageError: If it is not above 10, the number of the metric AR10.
    """
    if count <= 10:
        raise UsageError(f"max_detections is {count}, must be above 10")
    return count


def _metrics(kind: Kind, max_detections: int) -> dict[str, COCOMetric]:
    """COCO's metrics by name, with another number of detections than 100."""
    metrics = {}
    for metric in COCO_METRICS[kind]:
        if metric.detections == MAX_DETECTIONS:
            metric = metric._replace(detections=max_detections)
        name = f"AR{max_detections}" if metric.name == "AR100" else metric.name
        metrics[name] = metric._replace(name=name)
    return metrics


def _in_order(image_ids: Sequence[Any]) -> list[Any]:
    try:
        return sorted(image_ids)
    except TypeError:  # numbers among names
        return sorted(image_ids, key=lambda item: (str(type(item)), item))


def _coco_content(annotations: Annotations, kind: Kind, number_of: dict[Any, int]) -> dict[str, Any]:
    """The ground truth as COCO's tools take it, and may change it."""
    count = len(annotations.image)
    extents = annotations.extents
    if extents is None:
        extents = annotations.boxes.copy()
        extents[:, 2:] -= extents[:, :2]
    areas = annotations.areas if annotations.areas is not None else extents[:, 2] * extents[:, 3]
    numbers = [number_of[image] for image in annotations.image_ids]
    objects: list[Row] = [
        # Numbered from 1: COCO's tools take an object 0 for one that nothing has found.
        {"id": place, "image_id": numbers[image], "category_id": annotations.category_ids[label]}
        | {"iscrowd": int(crowd), "area": area}
        for place, image, label, crowd, area in zip(
            range(1, count + 1),
            annotations.image.tolist(),
            annotations.labels.tolist(),
            annotations.ignored.tolist(),
            areas.tolist(),
            strict=True,
        )
    ]
    columns: dict[str, list[Any]] = {}
    if kind == "segm":
        assert annotations.segmentations is not None
        columns["segmentation"] = annotations.segmentations.tolist()
    else:
        columns["bbox"] = extents.tolist()
    if kind == "keypoints":
        assert annotations.keypoints is not None
        keypoints = annotations.keypoints.reshape(count, annotations.keypoints.shape[1] * 3)
        visible = np.count_nonzero(annotations.keypoints[..., 2] > 0, axis=1)
        stated = visible if annotations.num_keypoints is None else annotations.num_keypoints
        columns |= {"keypoints": keypoints.tolist(), "num_keypoints": stated.tolist()}
    for key, values in columns.items():
        for entry, value in zip(objects, values, strict=True):
            entry[key] = value
    sizes = annotations.sizes.tolist()
    return {
        "info": {},
        "images": [
            {"id": number, "width": width, "height": height}
            for number, (width, height) in zip(numbers, sizes, strict=True)
        ],
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(annotations.category_ids, annotations.class_names, strict=True)
        ],
        "annotations": objects,
    }


def _chosen(backend: Backend) -> Backend:
    """The library that `auto` stands for."""
    if backend != "auto":
        return backend
    return "faster-coco-eval" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"


def _tools(backend: Backend) -> tuple[Any, Any]:
    """The classes COCO and COCOeval of a library."""
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    if backend != "faster-coco-eval":
        raise UsageError(f"backend is {backend!r}, must be 'auto', 'pycocotools' or 'faster-coco-eval'")
    try:
        import faster_coco_eval
    except ImportError:
        raise UsageError(
            'faster-coco-eval is not installed: pip install "sis-lightning[fast]", or take pycocotools'
        ) from None
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def read_results(path: Path, ground_truth: COCOGroundTruth) -> list[Row]:
    """Reads a results file and checks it.

    Args:
        path: A JSON file in COCO's result format.
        ground_truth: The ground truth that the results are to be scored with.

    Raises:
        DataError: If an entry is not a result; the message names the entry and what is wrong with it.
    """
    rows = load_json(path)
    check_results(rows, ground_truth, str(path))
    return rows  # type: ignore[no-any-return]


def check_results(rows: Any, ground_truth: COCOGroundTruth, source: str = "results") -> None:
    """Checks result rows against the ground truth that they are to be scored with.

    Args:
        rows: Values that should be entries of COCO's result format.
        ground_truth: The ground truth, which says what the images and categories are and what is scored.
        source: Name of the rows in errors.

    Raises:
        DataError: If an entry is not a result; the message names the first such entry (counted from 0), its key and
            value.
    """
    key = RESULT_KEYS[ground_truth.kind]
    if not isinstance(rows, list):
        raise DataError(f"{source}: not a list of results, each with image_id, category_id, score and {key}")
    where = f"{source}: entry"
    _require_keys(rows, ("image_id", "category_id", "score", key), where)
    _require_known(rows, "image_id", set(ground_truth.image_ids), where, "is not an image of the ground truth")
    categories = ground_truth.annotations.category_ids
    span = f" (its {len(categories)} are in {categories[0]}…{categories[-1]})" if categories else ""
    _require_known(rows, "category_id", set(categories), where, f"is not a category of the ground truth{span}")
    _numbers(rows, "score", 0, where)
    if ground_truth.kind == "bbox":
        _require_boxes(rows, where)
    elif ground_truth.kind == "keypoints":
        _numbers(rows, "keypoints", ground_truth.keypoint_values, where)
    else:
        annotations = ground_truth.annotations
        size_of = dict(zip(annotations.image_ids, annotations.sizes, strict=True))
        for place, row in enumerate(rows):
            fault = rle_fault(row["segmentation"], size_of[row["image_id"]])
            if fault:
                raise DataError(f"{where} {place}: {fault}")


def _require_keys(entries: list[Any], keys: tuple[str, ...], where: str) -> None:
    needed = set(keys)
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{where} {place} is {shortened(entry)}, not an object with {', '.join(keys)}")
        if not needed <= entry.keys():
            lacking = next(key for key in keys if key not in entry)
            raise DataError(f"{where} {place} has no '{lacking}'; it has {', '.join(map(repr, entry)) or 'nothing'}")


def _require_known(entries: list[Row], key: str, known: set[int], where: str, fault: str) -> None:
    for place, entry in enumerate(entries):
        value = entry[key]
        if not isinstance(value, (int, float, np.integer)) or value not in known:
            raise DataError(f"{where} {place}: {key} {shortened(value)} {fault}")


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
                raise DataError(f"{where} {place}: {key} is {shortened(value)}{count}, not {wanted}")
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
        found = shortened(entries[place]["bbox"])
        raise DataError(f"{where} {place}: bbox {found} has a negative width or height; it is [x, y, width, height]")
