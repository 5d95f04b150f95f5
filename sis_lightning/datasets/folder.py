"""Folders of images: sorted by class, or without labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

from sis_lightning.datasets.base import ImageDataset, Sample
from sis_lightning.datasets.constants import IMAGE_ENDINGS
from sis_lightning.datasets.images import UNREADABLE, read_image
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.paths import PathArray
from sis_lightning.errors import DataError, MissingDataError

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
        image = read_image(path, upright=self.upright)
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

    Samples have `image` (3, H, W), rotated as its EXIF orientation says, and `name`, the path below the folder without
    its ending (with it if two files differ in nothing else).

    Args:
        path: The folder or image file.

    Raises:
        DataError: If there is no image, or a file with an image's ending is not an image.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        self.meta = DatasetMeta()
        if path.is_file():
            self.paths, self.root = [path], path.parent
        elif path.is_dir():
            self.paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
            self.root = path
        else:
            raise DataError(f"'{path}': no such file or folder")
        if not self.paths:
            raise DataError(f"'{path}': no images in it ({', '.join(IMAGE_ENDINGS)})")
        for file in self.paths:  # before any work is done on the others
            try:
                Image.open(file).close()
            except UNREADABLE as error:
                raise DataError(f"{file}: not an image ({error})") from None
        names = [path.relative_to(self.root).with_suffix("") for path in self.paths]
        often = Counter(names)
        self.names = [
            (name if often[name] == 1 else path.relative_to(self.root)).as_posix()
            for name, path in zip(names, self.paths, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.paths)

    def files(self) -> Sequence[Path]:
        """The images."""
        return self.paths

    def __getitem__(self, index: int) -> Sample:
        return {"image": read_image(self.paths[index], upright=True), "name": self.names[index]}
