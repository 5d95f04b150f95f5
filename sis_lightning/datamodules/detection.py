"""Boxes: COCO's instances, and Pascal VOC's 2007 and 2012 together."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from sis_lightning.datamodules.base import Sample, SISDataModule, Source, Split, read_image
from sis_lightning.datasets.annotations import Annotations
from sis_lightning.datasets.coco_reader import read_coco
from sis_lightning.datasets.constants import VOC_CLASSES
from sis_lightning.datasets.download import Archive, voc_archives
from sis_lightning.datasets.lists import read_names, voc_list
from sis_lightning.datasets.voc_reader import read_voc
from sis_lightning.errors import DataError, UsageError
from sis_lightning.evaluation.coco import Backend as Evaluator
from sis_lightning.evaluation.coco import COCOGroundTruth as COCOTruth
from sis_lightning.evaluation.coco import Kind
from sis_lightning.evaluation.gathered import Row, Truth
from sis_lightning.evaluation.voc import VOCGroundTruth as VOCTruth
from sis_lightning.evaluation.voc import write_comp4
from sis_lightning.files import write_text


class AnnotatedSource(Source):
    """Images with their objects, less ignored ones: `image_id`, `boxes` (n, 4) in px, `labels` (n,) 1…K."""

    def __init__(self, annotations: Annotations) -> None:
        self.annotations, self.defects = annotations, annotations.defects

    def __len__(self) -> int:
        return len(self.annotations)

    def files(self) -> Sequence[Path]:
        """Pictures, and what is said of them: COCO's one file, or VOC's for each picture."""
        pictures, source = self.annotations.paths, self.annotations.source
        if source.is_file():
            return [*pictures, source]
        return [*pictures, *(path.parents[1] / "Annotations" / f"{path.stem}.xml" for path in pictures)]

    def __getitem__(self, index: int) -> Sample:
        known = self.annotations
        objects = known.objects(index)
        counted = ~known.ignored[objects]
        return {
            "image": self.read(index),
            "name": known.paths[index].stem,
            "image_id": known.image_ids[index],
            "boxes": torch.from_numpy(known.boxes[objects][counted]).float(),
            "labels": torch.from_numpy(known.labels[objects][counted]) + 1,
        }

    def checks(self) -> Iterator[Callable[[], Sample]]:
        """Every image that is there, with its objects."""
        missing = {defect.file for defect in self.defects}
        for index, path in enumerate(self.annotations.paths):
            if path not in missing:
                yield functools.partial(AnnotatedSource.__getitem__, self, index)

    def read(self, index: int) -> tv_tensors.Image:
        """Decodes an image; refuses one of another size than its annotation says.

        Raises:
            DataError: Naming the file.
        """
        path, size = self.annotations.paths[index], tuple(self.annotations.sizes[index].tolist())
        image = read_image(path)
        if size not in ((0, 0), (image.shape[2], image.shape[1])):
            raise DataError(
                f"{path}: {image.shape[2]}×{image.shape[1]} px, but {self.annotations.source} says {size[0]}×{size[1]}"
            )
        return image

    def groups(self) -> Sequence[int] | None:
        """Upright images apart from wide ones: a batch is padded to its widest and to its highest image."""
        sizes = self.annotations.sizes
        groups: list[int] = (sizes[:, 0] < sizes[:, 1]).astype(int).tolist()
        return groups


_COCO = "http://images.cocodataset.org"


class AnnotatedDataModule(SISDataModule):
    """Images whose objects stand in COCO's or VOC's annotation files.

    Args:
        root: Folder with the data set in its published layout.
        limit: The first images of every split that have objects, alone, for trials; None for all.
        loading: `batch_size`, `num_workers` and what else every DataModule takes.
    """

    def __init__(self, root: str, limit: int | None = None, **loading: Any) -> None:
        super().__init__(root, **loading)
        if limit is not None and limit < 1:
            raise UsageError(f"data.limit is {limit}, must be at least 1, or null for all images")
        self.limit = limit

    def annotations(self, split: Split) -> Annotations:
        """What is annotated in a split, defects included.

        Raises:
            DataError: Where files are missing.
        """
        raise NotImplementedError

    def usable(self, split: Split) -> Annotations:
        """What a run takes of a split: clipped, and for training without ignored objects."""
        known = self.annotations(split).first(self.limit)
        known.clip()
        if split == "train":
            known.drop(known.ignored.copy(), self.ignored_name)
        self.class_names, self.category_ids = known.class_names, known.category_ids
        if self.limit:
            self.notes["limit"] = f"the first {self.limit} images with objects of each split"
        self._note_dropped(split, known)
        return known

    def _note_dropped(self, split: Split, known: Annotations) -> None:
        if known.dropped:
            left = ", ".join(f"{count:,} {reason}" for reason, count in known.dropped.items())
            self.notes[f"{split} without"] = left

    #: What objects are called that count neither for nor against.
    ignored_name = "crowds"

    def source(self, split: Split) -> Source:
        """The images of a split with their boxes."""
        return AnnotatedSource(self.usable(split))


_flip = v2.RandomHorizontalFlip()


def mirrored_or_not(sample: Sample) -> Sample:
    """Mirrors half of the images, with their boxes."""
    size = tuple(sample["image"].shape[1:])
    boxes = tv_tensors.BoundingBoxes(sample["boxes"], format="XYXY", canvas_size=size)
    image, boxes = _flip(sample["image"], boxes)
    return {**sample, "image": image, "boxes": boxes}


class COCOFiles(AnnotatedDataModule):
    """The layout of COCO 2017: `annotations/KIND_SPLIT.json`, pictures in `SPLIT/`.

    Args:
        root: Folder that holds `annotations/` (or a folder `coco` that does).
        train_split: Of the annotation file's name and of the pictures' folder.
        val_split: The same.
        test_split: The same; None for `val_split`. One without annotations, such as `test-dev2017`, gives no figures
            but a results file for the server.
        evaluator: What scores: `pycocotools`, or the same figures sooner by `faster-coco-eval`.
        limit: The first images of every split that have objects, alone, for trials; None for all.
        loading: `batch_size`, `num_workers` and what else every DataModule takes.
    """

    kind: Kind
    task: str
    # COCO publishes no checksums; these are those that PaddleDetection, fast.ai and others check their downloads by.
    archives = (
        Archive(f"{_COCO}/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", "train2017", fetched=False),
        Archive(f"{_COCO}/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", "val2017", fetched=False),
        Archive(
            f"{_COCO}/annotations/annotations_trainval2017.zip",
            "f4bbac642086de4f52a3fdda2de5fa2c",
            "annotations",
            fetched=False,
        ),
    )

    def __init__(
        self,
        root: str,
        train_split: str = "train2017",
        val_split: str = "val2017",
        test_split: str | None = None,
        evaluator: Evaluator = "pycocotools",
        **loading: Any,
    ) -> None:
        super().__init__(root, **loading)
        self.splits = {"train": train_split, "val": val_split, "test": test_split or val_split}
        self.evaluator = evaluator
        self._truths: dict[str, COCOTruth] = {}

    @property
    def home(self) -> Path:
        """The folder with `annotations/`."""
        nested = self.root / "coco"
        return nested if nested.is_dir() or not (self.root / "annotations").is_dir() else self.root

    def annotation_file(self, split: Split) -> Path:
        """The JSON of a split.

        Raises:
            DataError: Where there is none.
        """
        name, folder = self.splits[split], self.home / "annotations"
        candidates = [folder / f"{self.task}_{name}.json", folder / f"image_info_{name}.json"]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise DataError(self.missing(f"{candidates[0]} does not exist"))
        return path

    def annotations(self, split: Split) -> Annotations:
        """Reads the JSON of a split."""
        folder = self.home / self.splits[split].replace("test-dev", "test")
        return read_coco(self.annotation_file(split), folder, self.kind, split=self.splits[split])

    def truth(self, split: Split) -> Truth:
        """The annotation file, for COCO's own evaluation."""
        path = str(self.annotation_file(split))
        if path not in self._truths:
            self._truths[path] = COCOTruth(read_coco(Path(path), kind=self.kind), self.kind, self.evaluator)
        return self._truths[path]

    def write_results(self, rows: list[Row], folder: Path) -> Path:
        """COCO's results format, as its server wants it."""
        kind = "person_keypoints" if self.kind == "keypoints" else "detections"
        path = folder / f"{kind}_{self.splits['test']}_sis-lightning_results.json"
        write_text(path, json.dumps(rows))
        return path

    def how_to_get(self) -> str:
        """The layout and its source."""
        train, val = self.splits["train"], self.splits["val"]
        return (
            f"Wanted: annotations/{self.task}_{{{train},{val}}}.json, {train}/ and {val}/ below {self.root},\n"
            "  from https://cocodataset.org/#download."
        )


class COCODetectionDataModule(COCOFiles):
    """COCO's instances: 80 categories, numbered among 1…90; the model's labels are 1…80.

    Training: horizontal flip; batches of upright or of wide images; without crowds and boxes of no area, images without
    objects stay. Scored by COCO's own code, for which detections on crowds count neither way. ImageNet's mean and
    standard deviation; the detector resizes.

    Args:
        root: Folder that holds `annotations/` (or a folder `coco` that does).
        files: `train_split`, `val_split`, `test_split` of the files' names (`train2017`, `val2017`, as val);
            `evaluator`, `limit`, and `batch_size`, `num_workers` and what else every DataModule takes.

    Raises:
        DataError: In `setup`, for missing files and defects without remedy (`sis-lightning check-data` lists them all);
            in a run, for unreadable images or images of another size than their annotation says.
    """

    kind = "bbox"
    task = "instances"

    def __init__(self, root: str, **files: Any) -> None:
        super().__init__(root, **files)

    def train_transform(self, sample: Sample) -> Sample:
        """Horizontal flip."""
        return mirrored_or_not(sample)


class VOCDetectionDataModule(AnnotatedDataModule):
    """Pascal VOC's boxes: 20 classes, any union of years and splits.

    Training: horizontal flip; batches of upright or of wide images; without difficult objects (as Girshick's
    py-faster-rcnn). Scored as the devkit does: average precision at IoU 0.5 by VOC 2007's 11 points and by VOC 2012's
    area; difficult objects count neither way. ImageNet's mean and standard deviation; the detector resizes.

    Args:
        root: Folder that holds `VOCdevkit/VOC2007/` and so on (or these folders themselves).
        train_splits: As `YEAR/SPLIT`, by the lists below `ImageSets/Main/`.
        test_splits: The same; val and test are these.
        classes: Names of the classes; none for VOC's 20.
        limit: The first images of every split that have objects, alone, for trials; None for all.
        loading: `batch_size`, `num_workers` and what else every DataModule takes; `download` fetches both years.

    Raises:
        UsageError: For splits that are not `YEAR/SPLIT`.
        DataError: In `setup`, for missing files and defects without remedy (`sis-lightning check-data` lists them all);
            in a run, for unreadable images or images of another size than their annotation says.
    """

    archives = voc_archives("2007", "2007-test", "2012")
    headline = "AP50_voc07"
    ignored_name = "difficult objects"

    def __init__(
        self,
        root: str,
        train_splits: Sequence[str] = ("2007/trainval", "2012/trainval"),
        test_splits: Sequence[str] = ("2007/test",),
        classes: list[str] | None = None,
        limit: int | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(root, limit, **loading)
        for split in (*train_splits, *test_splits):
            year, slash, name = split.partition("/")
            if not (slash and name and year.isdecimal()):
                raise UsageError(f"data.train_splits, test_splits: '{split}' is not YEAR/SPLIT, such as 2012/trainval")
        if not train_splits or not test_splits:
            raise UsageError("data.train_splits, test_splits: at least one YEAR/SPLIT each, such as 2012/trainval")
        self.train_splits, self.test_splits = tuple(train_splits), tuple(test_splits)
        self.names = tuple(classes or VOC_CLASSES[1:])
        self._truth: VOCTruth | None = None

    def year(self, number: str) -> Path:
        """The folder of a year."""
        nested = self.root / "VOCdevkit" / f"VOC{number}"
        return nested if nested.is_dir() or not (self.root / f"VOC{number}").is_dir() else self.root / f"VOC{number}"

    @property
    def home(self) -> Path:
        """The folder of the first year to train on."""
        return self.year(self.train_splits[0].partition("/")[0])

    def annotations(self, split: Split) -> Annotations:
        """Reads the XML of a split."""
        homes: dict[Path, dict[str, None]] = {}
        for name in self.train_splits if split == "train" else self.test_splits:
            year, _, part = name.partition("/")
            home = self.year(year)
            if not (home / "Annotations").is_dir():
                raise DataError(self.missing(f"{home / 'Annotations'} does not exist"))
            # Lists may overlap, as trainval does with train: each image counts once.
            homes.setdefault(home, {}).update(dict.fromkeys(read_names(voc_list(home, "Main", part))))
        return read_voc([(home, list(names)) for home, names in homes.items()], self.names)

    def train_transform(self, sample: Sample) -> Sample:
        """Horizontal flip."""
        return mirrored_or_not(sample)

    def truth(self, split: Split) -> Truth:
        """The annotations with their difficult objects, for the devkit's rules; val and test are one."""
        if self._truth is None:
            self._truth = VOCTruth(self.annotations(split))
        return self._truth

    def write_results(self, rows: list[Row], folder: Path) -> Path:
        """`VOCYEAR/Main/comp4_det_SPLIT_CLASS.txt`, as the devkit and the server want them."""
        truth = self.annotations("test")
        for split in self.test_splits:
            year, _, part = split.partition("/")
            names = set(read_names(voc_list(self.year(year), "Main", part)))
            chosen = [row for row in rows if row["image_id"] in names]
            write_comp4(chosen, truth.class_names, folder / f"VOC{year}" / "Main", part)
        return folder

    def how_to_get(self) -> str:
        """The layout and its source."""
        years = sorted({split.partition("/")[0] for split in (*self.train_splits, *self.test_splits)})
        return (
            f"Wanted: VOCdevkit/VOC{{{','.join(years)}}}/{{JPEGImages,Annotations,ImageSets/Main}} below {self.root}\n"
            f"  (--data.download true, or {self.archives[-1].url} and the like)."
        )
