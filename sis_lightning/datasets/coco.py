"""COCO 2017's instances and keypoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sis_lightning.datasets.annotations import Annotations
from sis_lightning.datasets.base import Sample
from sis_lightning.datasets.coco_reader import Kind, read_coco, several_categories
from sis_lightning.datasets.detection_dataset import DetectionDataset
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.person_boxes import PersonBoxes
from sis_lightning.errors import DataError, MissingDataError, UsageError

#: The name of a kind's annotation files, `annotations/NAME_SPLIT.json`.
FILE_NAMES: dict[Kind, str] = {"bbox": "instances", "segm": "instances", "keypoints": "person_keypoints"}

#: Names of the chosen classes, or, for each class, the names of those that are merged into it.
Classes = Sequence[str] | Mapping[str, Sequence[str]]

#: Where the files are expected.
LAYOUT = (
    "Expected: annotations/{name}_SPLIT.json and SPLIT/*.jpg in {root} or {root}/coco,\n"
    "  from https://cocodataset.org/#download"
)


def check_classes(classes: Classes) -> Classes:
    """Checks a choice of classes.

    Returns:
        The same.

    Raises:
        UsageError: If it is empty, names one twice, or is text.
    """
    groups = classes.values() if isinstance(classes, Mapping) else [classes]
    if not classes or any(isinstance(names, str) or not names for names in groups):
        raise UsageError(f"classes is {classes!r}, must be names, or for each class the names of those it is merged of")
    names = [name for group in groups for name in group]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"classes has '{twice[0]}' twice")
    return classes


def coco_home(root: Path) -> Path:
    """The folder with `annotations/`: `root/coco`, or `root` itself if it is there."""
    nested = root / "coco"
    return nested if nested.is_dir() or not (root / "annotations").is_dir() else root


def annotation_file(root: Path, split: str, kind: Kind) -> Path:
    """The JSON of a split: `instances_SPLIT.json` or `person_keypoints_SPLIT.json`, else `image_info_SPLIT.json`.

    Or `SPLIT/_annotations.coco.json`.

    Raises:
        MissingDataError: If there is none.
    """
    folder = coco_home(root) / "annotations"
    candidates = [folder / f"{FILE_NAMES[kind]}_{split}.json", folder / f"image_info_{split}.json"]
    candidates.append(coco_home(root) / split / "_annotations.coco.json")  # as Roboflow exports it
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise MissingDataError(f"{candidates[0]} does not exist\n  {LAYOUT.format(name=FILE_NAMES[kind], root=root)}")
    return path


def _read(root: str | Path, split: str, kind: Kind, category: str | None = None) -> Annotations:
    images = image_folder(Path(root), split)
    return read_coco(annotation_file(Path(root), split, kind), images, kind, split=split, category=category)


def image_folder(root: Path, split: str) -> Path:
    """The folder of a split's images: `SPLIT`, or `images/SPLIT` or `images`, as CVAT and Label Studio export them."""
    name = split.replace("test-dev", "test")
    home = coco_home(root)
    candidates = (home / name, home / "images" / name, home / "images")
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


class COCODetectionDataset(DetectionDataset):
    """COCO's instances: images with boxes of 80 categories, whose own ids are among 1…90.

    Samples have `image` (3, H, W), `name`, the path below the image folder with its ending, `boxes` (n, 4) x1, y1, x2,
    y2 in px, float32, `labels` (n,) 1…80, and for evaluation `truth` (see `Annotations.ground_truth`). Crowds and boxes
    of no area are not among `boxes`; images without objects stay.

    Args:
        root: Folder that holds `annotations/`, or a folder `coco` that does.
        split: Split in the names of the annotation file and of the image folder, such as `train2017`. A split without
            annotations, such as `test-dev2017`, can be predicted.
        evaluation: Whether samples have `truth`.
        limit: Number of images that have objects; only the first ones are used. None for all images.
        classes: The classes to read, in the order of their labels, as names of the file; or, for each class, the names
            of those that are merged into it. None for all classes of the file.
        empty_images: Whether images without objects of these classes are kept.

    Raises:
        DataError: If files are missing or not of COCO's format, or have no such class. What is wrong with single
            entries is in `defects`. Reading a sample: if the image is unreadable or has another size than its
            annotation says.
        UsageError: If `limit` is below 1, or `classes` are none or named twice.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train2017",
        *,
        evaluation: bool = False,
        limit: int | None = None,
        classes: Classes | None = None,
        empty_images: bool = True,
    ) -> None:
        annotations = _read(root, split, "bbox")
        if classes is not None:
            annotations.choose_classes(check_classes(classes))
        super().__init__(annotations, evaluation=evaluation, limit=limit)
        if not empty_images:
            self.annotations = self.annotations.with_objects()
            self.all_objects = self.all_objects and self.annotations
            self._note_dropped()
        known = self.annotations
        self.meta = DatasetMeta(known.class_names, known.category_ids, protocol="coco")

    def annotation_files(self) -> Sequence[Path]:
        """The JSON of the split."""
        return [self.annotations.source]


class COCOKeypointsDataset(DetectionDataset):
    """COCO's persons with 17 keypoints, or other objects with other keypoints, which the file's category names.

    For training a sample is one annotated person: `image` (3, H, W), `name`, `box` (4,) x1, y1, x2, y2 in px, and
    `keypoints` (K, 3) x, y in px and visibility 0, 1 or 2, float64 arrays. Crowds and persons without any annotated
    keypoint are left out.

    For evaluation a sample is one image: `image`, `name`, `person_boxes` (P, 5) x1, y1, x2, y2 in px and score, the
    persons whose keypoints are to be estimated, `box_source`, which says where these boxes are from, and `truth` (see
    `Annotations.ground_truth`).

    Args:
        root: Folder that holds `annotations/`, or a folder `coco` that does.
        split: Split in the names of the annotation file and of the image folder, such as `train2017`.
        evaluation: Whether a sample is an image instead of a person.
        person_boxes: For evaluation, a file with a detector's boxes (see `PersonBoxes`); None for the boxes of the
            ground truth, of persons with keypoints.
        least_box_score: Minimum score of the boxes of `person_boxes`; others are left out.
        limit: Number of images that have persons with keypoints; only the first ones are used. None for all images.
        category: Name of the category with the keypoints; None for the only one, or `person`.
        flip_pairs: Names (left, right) of the keypoints that a horizontal flip exchanges; None for those whose names
            differ in left and right.
        sigmas: Standard deviation of each keypoint for the object keypoint similarity (OKS); None for the file's or
            COCO's, for unknown keypoints the mean of COCO's.

    Raises:
        DataError: If files are missing or not of COCO's format, no person has keypoints (training), or
            `person_boxes` has none of the images. What is wrong with single entries is in `defects`. Reading a
            sample: if the image is unreadable or has another size than its annotation says.
        UsageError: If `limit` is below 1, `flip_pairs` or `sigmas` do not fit, or the split has no annotations and
            `person_boxes` are not given.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train2017",
        *,
        evaluation: bool = False,
        person_boxes: str | Path | None = None,
        least_box_score: float = 0.0,
        limit: int | None = None,
        category: str | None = None,
        flip_pairs: Sequence[tuple[str, str]] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        annotations = _read(root, split, "keypoints", category)
        if len(annotations.class_names) > 1:
            if "person" not in annotations.class_names:
                raise DataError(f"{annotations.source}: {several_categories(annotations.class_names)}")
            annotations.choose_classes(["person"])
        super().__init__(annotations, evaluation=evaluation, limit=limit)
        known = self.annotations
        assert known.skeleton is not None
        skeleton = known.skeleton.changed(flip_pairs, sigmas)
        self.notes.update(skeleton.notes())
        self.meta = DatasetMeta(
            known.class_names,
            known.category_ids,
            protocol="coco",
            keypoint_names=skeleton.names,
            flip_pairs=skeleton.flip_pairs,
            skeleton=skeleton.edges,
            sigmas=skeleton.sigmas,
        )
        if not evaluation:
            known.drop(np.all(self._keypoints[..., 2] == 0, axis=1), "persons without keypoints")
            self._note_dropped()
            if not len(known.image) and not any(not defect.remedy for defect in self.defects):
                raise DataError(f"{known.source}: no person in it has annotated keypoints to learn from")
            return
        self.box_source = "ground truth"
        self._detected: dict[Any, NDArray[np.float64]] | None = None
        if person_boxes is None:
            if not known.annotated:
                raise UsageError(
                    f"{known.source} has no annotations, and so no person boxes: person_boxes must name a detector's"
                )
        else:
            boxes = PersonBoxes(person_boxes, least_box_score, known.category_ids[0])
            self._detected = boxes.of_images(known.image_ids, known.names(), known.source)
            self.box_source = boxes.description
        self.notes["person boxes"] = self.box_source

    @property
    def _keypoints(self) -> NDArray[np.float64]:
        keypoints = self.annotations.keypoints
        assert keypoints is not None
        return keypoints

    def annotation_files(self) -> Sequence[Path]:
        """The JSON of the split."""
        return [self.annotations.source]

    def __len__(self) -> int:
        return len(self.annotations) if self.evaluation else len(self.annotations.image)

    def __getitem__(self, index: int) -> Sample:
        known = self.annotations
        if not self.evaluation:
            image = int(known.image[index])
            return {
                "image": self.read(image),
                "name": f"{known.name(image)}_{index}",
                "box": known.boxes[index],
                "keypoints": self._keypoints[index],
            }
        if self._detected is None:
            objects = known.objects(index)
            annotated = (self._keypoints[objects][..., 2] > 0).any(axis=1) & ~known.ignored[objects]
            boxes = known.boxes[objects][annotated]
            persons = np.column_stack([boxes, np.ones(len(boxes))])
        else:
            persons = self._detected.get(known.image_ids[index], np.zeros((0, 5)))
        assert self.all_objects is not None
        return {
            "image": self.read(index),
            "name": known.name(index),
            "person_boxes": persons,
            "box_source": self.box_source,
            "truth": self.all_objects.ground_truth(index),
        }

    def groups(self) -> Sequence[int] | None:
        """None: all crops have one size."""
        return None
