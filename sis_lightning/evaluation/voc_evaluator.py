"""Pascal VOC's average precision, over all devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sis_lightning.evaluation.gathered import GatheredEvaluator, own_id, own_key, sources_of
from sis_lightning.evaluation.voc import Rule, VOCGroundTruth, write_comp4


class VOCEvaluator(GatheredEvaluator):
    """Pascal VOC's average precision over a whole split; see `VOCGroundTruth` for its rules.

    `update` takes for each image a prediction `boxes` (n, 4) x1, y1, x2, y2 in px, `labels` (n,) 1…K and `scores` (n,).

    Args:
        class_names: Class names by label.
        rule: `devkit` or `toolkit`.
        iou: Threshold of the IoU, above 0 and at most 1.

    Attributes:
        annotated: After `compute`: False if no image had annotations, so that there are no metrics.
    """

    def __init__(self, class_names: Sequence[str], rule: Rule = "devkit", iou: float = 0.5) -> None:
        super().__init__(class_names, range(len(class_names)))
        self.rule, self.iou = rule, iou

    def _score(self) -> dict[str, float]:
        return VOCGroundTruth(self._annotations(), self.rule, self.iou).score(self._box_rows(own_key))

    def write_results(self, folder: Path) -> Path:
        """Writes the predictions that the last `compute` scored, in the format of the devkit and VOC's server.

        Args:
            folder: The folder to write to, which is created if it does not exist.

        Returns:
            The folder; for images of the split `2007/test` it has `VOC2007/Main/comp4_det_test_CLASS.txt`.
        """
        truth_of = {key: truth for key, truth, _ in self._scored}
        rows: dict[str, list[dict[str, Any]]] = {
            split: [] for truth in truth_of.values() for split in sources_of(truth)
        }
        for row in self._box_rows(own_key):
            key = row["image_id"]
            for split in sources_of(truth_of[key]):
                rows[split].append({**row, "image_id": own_id(key, truth_of[key])})
        for split, found in rows.items():
            year, _, part = split.rpartition("/")
            place = Path(folder, f"VOC{year}", "Main") if year else Path(folder)
            write_comp4(found, self.class_names, place, part or "test")
        return Path(folder)
