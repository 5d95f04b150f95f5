"""The base of evaluators that score a whole split at once: they gather it from all devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from sis_lightning.datasets.annotations import Annotations, GroundTruth
from sis_lightning.datasets.paths import PathArray
from sis_lightning.errors import UsageError

#: The predictions of one image that an evaluator scores, by name, as tensors or arrays.
Detections = Mapping[str, Any]
#: The image's key (its split and id), its ground truth and its predictions as arrays.
_Entry = tuple[Any, GroundTruth, dict[str, NDArray[Any]]]


class GatheredEvaluator(Metric, ABC):
    """Collects predictions and ground truth image by image, and scores them once over all devices.

    `compute` gathers both from all devices, scores each image once (a distributed sampler may repeat some) on the first
    rank and gives the same metrics on all ranks. An exception while scoring is raised on all ranks.

    Args:
        class_names: Class names by label; the predictions' labels are 1…K in this order.
        category_ids: The data set's own id of each class.

    Attributes:
        annotated: After `compute`: False if no image had annotations, so that there are no metrics.
    """

    full_state_update = False

    def __init__(self, class_names: Sequence[str], category_ids: Sequence[int]) -> None:
        super().__init__(sync_on_compute=False)
        self.class_names, self.category_ids = tuple(class_names), tuple(category_ids)
        self.annotated = True
        self._entries: list[_Entry] = []
        self._scored: list[_Entry] = []

    def update(self, predictions: Sequence[Detections], targets: Sequence[GroundTruth]) -> None:
        """Adds the predictions of some images; images without predictions count too.

        Args:
            predictions: For each image, what the subclass scores, as tensors or arrays.
            targets: The ground truth of each image, as in a batch's `truth` (see `Annotations.ground_truth`). `boxes`
                and `labels` are enough: without an `image_id` each target is taken for another image.

        Raises:
            UsageError: If there are not as many predictions as targets.
        """
        if len(predictions) != len(targets):
            raise UsageError(f"{len(predictions)} predictions for {len(targets)} images")
        for prediction, target in zip(predictions, targets, strict=True):
            truth = _complete(target)
            key = (truth["source"], truth["image_id"])
            if truth["image_id"] is None:
                key = (_rank(), len(self._entries))
            self._entries.append((key, truth, {name: _array(value) for name, value in prediction.items()}))

    def compute(self) -> dict[str, float]:
        """Scores the predictions of all devices.

        Returns:
            The metrics by their names, NaN if there is nothing to find; none if no image has annotations.
        """
        shared = dist.is_available() and dist.is_initialized()
        parts: list[Any] = [self._entries]
        if shared:
            # Only the first rank scores, so only it needs the memory for all entries.
            received: list[Any] | None = [None] * dist.get_world_size() if _rank() == 0 else None
            dist.gather_object(self._entries, received)
            parts = received or []
        answer: list[Any] = [None]
        if _rank() == 0:
            # The last entry of an image counts, at the place of its first.
            merged = {entry[0]: entry for part in parts for entry in part}
            self._scored = list(merged.values())
            try:
                annotated = not self._scored or any(truth["annotated"] for _, truth, _ in self._scored)
                answer = [(self._score() if annotated else {}, annotated)]
            except Exception as error:
                if not shared:
                    raise
                answer = [error]  # the other ranks wait for the metrics
        if shared:
            dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        metrics, self.annotated = answer[0]
        return dict(metrics)

    def reset(self) -> None:
        """Forgets all images; `write_results` still writes what the last `compute` scored."""
        super().reset()
        self._entries = []

    @abstractmethod
    def _score(self) -> dict[str, float]:
        """The metrics of `self._scored`."""

    @abstractmethod
    def write_results(self, folder: Path) -> Path:
        """Writes the predictions that the last `compute` scored, in the format of the data set's server.

        On other ranks than the first there is nothing to write.

        Args:
            folder: The folder to write to, which is created if it does not exist.

        Returns:
            The file or folder.
        """

    def _annotations(self) -> Annotations:
        """The gathered ground truth as one set of annotations, whose image ids are the entries' keys."""
        truths = [truth for _, truth, _ in self._scored]

        def joined(name: str, width: tuple[int, ...], dtype: type) -> Any:
            if any(name not in truth for truth in truths):
                return None
            return np.concatenate([np.zeros((0, *width), dtype), *(truth[name] for truth in truths)])

        keypoints = [truth["keypoints"] for truth in truths if "keypoints" in truth]
        count = keypoints[0].shape[1] if keypoints else 0
        return Annotations(
            source=Path("ground truth"),
            class_names=self.class_names,
            category_ids=self.category_ids,
            paths=PathArray(str(truth["image_id"]) for truth in truths),
            image_ids=[key for key, _, _ in self._scored],
            sizes=np.zeros((len(truths), 2), dtype=np.int64),
            image=np.repeat(np.arange(len(truths)), [len(truth["labels"]) for truth in truths]),
            boxes=joined("boxes", (4,), np.float64),
            labels=joined("labels", (), np.int64) - 1,
            ignored=joined("ignored", (), np.bool_),
            keypoints=joined("keypoints", (count, 3), np.float64),
            areas=joined("areas", (), np.float64),
            num_keypoints=joined("num_keypoints", (), np.int64),
            extents=joined("extents", (4,), np.float64),
        )

    def _box_rows(self, key_of: Callable[[Any, GroundTruth], Any]) -> list[dict[str, Any]]:
        """Detections in COCO's result format, each image under the id that `key_of` gives."""
        rows: list[dict[str, Any]] = []
        for key, truth, prediction in self._scored:
            image_id = key_of(key, truth)
            extents = prediction["boxes"].astype(np.float64).reshape(-1, 4)
            extents[:, 2:] -= extents[:, :2]
            rows += [
                {"image_id": image_id, "category_id": self.category_ids[label - 1], "bbox": box, "score": score}
                for box, label, score in zip(
                    extents.tolist(), prediction["labels"].tolist(), prediction["scores"].tolist(), strict=True
                )
            ]
        return rows


def sources_of(truth: GroundTruth) -> tuple[str, ...]:
    """Names of the splits that list an image."""
    source = truth["source"]
    return (source,) if isinstance(source, str) else tuple(source)


def own_id(key: Any, truth: GroundTruth) -> Any:
    """The data set's own id of an image, for results files; the entry's number if it has none."""
    return key[1] if truth["image_id"] is None else truth["image_id"]


def own_key(key: Any, _: GroundTruth) -> Any:
    """The key under which an image is scored."""
    return key


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() and value.element_size() < 4 else value.numpy()
    array: NDArray[Any] = np.asarray(value)
    return array


def _complete(target: Mapping[str, Any]) -> GroundTruth:
    """A ground truth with all that is scored; what is missing follows from its boxes or keypoints."""
    truth = {"image_id": None, "source": "", "annotated": True, **target}
    if isinstance(truth["source"], list):
        truth["source"] = tuple(truth["source"])
    for name in _ARRAYS & truth.keys():
        truth[name] = _array(truth[name])
    if "boxes" not in truth:
        raise UsageError(f"a target has no 'boxes'; it has {', '.join(map(repr, target)) or 'nothing'}")
    truth.setdefault("labels", np.ones(len(truth["boxes"]), dtype=np.int64))
    count = len(truth["labels"])
    truth["boxes"] = truth["boxes"].astype(np.float64).reshape(-1, 4)
    truth.setdefault("ignored", np.zeros(count, dtype=np.bool_))
    sides = truth["boxes"][:, 2:] - truth["boxes"][:, :2]
    truth.setdefault("areas", sides.prod(axis=1))
    if "keypoints" in truth:
        truth.setdefault("num_keypoints", np.count_nonzero(truth["keypoints"][..., 2] > 0, axis=1))
    wanted = ("image_id", "source", "annotated")
    return {name: value for name, value in truth.items() if name in _ARRAYS or name in wanted}


_ARRAYS = {"boxes", "labels", "ignored", "areas", "extents", "keypoints", "num_keypoints"}
