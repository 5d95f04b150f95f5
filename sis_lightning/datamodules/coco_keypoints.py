"""Keypoints of persons on COCO, one crop per person."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from sis_lightning.datamodules.base import Transform
from sis_lightning.datamodules.coco_detection import COCODataModule
from sis_lightning.datasets.base import ImageDataset, Sample
from sis_lightning.datasets.coco import COCOKeypointsDataset
from sis_lightning.datasets.constants import Split
from sis_lightning.datasets.crops import Crop
from sis_lightning.datasets.folder import UnlabelledDataset
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.person_boxes import Boxes, PersonBoxes
from sis_lightning.errors import UsageError
from sis_lightning.option_effects import Effect

WHOLE_IMAGES = "none: each image is taken as one person"


@dataclass(frozen=True)
class RandomPersonCrop:
    """Crops the person of a training sample, randomly rotated, scaled and flipped.

    Attributes:
        output: Width and height of the crop in px.
        rotation: Standard deviation of the rotation in degrees.
        scale: Standard deviation of the random factor by which the crop is resized. The factor is limited to 1 ±
            `scale`.
        flip_order: For each keypoint, the index of the keypoint whose place it takes in a flipped crop.
    """

    output: tuple[int, int]
    rotation: float
    scale: float
    flip_order: tuple[int, ...]

    def __call__(self, sample: Sample) -> Sample:
        """Returns `image` (3, h, w), `name` and `keypoints` (K, 3): x, y in px of the crop, and visibility."""
        crop = Crop.around(sample["box"], self.output)
        factor = float(np.clip(1 + self.scale * np.random.randn(), 1 - self.scale, 1 + self.scale))
        angle = float(np.clip(self.rotation * np.random.randn(), -2 * self.rotation, 2 * self.rotation))
        crop = Crop(
            crop.centre,
            (crop.size[0] * factor, crop.size[1] * factor),
            self.output,
            rotation=angle if np.random.rand() < 0.6 else 0.0,
            flipped=bool(np.random.rand() < 0.5),
        )
        keypoints = crop.move_keypoints(sample["keypoints"], self.flip_order)
        keypoints[keypoints[:, 2] == 0] = 0  # keypoints that are not annotated have no place
        return {
            "image": crop.cut(sample["image"]),
            "name": sample["name"],
            "keypoints": torch.from_numpy(keypoints).float(),
        }


@dataclass(frozen=True)
class PersonCrops:
    """Crops all persons of an evaluation sample.

    Attributes:
        output: Width and height of the crops in px.
        box_source: The origin of the boxes of samples that have no `person_boxes`.
        boxes: Boxes (P, 5) x1, y1, x2, y2 in px and score of these samples, by their names; None takes each whole image
            as one person.
    """

    output: tuple[int, int]
    box_source: str = WHOLE_IMAGES
    boxes: Mapping[str, Boxes] | None = None

    def __call__(self, sample: Sample) -> Sample:
        """Adds `crops` (P, 3, h, w), `to_image` (P, 2, 3), `person_boxes` (P, 4), `box_scores` and `areas` (P,)."""
        sample = dict(sample)
        persons: Boxes | None = sample.pop("person_boxes", None)
        if persons is None:
            sample["box_source"] = self.box_source
            if self.boxes is not None:
                persons = self.boxes.get(sample["name"], np.zeros((0, 5)))
            else:
                height, width = sample["image"].shape[1:]
                persons = np.array([[0, 0, width, height, 1]], dtype=np.float64)
        crops = [Crop.around(person[:4], self.output) for person in persons]
        width, height = self.output
        cut = [crop.cut(sample["image"]) for crop in crops]
        matrices = np.array([crop.to_image for crop in crops]).reshape(-1, 2, 3)
        return {
            **sample,
            "crops": torch.stack(cut) if cut else sample["image"].new_zeros(0, len(sample["image"]), height, width),
            # NumPy arrays, because Lightning casts the tensors of a batch to half precision if the Trainer uses it.
            "to_image": matrices,
            "person_boxes": persons[:, :4].copy(),
            "box_scores": persons[:, 4].copy(),
            "areas": np.array([crop.size[0] * crop.size[1] for crop in crops], dtype=np.float64),
        }


class COCOKeypointsDataModule(COCODataModule):
    """Top-down keypoint detection on COCO, with 17 keypoints per person (Simple Baselines, Xiao et al. 2018).

    Other objects and keypoints are those that the category of the annotation file names.

    Training: one person per sample. The person's box is extended to the aspect ratio of the input, scaled by 1.25, and
    cropped. Scale and rotation are drawn from truncated normal distributions, and 60 % of the crops are rotated. A
    random horizontal flip exchanges left and right keypoints. Crowds and persons without any annotated keypoint are
    left out. Evaluation: all persons of an image, in boxes from the ground truth (of persons with keypoints) or from a
    detector.

    Args:
        root: Folder that contains `annotations/`, or a folder `coco` with `annotations/`.
        input_size: Height and width of the crops in px, each divisible by 32.
        rotation: Standard deviation of the random rotation in degrees, which is limited to twice this value.
        scale: Standard deviation of the random factor by which the crop is resized. The factor is limited to 1 ±
            `scale`.
        person_boxes: JSON file with the person boxes of a detector for evaluation and prediction: results in COCO's
            format, or the `predictions.json` that `predict` wrote for a detection task. None: the ground truth boxes,
            or each whole image as one person with `predict_path`.
        least_box_score: Minimum score of the boxes in `person_boxes`; boxes with a lower score are not used.
        category: Name of the category with the keypoints. None: the only one that has keypoints, or `person`.
        flip_pairs: Names (left, right) of the keypoints that a horizontal flip exchanges, such as
            `[[left_eye, right_eye]]`. None: those whose names differ in left and right, or in a separate l and r.
        sigmas: Standard deviation of each keypoint, as a share of the object's size, for the object keypoint similarity
            (OKS). None: those of the annotation file, or COCO's; for keypoints of unknown names the mean of COCO's.
        files: `train_split`, `val_split`, `test_split`, `evaluator`, `limit`, and `batch_size`, `num_workers` and the
            other arguments of `SISDataModule`.

    Raises:
        UsageError: If an argument is invalid.
        DataError: In `setup`, if files are missing or have defects that cannot be repaired; in a run, if an image is
            unreadable or of another size than its annotation says.
    """

    kind = "keypoints"
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "input_size": Effect.RESULT,
        "rotation": Effect.RESULT,
        "scale": Effect.RESULT,
        "person_boxes": Effect.RESULT,
        "least_box_score": Effect.RESULT,
        "category": Effect.RESULT,
        "flip_pairs": Effect.RESULT,
        "sigmas": Effect.RESULT,
    }

    def __init__(
        self,
        root: str,
        input_size: tuple[int, int] = (256, 192),
        rotation: float = 40.0,
        scale: float = 0.3,
        person_boxes: str | None = None,
        least_box_score: float = 0.0,
        category: str | None = None,
        flip_pairs: list[tuple[str, str]] | None = None,
        sigmas: list[float] | None = None,
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
        self.category, self.flip_pairs, self.sigmas = category, flip_pairs, sigmas
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
        evaluation: dict[str, Any] = {
            "evaluation": True, "person_boxes": self.person_boxes, "least_box_score": self.least_box_score
        }  # fmt: skip
        return COCOKeypointsDataset(
            self.root,
            self.splits[split],
            limit=self.limit,
            category=self.category,
            flip_pairs=self.flip_pairs,
            sigmas=self.sigmas,
            **({} if split == "train" else evaluation),
        )

    def setup(self, stage: str | None = None) -> None:
        """Makes the Datasets; for a folder of images to predict on, finds the person boxes by the images' names."""
        super().setup(stage)
        dataset = self.datasets.get("predict")
        if stage == "predict" and isinstance(dataset, UnlabelledDataset):
            self.notes["person boxes"] = WHOLE_IMAGES
            if self.person_boxes:
                boxes = PersonBoxes(self.person_boxes, self.least_box_score)
                self._named_boxes = boxes.of_names(dataset.names, self.predict_path)
                self.notes["person boxes"] = boxes.description

    @property
    def train_transform(self) -> Transform:
        """Crops one person, randomly rotated, scaled and flipped; `keypoints` (K, 3) are in px of the crop."""
        return RandomPersonCrop(self._output, self.rotation, self.scale, self.meta.flip_order)

    @property
    def eval_transform(self) -> Transform:
        """Crops all persons: `crops` (P, 3, h, w), `to_image` (P, 2, 3), `box_scores` and `areas` (P,)."""
        return PersonCrops(self._output, self.notes.get("person boxes", WHOLE_IMAGES), self._named_boxes)

    @property
    def eval_batch_size(self) -> int:
        """Images per evaluation step; smaller, because each has several crops."""
        return min(self.batch_size, 16 * self._ranks()[1])
