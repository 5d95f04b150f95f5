"""Keypoints of persons on COCO, one crop a person."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from sis_lightning.datamodules.base import Split
from sis_lightning.datamodules.coco_detection import COCODataModule
from sis_lightning.datasets.base import Batch, ImageDataset, Sample
from sis_lightning.datasets.coco import COCOKeypointsDataset
from sis_lightning.datasets.folder import UnlabelledDataset
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.person_boxes import Boxes, PersonBoxes
from sis_lightning.errors import UsageError
from sis_lightning.models.heatmap_codec import Crop
from sis_lightning.option_effects import Effect

WHOLE_IMAGES = "none: each image is taken as one person"


class COCOKeypointsDataModule(COCODataModule):
    """COCO's persons with 17 keypoints, for top-down estimation (Simple Baselines, Xiao et al. 2018).

    Training: one person a sample, a crop of the person's box extended to the input's proportions × 1.25; scale and
    rotation from truncated normal distributions, rotation for 60 % of the crops; random horizontal flip with left and
    right exchanged. Crowds and persons without any annotated keypoint are left out. Evaluation: all persons of an
    image, in boxes from the ground truth (of persons with keypoints) or from a detector.

    Args:
        root: Folder that holds `annotations/` (or a folder `coco` that does).
        input_size: Height and width of the crops in px, each divisible by 32.
        rotation: Standard deviation of the rotation in degrees; the rotation is at most twice that.
        scale: Standard deviation, and greatest change, of the crop's size, as a share of it.
        person_boxes: A detector's results: a JSON in COCO's format, or the `predictions.json` of our own detection's
            `predict`; None for the ground truth's boxes.
        least_box_score: Least score of the boxes of `person_boxes`; others are left out.
        files: `train_split`, `val_split`, `test_split`, `evaluator`, `limit`, and `batch_size`, `num_workers` and the
            other arguments of `SISDataModule`.

    Raises:
        UsageError: If an argument is invalid.
        DataError: In `setup`, if files are missing or have defects without a remedy; in a run, if an image is
            unreadable or of another size than its annotation says.
    """

    kind = "keypoints"
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "input_size": Effect.RESULT,
        "rotation": Effect.RESULT,
        "scale": Effect.RESULT,
        "person_boxes": Effect.RESULT,
        "least_box_score": Effect.RESULT,
    }

    def __init__(
        self,
        root: str,
        input_size: tuple[int, int] = (256, 192),
        rotation: float = 40.0,
        scale: float = 0.3,
        person_boxes: str | None = None,
        least_box_score: float = 0.0,
        **files: Any,
    ) -> None:
        super().__init__(root, **files)
        height, width = input_size
        if height < 32 or width < 32 or height % 32 or width % 32:
            raise UsageError(f"input_size is {list(input_size)}: height and width must be divisible by 32")
        if rotation < 0 or not 0 <= scale < 1:
            raise UsageError(f"rotation is {rotation} (at least 0), scale {scale} (0 to below 1)")
        self.image_size = (height, width)
        self.rotation, self.scale = rotation, scale
        self.person_boxes = Path(person_boxes) if person_boxes else None
        self.least_box_score = least_box_score
        self._named_boxes: dict[str, Boxes] | None = None

    @property
    def _output(self) -> tuple[int, int]:
        assert self.image_size is not None
        height, width = self.image_size
        return width, height

    def describe(self, meta: DatasetMeta) -> DatasetMeta:
        """Adds the size of the crops."""
        return dataclasses.replace(super().describe(meta), image_size=self.image_size)

    def dataset(self, split: Split) -> ImageDataset:
        """Persons for training, images of persons for evaluation."""
        name = self.splits[split]
        if split == "train":
            return COCOKeypointsDataset(self.root, name, limit=self.limit)
        return COCOKeypointsDataset(
            self.root, name, evaluation=True, person_boxes=self.person_boxes, min_box_score=self.least_box_score,
            limit=self.limit,
        )  # fmt: skip

    def setup(self, stage: str | None = None) -> None:
        """Makes the Datasets; for a folder of images to predict on, finds the person boxes by the images' names."""
        super().setup(stage)
        dataset = self.datasets.get("predict")
        if stage == "predict" and isinstance(dataset, UnlabelledDataset):
            self.notes["person boxes"] = WHOLE_IMAGES
            if self.person_boxes:
                boxes = PersonBoxes(self.person_boxes, self.least_box_score)
                self.notes["person boxes"] = boxes.description
                self._named_boxes = boxes.of_names(dataset.names, self.predict_path)

    def train_transform(self, sample: Sample) -> Sample:
        """Crops one person, randomly rotated, scaled and flipped; `keypoints` (17, 3) are in px of the crop."""
        crop = Crop.around(sample["box"], self._output)
        factor = float(np.clip(1 + self.scale * np.random.randn(), 1 - self.scale, 1 + self.scale))
        angle = float(np.clip(self.rotation * np.random.randn(), -2 * self.rotation, 2 * self.rotation))
        crop = Crop(
            crop.centre,
            (crop.size[0] * factor, crop.size[1] * factor),
            self._output,
            rotation=angle if np.random.rand() < 0.6 else 0.0,
            flipped=bool(np.random.rand() < 0.5),
        )
        keypoints = crop.move_keypoints(sample["keypoints"], self.meta.flip_order)
        keypoints[keypoints[:, 2] == 0] = 0  # keypoints that are not annotated have no place
        return {
            "image": crop.cut(sample["image"]),
            "name": sample["name"],
            "keypoints": torch.from_numpy(keypoints).float(),
        }

    def eval_transform(self, sample: Sample) -> Sample:
        """Crops all persons: `crops` (P, 3, h, w), `to_image` (P, 2, 3), `box_scores` and `areas` (P,)."""
        persons: Boxes | None = sample.pop("person_boxes", None)
        if persons is None:
            sample["box_source"] = self.notes.get("person boxes", WHOLE_IMAGES)
            if self._named_boxes is not None:
                persons = self._named_boxes.get(sample["name"], np.zeros((0, 5)))
            else:
                height, width = sample["image"].shape[1:]
                persons = np.array([[0, 0, width, height, 1]], dtype=np.float64)
        crops = [Crop.around(person[:4], self._output) for person in persons]
        width, height = self._output
        cut = [crop.cut(sample["image"]) for crop in crops]
        matrices = np.array([crop.to_image for crop in crops]).reshape(-1, 2, 3)
        return {
            **sample,
            "crops": torch.stack(cut) if cut else torch.zeros(0, 3, height, width, dtype=torch.uint8),
            # Arrays, because a Trainer of half precision would round tensors.
            "to_image": matrices,
            "box_scores": persons[:, 4].copy(),
            "areas": np.array([crop.size[0] * crop.size[1] for crop in crops], dtype=np.float64),
        }

    @property
    def eval_batch_size(self) -> int:
        """Number of images of several persons each: as many as persons in a training batch would fill memory."""
        return min(self.batch_size, 16 * self._ranks()[1])

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the crops only: whole images are only drawn on, and the rest is used in float64 on the CPU."""
        stay = {key: value for key, value in batch.items() if "crops" in batch and key != "crops"}
        move = {key: value for key, value in batch.items() if key not in stay}
        moved: Batch = super().transfer_batch_to_device(move, device, dataloader_idx)
        return {**stay, **moved}
