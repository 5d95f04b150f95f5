"""Times COCO's box metrics in two libraries, and verifies that their values agree."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from sis_lightning.bench.report import Benchmark, benchmark
from sis_lightning.datasets.coco_reader import read_coco
from sis_lightning.datasets.meta import Backend
from sis_lightning.errors import DataError, UsageError
from sis_lightning.evaluation.coco import COCOGroundTruth

_CLASSES, _BOXES, _FALSE = 80, 36, 4  # classes of the data set; boxes and false detections per image
_SIDE = 640


def time_evaluators(images: int = 5000) -> Benchmark:
    """Times COCO's twelve box metrics in pycocotools and in faster-coco-eval, one after the other in this process.

    The boxes are random with a fixed seed: 36 per image of 80 classes, each detected with a jitter, and 4 false
    detections. Validating and indexing the ground truth is timed apart from scoring; imports are not timed.

    Args:
        images: Number of images, at least 1.

    Raises:
        DataError: If the metrics differ by more than 1e-12.
        UsageError: If there are no images, or faster-coco-eval is not installed.
    """
    if images < 1:
        raise UsageError(f"images is {images}, must be at least 1")
    ground_truth, found = _boxes(images)
    rows: list[dict[str, str | float]] = []
    metrics = []
    evaluators: tuple[Backend, ...] = ("pycocotools", "faster-coco-eval")
    for evaluator in evaluators:
        COCOGroundTruth(read_coco({"images": [], "categories": []}), "bbox", evaluator)  # imports
        begun = time.perf_counter()
        known = COCOGroundTruth(read_coco(ground_truth), "bbox", evaluator)
        indexed, indexed_cpu = time.perf_counter(), time.process_time()
        metrics.append(known.score(found))
        scored, scored_cpu = time.perf_counter(), time.process_time()
        rows.append(
            {
                "evaluator": evaluator,
                "index ground truth s": round(indexed - begun, 2),
                "score s": round(scored - indexed, 2),
                "score CPU s": round(scored_cpu - indexed_cpu, 2),
                "time / pycocotools": 0.0,
                "AP": metrics[-1]["AP"],
            }
        )
        rows[-1]["time / pycocotools"] = round(float(rows[-1]["score s"]) / max(float(rows[0]["score s"]), 0.01), 3)
    one, other = (np.array(list(values.values())) for values in metrics)
    if not np.allclose(one, other, rtol=0, atol=1e-12, equal_nan=True):
        raise DataError(f"the evaluators differ: {metrics[0]} and {metrics[1]}")
    difference = np.nanmax(np.abs(one - other))
    ratio = float(rows[0]["score s"]) / max(float(rows[1]["score s"]), 0.01)
    return benchmark(
        name="coco_eval",
        title=(
            f"COCO's box metrics: {images:,} images × {_CLASSES} classes × {_BOXES} boxes per image, "
            f"{_BOXES + _FALSE} detections per image"
        ),
        command="sis-lightning bench --eval" + ("" if images == 5000 else f" --images {images}"),
        rows=rows,
        note=f"faster-coco-eval scores {ratio:.1f} times as fast; the metrics differ by at most {difference:.1g}.",
        packages=(*evaluators, "numpy"),
    )


def _boxes(images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth in COCO's format, and detections of it."""
    rng = np.random.default_rng(0)
    count = images * _BOXES
    owner = np.repeat(np.arange(1, images + 1), _BOXES)
    labels = rng.integers(1, _CLASSES + 1, count)
    # Sides of 4 to 400 px, as many in each octave, so that COCO's small, medium and large objects all occur.
    sides = np.exp(rng.uniform(np.log(4), np.log(400), (count, 2)))
    corners = rng.uniform(0, _SIDE - sides)
    boxes = np.concatenate([corners, sides], axis=1)
    crowds = rng.random(count) < 0.01
    jitter = rng.normal(0, 0.1, boxes.shape) * np.concatenate([sides, sides], axis=1)
    near = np.concatenate([boxes[:, :2] + jitter[:, :2], np.abs(sides + jitter[:, 2:]) + 0.1], axis=1)
    false = np.concatenate(
        [rng.uniform(0, _SIDE / 2, (images * _FALSE, 2)), rng.uniform(4, 300, (images * _FALSE, 2))], 1
    )
    found = np.concatenate([near, false])
    owners = np.concatenate([owner, np.repeat(np.arange(1, images + 1), _FALSE)])
    named = np.concatenate([labels, rng.integers(1, _CLASSES + 1, len(false))])
    scores = np.concatenate([rng.beta(4, 2, count), rng.beta(2, 4, len(false))])
    ground_truth = {
        "images": [{"id": number, "width": _SIDE, "height": _SIDE} for number in range(1, images + 1)],
        "categories": [{"id": number, "name": str(number)} for number in range(1, _CLASSES + 1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for i, (image, label, box, crowd) in enumerate(
                zip(owner.tolist(), labels.tolist(), boxes.tolist(), crowds.tolist(), strict=True), start=1
            )
        ],
    }
    rows = [
        {"image_id": image, "category_id": label, "bbox": box, "score": score}
        for image, label, box, score in zip(
            owners.tolist(), named.tolist(), found.tolist(), scores.tolist(), strict=True
        )
    ]
    return ground_truth, rows
