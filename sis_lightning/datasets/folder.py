"""Folders of images: sorted by class, or without labels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

from sis_lightning.datasets.base import ImageDataset, Sample
from sis_lightning.datasets.constants import IMAGE_ENDINGS
from sis_lightning.datasets.images import ImageReader
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.paths import PathArray
from sis_lightning.errors import DataError, MissingDataError
from sis_lightning.machine import usable_cores

#: Where the files are expected.
LAYOUT = "Expected: train/CLASS/*.jpg and val/CLASS/*.jpg (or test/CLASS/*.jpg) in {root}"


class ImageFolderDataset(ImageDataset):
    """Images sorted by class: `root/SPLIT/CLASS/*.jpg`.

    Samples have `image` (3, H, W), `label`, an int in 0…K-1, and `name`, the path below the split's folder without its
    ending. Classes are the names of the folders, sorted; if there is a `root/train`, they are those of `root/train`, as
    another split may lack some.

    Args:
        root: Folder that holds a folder for each split.
        split: `train`, `val` or `test`. If there is only one of `val` and `test`, either name means it.
        image_size: Height and width in px that all images must have; None for any.

    Raises:
        DataError: If the folder is missing, a class has no image, or a class is not one of `root/train`; reading a
            sample, if the image is unreadable or has another size.
    """

    def __init__(self, root: str | Path, split: str = "train", image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        root = Path(root)
        self.folder, self.image_size = root / split, image_size
        if not self.folder.is_dir() and split in ("val", "test"):
            self.folder = root / ("test" if split == "val" else "val")
        if not self.folder.is_dir():
            raise MissingDataError(f"{root / split} does not exist\n  {LAYOUT.format(root=root)}")
        try:
            listing = ImageFolder(str(self.folder), is_valid_file=lambda path: path.lower().endswith(IMAGE_ENDINGS))
        except FileNotFoundError as error:
            raise DataError(f"{self.folder}: {str(error).splitlines()[0]}") from None
        classes: list[str] = listing.classes
        if split != "train" and (root / "train").is_dir():
            trained = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
            extra = sorted(set(classes) - set(trained))
            if extra:
                raise DataError(
                    f"{self.folder}: class '{extra[0]}' is not among the {len(trained)} classes of {root / 'train'}"
                )
        else:
            trained = classes
        self.paths = PathArray(path for path, _ in listing.samples)
        label_of = np.array([trained.index(name) for name in classes])
        self.labels = label_of[[label for _, label in listing.samples]]
        self.meta = DatasetMeta(tuple(trained))

    def __len__(self) -> int:
        return len(self.labels)

    def files(self) -> Sequence[Path]:
        """The images."""
        return self.paths

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        image = self.reader.read(path)
        if self.image_size and tuple(image.shape[1:]) != self.image_size:
            wanted = "×".join(str(side) for side in reversed(self.image_size))
            raise DataError(
                f"{path}: {image.shape[2]}×{image.shape[1]} px, but all images must have {wanted} px\n"
                "  With crop: resized they may have any size; image_size is another size."
            )
        return {
            "image": image,
            "label": int(self.labels[index]),
            "name": path.relative_to(self.folder).with_suffix("").as_posix(),
        }


class UnlabelledDataset(ImageDataset):
    """All images of a folder and its subfolders, or a single image, without targets.

    Samples have `image` (3, H, W), rotated as its EXIF orientation says, and `name`, the path below the folder with its
    ending. Hidden files and folders, such as the `._a.jpg` that macOS writes, are left out.

    Args:
        path: The folder or image file.
        skip_bad: Whether unreadable images are left out instead of refused. They are in `bad`.
        reader: How image files become tensors.

    Attributes:
        bad: The unreadable images, by their names, with the reason.
        sizes: Height and width in px of each image.

    Raises:
        DataError: If there is no image, or some cannot be read; the message names all of these.
    """

    def __init__(self, path: str | Path, *, skip_bad: bool = False, reader: ImageReader | None = None) -> None:
        super().__init__()
        self.reader = reader or ImageReader(upright=True)
        path = Path(path)
        self.meta = DatasetMeta()
        if path.is_file():
            paths, root = [path], path.parent
        elif path.is_dir():
            paths, root = images_below(path), path
        else:
            raise DataError(f"'{path}': no such file or folder")
        with ThreadPoolExecutor(usable_cores()) as pool:  # decoding releases Python's lock
            sizes, faults = zip(*pool.map(self.reader.inspect, paths), strict=True)
        names = [file.relative_to(root).as_posix() for file in paths]
        self.bad = {name: fault for name, fault in zip(names, faults, strict=True) if fault}
        if self.bad and not (skip_bad and len(self.bad) < len(paths)):
            listed = "; ".join(f"{name} ({fault})" for name, fault in self.bad.items())
            raise DataError(
                f"{path}: {len(self.bad)} of {len(paths)} images cannot be read: {listed}\n"
                "  With skip_bad: true the others are predicted."
            )
        self.paths = [file for file, fault in zip(paths, faults, strict=True) if not fault]
        self.names = [name for name in names if name not in self.bad]
        self.sizes: list[tuple[int, int]] = [size for size, fault in zip(sizes, faults, strict=True) if not fault]

    def __len__(self) -> int:
        return len(self.paths)

    def files(self) -> Sequence[Path]:
        """The images."""
        return self.paths

    def __getitem__(self, index: int) -> Sample:
        return {"image": self.reader.read(self.paths[index]), "name": self.names[index]}


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted; hidden files and folders are left out.

    Raises:
        DataError: If there is none.
    """
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
    paths = sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not paths:
        raise DataError(f"'{folder}': no images in it ({', '.join(IMAGE_ENDINGS)})")
    return paths
