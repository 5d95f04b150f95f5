"""People, one crop each, with their joints: COCO's keypoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sis_lightning.datamodules.base import Batch, FolderSource, Sample, Source, Split
from sis_lightning.datamodules.detection import AnnotatedSource, COCOFiles
from sis_lightning.datasets.annotations import Annotations, load_json
from sis_lightning.errors import DataError, UsageError
from sis_lightning.models.heatmap_codec import Crop

Boxes = NDArray[np.float64]  # (P, 5): x1, y1, x2, y2, score


class _PersonSource(AnnotatedSource):
    """One annotated person a sample, for training."""

    def __len__(self) -> int:
        return len(self.annotations.image)

    def __getitem__(self, index: int) -> Sample:
        known = self.annotations
        picture = int(known.image[index])
        assert known.keypoints is not None
        return {
            "image": self.read(picture),
            "name": f"{known.paths[picture].stem}_{index}",
            "box": known.boxes[index],
            "joints": known.keypoints[index],
        }

    def groups(self) -> None:
        """All crops have one size."""


class _PeopleSource(AnnotatedSource):
    """One image a sample, with the boxes of the people to look for, for evaluation."""

    def __init__(self, annotations: Annotations, people: dict[Any, Boxes] | None) -> None:
        super().__init__(annotations)
        self.people = people

    def __getitem__(self, index: int) -> Sample:
        known = self.annotations
        objects = known.objects(index)
        assert known.keypoints is not None
        joints = known.keypoints[objects]
        annotated = (joints[..., 2] > 0).any(axis=1) & ~known.ignored[objects]
        image_id = known.image_ids[index]
        if self.people is None:
            boxes = known.boxes[objects][annotated]
            people = np.column_stack([boxes, np.ones(len(boxes))])
        else:
            people = self.people.get(image_id, np.zeros((0, 5)))
        return {
            "image": self.read(index),
            "name": known.paths[index].stem,
            "image_id": image_id,
            "people": people,
            "true_joints": torch.from_numpy(joints[annotated]),
        }


class COCOKeypointsDataModule(COCOFiles):
    """COCO's people with 17 joints, for top-down estimation (Simple Baselines, Xiao et al. 2018).

    Training: one person a sample, a crop of its box extended to the input's proportions × 1.25; scale and rotation
    drawn from normal distributions cut at their ranges, rotation for 60 % of the crops, half of them mirrored with
    left and right exchanged. Crowds and people without any joint are left out. Evaluation: all people of an image, in
    boxes from the ground truth (of people with joints) or from a detector. ImageNet's mean and standard deviation.

    Args:
        root: Folder that holds `annotations/` (or a folder `coco` that does).
        input_size: Height and width of the crops in px, each divisible by 32.
        rotation: Standard deviation of the rotation in degrees; at most twice that.
        scale: Standard deviation, and greatest change, of the crop's size, as a share of it.
        person_boxes: None for the ground truth's, or a detector's results: a JSON in COCO's format, or the
            `predictions.json` of our own detection's `predict`.
        least_box_score: Boxes of `person_boxes` below it are left out.
        files: `train_split`, `val_split`, `test_split` of the files' names (`train2017`, `val2017`, as val);
            `evaluator`, `limit`, and `batch_size`, `num_workers` and what else every DataModule takes.

    Raises:
        UsageError: For an input size or ranges that cannot be.
        DataError: In `setup`, for missing files and defects without remedy (`sis-lightning check-data` lists them all);
            in a run, for unreadable images or images of another size than their annotation says.
    """

    kind = "keypoints"
    task = "person_keypoints"
    ignored_name = "crowds"

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
            raise UsageError(f"data.input_size is {list(input_size)}: height and width must be divisible by 32")
        if rotation < 0 or not 0 <= scale < 1:
            raise UsageError(f"data.rotation is {rotation} (at least 0), data.scale {scale} (0 to below 1)")
        self.output = (width, height)
        self.rotation, self.scale = rotation, scale
        self.person_boxes = Path(person_boxes) if person_boxes else None
        self.least_box_score = least_box_score
        self.named_boxes: dict[Any, Boxes] | None = None

    def source(self, split: Split) -> Source:
        """People for training, images of people for evaluation."""
        known = self.usable(split)
        assert known.keypoints is not None
        if split == "train":
            known.drop(np.all(known.keypoints[..., 2] == 0, axis=1), "people without joints")
            self._note_dropped(split, known)
            if not len(known.image):
                raise DataError(f"{known.source}: nobody in it has joints to learn from")
            return _PersonSource(known)
        if self.person_boxes is None:
            if not known.annotated:
                raise UsageError(
                    f"{known.source} has no annotations, and so no boxes of people: give a detector's with\n"
                    "  --data.person_boxes FILE"
                )
            self.notes["person boxes"] = "ground truth"
            return _PeopleSource(known, None)
        people = self._read_boxes(known.category_ids[0])
        # Our own detection's predictions go by the pictures' names.
        ids = set(known.image_ids)
        by_name = {path.stem: image for path, image in zip(known.paths, known.image_ids, strict=True)}
        people = {image if image in ids else by_name.get(image, image): boxes for image, boxes in people.items()}
        if people and not ids.intersection(people):
            raise DataError(
                f"data.person_boxes {self.person_boxes}: none of its {len(people)} images is in {known.source},\n"
                f"  such as {next(iter(people))!r}: are they of another split?"
            )
        return _PeopleSource(known, people)

    def annotations(self, split: Split) -> Annotations:
        """Reads the JSON of a split; of all categories there, people alone."""
        known = super().annotations(split)
        if len(known.class_names) != 1:
            known.keep_class("person")
        return known

    def _read_boxes(self, category: int) -> dict[Any, Boxes]:
        assert self.person_boxes is not None
        people, dropped = read_person_boxes(self.person_boxes, self.least_box_score, category)
        count = sum(len(boxes) for boxes in people.values())
        left = f", {dropped:,} of no area left out" if dropped else ""
        self.notes["person boxes"] = f"{self.person_boxes} ({count:,} of score ≥ {self.least_box_score:g}{left})"
        return people

    def setup(self, stage: str) -> None:
        """Lists the splits; for a folder of pictures to predict on, reads the boxes by the pictures' names."""
        super().setup(stage)
        if stage == "predict" and self.predict_path:
            self.notes["person boxes"] = "none: each picture is taken as one person"
            source = self.sources["predict"]
            if self.person_boxes and isinstance(source, FolderSource):
                people = self._read_boxes(1)
                # COCO's files are named by their numbers.
                keys = {name: int(name) if name.isdecimal() and name not in people else name for name in source.names}
                self.named_boxes = {name: people[key] for name, key in keys.items() if key in people}
                if not self.named_boxes:
                    raise DataError(
                        f"data.person_boxes {self.person_boxes}: none of the {len(source)} pictures in "
                        f"{self.predict_path} is named in it, such as '{source.names[0]}'"
                    )

    def train_transform(self, sample: Sample) -> Sample:
        """Crops one person, turned, scaled and mirrored at random; `joints` (17, 3) are in the crop's px."""
        crop = Crop.around(sample["box"], self.output)
        factor = float(np.clip(1 + self.scale * np.random.randn(), 1 - self.scale, 1 + self.scale))
        turn = float(np.clip(self.rotation * np.random.randn(), -2 * self.rotation, 2 * self.rotation))
        crop = Crop(
            crop.centre,
            (crop.size[0] * factor, crop.size[1] * factor),
            self.output,
            rotation=turn if np.random.rand() < 0.6 else 0.0,
            mirrored=bool(np.random.rand() < 0.5),
        )
        joints = crop.joints(sample["joints"])
        joints[joints[:, 2] == 0] = 0  # what is not annotated lies nowhere
        return {
            "image": crop.cut(sample["image"]),
            "name": sample["name"],
            "joints": torch.from_numpy(joints).float(),
        }

    def eval_transform(self, sample: Sample) -> Sample:
        """Crops all people: `crops` (P, 3, h, w), `to_image` (P, 2, 3), `box_scores` and `areas` (P,)."""
        people: Boxes | None = sample.pop("people", None)
        if people is None and self.named_boxes is not None:
            people = self.named_boxes.get(sample["name"], np.zeros((0, 5)))
        elif people is None:
            height, width = sample["image"].shape[1:]
            people = np.array([[0, 0, width, height, 1]], dtype=np.float64)
        crops = [Crop.around(person[:4], self.output) for person in people]
        width, height = self.output
        cut = [crop.cut(sample["image"]) for crop in crops]
        matrices = np.array([crop.to_image for crop in crops]).reshape(-1, 2, 3)
        return {
            **sample,
            "crops": torch.stack(cut) if cut else torch.zeros(0, 3, height, width, dtype=torch.uint8),
            "to_image": torch.from_numpy(matrices),
            "box_scores": torch.from_numpy(people[:, 4].copy()),
            "areas": torch.tensor([crop.size[0] * crop.size[1] for crop in crops], dtype=torch.float64),
        }

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalises the crops; the whole images of an evaluation stay bytes, as they are only drawn on."""
        if "crops" not in batch:
            return super().on_after_batch_transfer(batch, dataloader_idx)
        return {**batch, "crops": [self.normalize(crops) for crops in batch["crops"]]}

    @property
    def eval_batch_size(self) -> int:
        """Images, of some people each: a training batch's number of them would fill memory."""
        return min(self.batch_size, 16 * self._ranks()[1])

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Crops alone: whole images are only drawn on, and what is decoded with stays exact, on the CPU."""
        stay = {key: value for key, value in batch.items() if "crops" in batch and key != "crops"}
        move = {key: value for key, value in batch.items() if key not in stay}
        moved: Batch = super().transfer_batch_to_device(move, device, dataloader_idx)
        return {**stay, **moved}


def read_person_boxes(path: Path, least_score: float = 0.0, category: int = 1) -> tuple[dict[Any, Boxes], int]:
    """Reads people's boxes by image.

    Args:
        path: JSON: results in COCO's format, or our detection's `predictions.json`, of which class `person` is taken
            (those that it shows: `model.shown_score`).
        least_score: Boxes below it are left out.
        category: COCO's number of people.

    Returns:
        For each `image_id`, or name of a picture, boxes (P, 5) x1, y1, x2, y2, score; and how many of no area there
        were besides.

    Raises:
        DataError: Where the file is missing or of neither format, or a box is not finite numbers: which one.
    """
    rows = load_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: not a detector's results: a list of objects with image_id, category_id, bbox, score")
    people: dict[Any, list[list[float]]] = {}
    dropped = 0
    for place, row in enumerate(rows):
        try:
            if "objects" in row:
                image: Any = str(row["name"])
                boxes = [[*item["box"], item["score"]] for item in row["objects"] if item["class"] == "person"]
            else:
                image, (x, y, width, height) = row["image_id"], row["bbox"]
                boxes = [[x, y, x + width, y + height, row["score"]]] if row["category_id"] == category else []
            found = people.setdefault(image, [])
            numbers = [box for box in boxes if len(box) == 5 and all(map(math.isfinite, box))]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: entry {place} is not a detection ({type(error).__name__}: {error})") from None
        if len(numbers) < len(boxes):
            raise DataError(f"{path}: entry {place} is not a detection: its box and score are not five finite numbers")
        # Detectors write boxes of no area now and then.
        areas = [box for box in numbers if box[0] < box[2] and box[1] < box[3]]
        dropped += len(numbers) - len(areas)
        found += [box for box in areas if box[4] >= least_score]
    return {image: np.array(boxes, dtype=np.float64).reshape(-1, 5) for image, boxes in people.items()}, dropped
