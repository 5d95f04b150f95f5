"""COCO's metrics of detections and keypoints, over all devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sis_lightning.datasets.meta import Backend
from sis_lightning.errors import UsageError
from sis_lightning.evaluation.coco import MAX_DETECTIONS, COCOGroundTruth, check_max_detections
from sis_lightning.evaluation.gathered import GatheredEvaluator, own_id, own_key, sources_of
from sis_lightning.files import write_text


class COCOEvaluator(GatheredEvaluator):
    """COCO's 12 metrics of boxes or 10 of keypoints over a whole split, and the AP of each class, by COCO's own tools.

    `update` takes for each image a prediction `boxes` (n, 4) x1, y1, x2, y2 in px, `labels` (n,) 1…K and `scores` (n,),
    or `keypoints` (P, K, 3) x, y in px and score, and `scores` (P,).

    Args:
        kind: `bbox` or `keypoints`.
        category_ids: The data set's own id of each class; for keypoints that of the one class.
        backend: The library that computes: `pycocotools`, `faster-coco-eval`, which gives the same metrics faster, or
            `auto` for the latter if it is installed.
        class_names: Class names by label; None for the category ids.
        sigmas: Standard deviation of each keypoint for the object keypoint similarity; None for COCO's 17.
        max_detections: Number of boxes per image and class that count; COCO's is 100.

    Attributes:
        annotated: After `compute`: False if no image had annotations, so that there are no metrics.

    Raises:
        UsageError: If an argument is invalid, or `backend` is not installed (in `compute`).
    """

    def __init__(
        self,
        kind: Literal["bbox", "keypoints"],
        category_ids: Sequence[int],
        backend: Backend = "auto",
        *,
        class_names: Sequence[str] | None = None,
        sigmas: Sequence[float] | None = None,
        max_detections: int = MAX_DETECTIONS,
    ) -> None:
        if kind not in ("bbox", "keypoints"):
            raise UsageError(f"kind is {kind!r}, must be 'bbox' or 'keypoints'")
        super().__init__(class_names or [str(number) for number in category_ids], category_ids)
        self.kind, self.backend, self.max_detections = kind, backend, check_max_detections(max_detections)
        self.sigmas = tuple(sigmas) if sigmas else None

    def _score(self) -> dict[str, float]:
        annotations = self._annotations()
        if self.kind == "keypoints" and annotations.keypoints is None:
            raise UsageError("a target has no 'keypoints' to score against")
        known = COCOGroundTruth(annotations, self.kind, self.backend, self.sigmas, self.max_detections)
        return known.score(self._rows(own_key))

    def _rows(self, key_of: Any) -> list[dict[str, Any]]:
        if self.kind == "bbox":
            return self._box_rows(key_of)
        return [
            {"image_id": key_of(key, truth), "category_id": self.category_ids[0], "keypoints": person, "score": score}
            for key, truth, prediction in self._scored
            for person, score in zip(
                [person.ravel().tolist() for person in prediction["keypoints"]],
                prediction["scores"].tolist(),
                strict=True,
            )
        ]

    def write_results(self, folder: Path) -> Path:
        """Writes the predictions that the last `compute` scored, in COCO's result format.

        Args:
            folder: The folder to write to, which is created if it does not exist.

        Returns:
            The file: `detections_SPLIT_sis-lightning_results.json`, or `person_keypoints_…` for keypoints.
        """
        kind = "person_keypoints" if self.kind == "keypoints" else "detections"
        splits = dict.fromkeys(name for _, truth, _ in self._scored for name in sources_of(truth) if name)
        path = Path(folder, "_".join([kind, *splits, "sis-lightning", "results.json"]))
        write_text(path, json.dumps(self._rows(own_id)))
        return path
