"""Pascal VOC's boxes, and its masks with those of SBD."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from sis_lightning.datasets.annotations import Defect
from sis_lightning.datasets.base import ImageDataset, Sample
from sis_lightning.datasets.constants import IMAGE_ENDINGS, VOC_CLASSES, VOID
from sis_lightning.datasets.detection_dataset import DetectionDataset
from sis_lightning.datasets.images import UNREADABLE, open_image, turned
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.voc_reader import files_by_name, read_names, read_voc, repeated, voc_list
from sis_lightning.errors import DataError, MissingDataError, UsageError

#: What a mask has for a class: a number, or a colour (red, green, blue).
MaskValue = int | Sequence[int]

_COLOUR_OF_ID_1 = (128, 0, 0)  # of VOC's palette

#: Where the files are expected.
DETECTION_LAYOUT = (
    "Expected: VOCdevkit/VOC{year}/{{JPEGImages,Annotations,ImageSets/Main}} in {root},\n"
    "  from http://host.robots.ox.ac.uk/pascal/VOC/"
)
SEGMENTATION_LAYOUT = (
    "Expected: VOCdevkit/VOC2012/{{JPEGImages,SegmentationClass,ImageSets/Segmentation}} in {root},\n"
    "  from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
)


def voc_home(root: Path, year: str, *, itself: bool = False) -> Path:
    """The folder of a year: `root/VOCdevkit/VOCYEAR` or `root/VOCYEAR`.

    Args:
        root: Folder that holds either.
        year: The year, such as `2012`.
        itself: Whether `root` may also be the folder of the year.
    """
    candidates = [root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}", *([root] if itself else [])]
    found = next((folder for folder in candidates if (folder / "JPEGImages").is_dir()), None)
    return found or next((folder for folder in candidates[:2] if folder.is_dir()), candidates[0])


def parse_split(split: str) -> tuple[str, str]:
    """Year and list of a split such as `2012/trainval`.

    Raises:
        UsageError: If it is anything else.
    """
    year, slash, name = split.partition("/")
    if not (slash and name and year.isdecimal()):
        raise UsageError(f"'{split}' is not YEAR/SPLIT, such as 2012/trainval")
    return year, name


class VOCDetectionDataset(DetectionDataset):
    """Pascal VOC's boxes: 20 classes, any union of years and splits.

    Samples have `image` (3, H, W), `name`, `boxes` (n, 4) x1, y1, x2, y2 in px, float32, `labels` (n,) 1…20, and for
    evaluation `truth` (see `Annotations.ground_truth`). Difficult objects are not among `boxes` (as in Girshick's
    py-faster-rcnn); images without objects stay.

    Args:
        root: Folder that holds `VOCdevkit/VOC2007/` and so on, or these folders themselves.
        splits: Splits as `YEAR/SPLIT`, by the lists in `ImageSets/Main/`. An image that several list is read once.
        classes: Names of the classes; None for VOC's 20.
        evaluation: Whether samples have `truth`.
        limit: Number of images that have objects; only the first ones are used. None for all images.

    Raises:
        DataError: If folders or lists are missing. What is wrong with single files is in `defects`. Reading a sample:
            if the image is unreadable or has another size than its annotation says.
        UsageError: If an argument is invalid.
    """

    def __init__(
        self,
        root: str | Path,
        splits: Sequence[str] = ("2007/trainval", "2012/trainval"),
        classes: Sequence[str] | None = None,
        *,
        evaluation: bool = False,
        limit: int | None = None,
    ) -> None:
        if isinstance(splits, str) or not splits:
            raise UsageError("splits must be a list of at least one YEAR/SPLIT, such as ['2012/trainval']")
        homes: dict[Path, dict[str, tuple[str, ...]]] = {}
        again: list[str] = []
        for split in splits:
            year, name = parse_split(split)
            home = voc_home(Path(root), year)
            if not (home / "Annotations").is_dir():
                raise MissingDataError(
                    f"{home / 'Annotations'} does not exist\n  {DETECTION_LAYOUT.format(year=year, root=root)}"
                )
            listed = homes.setdefault(home, {})
            again += [note for note in [repeated(voc_list(home, "Main", name))] if note]
            for image in read_names(voc_list(home, "Main", name)):
                listed[image] = (*listed.get(image, ()), split)
        names = tuple(classes or VOC_CLASSES[1:])
        annotations = read_voc(
            [(home, list(listed)) for home, listed in homes.items()],
            names,
            splits=[of_image for listed in homes.values() for of_image in listed.values()],
        )
        super().__init__(annotations, evaluation=evaluation, limit=limit, ignored_name="difficult objects")
        self.meta = DatasetMeta(names, annotations.category_ids, primary_metric="AP50_voc07", protocol="voc")
        if again:
            self.notes["listed again"] = "; ".join(again)

    def annotation_files(self) -> Sequence[Path]:
        """The XML file of each image."""
        return [path.parents[1] / "Annotations" / f"{path.stem}.xml" for path in self.annotations.paths]


class VOCSegmentationDataset(ImageDataset):
    """Pascal VOC 2012's masks: 21 classes with background, 255 for void.

    Samples have `image` (3, H, W), `mask` (H, W) of class ids, uint8, and `name`.

    Args:
        root: Folder that holds `VOCdevkit/VOC2012/` (or `VOC2012/`, or the content of that folder).
        split: Name of a list in `ImageSets/Segmentation/`, such as `train` (1,464 images) or `val` (1,449).
            `train_aug` (10,582 images) takes SBD's masks from `SegmentationClassAug/`; without a list of that name, it
            consists of all images of SBD and of `train` that are not in `val`. `auto` is `train_aug` if this folder
            exists, else `train`.
        classes: Names of the classes by mask id, background first; None for VOC's 21.
        mask_values: What the masks have for each class, in the order of the classes: numbers such as [0, 255], or
            colours such as [[0, 0, 0], [128, 0, 0]]. None: the ids 0, 1, …, and 255 for void.
        void_values: With `mask_values`, the numbers or colours of pixels that are not annotated.

    Raises:
        DataError: If folders or lists are missing. Listed images or masks that do not exist are in `defects`. Reading a
            sample: if a file is unreadable, the mask has another size than the image, or an id that is no class.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        classes: Sequence[str] | None = None,
        mask_values: Sequence[MaskValue] | None = None,
        void_values: Sequence[MaskValue] = (),
    ) -> None:
        super().__init__()
        self.home = voc_home(Path(root), "2012", itself=True)
        if not (self.home / "JPEGImages").is_dir():
            raise MissingDataError(
                f"{self.home / 'JPEGImages'} does not exist\n  {SEGMENTATION_LAYOUT.format(root=root)}"
            )
        self.meta = DatasetMeta(tuple(classes or VOC_CLASSES))
        self._values = None if mask_values is None else MaskValues(mask_values, void_values)
        if mask_values is not None and len(mask_values) != self.meta.num_classes:
            raise UsageError(
                f"mask_values has {len(mask_values)} entries for {self.meta.num_classes} classes: give one for each"
            )
        if mask_values is None and void_values:
            raise UsageError("void_values is given without mask_values, which says what the classes have")
        masks, listed_in, self.names = self._listed(split)
        photographs = files_by_name(self.home / "JPEGImages", IMAGE_ENDINGS, self.names)
        annotated = files_by_name(self.home / masks, (".png",), self.names)
        self.images = [self.home / "JPEGImages" / photographs.get(name, f"{name}.jpg") for name in self.names]
        self.masks = [self.home / masks / annotated.get(name, f"{name}.png") for name in self.names]
        what = f"does not exist, but {listed_in} names it"
        defects = []
        for files, there in ((self.images, photographs), (self.masks, annotated)):
            lacking = [path for path, name in zip(files, self.names, strict=True) if name not in there]
            defects += [Defect(path, "", what) for path in lacking]
        stray = sorted(set(annotated) - set(photographs) - set(self.names))
        defects += [Defect(self.home / masks / annotated[name], "", "it has no image", "dropped") for name in stray]
        self.defects = defects
        if classes is None and mask_values is None and (note := self._foreign_palette()):
            self.notes["masks"] = note

    def _listed(self, split: str) -> tuple[str, str, list[str]]:
        """The folder of masks, what lists the images, and their names."""

        def by_list(name: str, masks: str) -> tuple[str, str, list[str]]:
            path = voc_list(self.home, "Segmentation", name)
            if note := repeated(path):
                self.notes["listed again"] = note
            return masks, str(path), read_names(path)

        if split not in ("auto", "train_aug", "trainaug"):
            return by_list(split, "SegmentationClass")
        augmented = self.home / "SegmentationClassAug"
        if augmented.is_dir():
            for name in ("train_aug", "trainaug"):
                if voc_list(self.home, "Segmentation", name).is_file():
                    return by_list(name, augmented.name)
            # The 10,582 images of train_aug are SBD's and the training images less those of val.
            val = set(read_names(voc_list(self.home, "Segmentation", "val")))
            names = sorted(path.stem for path in augmented.glob("*.png") if path.stem not in val)
            return augmented.name, f"{augmented} less val", names
        if split != "auto":
            raise DataError(f"{augmented} does not exist (SBD's masks in VOC's format)")
        return by_list("train", "SegmentationClass")

    def _foreign_palette(self) -> str:
        """Says that the first mask's palette is not that of VOC, whose classes its ids are taken for; else empty."""
        try:
            with Image.open(self.masks[0]) as mask:
                palette = mask.getpalette() if mask.mode == "P" else None
        except (IndexError, *UNREADABLE):
            return ""
        colour = tuple(palette[3:6]) if palette else (0, 0, 0)
        if colour in ((0, 0, 0), _COLOUR_OF_ID_1) or colour == (1, 1, 1):  # no colours at all, or VOC's
            return ""
        return (
            f"the palette is not VOC's: id 1 has the colour {colour} instead of {_COLOUR_OF_ID_1}; "
            "if the ids are not VOC's either, name the classes in their order"
        )

    def require_targets(self) -> None:
        """Checks that masks have at least two classes, reading them until two are found: mostly one mask.

        Raises:
            DataError: If all masks together have fewer, or one of those read is damaged or has an id that is no class.
        """
        self._require_classes(self._seen())

    def require_scores(self) -> None:
        """Checks that masks of one class are not ones of 0 and 255, whose mIoU would be 1 whatever is predicted.

        Raises:
            DataError: If all masks together have one class and void pixels, or nothing else than these.
        """
        seen = self._seen()
        if VOID in seen:
            self._require_classes(seen)

    def _seen(self) -> set[int]:
        """The ids in the masks, read until two classes are found."""
        seen: set[int] = set()
        for path in self.masks:
            if path.is_file():  # those that lack are told elsewhere
                seen.update(self._read_mask(path).unique().tolist())
            if len(seen - {VOID}) > 1:
                break
        return seen

    def _require_classes(self, seen: set[int]) -> None:
        if len(seen - {VOID}) > 1:
            return
        known = sorted(seen - {VOID})
        names = [self.meta.class_names[number] for number in known]
        found = f"only the class {names[0]!r} ({known[0]})" if names else "no annotated pixel"
        hint = ""
        if VOID in seen:
            hint = f"\n  The id {VOID} means void (not annotated). For masks of 0 and {VOID}: mask_values: [0, {VOID}]."
        raise DataError(f"{self.masks[0].parent}: {found} in {len(self.masks):,} masks: nothing to learn{hint}")

    def __len__(self) -> int:
        return len(self.names)

    def files(self) -> Sequence[Path]:
        """The images and masks."""
        return [*self.images, *self.masks]

    def checks(self) -> Iterator[Callable[[], Sample]]:
        """Functions that read each image and mask if both exist."""
        missing = {defect.file for defect in self.defects}
        for index, files in enumerate(zip(self.images, self.masks, strict=True)):
            if not missing.intersection(files):
                yield functools.partial(self.__getitem__, index)

    def _read_mask(self, path: Path) -> tv_tensors.Mask:
        return read_mask(path, self.meta.num_classes) if self._values is None else self._values.read(path)

    def __getitem__(self, index: int) -> Sample:
        image = self.reader.read(self.images[index])
        mask = self._read_mask(self.masks[index])
        if image.shape[1:] != mask.shape:
            size, expected = (image.shape[2], image.shape[1]), (mask.shape[1], mask.shape[0])
            sizes = f"{expected[0]}×{expected[1]} px, its image {size[0]}×{size[1]}"
            why = turned(self.images[index], size, expected)
            raise DataError(f"{self.masks[index]}: the mask has {sizes}{why}")
        return {"image": image, "mask": mask, "name": self.names[index]}


class MaskValues:
    """Reads masks whose values are not the ids of the classes.

    Args:
        classes: The value of each class, 0…K-1: numbers, or colours (red, green, blue).
        void: Values of pixels that are not annotated.

    Raises:
        UsageError: If numbers and colours are mixed, one is out of range, or one is given twice.
    """

    def __init__(self, classes: Sequence[MaskValue], void: Sequence[MaskValue] = ()) -> None:
        given = [*classes, *void]
        self.colours = not all(isinstance(value, int) for value in given)
        codes = []
        for value in given:
            parts, limit = ([value], 65536) if isinstance(value, int) else (list(value), 256)
            if len(parts) != (3 if self.colours else 1) or not all(0 <= part < limit for part in parts):
                raise UsageError(
                    f"mask_values: {value!r} must be a number in 0…65535, or all must be colours [red, green, blue]"
                )
            codes.append(functools.reduce(lambda code, part: 256 * code + part, parts))
        for value, code in zip(given, codes, strict=True):
            if codes.count(code) > 1:
                raise UsageError(f"mask_values: {value!r} is given twice")
        order = np.argsort(codes)
        self._codes = np.array(codes, dtype=np.int64)[order]
        self._ids = np.array([*range(len(classes)), *(VOID for _ in void)], dtype=np.uint8)[order]

    def read(self, path: Path) -> tv_tensors.Mask:
        """Reads a mask of any mode.

        Args:
            path: An image file without loss, such as a PNG.

        Returns:
            Class ids (H, W), uint8.

        Raises:
            DataError: If the file is missing or damaged, or has a value that is not among those given.
        """
        with open_image(path) as image:
            if self.colours:
                rgb = np.asarray(image.convert("RGB")).astype(np.int64)
                codes = (rgb[..., 0] * 256 + rgb[..., 1]) * 256 + rgb[..., 2]
            elif image.mode in ("P", "L", "1", "I;16", "I"):
                codes = np.asarray(image).astype(np.int64)
            else:
                raise DataError(f"{path}: mask of mode {image.mode}: mask_values must be colours [red, green, blue]")
        place = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = self._codes[place] != codes
        if unknown.any():
            code = int(codes[unknown][0])
            value = [code >> 16, code >> 8 & 255, code & 255] if self.colours else code
            raise DataError(
                f"{path}: the mask has {value}, which is neither among mask_values nor among void_values "
                f"({unknown.mean():.2%} of its pixels have such values)"
            )
        return tv_tensors.Mask(torch.from_numpy(self._ids[place]))


def read_mask(path: Path, classes: int) -> tv_tensors.Mask:
    """Reads a palette or grey mask.

    Args:
        path: A PNG file.
        classes: Number of classes; ids are 0…classes-1, or `VOID` for pixels that are not annotated.

    Returns:
        Class ids (H, W), uint8.

    Raises:
        DataError: If the file is missing, damaged or in colours, or has an id that is no class.
    """
    with open_image(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise DataError(
                f"{path}: mask of mode {image.mode}: class ids need a palette (P) or grey (L) PNG\n"
                "  For masks in colours, set mask_values to the colours of the classes."
            )
        ids = np.array(image, dtype=np.uint8)
    found = np.flatnonzero(np.bincount(ids.reshape(-1), minlength=256))
    outside = [int(i) for i in found if i >= classes and i != VOID]
    if outside:
        hint = (
            "\n  Do the names of the classes begin with the background, which is class 0?"
            if outside == [classes]
            else ""
        )
        raise DataError(
            f"{path}: mask id {outside[0]} is outside of the classes 0…{classes - 1} and {VOID} (void){hint}"
        )
    return tv_tensors.Mask(torch.from_numpy(ids))
