"""ImageNet's classification data, ILSVRC 2012."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from sis_lightning.datasets.constants import IMAGE_ENDINGS
from sis_lightning.datasets.folder import ImageFolderDataset
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.paths import PathArray
from sis_lightning.errors import DataError, MissingDataError

#: Where the files are expected.
LAYOUT = (
    "Expected in {root}, or in a folder ilsvrc in it: ILSVRC/Data/CLS-LOC/train/SYNSET/*.JPEG, …/val/*.JPEG and\n"
    "  LOC_val_solution.csv, as in the archive of Kaggle's imagenet-object-localization-challenge;\n"
    "  or train/SYNSET/*.JPEG and val/SYNSET/*.JPEG, as torchvision.datasets.ImageNet unpacks its archives"
)
_NAMES, _SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"


def imagenet_home(root: str | Path) -> Path:
    """The folder with the two files of ILSVRC, or with `train` and `val`: `root` or `root/ilsvrc`."""
    inner = Path(root) / "ilsvrc"
    return inner if inner.is_dir() else Path(root)


class ImageNetDataset(ImageFolderDataset):
    """ImageNet: 1,281,167 training and 50,000 validation images of any sizes in 1,000 classes.

    Samples are those of `ImageFolderDataset`. Labels follow the sorted synsets (`n01440764` is 0), as in all published
    weights. The names of the classes are those of `LOC_synset_mapping.txt` or of torchvision's `meta.bin`, up to the
    first comma, or else the synsets. Two classes of the same name (`crane`, `maillot`) have their synset behind it.

    Args:
        root: Folder in one of the two layouts, see `LAYOUT`; or a folder that has it as `ilsvrc`.
        split: `train`; `val` or `test` for the validation images.
        image_size: Height and width in px that all images must have; None for any.

    Raises:
        DataError: If something is missing, or an image of the validation has no label; reading a sample, if the image
            is unreadable.
    """

    def __init__(self, root: str | Path, split: str = "train", image_size: tuple[int, int] | None = None) -> None:
        home = imagenet_home(root)
        published = home / "ILSVRC" / "Data" / "CLS-LOC"
        folder = published if published.is_dir() else home
        for part in ("train", "val"):
            if not (folder / part).is_dir():
                raise MissingDataError(f"{folder / part} does not exist\n  {LAYOUT.format(root=root)}")
        wanted = "train" if split == "train" else "val"
        if wanted == "val" and not any(entry.is_dir() for entry in (folder / "val").iterdir()):
            self._read_flat(home, folder, image_size)
        else:
            super().__init__(folder, wanted, image_size)
        self.meta = DatasetMeta(_class_names(home, self.meta.class_names))

    def _read_flat(self, home: Path, folder: Path, image_size: tuple[int, int] | None) -> None:
        """Reads validation images that are all in one folder, with the labels of the published list."""
        super(ImageFolderDataset, self).__init__()
        self.folder, self.image_size = folder / "val", image_size
        path = home / _SOLUTION
        if not path.is_file():
            raise MissingDataError(f"{path} does not exist: the labels of {self.folder}\n  {LAYOUT.format(root=home)}")
        with path.open(encoding="utf-8-sig", newline="") as file:
            label_of = {row["ImageId"]: (row["PredictionString"] or "").split(" ")[0] for row in csv.DictReader(file)}
        synsets = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
        number = {synset: label for label, synset in enumerate(synsets)}
        paths = sorted(entry for entry in self.folder.iterdir() if entry.suffix.lower() in IMAGE_ENDINGS)
        for image in paths:
            if label_of.get(image.stem) not in number:
                raise DataError(f"{path}: {image.stem} has no label that is a folder of {folder / 'train'}")
        if missing := sorted(label_of.keys() - {image.stem for image in paths}):
            raise DataError(f"{self.folder}: {len(missing)} images of {path} are missing, such as {missing[0]}")
        self.paths = PathArray(map(str, paths))
        self.labels = np.array([number[label_of[image.stem]] for image in paths])
        self.meta = DatasetMeta(tuple(synsets))


def _class_names(home: Path, synsets: tuple[str, ...]) -> tuple[str, ...]:
    """The names of synsets; themselves if there is no file of names."""
    known: dict[str, str] = {}
    if (home / _NAMES).is_file():
        lines = (home / _NAMES).read_text(encoding="utf-8-sig").splitlines()
        known = {synset: names for synset, _, names in (line.partition(" ") for line in lines)}
    elif (home / "meta.bin").is_file():
        words, _ = torch.load(home / "meta.bin", weights_only=True)
        known = {synset: names[0] for synset, names in words.items()}
    first = [known.get(synset, synset).split(",")[0].strip() for synset in synsets]
    return tuple(
        f"{name} ({synset})" if first.count(name) > 1 else name for synset, name in zip(synsets, first, strict=True)
    )
