"""Prediction of anyone's images, without a Trainer and without a data set."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor

from sis_lightning.datasets.base import Batch
from sis_lightning.datasets.folder import images_below
from sis_lightning.datasets.images import ImageReader
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.errors import UsageError

#: One image for `predict`.
ImageLike = str | Path | Image.Image | Tensor
#: A mapping of tensors for each image.
Outputs = list[dict[str, Any]]


class Inference(LightningModule):
    """The part of `BaseTask` that reads images and predicts them."""

    in_channels: int
    meta: DatasetMeta

    @abstractmethod
    def normalized(self, batch: Batch) -> Batch:
        """A batch with normalised images."""

    @abstractmethod
    def infer(self, batch: Batch) -> Outputs:
        """Predicts a batch with normalised images.

        Returns:
            A mapping of tensors for each image, in order.
        """

    @abstractmethod
    def predictions(self, batch: Batch, outputs: Outputs) -> list[Any]:
        """Makes typed predictions of outputs.

        Args:
            batch: The batch as the loader gave it.
            outputs: What `infer` returned for it.

        Returns:
            One `Prediction` for each image.
        """

    def predict(self, images: ImageLike | Iterable[ImageLike], *, batch_size: int = 8) -> Any:
        """Predicts images, on the device of the task, without a data set.

        Args:
            images: Path of an image or of a folder of images, PIL image, or uint8 tensor (C, H, W); or a sequence of
                these, or a tensor (N, C, H, W). Files are rotated as their EXIF orientation says.
            batch_size: Number of images that are predicted at once.

        Returns:
            One `Prediction` for one image; a list of them, in order (a folder's by name), for several.

        Raises:
            DataError: If a file is missing or not an image.
            UsageError: If an image is of another type, or has another number of channels than the network takes.
        """
        one, samples = self._samples(images)
        found = self._predict(({"image": image, "name": name} for name, image in samples), batch_size)
        return found[0] if one else found

    def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Brings a sample of `predict`, an `image` (C, H, W), uint8, to what `infer` takes: by default as it is."""
        return sample

    def _predict(self, samples: Iterable[dict[str, Any]], batch_size: int) -> list[Any]:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, must be at least 1")
        modes = {module: module.training for module in self.modules()}
        self.eval()
        found: list[Any] = []
        try:
            with torch.no_grad():
                iterator = iter(samples)
                while chunk := list(itertools.islice(iterator, batch_size)):
                    prepared = [self.prepare(sample) for sample in chunk]
                    batch = {key: [sample[key] for sample in prepared] for key in prepared[0]}
                    outputs = self.infer(self.normalized(self._on_device(batch)))
                    # Drawn on the images as they were given.
                    found += self.predictions({**batch, "image": [sample["image"] for sample in chunk]}, outputs)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return found

    def _on_device(self, batch: Batch) -> Batch:
        images = [image.to(self.device) for image in batch["image"]]
        same = len({image.shape for image in images}) == 1
        return {**batch, "image": torch.stack(images) if same else images}

    def _samples(self, images: Any) -> tuple[bool, Iterator[tuple[str, Tensor]]]:
        """Whether one image was given, and names and images (C, H, W) as they are read."""
        if isinstance(images, str | Path) and Path(images).is_dir():
            folder = Path(images)
            return False, ((path.relative_to(folder).as_posix(), self._read(path)) for path in images_below(folder))
        if isinstance(images, Tensor) and images.ndim == 4:
            images = list(images)
        if isinstance(images, str | Path | Image.Image | Tensor):
            return True, iter([(self._name(images, 0), self._read(images))])
        if not isinstance(images, Iterable):
            raise UsageError(f"images is a {type(images).__name__}, must be paths, PIL images or uint8 tensors")
        return False, ((self._name(image, index), self._read(image)) for index, image in enumerate(images))

    @staticmethod
    def _name(image: Any, index: int) -> str:
        return Path(image).name if isinstance(image, str | Path) else str(index)

    def _read(self, image: Any) -> Tensor:
        """One image (C, H, W): uint8, or normalised if the files of the data set have another range of values."""
        reader = ImageReader(True, self.meta.mean, self.meta.std, self.meta.value_range)
        if isinstance(image, str | Path):
            return torch.Tensor.as_subclass(reader.read(Path(image)), Tensor)
        if isinstance(image, Image.Image):
            return torch.Tensor.as_subclass(reader.from_pil(image), Tensor)
        if not isinstance(image, Tensor):
            raise UsageError(f"an image is a {type(image).__name__}, must be a path, a PIL image or a uint8 tensor")
        any_type = reader.value_range is not None
        if (image.dtype != torch.uint8 and not any_type) or image.ndim != 3 or len(image) != self.in_channels:
            wanted = "" if any_type else "uint8 "
            raise UsageError(
                f"an image is a tensor of {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}, "
                f"must be {wanted}({self.in_channels}, H, W)"
            )
        return reader.from_tensor(image)
