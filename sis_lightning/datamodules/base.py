"""The one way from files to batches.

A `Source` decodes sample `index` to uint8 tensors; a transform augments it; the loader stacks samples; the device
normalises the batch. What a training run sees depends on (seed, epoch, index) alone: not on the number of workers, of
devices or of restarts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from sis_lightning.datasets.annotations import Defect
from sis_lightning.datasets.constants import SYNTHETIC_MARKER
from sis_lightning.datasets.download import Archive, download, extract
from sis_lightning.datasets.synthetic import write_synthetic
from sis_lightning.errors import DataError, UsageError
from sis_lightning.evaluation.gathered import Row, Truth
from sis_lightning.files import digest_files, digest_listing
from sis_lightning.machine import usable_cores
from sis_lightning.run.signals import STOPPING

Sample = dict[str, Any]
Batch = dict[str, Any]
Split = Literal["train", "val", "test"]

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_image(path: Path, *, upright: bool = False) -> tv_tensors.Image:
    """Decodes a picture of any mode to uint8 RGB (3, H, W).

    Args:
        path: The file.
        upright: Turns it as its EXIF says. Not for data sets: their annotations are of the pixels as stored.

    Raises:
        DataError: Where the file is missing, truncated or not a picture.
    """
    with open_image(path) as image:
        if image.mode.startswith("I;16"):  # convert() would clip the upper 8 bits instead of dropping the lower
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = ImageOps.exif_transpose(image) if upright else image
        return tv_tensors.Image(transforms.pil_to_tensor(image.convert("RGB")))


def open_image(path: Path) -> Image.Image:
    """Opens and fully decodes a picture.

    Raises:
        DataError: Where the file is missing, truncated or not a picture.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: unreadable or truncated image ({error})") from None
    return image


class Source(ABC):
    """A list of samples as they lie on disk.

    Attributes:
        defects: What was found wrong while listing them.
    """

    defects: Sequence[Defect] = ()

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Decodes sample `index`: `image` (uint8, (3, H, W)), `name` (unique), and the task's targets."""

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """All that the samples are read from."""

    def checks(self) -> Iterator[Callable[[], Sample]]:
        """Decodes everything once, piece by piece, for `check-data`: each call may raise DataError."""
        return (functools.partial(self.__getitem__, index) for index in range(len(self)))

    def require_sound(self) -> None:
        """Stops a run on defects that training has no remedy for.

        Raises:
            DataError: Names the first of them, and how to see the others.
        """
        fatal = [defect for defect in self.defects if not defect.remedy]
        if fatal:
            raise DataError(
                f"{fatal[0]}\n"
                f"  {len(fatal)} such defect(s): 'sis-lightning check-data' with the same options lists them all."
            )

    def groups(self) -> Sequence[int] | None:
        """A number for each sample, where training batches should hold samples of one number alone."""
        return None


class FolderSource(Source):
    """All pictures below a folder, or a single picture, without targets.

    Raises:
        DataError: Where there are none.
    """

    def __init__(self, path: Path) -> None:
        if path.is_file():
            self.paths, self.root = [path], path.parent
        elif path.is_dir():
            self.paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
            self.root = path
        else:
            raise DataError(f"data.predict_path '{path}': no such file or folder")
        if not self.paths:
            raise DataError(f"data.predict_path '{path}': no pictures in it ({', '.join(IMAGE_ENDINGS)})")
        for file in self.paths:  # before anything is done with the others
            try:
                Image.open(file).close()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise DataError(f"{file}: not a picture ({error})") from None
        names = [path.relative_to(self.root).with_suffix("") for path in self.paths]
        often = Counter(names)
        # a.jpg beside a.png: their endings tell them apart.
        self.names = [
            (name if often[name] == 1 else path.relative_to(self.root)).as_posix()
            for name, path in zip(names, self.paths, strict=True)
        ]

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.paths)

    def files(self) -> Sequence[Path]:
        """The pictures."""
        return self.paths

    def __getitem__(self, index: int) -> Sample:
        """`image`, turned upright by its EXIF, and `name`, the path below the folder without its ending."""
        return {"image": read_image(self.paths[index], upright=True), "name": self.names[index]}


class _Augmented(Dataset[Sample]):
    """Samples by (epoch, index), each transformed under a seed of its own."""

    def __init__(self, source: Source, transform: Callable[[Sample], Sample], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        sample = self.source[index]
        with isolate_rng(include_cuda=False):
            seed = sample_seed(self.seed, epoch, index)
            # Not torch.manual_seed, which would also touch the accelerator's generators.
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            return self.transform(sample)


def _ignore_signals(_: int) -> None:
    """A cluster's signals go to workers too: they are for the run to answer, which still needs its workers then."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def sample_seed(*parts: int) -> int:
    """Mixes numbers such as (seed, epoch, index) into one seed of 63 bits."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) for one rank: each epoch another permutation, drawn from (seed, epoch).

    Every rank gets as many samples as the others (the last few of the permutation are left out), so that no device
    waits for another; `set_epoch` is called by the Trainer.

    Args:
        length: Samples in all.
        seed: Of the run.
        rank: This device.
        world_size: All devices.
        groups: A number for each sample: batches then hold samples of one group, but for the last one or two.
        batch_size: Of those batches, over all devices.
        start: Epoch to begin with, and how many of its samples (over all devices) are done with already.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[int] | None = None,
        batch_size: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.groups, self.batch_size = groups, batch_size
        # Known from the beginning: Lightning draws from a loader before it sets the epoch.
        self.start, self.epoch = start, start[0]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        if self.groups is not None:
            order = self._by_group(order, generator)
        done = self.start[1] if self.epoch == self.start[0] else 0
        for index in order.tolist()[done + self.rank : len(self) * self.world_size : self.world_size]:
            yield self.epoch, index

    def _by_group(self, order: Tensor, generator: torch.Generator) -> Tensor:
        group_of = torch.as_tensor(self.groups)[order]
        whole: list[Tensor] = []
        rest: list[Tensor] = []
        for group in sorted(set(group_of.tolist())):
            members = order[group_of == group]
            cut = len(members) - len(members) % self.batch_size
            whole += members[:cut].view(-1, self.batch_size)
            rest.append(members[cut:])
        turns = torch.randperm(len(whole), generator=generator).tolist()
        return torch.cat([*(whole[turn] for turn in turns), *rest])


class ShardSampler(Sampler[tuple[int, int]]):
    """Yields (0, index) for one rank, in order: over all ranks each sample once, none twice to pad."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)


def collate(samples: list[Sample]) -> Batch:
    """Stacks tensors of one shape, keeps lists of everything else (and of images, where their sizes differ)."""
    batch: Batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if isinstance(values[0], int):
            batch[key] = torch.tensor(values)
        elif isinstance(values[0], Tensor):
            values = [value.as_subclass(Tensor) for value in values]
            batch[key] = torch.stack(values) if len({value.shape for value in values}) == 1 else values
        else:
            batch[key] = values
    return batch


class SISDataModule(LightningDataModule, ABC):
    """Loaders over a train, a val and a test `Source`, and over a folder to predict on.

    A subclass says where its samples are (`source`) and how to augment them (`train_transform`).

    Args:
        root: Folder with the data set in its published layout.
        batch_size: Images a step, over all devices together: a recipe's batch stays what it is on any number of them.
        num_workers: Processes that decode and augment, for each device; 0 for none.
        predict_path: A folder of pictures, or one picture, that `predict` takes instead of the val split.
        synthetic: Arguments of `sis_lightning.write_synthetic`: makes the data where `root` does not exist.
        download: Fetches the data set where it is missing.

    Raises:
        UsageError: Where `batch_size` or `num_workers` cannot be, or does not divide over the devices.
        DataError: In `setup`, where data is missing or damaged.
    """

    #: Names of the classes by id, known after `setup`.
    class_names: Sequence[str] = ()
    #: The data set's own numbers of the classes, where results are written with them.
    category_ids: Sequence[int] = ()
    #: The figure that chooses checkpoints, where the data set decides it and not the task.
    headline: ClassVar[str | None] = None
    #: As which the data set is published.
    archives: ClassVar[tuple[Archive, ...]] = ()
    #: ImageNet's.
    mean: ClassVar[tuple[float, float, float]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, float, float]] = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str,
        batch_size: int = 16,
        num_workers: int = 4,
        predict_path: str | None = None,
        synthetic: dict[str, Any] | None = None,
        download: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UsageError(
                f"data.batch_size is {batch_size} (at least 1), data.num_workers {num_workers} (at least 0)"
            )
        self.root, self.batch_size, self.num_workers = Path(root), batch_size, num_workers
        self.predict_path = Path(predict_path) if predict_path else None
        self.synthetic, self.download = synthetic, download
        self.sources: dict[str, Source] = {}
        #: Epoch, and batches of it that are done: where training begins.
        self.position = (0, 0)
        #: What a reader of the run should know of the data, by a short label.
        self.notes: dict[str, str] = {}

    @abstractmethod
    def source(self, split: Split) -> Source:
        """Lists the samples of a split, checking that they are there.

        Raises:
            DataError: Where something is missing or damaged: what, where, and how to get it.
        """

    @abstractmethod
    def train_transform(self, sample: Sample) -> Sample:
        """Augments a decoded sample under the global random state."""

    def eval_transform(self, sample: Sample) -> Sample:
        """What happens to a decoded sample outside training: nothing random, by default nothing at all."""
        return sample

    @property
    def home(self) -> Path:
        """The folder of the very data set, at or below `root`."""
        return self.root

    @property
    def num_classes(self) -> int:
        """How many classes the targets have."""
        return len(self.class_names)

    @property
    def eval_batch_size(self) -> int:
        """Images a step outside training, over all devices."""
        return self.batch_size

    def identity(self) -> str:
        """Where the data comes from: `synthetic` (by its marker), else what `provenance` finds."""
        for folder in (self.home, self.home.parent, self.root):
            marker = folder / SYNTHETIC_MARKER
            if marker.is_file():
                arguments = json.loads(marker.read_text())
                return f"synthetic (seed {arguments.get('seed')}, {arguments.get('images')} images)"
        return self.provenance()

    def fingerprint(self, split: Split) -> str:
        """SHA-256 of the names and of every byte of the files that a split is read from."""
        return digest_files(self.sources[split].files(), self.home)

    def listing(self, split: Split) -> str:
        """SHA-256 that tells the files of a split from others in seconds; see `digest_listing`."""
        return digest_listing(self.sources[split].files(), self.home)

    def provenance(self) -> str:
        """`official` where the files are proved to be the published ones, else `other`."""
        return "other"

    @property
    def to_be_made(self) -> bool:
        """Whether `prepare_data` will write or fetch the data."""
        return not self.home.is_dir() and (self.download or (self.synthetic is not None and not self.root.exists()))

    def prepare_data(self) -> None:
        """Writes synthetic data, or downloads, where that was asked for and nothing is there."""
        if not self.to_be_made:
            return
        if self.synthetic is not None:
            print(f"{self.root} does not exist: writing synthetic data there, {self.synthetic}", flush=True)
            write_synthetic(self.root, **self.synthetic)
        else:
            self.root.mkdir(parents=True, exist_ok=True)
            self.fetch()

    def truth(self, split: Split) -> Truth:
        """What results of a split are scored against, where they are scored as a whole."""
        raise NotImplementedError(f"{type(self).__name__} has no annotation file to score against")

    def write_results(self, rows: list[Row], folder: Path) -> Path:
        """Writes the results of the test split for the data set's server; returns the file or folder."""
        raise NotImplementedError(f"{type(self).__name__} has no server's format")

    def fetch(self) -> None:
        """Downloads the data set into `root`, and unpacks it."""
        archives = [archive for archive in self.archives if archive.fetched]
        if not archives:
            raise UsageError(f"data.download: {type(self).__name__} has nothing to download. {self.how_to_get()}")
        for archive in archives:
            path = download(archive.url, self.root / archive.file, archive.md5)
            extract(path, self.root, archive.folder)

    def setup(self, stage: str) -> None:
        """Lists the splits that a stage needs, once; raises DataError where they are not usable."""
        if not self.root.exists() and not (stage == "predict" and self.predict_path):
            raise DataError(self.missing(f"data.root '{self.root}' does not exist"))
        needed: dict[str, list[Split]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}
        for split in needed.get(stage, []):
            if split in self.sources:
                continue
            self.sources[split] = self.source(split)
            self.sources[split].require_sound()
            if not len(self.sources[split]):
                raise DataError(self.missing(f"{self.root}: the {split} split is empty"))
        if stage == "predict" and "predict" not in self.sources:
            self.sources["predict"] = FolderSource(self.predict_path) if self.predict_path else self.source("val")
            self.sources["predict"].require_sound()

    def missing(self, what: str) -> str:
        """An error's text: what is missing, how to get it, and how to do without it."""
        return (
            f"{what}\n  {self.how_to_get()}\n"
            "  No data at hand? The demo overlay makes some: add --config configs/demo.yaml"
        )

    def how_to_get(self) -> str:
        """One line: the layout that is looked for and where it comes from."""
        return "Point --data.root to the data set."

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of `batch_size` over all devices; a last incomplete batch is left out."""
        rank, world = self._ranks()
        source = self.sources["train"]
        if self.batch_size % world:
            raise UsageError(f"data.batch_size {self.batch_size} does not divide over {world} devices")
        per_device = self.batch_size // world
        if len(source) // world < per_device:
            raise DataError(
                f"{self.root}: {len(source)} training images are fewer than one batch of {self.batch_size}.\n"
                f"  Set --data.batch_size {len(source)} or smaller."
            )
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        epoch, batches = self.position
        start = (epoch, batches * self.batch_size)
        sampler = EpochSampler(len(source), seed, rank, world, source.groups(), self.batch_size, start)
        return self._loader(_Augmented(source, self.train_transform, seed), sampler, per_device)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches are done: what a resumed run needs to go on with the next sample."""
        if self.trainer is None:
            return {}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return {"epoch": self.trainer.current_epoch, "batches": progress.current.completed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on from there."""
        self.position = (state_dict["epoch"], state_dict["batches"])

    def val_dataloader(self) -> DataLoader[Sample]:
        """Every image of the val split once, over all devices."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Every image of the test split once, over all devices."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Every image of `predict_path`, or of the val split."""
        return self._eval_loader("predict")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turns uint8 images into normalised float32, on the device: bytes are quicker to send."""
        images = batch["image"]
        if isinstance(images, list):
            batch["image"] = [self.normalize(image) for image in images]
        else:
            batch["image"] = self.normalize(images).contiguous(memory_format=torch.channels_last)
        return batch

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (…, 3, H, W) → float32 of mean 0 and variance 1 over the data set."""
        normalized: Tensor = transforms.normalize(
            transforms.to_dtype(images, torch.float32, scale=True), self.mean, self.std
        )
        return normalized

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of `normalize`, as float32 in 0…1: for pictures. Bytes were not normalised."""
        if images.dtype == torch.uint8:
            return images / 255
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (images.float() * std + mean).clamp(0, 1)

    def _eval_loader(self, split: str) -> DataLoader[Sample]:
        rank, world = self._ranks()
        source = self.sources[split]
        if len(source) < world:
            raise UsageError(f"{len(source)} image(s) to {split} are fewer than {world} devices: --trainer.devices 1")
        dataset = _Augmented(source, self.eval_transform, 0)
        return self._loader(dataset, ShardSampler(len(source), rank, world), max(1, self.eval_batch_size // world))

    def _loader(self, dataset: _Augmented, sampler: Sampler[tuple[int, int]], batch_size: int) -> DataLoader[Sample]:
        training = isinstance(sampler, EpochSampler)
        workers = min(self.num_workers, usable_cores())  # more than cores only get in each other's way
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            drop_last=training,
            persistent_workers=training and workers > 0,
            worker_init_fn=_ignore_signals,
            # Its own: a loader otherwise draws from the global generator, and so from what the model is to draw.
            generator=torch.Generator().manual_seed(0),
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
