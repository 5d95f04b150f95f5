"""CIFAR-100 in its python layout."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.datasets import CIFAR100

from sis_lightning.datasets.base import ImageDataset, Sample
from sis_lightning.datasets.constants import CIFAR100_MEAN, CIFAR100_STD
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.errors import DataError, MissingDataError, UsageError

#: Where the files are expected.
LAYOUT = f"Expected: {CIFAR100.base_folder}/{{{{train,test,meta}}}} in {{root}}, from {CIFAR100.url}"


def cifar_home(root: Path) -> Path:
    """The folder with the three files: `root/cifar-100-python`, or `root` itself if they are there."""
    nested = root / CIFAR100.base_folder
    return nested if nested.is_dir() or not (root / "meta").is_file() else root


class CIFAR100Dataset(ImageDataset):
    """CIFAR-100: 50,000 training and 10,000 test images of 32×32 px in 100 classes (Krizhevsky 2009).

    Samples have `image` (3, 32, 32), `label`, an int in 0…99, and `name`.

    Args:
        root: Folder that holds `cifar-100-python/`, or that folder itself.
        split: `train` or `test`.

    Raises:
        DataError: If a file is missing or is not what CIFAR's files are.
        UsageError: If there is no such split.
    """

    def __init__(self, root: str | Path, split: Literal["train", "test"] = "train") -> None:
        super().__init__()
        if split not in ("train", "test"):
            raise UsageError(f"split is {split!r}, must be 'train' or 'test'")
        home = cifar_home(Path(root))
        names = read_pickle(_existing(home / "meta", root)).get(b"fine_label_names")
        if not isinstance(names, list) or not names:
            raise DataError(f"{home / 'meta'}: it has no list 'fine_label_names'")
        self.meta = DatasetMeta(
            tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names),
            mean=CIFAR100_MEAN,
            std=CIFAR100_STD,
            image_size=(32, 32),
            resize="stretch",
        )
        self.path, self.split = _existing(home / split, root), split
        content = read_pickle(self.path)
        data, labels = content.get(b"data"), content.get(b"fine_labels")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
            raise DataError(f"{self.path}: 'data' is {found}, must be uint8 (N, 3072): images of 3×32×32")
        if not isinstance(labels, list) or len(labels) != len(data):
            count = len(labels) if isinstance(labels, list) else "no"
            raise DataError(f"{self.path}: {count} 'fine_labels' for {len(data)} images")
        outside = sorted({label for label in labels if not 0 <= label < len(names)})
        if outside:
            raise DataError(f"{self.path}: label {outside[0]} is outside of the {len(names)} classes in 'meta'")
        self.images = torch.from_numpy(data).view(-1, 3, 32, 32)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def files(self) -> Sequence[Path]:
        """The pickle of the split."""
        return [self.path]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = tv_tensors.Image(self.images[index])
        return {"image": image, "label": int(self.labels[index]), "name": f"{self.split}_{index:05d}"}


def _existing(path: Path, root: str | Path) -> Path:
    if not path.is_file():
        raise MissingDataError(f"{path} does not exist\n  {LAYOUT.format(root=root)}")
    return path


def read_pickle(path: Path) -> dict[bytes, Any]:
    """Reads a pickle of plain containers and arrays; anything that could run code is refused.

    Args:
        path: The pickle file.

    Raises:
        DataError: If the file is damaged, refers to any other object, or does not hold a mapping.
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
    """Unpickles arrays of numbers, and nothing else that is not built in."""

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
