"""CIFAR-100."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torchvision.datasets import CIFAR100
from torchvision.transforms import v2

from sis_lightning.datamodules.base import ImageTransform, SISDataModule, Transform
from sis_lightning.datamodules.flips import RandomCropAndFlip
from sis_lightning.datasets.base import ImageDataset
from sis_lightning.datasets.cifar import LAYOUT, CIFAR100Dataset, cifar_home
from sis_lightning.datasets.constants import CIFAR100_MEAN, Split
from sis_lightning.datasets.download import Archive, md5
from sis_lightning.errors import UsageError
from sis_lightning.option_effects import Effect


class CIFAR100DataModule(SISDataModule):
    """CIFAR-100: 50,000 training and 10,000 test images of 32×32 px in 100 classes.

    Training: padding of 4 with the mean colour, random crop of 32, random horizontal flip (the code of ResNeXt: zeros
    after normalising; here the colour is rounded), on uint8. Evaluation: the images as they are. The val split is the
    test split, as in the papers: report the metrics of the last epoch, not of the best one.

    Args:
        root: Folder that contains `cifar-100-python/`.
        loading: `batch_size`, `num_workers` and the other arguments of `SISDataModule`; images of `predict_path` are
            resized to 32×32.

    Raises:
        DataError: In `setup`, if files are missing or unreadable.
    """

    archives = (Archive(CIFAR100.url, CIFAR100.tgz_md5, CIFAR100.base_folder),)
    option_effects: ClassVar[Mapping[str, Effect]] = {}
    image_size = (32, 32)

    def __init__(self, root: str, **loading: Any) -> None:
        super().__init__(root, **loading)
        if self.value_range is not None or len(self.mean or CIFAR100_MEAN) != 3:
            raise UsageError("CIFAR-100 has RGB of 8 bits: leave out value_range, and give mean and std of 3 values")
        self._augmentation = RandomCropAndFlip(32, 4, self.mean_colour(CIFAR100_MEAN))
        self._preparation = v2.Resize((32, 32), antialias=True)

    @property
    def home(self) -> Path:
        """The folder with the three files."""
        return cifar_home(self.root)

    def dataset(self, split: Split) -> ImageDataset:
        """The file `train`, or `test` for val and test."""
        return CIFAR100Dataset(self.root, "train" if split == "train" else "test")

    def layout(self) -> str:
        """CIFAR's three files, and where they are published."""
        return LAYOUT.format(root=self.root)

    @property
    def train_transform(self) -> Transform:
        """Crops and flips the image."""
        return ImageTransform(self._augmentation)

    @property
    def eval_transform(self) -> Transform:
        """Resizes the image to 32×32."""
        return ImageTransform(self._preparation)

    def provenance(self) -> str:
        """`official` if the MD5 of train, test and meta are the published ones."""
        published = [*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])]
        files = {self.home / name: checksum for name, checksum in published}
        official = all(path.is_file() and md5(path) == checksum for path, checksum in files.items())
        return "official (MD5 of train, test and meta)" if official else "other (MD5 is not the published one)"
