"""Scoring of results files, by the same rules as `sis-lightning test`. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.table import Table

from sis_lightning.datasets.annotations import Annotations
from sis_lightning.datasets.coco_reader import Kind, read_coco
from sis_lightning.datasets.constants import VOC_CLASSES
from sis_lightning.datasets.meta import Backend
from sis_lightning.datasets.voc_reader import read_names, read_voc, voc_list
from sis_lightning.errors import DataError, UsageError
from sis_lightning.evaluation.coco import MAX_DETECTIONS, COCOGroundTruth, check_results, read_results
from sis_lightning.evaluation.voc import Rule, VOCGroundTruth, read_comp4
from sis_lightning.text_tables import table_to_text

VOCKind = Literal["voc07", "voc12"]
_RECALLS: dict[VOCKind, str] = {
    "voc07": "mean precision at 11 recalls (VOC2007)",
    "voc12": "area under the curve (VOC2010 and later)",
}


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one results file; `print` shows them as a table.

    Attributes:
        kind: The kind of results: COCO's bbox, segm, keypoints or VOC's voc07, voc12.
        ground_truth: The ground truth's annotation file, or VOC's folder.
        results: The results file, or the folder of VOC's files.
        settings: The rule, and the library that computed the metrics.
        counts: Number of images, objects and detections.
        metrics: The metrics by name in 0…1, NaN if there is nothing to find.
        headings: Headings of the columns of `meanings`.
        meanings: The meaning of each metric, one cell per column.
        note: Further facts on the metrics.
    """

    kind: Kind | VOCKind
    ground_truth: Path
    results: Path
    settings: dict[str, Any]
    counts: dict[str, int]
    metrics: dict[str, float]
    headings: tuple[str, ...] = field(repr=False)
    meanings: dict[str, tuple[str, ...]] = field(repr=False)
    note: str = field(repr=False)

    def to_json(self) -> str:
        """The metrics as JSON, with all digits and null for NaN."""
        metrics = {name: None if math.isnan(value) else value for name, value in self.metrics.items()}
        content = {"type": self.kind, "truth": str(self.ground_truth), "results": str(self.results), **self.settings}
        return json.dumps({**content, **self.counts, "metrics": metrics}, indent=2, ensure_ascii=False) + "\n"

    def to_table(self) -> str:
        """The metrics as a table of text."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        table = Table(
            title=f"{self.kind} ({settings})", title_justify="left", caption=self.note, caption_justify="left"
        )
        table.add_column("metric", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        for heading in self.headings:
            table.add_column(heading, justify="right")
        for name, value in self.metrics.items():
            table.add_row(name, "–" if math.isnan(value) else f"{value:.4f}", *self.meanings[name])
        # Paths are printed apart: a table would break or cut them.
        lines = [f"ground truth: {self.ground_truth}", f"results:      {self.results}"]
        lines.append(", ".join(f"{count:,} {what}" for what, count in self.counts.items()))
        lines.append(table_to_text(table).rstrip("\n"))
        if any(math.isnan(value) for value in self.metrics.values()):
            lines.append("– nothing to find")
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.to_table().rstrip("\n")


def evaluate(
    ground_truth: str | Path | dict[str, Any],
    results: str | Path | list[dict[str, Any]],
    kind: Kind | VOCKind,
    **options: Any,
) -> Evaluation:
    """Scores results, COCO's or VOC's.

    Args:
        ground_truth: The ground truth: COCO's annotation file (or its content), or a folder of VOC's layout with
            `Annotations/`.
        results: The results: a file in COCO's result format (or its content), or a folder of VOC's detection files,
            `CLASS.txt` or `comp4_det_SPLIT_CLASS.txt`.
        kind: The kind of results: COCO's `bbox`, `segm` or `keypoints`, or VOC's average precision by the rules of 2007
            (`voc07`) or of 2010 and later (`voc12`).
        options: For COCO: `backend` (`auto`, `pycocotools` or `faster-coco-eval`); `max_detections` for
            boxes and masks, `category` and `sigmas` for keypoints (see `evaluate_coco`). For VOC: `split` (a list of
            `ImageSets/Main/`), `rule` (`devkit` or `toolkit`), `iou` and `classes`.

    Returns:
        The metrics, with the files and the rule; `print` shows them as a table.

    Raises:
        DataError: If the ground truth or the results are not what they should be; the message names the entry.
        UsageError: If an argument is invalid, or the backend is not installed.
    """
    if kind not in (*get_args(Kind), *get_args(VOCKind)):
        known = ", ".join((*get_args(Kind), *get_args(VOCKind)))
        raise UsageError(f"kind is {kind!r}, must be one of {known}")
    allowed = ["split", "rule", "iou", "classes"] if kind in get_args(VOCKind) else ["backend"]
    allowed += {"keypoints": ["category", "sigmas"], "bbox": ["max_detections"], "segm": ["max_detections"]}.get(
        kind, []
    )
    for name in options:
        if name not in allowed:
            raise UsageError(f"{name} is not an option of {kind}, which has {', '.join(allowed)}")
    if kind == "voc07" or kind == "voc12":
        if not isinstance(ground_truth, str | Path) or not isinstance(results, str | Path):
            raise UsageError(f"{kind} scores a folder of detection files against a folder with Annotations/")
        return evaluate_voc(Path(ground_truth), Path(results), kind, **options)
    return evaluate_coco(
        ground_truth if isinstance(ground_truth, dict) else Path(ground_truth),
        results if isinstance(results, list) else Path(results),
        kind,
        **options,
    )


def evaluate_coco(
    ground_truth: Path | dict[str, Any],
    results: Path | list[dict[str, Any]],
    kind: Kind,
    backend: Backend = "auto",
    *,
    category: str | None = None,
    sigmas: Sequence[float] | None = None,
    max_detections: int = MAX_DETECTIONS,
) -> Evaluation:
    """Scores results in COCO's result format.

    Args:
        ground_truth: COCO's annotation file, or its content.
        results: A results file, or its content.
        kind: The kind of results.
        backend: The library that computes the metrics.
        category: With `keypoints`, the only category that is scored; None for all that have keypoints.
        sigmas: Standard deviation of each keypoint for the object keypoint similarity; None for the file's or COCO's,
            for unknown keypoints the mean of COCO's.
        max_detections: Number of boxes or masks per image and class that count; for keypoints always 20.

    Raises:
        DataError: If either is not what it should be, or the ground truth has no annotations.
        UsageError: If the backend is not installed, or there are not as many deviations as keypoints.
    """
    annotations = read_coco(ground_truth, kind=kind, category=category)
    if annotations.skeleton is not None:
        annotations.skeleton = annotations.skeleton.changed(sigmas=sigmas)
        if not annotations.skeleton.measured:
            annotations.notes["sigmas"] = f"sigmas: {annotations.skeleton.notes()['sigmas']}"
    known = COCOGroundTruth(annotations, kind, backend, max_detections=max_detections)
    if not known.annotated:
        raise DataError(
            f"{annotations.source} has no 'annotations' (COCO's image_info of a test set): only its server can score"
        )
    if isinstance(results, Path):
        rows = read_results(results, known)
    else:
        rows = results
        check_results(rows, known)
    overlap = "OKS" if kind == "keypoints" else "IoU"
    notes = "".join(f"\n{note}" for note in annotations.notes.values())
    return Evaluation(
        kind,
        annotations.source,
        results if isinstance(results, Path) else Path("results"),
        {"backend": backend},
        {"images": len(annotations), "objects": len(annotations.labels), "detections": len(rows)},
        known.score(rows),
        (overlap, "area", "detections per image and class"),
        {name: (metric.overlap, metric.area, f"≤ {metric.detections}") for name, metric in known.metrics.items()},
        f"area: small to 32² px, medium to 96² px, large above; .50:.95: the mean over ten thresholds{notes}",
    )


def evaluate_voc(
    ground_truth: Path,
    results: Path,
    kind: VOCKind,
    *,
    split: str | None = None,
    rule: Rule = "devkit",
    iou: float = 0.5,
    classes: Sequence[str] = VOC_CLASSES[1:],
) -> Evaluation:
    """Scores a folder of the devkit's detection files.

    Args:
        ground_truth: A folder with `Annotations/`; image files are not needed.
        results: A folder with `CLASS.txt` or `comp4_det_SPLIT_CLASS.txt`.
        kind: The year whose average precision is computed: `voc07` or `voc12`.
        split: A list of `ImageSets/Main/`; None for every file of `Annotations/`.
        rule: `devkit` or `toolkit`; see `VOCGroundTruth`.
        iou: Threshold of the IoU, above 0 and at most 1.
        classes: Names of the classes.

    Raises:
        DataError: If ground truth or results are not what they should be.
        UsageError: If an argument is invalid.
    """
    if not 0 < iou <= 1:
        raise UsageError(f"iou is {iou:g}, must be above 0 and at most 1")
    if len(set(classes)) < len(classes):
        raise UsageError(f"classes names one twice: {' '.join(classes)}")
    if rule not in get_args(Rule):
        raise UsageError(f"rule is {rule!r}, must be one of {', '.join(get_args(Rule))}")
    annotations = _voc_annotations(ground_truth, split, classes)
    rows = read_comp4(results, annotations)
    metrics = VOCGroundTruth(annotations, rule, iou).score(rows)
    chosen = {name: value for name, value in metrics.items() if name.partition("/")[0].endswith(kind)}
    mean = next(iter(chosen))
    difficult = annotations.ignored & (rule == "devkit")
    positives = np.bincount(annotations.labels[~difficult], minlength=len(classes)).tolist()
    ignored = np.bincount(annotations.labels[difficult], minlength=len(classes)).tolist()
    found = np.bincount(np.array([row["category_id"] for row in rows], dtype=np.int64), minlength=len(classes)).tolist()
    meanings: dict[str, tuple[str, ...]] = {mean: (str(sum(positives)), str(sum(ignored)), str(len(rows)))}
    for label, name in enumerate(classes):
        meanings[f"{mean}/{name}"] = (str(positives[label]), str(ignored[label]), str(found[label]))
    return Evaluation(
        kind,
        ground_truth,
        results,
        {"rule": rule, "iou": iou},
        {"images": len(annotations), "objects": len(annotations.labels), "detections": len(rows)},
        chosen,
        ("objects to find", "ignored as difficult", "detections"),
        meanings,
        _RECALLS[kind] + (f"; IoU > {iou:g}" if rule == "devkit" else f"; IoU ≥ {iou:g}, difficult objects count"),
    )


def _voc_annotations(home: Path, split: str | None, classes: Sequence[str]) -> Annotations:
    folder = home / "Annotations"
    if not folder.is_dir():
        near = sorted(home.glob("**/VOC20*/Annotations"))[:1] if home.is_dir() else []
        hint = f"; did you mean {near[0].parent}?" if near else ""
        raise DataError(f"{home} has no folder Annotations{hint}")
    names = (
        sorted(path.stem for path in folder.glob("*.xml"))
        if split is None
        else read_names(voc_list(home, "Main", split))
    )
    if not names:
        raise DataError(f"{folder} has no XML" if split is None else f"{home}: split '{split}' names no image")
    annotations = read_voc([(home, names)], classes, images=False)
    unknown = [defect for defect in annotations.defects if defect.what.startswith("unknown class")]
    if unknown:
        raise DataError(f"{unknown[0]}\n  {len(unknown)} such objects; `classes` names those of your data")
    return annotations
