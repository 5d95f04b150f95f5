"""`sis-lightning evaluate`: scores anyone's results file as `test` scores its own. Needs no torch."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from sis_lightning.datasets.annotations import Annotations, read_voc, voc_names
from sis_lightning.datasets.constants import VOC_CLASSES
from sis_lightning.errors import DataError, UsageError
from sis_lightning.evaluation.coco import FIGURES, COCOTruth, Evaluator, Kind, read_results
from sis_lightning.evaluation.voc import Rule, VOCTruth, read_comp4

VOCKind = Literal["voc07", "voc12"]
_RECALLS: dict[VOCKind, str] = {
    "voc07": "mean precision at 11 recalls (VOC2007)",
    "voc12": "area under the curve (VOC2010 and later)",
}


@dataclass(frozen=True)
class Evaluation:
    """The figures of one results file.

    Attributes:
        kind: What was scored: COCO's bbox, segm, keypoints or VOC's voc07, voc12.
        truth: The annotation file, or VOC's folder.
        results: The results file, or the folder of VOC's files.
        settings: By what rule, and with which library.
        counts: Of images, objects and detections.
        figures: In 0…1, NaN where there is nothing to find.
        headings: Of the columns of `meanings`.
        meanings: What each figure means, one cell a column.
        note: What else there is to know of them.
    """

    kind: Kind | VOCKind
    truth: Path
    results: Path
    settings: dict[str, Any]
    counts: dict[str, int]
    figures: dict[str, float]
    headings: tuple[str, ...]
    meanings: dict[str, tuple[str, ...]] = field(repr=False)
    note: str

    def to_json(self) -> str:
        """For machines: all digits, null for NaN."""
        figures = {name: None if math.isnan(value) else value for name, value in self.figures.items()}
        content = {"type": self.kind, "truth": str(self.truth), "results": str(self.results), **self.settings}
        return json.dumps({**content, **self.counts, "metrics": figures}, indent=2, ensure_ascii=False) + "\n"

    def to_table(self) -> str:
        """For people."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        table = Table(
            title=f"{self.kind} ({settings})", title_justify="left", caption=self.note, caption_justify="left"
        )
        table.add_column("figure", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        for heading in self.headings:
            table.add_column(heading, justify="right")
        for name, value in self.figures.items():
            table.add_row(name, "–" if math.isnan(value) else f"{value:.4f}", *self.meanings[name])
        text = io.StringIO()
        # Paths are printed apart: a table would break or cut them.
        print(f"truth:   {self.truth}\nresults: {self.results}", file=text)
        print(", ".join(f"{count:,} {what}" for what, count in self.counts.items()), file=text)
        Console(file=text, width=120).print(table)
        if any(math.isnan(value) for value in self.figures.values()):
            print("– nothing to find", file=text)
        return text.getvalue()


def evaluate_coco(truth: Path, results: Path, kind: Kind, evaluator: Evaluator = "pycocotools") -> Evaluation:
    """Scores a file in COCO's result format.

    Raises:
        DataError: Where either file is not what it should be, or the truth has no annotations.
        UsageError: Where the evaluator is not installed.
    """
    known = COCOTruth(truth, kind, evaluator)
    if not known.has_truth:
        raise DataError(f"{truth} has no 'annotations' (COCO's image_info of a test set): only its server can score")
    rows = read_results(results, known)
    overlap = "OKS" if kind == "keypoints" else "IoU"
    return Evaluation(
        kind,
        truth,
        results,
        {"evaluator": evaluator},
        {"images": len(known.image_ids), "objects": known.objects, "detections": len(rows)},
        known.score(rows),
        (overlap, "area", "detections an image and class"),
        {figure.name: (figure.overlap, figure.area, f"≤ {figure.detections}") for figure in FIGURES[kind]},
        "area: small to 32² px, medium to 96² px, large above; .50:.95: the mean over ten of them",
    )


def evaluate_voc(
    truth: Path,
    results: Path,
    kind: VOCKind,
    *,
    split: str | None = None,
    rule: Rule = "devkit",
    iou: float = 0.5,
    classes: Sequence[str] = VOC_CLASSES[1:],
) -> Evaluation:
    """Scores a folder of the devkit's files of detections.

    Args:
        truth: A folder with `Annotations/`; the pictures need not be there.
        results: A folder with `CLASS.txt` or `comp4_det_SPLIT_CLASS.txt`.
        kind: By which year's average precision.
        split: A list of `ImageSets/Main/`; every file of `Annotations/` for None.
        rule: See `VOCTruth`.
        iou: Above 0, at most 1.
        classes: Their names.

    Raises:
        DataError: Where truth or results are not what they should be.
        UsageError: For an IoU out of range or a class named twice.
    """
    if not 0 < iou <= 1:
        raise UsageError(f"--iou {iou:g}: it lies above 0 and is at most 1")
    if len(set(classes)) < len(classes):
        raise UsageError(f"--classes names one twice: {' '.join(classes)}")
    annotations = _voc_annotations(truth, split, classes)
    rows = read_comp4(results, annotations)
    figures = VOCTruth(annotations, rule, iou).score(rows)
    chosen = {name: value for name, value in figures.items() if name.partition("/")[0].endswith(kind)}
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
        truth,
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
    names = sorted(path.stem for path in folder.glob("*.xml")) if split is None else list(voc_names(home, split))
    if not names:
        raise DataError(f"{folder} has no XML" if split is None else f"{home}: split '{split}' names no image")
    annotations = read_voc([(home, names)], classes)
    # Nothing is wrong with pictures here: they are not looked at.
    fatal = [defect for defect in annotations.defects if not defect.remedy and defect.file.suffix == ".xml"]
    if fatal:
        hint = "\n  --classes NAME … says which there are" if "unknown class" in fatal[0].what else ""
        raise DataError(f"{fatal[0]}\n  {len(fatal)} such defects in {folder}{hint}")
    return annotations
