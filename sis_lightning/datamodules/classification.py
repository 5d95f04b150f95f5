"""Classification: CIFAR-100 in its python layout, and any folder of pictures sorted by class."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.transforms import v2

from sis_lightning.datamodules.base import IMAGE_ENDINGS, Sample, SISDataModule, Source, Split, read_image
from sis_lightning.datasets.download import Archive, md5
from sis_lightning.errors import DataError, UsageError


class _ClassificationDataModule(SISDataModule):
    """Square images of `image_size` px with one label each."""

    image_size: int
    augmentation: v2.Transform
    preparation: v2.Transform

    def train_transform(self, sample: Sample) -> Sample:
        """Augments the image alone."""
        return {**sample, "image": self.augmentation(sample["image"])}

    def eval_transform(self, sample: Sample) -> Sample:
        """Brings the image to `image_size`."""
        return {**sample, "image": self.preparation(sample["image"])}


class CIFAR100DataModule(_ClassificationDataModule):
    """CIFAR-100: 50,000 train and 10,000 test images of 32×32 in 100 classes, the official python layout.

    Training: zero padding of 4, random crop of 32, horizontal flip (He et al. 2016; ResNeXt, Res2Net), all on uint8;
    then mean and standard deviation of CIFAR-100. Evaluation: the images as they are. The val split is the test split,
    as in the papers: take figures from the end of the schedule, not from the best epoch.

    Args:
        root: Folder that holds `cifar-100-python/`.
        loading: `batch_size`, `num_workers` and what else every DataModule takes; `download` fetches the archive, and
            the pictures of `predict_path` are resized to 32×32.

    Raises:
        DataError: In `setup`, for missing or unreadable files.
    """

    archives = (Archive(CIFAR100.url, CIFAR100.tgz_md5, CIFAR100.base_folder),)
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    image_size = 32

    def __init__(self, root: str, **loading: Any) -> None:
        super().__init__(root, **loading)
        self.augmentation = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
        self.preparation = v2.Resize((32, 32), antialias=True)

    @property
    def home(self) -> Path:
        """Where the three files lie."""
        nested = self.root / CIFAR100.base_folder
        return nested if nested.is_dir() or not (self.root / "meta").is_file() else self.root

    def source(self, split: Split) -> Source:
        """Reads `train`, or `test` for val and test."""
        meta = read_pickle(self._file("meta"))
        names = meta.get(b"fine_label_names")
        if not isinstance(names, list) or not names:
            raise DataError(f"{self._file('meta')}: no list 'fine_label_names' in it")
        self.class_names = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
        name = "train" if split == "train" else "test"
        return _CIFARSource(self._file(name), name, len(self.class_names))

    def provenance(self) -> str:
        """`official` where the MD5 of train, test and meta are the published ones."""
        published = [*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])]
        files = {self.home / name: checksum for name, checksum in published}
        official = all(path.is_file() and md5(path) == checksum for path, checksum in files.items())
        return "official (MD5 of train, test and meta)" if official else "other (MD5 is not the published one)"

    def how_to_get(self) -> str:
        """The layout and its source."""
        return f"Wanted: {CIFAR100.base_folder}/{{train,test,meta}} from {CIFAR100.url} (--data.download true)."

    def _file(self, name: str) -> Path:
        path = self.home / name
        if not path.is_file():
            raise DataError(self.missing(f"{path} does not exist"))
        return path


class _CIFARSource(Source):
    """One file of the python layout."""

    def __init__(self, path: Path, split: str, classes: int) -> None:
        content = read_pickle(path)
        data, labels = content.get(b"data"), content.get(b"fine_labels")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
            raise DataError(f"{path}: 'data' is {found}, must be uint8 (N, 3072): images of 3×32×32")
        if not isinstance(labels, list) or len(labels) != len(data):
            count = len(labels) if isinstance(labels, list) else "no"
            raise DataError(f"{path}: {count} 'fine_labels' for {len(data)} images")
        outside = sorted({label for label in labels if not 0 <= label < classes})
        if outside:
            raise DataError(f"{path}: label {outside[0]} is outside of the {classes} classes in 'meta'")
        self.images = torch.from_numpy(data).view(-1, 3, 32, 32)
        self.labels, self.split, self.path = labels, split, path

    def __len__(self) -> int:
        return len(self.labels)

    def files(self) -> Sequence[Path]:
        return [self.path]

    def __getitem__(self, index: int) -> Sample:
        image = tv_tensors.Image(self.images[index])
        return {"image": image, "label": int(self.labels[index]), "name": f"{self.split}_{index:05d}"}


class ImageFolderDataModule(_ClassificationDataModule):
    """Your own pictures: `root/train/CLASS/*.jpg`, and the same below `val` or `test`.

    Training: `crop: pad` (zero padding of `image_size` / 8, random crop: for small images that all have
    `image_size` already, as CIFAR) or `crop: resized` (random area of 8-100 % at 3:4-4:3, resized: for photographs),
    horizontal flip; all on uint8. Evaluation: as they are (`pad`), or the shorter side to 8/7 `image_size` and the
    centre cropped (`resized`). Then ImageNet's mean and standard deviation. Classes are the folders' names, sorted.

    Args:
        root: Folder that holds `train/` and `val/` or `test/`.
        image_size: Side of the square that the network sees, in px.
        crop: `pad` or `resized`.
        loading: `batch_size`, `num_workers` and what else every DataModule takes.

    Raises:
        DataError: In `setup`, for missing folders, empty classes or classes that differ between splits; in a run, for
            an unreadable picture, or one of another size where `crop` is `pad`.
    """

    def __init__(
        self, root: str, image_size: int = 224, crop: Literal["pad", "resized"] = "resized", **loading: Any
    ) -> None:
        super().__init__(root, **loading)
        if image_size < 8:
            raise UsageError(f"data.image_size is {image_size}, must be at least 8")
        self.image_size, self.crop = image_size, crop
        if crop == "pad":
            first: v2.Transform = v2.RandomCrop(image_size, padding=image_size // 8)
            self.preparation = v2.Resize((image_size, image_size), antialias=True)
        else:
            first = v2.RandomResizedCrop(image_size, antialias=True)
            shorter = round(image_size * 8 / 7)
            self.preparation = v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(image_size)])
        self.augmentation = v2.Compose([first, v2.RandomHorizontalFlip()])

    def source(self, split: Split) -> Source:
        """Lists a split's folder; `val` and `test` stand in for each other where only one is there."""
        folder = self.root / split
        if not folder.is_dir() and split != "train":
            folder = self.root / ("test" if split == "val" else "val")
        if not folder.is_dir():
            raise DataError(self.missing(f"{self.root / split} does not exist"))
        size = self.image_size if self.crop == "pad" else None
        source = _ImageFolderSource(folder, size)
        if split != "train" and (self.root / "train").is_dir():
            trained = sorted(path.name for path in (self.root / "train").iterdir() if path.is_dir())
            extra = sorted(set(source.classes) - set(trained))
            if extra:
                raise DataError(
                    f"{folder}: class '{extra[0]}' is not among the {len(trained)} of {self.root / 'train'}"
                )
            source.renumber(trained)
        self.class_names = source.classes
        return source

    def how_to_get(self) -> str:
        """The layout."""
        return f"Wanted: train/CLASS/*.jpg and val/CLASS/*.jpg (or test/…) below {self.root}."


class _ImageFolderSource(Source):
    """One split's folder of class folders."""

    def __init__(self, folder: Path, size: int | None) -> None:
        try:
            listing = ImageFolder(str(folder), is_valid_file=lambda path: path.lower().endswith(IMAGE_ENDINGS))
        except FileNotFoundError as error:
            raise DataError(f"{folder}: {str(error).splitlines()[0]}") from None
        self.folder, self.size = folder, size
        self.classes: list[str] = listing.classes
        self.samples = [(Path(path), label) for path, label in listing.samples]

    def renumber(self, classes: list[str]) -> None:
        """Gives the labels that the train split has: a split may lack some classes."""
        self.samples = [(path, classes.index(self.classes[label])) for path, label in self.samples]
        self.classes = classes

    def __len__(self) -> int:
        return len(self.samples)

    def files(self) -> Sequence[Path]:
        return [path for path, _ in self.samples]

    def __getitem__(self, index: int) -> Sample:
        path, label = self.samples[index]
        image = read_image(path)
        if self.size and tuple(image.shape[1:]) != (self.size, self.size):
            raise DataError(
                f"{path}: {image.shape[2]}×{image.shape[1]} px, but with data.crop 'pad' all images have "
                f"{self.size}×{self.size}.\n  Set --data.crop resized, or --data.image_size."
            )
        return {"image": image, "label": label, "name": path.relative_to(self.folder).with_suffix("").as_posix()}


def read_pickle(path: Path) -> dict[bytes, Any]:
    """Reads a pickle of plain containers and arrays; anything that could run code is refused.

    Raises:
        DataError: Where the file is damaged, refers to any other object, or holds no mapping.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(f"{path}: unreadable pickle ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not the mapping of CIFAR's python layout")
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Knows what an array of numbers needs, and nothing else."""

    _allowed = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        """Refuses every other class or function."""
        if (module, name) not in self._allowed:
            raise DataError(
                f"refused to unpickle: it refers to '{module}.{name}', which could run code; CIFAR's files hold arrays"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
