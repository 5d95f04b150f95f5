"""From Datasets to batches.

A Dataset reads sample `index` as uint8 tensors, a transform augments it, and a loader stacks samples. What a training
run sees depends on seed, epoch and index only: not on the number of workers, devices or restarts.

The batch format, for every task:

- `image`: uint8 RGB (N, 3, H, W), or a list of uint8 (3, H, W) if sizes differ. The task normalises them. With
  `mean` and `std` of C values (N, C, H, W); with `value_range` float32, normalised already.
- `name`: a string for each image.
- classification: `label` (N,).
- segmentation: `mask` (N, H, W) uint8 of class ids, 255 for void, or a list of (H, W).
- detection: lists `boxes` of (n, 4) x1, y1, x2, y2 in px and `labels` of (n,) 1…K.
- keypoints, training: `keypoints` (N, K, 3) x, y in px of the crop and visibility 0, 1 or 2.
- keypoints, evaluation: lists with an entry for each image: `crops` (P, 3, h, w) uint8, `to_image` (P, 2, 3), the
  affine matrix from a crop's px to the image's, `person_boxes` (P, 4) x1, y1, x2, y2 in px of the image, `box_scores`
  (P,), `areas` (P,) of the crops in px² of the image, and `box_source`, which says where the boxes are from.
- evaluation of detection and keypoints: `truth`, a dict for each image; see `Annotations.ground_truth`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, Sampler

from sis_lightning.datamodules import workers
from sis_lightning.datamodules.samplers import BatchesBySize, EpochSampler, ShardSampler, sample_seed
from sis_lightning.datasets.base import ImageDataset, Sample, collate
from sis_lightning.datasets.constants import SPLITS, SYNTHETIC_MARKER, Split
from sis_lightning.datasets.download import Archive, download, extract
from sis_lightning.datasets.folder import UnlabelledDataset
from sis_lightning.datasets.images import ImageReader
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.paths import PathArray
from sis_lightning.datasets.synthetic import write_synthetic
from sis_lightning.errors import DataError, MissingDataError, UsageError
from sis_lightning.files import digest_files, digest_listing
from sis_lightning.lightning_internals import batch_progress
from sis_lightning.machine import usable_cores
from sis_lightning.option_effects import Effect

#: Augments or prepares a sample. Loaders send it to their workers, so it must be picklable, and small.
Transform = Callable[[Sample], Sample]


# Limit of a batch to predict: decoded, such a batch takes 50 MB, and normalised four times as much.
_MAX_PIXELS = 16_000_000
# Number of damaged samples in a row that are replaced.
_REPLACED = 100
_OF_SPLITS = ("listed again", "without", "areas", "boxes twice", "file names")


def unchanged(sample: Sample) -> Sample:
    """Returns a sample as it is."""
    return sample


@dataclass(frozen=True)
class ImageTransform:
    """Applies a transform to the image of a sample.

    Attributes:
        transform: A transform of images, such as those of `torchvision.transforms.v2`.
    """

    transform: Callable[[Any], Any]

    def __call__(self, sample: Sample) -> Sample:
        """Returns the sample with the transformed image."""
        return {**sample, "image": self.transform(sample["image"])}


class _Augmented(Dataset[Sample]):
    """Samples by (epoch, index), each read and transformed under a seed of its own.

    Args:
        dataset: The Dataset.
        transform: Augments a sample.
        seed: Seed of the run.
        replace: Whether the next sample takes the place of one that is damaged.
    """

    def __init__(self, dataset: ImageDataset, transform: Transform, seed: int, *, replace: bool = False) -> None:
        self.dataset, self.transform, self.seed, self.replace = dataset, transform, seed, replace
        self.told: set[int] = set()

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Sample]:
        """The samples of a batch; loaders call it. Isolating the generators takes longer than to augment an image."""
        with isolate_rng(include_cuda=False):
            return [self._seeded(epoch, index) for epoch, index in keys]

    def _seeded(self, epoch: int, index: int) -> Sample:
        seed = sample_seed(self.seed, epoch, index)
        # torch.manual_seed would also seed the accelerator's generators.
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return self.transform(self._read(index))

    def _read(self, index: int, replaced: int = 0) -> Sample:
        try:
            return self.dataset[index]
        except DataError as error:
            if not self.replace or replaced == _REPLACED:
                raise
            if index not in self.told:
                self.told.add(index)
                print(f"left out, as on_error is skip: {error}", file=sys.stderr, flush=True)
        return self._read((index + 1) % len(self.dataset), replaced + 1)


class _Batches(Dataset[Any]):
    """Reads whole batches: item `keys` is the list of their samples."""

    def __init__(self, samples: _Augmented) -> None:
        self.samples = samples

    def __getitem__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        return self.samples.__getitems__(keys)


class SISDataModule(LightningDataModule, ABC):
    """Data loaders for the train, val and test splits of a data set, and for a folder of images to predict on.

    A subclass makes the Datasets (`dataset`) and gives the augmentation of samples (`train_transform`). It works with
    any LightningModule that takes the batch format of `sis_lightning.datamodules.base`; one with a method `set_meta` is
    given the `DatasetMeta` at the end of `setup`. Without a Trainer, call `setup` and then `train_dataloader`.

    Args:
        root: Folder that contains the data set in its published layout.
        batch_size: Number of images in a training step, in total over all devices.
        num_workers: Number of worker processes per device that decode and augment images; with 0, the main process does
            so.
        predict_path: Folder of images, or one image, on which `predict` runs instead of the val split.
        synthetic: Arguments of `sis_lightning.write_synthetic`, including its `root`. Synthetic data is written only if
            that `root` and the DataModule's `root` are the same folder, and this folder does not exist. None: never.
        download: Whether the data set is downloaded into `root` if it is missing.
        skip_bad: Whether unreadable images of `predict_path` are left out and named at the end, instead of refused
            before any prediction.
        on_error: What happens if a training image or its target is damaged: `fail` ends the run; `skip` takes the next
            sample instead, and names the damaged file once in each worker. Evaluation always fails, as its metrics
            would not be those of the split.
        upright: Whether images are rotated as their EXIF orientation says. By default they are taken as stored, as most
            annotations refer to the stored pixels; images of `predict_path` are always rotated.
        mean: Mean of each channel of the training images, in 0…1; its length is the number of channels, which
            `in_channels` of the task must be. None: that of the data set, or of ImageNet.
        std: Standard deviation of each channel, in 0…1.
        value_range: The values in the image files that become 0 and 1, such as `[0, 4095]`, for pixels of more than 8
            bits and for floating-point numbers; they stay as exact as they are. None: 0 and 255, or 65535 of 16 bits,
            of which the upper 8 are taken.

    Attributes:
        datasets: The Dataset of each split, after `setup`.
        notes: Facts on the data for the record of a run, by a short label.
        image_size: Height and width in px of the training images; None if they keep their own sizes.
        position: The epoch in which training begins, and the number of its batches that are done already.

    Raises:
        UsageError: If an argument is invalid, or `batch_size` is not a multiple of the number of devices.
        DataError: In `setup`, if data is missing or damaged.
    """

    #: The published archives of the data set.
    archives: ClassVar[tuple[Archive, ...]] = ()
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "root": Effect.NOTHING,
        "batch_size": Effect.RESULT,
        "num_workers": Effect.NOTHING,
        "predict_path": Effect.NOTHING,
        "synthetic": Effect.NOTHING,
        "download": Effect.NOTHING,
        "skip_bad": Effect.NOTHING,
        "upright": Effect.RESULT,
        "mean": Effect.RESULT,
        "std": Effect.RESULT,
        "value_range": Effect.RESULT,
        "on_error": Effect.RESULT,
    }
    image_size: tuple[int, int] | None = None

    def __init__(
        self,
        root: str,
        batch_size: int = 16,
        num_workers: int = 4,
        predict_path: str | None = None,
        synthetic: dict[str, Any] | None = None,
        download: bool = False,
        skip_bad: bool = False,
        upright: bool = False,
        on_error: Literal["fail", "skip"] = "fail",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()) or any(not v > 0 for v in std or ()):
            raise UsageError(f"mean is {mean}, std {std}: give both, with a value for each channel, std above 0")
        if value_range is not None and not value_range[0] < value_range[1]:
            raise UsageError(f"value_range is {list(value_range)}, must be [low, high] with low < high")
        self.mean, self.std, self.value_range = mean, std, value_range
        if batch_size < 1 or num_workers < 0:
            raise UsageError(f"batch_size is {batch_size} (at least 1), num_workers {num_workers} (at least 0)")
        if synthetic is not None and "root" not in synthetic:
            raise UsageError("synthetic has no 'root': the folder in which synthetic data may be made")
        self.root, self.batch_size, self.num_workers = Path(root), batch_size, num_workers
        self.predict_path = Path(predict_path) if predict_path else None
        self.synthetic, self.download, self.skip_bad, self.upright = synthetic, download, skip_bad, upright
        if on_error not in ("fail", "skip"):
            raise UsageError(f"on_error is {on_error!r}, must be fail or skip")
        self.on_error = on_error
        self.datasets: dict[str, ImageDataset] = {}
        self.notes: dict[str, str] = {}
        self.position = (0, 0)

    @abstractmethod
    def dataset(self, split: Split) -> ImageDataset:
        """Makes the Dataset of a split.

        Raises:
            DataError: If something is missing or damaged: what, where, and where to get it.
        """

    def open(self, split: Split) -> ImageDataset:
        """The Dataset of a split, set as the arguments say."""
        dataset = self.dataset(split)
        dataset.reader = self._reader(dataset.meta, upright=self.upright)
        return dataset

    def _reader(self, meta: DatasetMeta, *, upright: bool) -> ImageReader:
        meta = self._with_values(meta)
        return ImageReader(upright, meta.mean, meta.std, meta.value_range)

    def mean_colour(self, usual: Sequence[float]) -> tuple[int, ...]:
        """The colour that becomes 0 when images are normalised, up to rounding, for the padding of training images.

        Args:
            usual: Mean of each channel of the data set, in 0…1.

        Returns:
            A value for each channel: 0…255, or 0 if images are normalised as they are read.
        """
        mean = self.mean or usual
        return tuple(0 if self.value_range else round(255 * value) for value in mean)

    def _with_values(self, meta: DatasetMeta) -> DatasetMeta:
        if self.mean is not None and self.std is not None:
            meta = dataclasses.replace(meta, mean=tuple(self.mean), std=tuple(self.std))
        return dataclasses.replace(meta, value_range=self.value_range)

    @property
    @abstractmethod
    def train_transform(self) -> Transform:
        """Augments a sample, drawing from the global random generators.

        It is sent to the loader's workers, so it should not refer to the DataModule, and with it to Trainer and model.
        """

    @property
    def eval_transform(self) -> Transform:
        """Prepares a sample for evaluation and prediction, without anything random; by default it stays as it is."""
        return unchanged

    @property
    def meta(self) -> DatasetMeta:
        """The description of the data set for a task.

        Raises:
            UsageError: Before `setup`, and if only unlabelled images were set up.
        """
        labelled = (dataset.meta for dataset in self.datasets.values() if dataset.meta.class_names)
        meta = next(labelled, None)
        if meta is None:
            raise UsageError(f"{type(self).__name__} has no meta before setup() has read a labelled split")
        return self.describe(meta)

    def describe(self, meta: DatasetMeta) -> DatasetMeta:
        """Adds the values that this DataModule decides, such as the image size, to a Dataset's meta."""
        return self._with_values(meta)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty before `setup`."""
        return next((dataset.meta.class_names for dataset in self.datasets.values() if dataset.meta.class_names), ())

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 before `setup`."""
        return len(self.class_names)

    @property
    def home(self) -> Path:
        """The folder of the data set itself: `root` or a folder in it."""
        return self.root

    @property
    def eval_batch_size(self) -> int:
        """Number of images in a step of evaluation or prediction, over all devices."""
        return self.batch_size

    def identity(self) -> str:
        """The origin of the data: `synthetic` by its marker file, else as `provenance` says."""
        for folder in (self.home, self.home.parent, self.root):
            marker = folder / SYNTHETIC_MARKER
            if marker.is_file():
                arguments = json.loads(marker.read_text())
                return f"synthetic (seed {arguments.get('seed')}, {arguments.get('images')} images)"
        return self.provenance()

    def fingerprint(self, split: Split) -> str:
        """SHA-256 of the names and of every byte of the files that a split is read from."""
        return digest_files(self.datasets[split].files(), self.home)

    def listing(self, split: Split) -> str:
        """SHA-256 that tells the files of a split from others within seconds; see `digest_listing`."""
        files = self.datasets[split].files()
        return digest_listing(files.names() if isinstance(files, PathArray) else files, self.home)

    def provenance(self) -> str:
        """`official` if the files are proved to be the published ones, else `other`."""
        return "other"

    @property
    def to_be_made(self) -> bool:
        """Whether `prepare_data` will write or download the data."""
        return not self.home.is_dir() and (self.download or self._synthetic_root_is_free)

    @property
    def _synthetic_root_is_free(self) -> bool:
        if self.synthetic is None or self.root.exists():
            return False
        return Path(self.synthetic["root"]).absolute() == self.root.absolute()

    def prepare_data(self) -> None:
        """Makes synthetic data, or downloads the data set, if that was asked for and the data is missing."""
        if not self.to_be_made:
            return
        if self._synthetic_root_is_free:
            arguments = {key: value for key, value in (self.synthetic or {}).items() if key != "root"}
            print(f"{self.root} does not exist: writing synthetic data there, {arguments}", flush=True)
            write_synthetic(self.root, **arguments)
        else:
            self.root.mkdir(parents=True, exist_ok=True)
            self.fetch()

    def fetch(self) -> None:
        """Downloads the data set into `root`, and unpacks it.

        Raises:
            UsageError: If there is nothing to download.
            DataError: If the download fails.
        """
        archives = [archive for archive in self.archives if archive.fetched]
        if not archives:
            raise UsageError(f"{type(self).__name__} has nothing to download")
        for archive in archives:
            path = download(archive.url, self.root / archive.file, archive.md5)
            extract(path, self.root, archive.folder)

    def setup(self, stage: str | None = None) -> None:
        """Makes the Datasets that a stage needs, and hands `meta` to the LightningModule if that takes it.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None for the splits of fit and test.

        Raises:
            DataError: If data is missing, damaged or empty.
        """
        try:
            self._make_datasets(stage)
        except MissingDataError as error:
            fetched = any(archive.fetched for archive in self.archives)
            raise MissingDataError(f"{error}\n  download=True downloads it." if fetched else str(error)) from None
        module: Any = self.trainer.lightning_module if self.trainer else None
        if hasattr(module, "set_meta") and self.class_names:
            module.set_meta(self.meta)

    def _make_datasets(self, stage: str | None) -> None:
        if not self.root.exists() and not (stage == "predict" and self.predict_path):
            raise MissingDataError(f"root '{self.root}' does not exist\n  {self.layout()}".rstrip())
        needed: dict[str | None, list[Split]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}
        for split in {**needed, None: list(SPLITS)}.get(stage, []):
            if split not in self.datasets:
                self._add(split, self.open(split))
                if not len(self.datasets[split]):
                    raise DataError(f"{self.root}: the {split} split is empty")
                if split == "train":
                    self.datasets[split].require_targets()
                else:
                    self.datasets[split].require_scores()
        if stage == "predict" and "predict" not in self.datasets:
            photographs = self.predict_path and UnlabelledDataset(
                self.predict_path, skip_bad=self.skip_bad, reader=self._reader(DatasetMeta(), upright=True)
            )
            self._add("predict", photographs or self.open("val"))

    def _add(self, split: str, dataset: ImageDataset) -> None:
        dataset.require_sound()
        self.datasets[split] = dataset
        for label, note in dataset.notes.items():
            # What is told of a split's own files is kept apart from what another split's say.
            self.notes[f"{split} {label}" if label in _OF_SPLITS else label] = note

    def layout(self) -> str:
        """One or two lines: which files are expected in `root`, and where they are published; empty if unknown."""
        return ""

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of `batch_size` over all devices; a last incomplete batch is left out."""
        rank, world = self._ranks()
        dataset = self.datasets["train"]
        if self.batch_size % world:
            raise UsageError(f"batch_size {self.batch_size} is not a multiple of {world}, the number of devices")
        per_device = self.batch_size // world
        if len(dataset) // world < per_device:
            raise DataError(
                f"{self.root}: {len(dataset)} training images are fewer than one batch of {self.batch_size}:\n"
                f"  batch_size may be at most {len(dataset)}"
            )
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        epoch, batches = self.position
        start = (epoch, batches * self.batch_size)
        sampler = EpochSampler(len(dataset), seed, rank, world, dataset.groups(), self.batch_size, start)
        augmented = _Augmented(dataset, self.train_transform, seed, replace=self.on_error == "skip")
        return self._loader(augmented, sampler, per_device)

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches that are done, so that a resumed run reads the next sample."""
        if self.trainer is None:
            return {}
        return {"epoch": self.trainer.current_epoch, "batches": batch_progress(self.trainer).current.completed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Sets `position` from `state_dict()`."""
        self.position = (state_dict["epoch"], state_dict["batches"])

    def val_dataloader(self) -> DataLoader[Sample]:
        """Every image of the val split once, over all devices."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Every image of the test split once, over all devices."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Every image of `predict_path` or of the val split once, over all devices.

        Images of `predict_path` come in the order of their sizes, and in batches of at most 16 megapixels.
        """
        dataset = self.datasets["predict"]
        if not isinstance(dataset, UnlabelledDataset):
            return self._eval_loader("predict")
        rank, world = self._ranks()
        self._require_one_each("predict", world)
        batches = BatchesBySize(dataset.sizes, max(1, self.eval_batch_size // world), _MAX_PIXELS, rank, world)
        count = self._worker_count()
        return DataLoader(
            _Batches(_Augmented(dataset, self.eval_transform, 0)),
            batch_size=None,
            sampler=batches,
            num_workers=count,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=1 if count else None,
            worker_init_fn=workers.initialize,
            generator=torch.Generator().manual_seed(0),
        )

    def _eval_loader(self, split: str) -> DataLoader[Sample]:
        rank, world = self._ranks()
        dataset = self.datasets[split]
        self._require_one_each(split, world)
        augmented = _Augmented(dataset, self.eval_transform, 0)
        return self._loader(augmented, ShardSampler(len(dataset), rank, world), max(1, self.eval_batch_size // world))

    def _require_one_each(self, split: str, world: int) -> None:
        if (count := len(self.datasets[split])) < world:
            raise UsageError(f"{count} image(s) to {split} are fewer than {world}, the number of devices")

    def _worker_count(self) -> int:
        count = min(self.num_workers, usable_cores())  # more workers than cores only compete for them
        if count:
            workers.require_resources()
        return count

    def _loader(self, dataset: _Augmented, sampler: Sampler[tuple[int, int]], batch_size: int) -> DataLoader[Sample]:
        training = isinstance(sampler, EpochSampler)
        count = self._worker_count()
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=count,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            drop_last=training,
            persistent_workers=training and count > 0,
            worker_init_fn=workers.initialize,
            # Without a generator of its own, a loader draws from the global one, and so changes what the model draws.
            generator=torch.Generator().manual_seed(0),
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
