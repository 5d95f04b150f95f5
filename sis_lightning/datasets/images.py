"""Decoding of images, and their normalisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from sis_lightning.datasets.constants import IMAGENET_MEAN, IMAGENET_STD
from sis_lightning.errors import DataError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def open_image(path: Path, check: Callable[[ImageFile.ImageFile], None] | None = None) -> Image.Image:
    """Opens and decodes an image.

    Args:
        path: The image file.
        check: Looks at the file before it is decoded, and may refuse it.

    Returns:
        The decoded image, in the mode of the file.

    Raises:
        DataError: If the file is missing, truncated or not an image.
    """
    try:
        image = Image.open(path)
        try:
            if check:
                check(image)
            image.load()
        except BaseException:
            image.close()
            raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UNREADABLE as error:
        # Pillow reads TIFF of up to four channels, and of 16 bits only if it is grey.
        hint = "\n  TIFF of other channels or bits is read if value_range is given." if _is_tiff(path) else ""
        raise DataError(f"{path}: unreadable or truncated image ({error}){hint}") from None
    return image


def _is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def to_rgb(image: Image.Image, *, upright: bool = False) -> tv_tensors.Image:
    """Converts an image of any mode to a tensor.

    Args:
        image: The decoded image.
        upright: Whether the image is rotated as its EXIF orientation says.

    Returns:
        RGB of shape (3, H, W), uint8.

    Raises:
        DataError: If the pixels are 32-bit integers or floating-point numbers, whose range is not known.
    """
    if image.mode in ("I", "F"):
        name = getattr(image, "filename", "") or "the image"
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}[image.mode]
        raise DataError(
            f"{name}: its pixels are {kind}, and no file says which of them is white\n"
            "  Say so by value_range, such as [0, 4095]; or convert it to 8 or 16 bits per channel."
        )
    image = ImageOps.exif_transpose(image) if upright else image
    if image.mode.startswith("I;16"):  # convert() would clip the upper 8 bits instead of dropping the lower ones
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return tv_tensors.Image(transforms.pil_to_tensor(image.convert("RGB")))


def read_image(path: Path, *, upright: bool = False) -> tv_tensors.Image:
    """Reads an image file of any mode.

    Args:
        path: The image file.
        upright: Whether the image is rotated as its EXIF orientation says. Data sets do not: their annotations refer to
            the pixels as stored.

    Returns:
        RGB of shape (3, H, W), uint8.

    Raises:
        DataError: If the file is missing, truncated or not an image.
    """
    if not upright and (image := _decode_jpeg(path)) is not None:
        return image
    with open_image(path) as opened:
        return to_rgb(opened, upright=upright)


@dataclass(frozen=True)
class ImageReader:
    """How image files become tensors: by default RGB of 8 bits.

    With `value_range`, images may have any type of pixels and any number of channels (TIFF, for more than four), and
    are normalised as they are read: 16 bits stay 16 bits.

    Attributes:
        upright: Whether images are rotated as their EXIF orientation says.
        mean: Mean of each channel, in 0…1. An image of one channel is read as RGB if there are three.
        std: Standard deviation of each channel, in 0…1.
        value_range: The values in the files that become 0 and 1; None for 0 and 255, or 65535 of 16 bits.
    """

    upright: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    value_range: tuple[float, float] | None = None

    @property
    def _plain(self) -> bool:
        """Whether images are RGB of 8 bits."""
        return self.value_range is None and len(self.mean) == 3

    def read(self, path: Path) -> tv_tensors.Image:
        """Reads an image file.

        Args:
            path: The image file.

        Returns:
            (C, H, W) for C channels: uint8; with `value_range` float32, normalised by mean and standard deviation.

        Raises:
            DataError: If the file is missing, truncated, not an image, or of another number of channels.
        """
        if self._plain:
            return read_image(path, upright=self.upright)
        return self._from_array(_read_array(path, len(self.mean), upright=self.upright), str(path))

    def from_pil(self, image: Image.Image) -> tv_tensors.Image:
        """Converts a decoded image, as `read` does."""
        if self._plain:
            return to_rgb(image, upright=self.upright)
        name = getattr(image, "filename", "") or "the image"
        return self._from_array(_to_array(image, len(self.mean), upright=self.upright), name)

    def from_tensor(self, image: Tensor) -> Tensor:
        """Normalises the values (C, H, W) of an image with `value_range`; without, they stay as they are."""
        if self.value_range is None:
            return image
        low, high = self.value_range
        return normalize((image.float() - low) / (high - low), self.mean, self.std)

    def _from_array(self, pixels: NDArray[Any], name: str) -> tv_tensors.Image:
        channels = len(self.mean)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3 if channels == 3 else 1, axis=2)
        if pixels.shape[2] != channels:
            raise DataError(
                f"{name}: an image of {pixels.shape[2]} channels, not {channels}\n"
                "  mean and std must have a value for each channel."
            )
        if self.value_range is None and pixels.dtype != np.uint8:
            raise DataError(
                f"{name}: its pixels are {pixels.dtype}, and no file says which of them is white\n"
                "  Say so by value_range, such as [0, 4095]."
            )
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise DataError(f"{name}: it has pixels that are no finite numbers (NaN or infinite)")
        if self.value_range is not None:
            pixels = pixels.astype(np.float32)
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return tv_tensors.Image(self.from_tensor(image))

    def inspect(self, path: Path) -> tuple[tuple[int, int], str]:
        """Decodes an image file; with the defaults as `inspect_image` does.

        Returns:
            Height and width in px of the image, and why it cannot be read: empty if it can.
        """
        if self._plain:
            return inspect_image(path)
        try:
            height, width = self.read(path).shape[1:]
        except DataError as error:
            return (0, 0), str(error).partition(": ")[2].partition("\n")[0]
        return (height, width), ""


def _read_array(path: Path, channels: int, *, upright: bool) -> NDArray[Any]:
    """The pixels of an image file, in the type of the file: (H, W) or (H, W, C)."""
    if not _is_tiff(path):
        with open_image(path, _refuse_deep_colour) as image:
            return _to_array(image, channels, upright=upright)
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            pixels: NDArray[Any] = series.asarray()
            axes = series.axes
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except Exception as error:  # tifffile lets errors of struct, zlib and others through
        raise DataError(f"{path}: unreadable or truncated image ({error})") from None
    if pixels.ndim == 3 and axes.endswith("YX"):  # bands one after the other
        pixels = np.moveaxis(pixels, 0, -1)
    elif not (pixels.ndim == 2 or (pixels.ndim == 3 and axes.startswith("YX"))):
        raise DataError(f"{path}: its {pixels.ndim} axes {axes} are not rows, columns and channels")
    return pixels


def _refuse_deep_colour(image: ImageFile.ImageFile) -> None:
    # Pillow keeps the upper 8 of 16 bits in colour, which would be black where white is 65535.
    if ";16" in str(image.tile) and not image.mode.startswith("I"):
        raise DataError(f"{image.filename!s}: 16 bits per channel in colour are read of TIFF only")


def _to_array(image: Image.Image, channels: int, *, upright: bool) -> NDArray[Any]:
    image = ImageOps.exif_transpose(image) if upright else image
    if channels == 1 and image.mode not in ("L", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("L")
    elif image.mode not in ("L", "I", "F", "RGB", "RGBA", "CMYK") and not image.mode.startswith("I;16"):
        image = image.convert("RGBA" if channels == 4 else "RGB")
    if channels == 3 and image.mode in ("RGBA", "CMYK"):
        image = image.convert("RGB")
    return np.asarray(image)


def inspect_image(path: Path) -> tuple[tuple[int, int], str]:
    """Decodes an image file, JPEGs at an eighth of their size.

    Images of more than `Image.MAX_IMAGE_PIXELS` (89 megapixels) are not decoded: a small file can hold any number of
    pixels.

    Returns:
        Height and width in px of the upright image, and why it cannot be read: empty if it can.
    """
    size = (0, 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                return size, f"{image.width * image.height / 1e6:.3g} megapixels, more than {limit / 1e6:.3g}"
            turned = int(image.getexif().get(ExifTags.Base.Orientation, 1)) in range(5, 9)
            size = (image.width, image.height) if turned else (image.height, image.width)
            if image.mode in ("I", "F"):
                to_rgb(image)
            image.draft("RGB", (image.width // 8 or 1, image.height // 8 or 1))
            image.load()
    except DataError as error:
        return size, str(error).partition(": ")[2].partition("\n")[0]
    except Image.DecompressionBombError:  # twice the limit
        return size, f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.3g} megapixels"
    except UNREADABLE as error:
        return size, str(error).replace(str(path), path.name) or type(error).__name__
    return size, ""


def orientation(path: Path) -> int:
    """The EXIF orientation of an image file: 1 for upright or unknown, 5 to 8 for a quarter turn."""
    try:
        with Image.open(path) as image:
            number = int(image.getexif().get(ExifTags.Base.Orientation, 1))
            return number if 1 <= number <= 8 else 1
    except UNREADABLE:
        return 1


def turned(path: Path, size: tuple[int, int], expected: tuple[int, int]) -> str:
    """Says that an EXIF orientation is why a size is not the expected one; empty if it is not.

    Args:
        path: The image file.
        size: Width and height of the image in px, as stored.
        expected: Width and height in px that its annotation has.
    """
    number = orientation(path)
    if number < 5 or size != (expected[1], expected[0]):
        return ""
    return (
        f"\n  The image has EXIF orientation {number}: viewers rotate it by a quarter turn, and so was it annotated.\n"
        "  With upright: true, all images are rotated as their EXIF orientation says"
    )


def _decode_jpeg(path: Path) -> tv_tensors.Image | None:
    """The pixels of a usual JPEG, by libjpeg-turbo, which takes three quarters of Pillow's time for the same pixels.

    None for every other file, damaged ones included, of which Pillow knows more kinds and gives better reasons.
    """
    if path.suffix.lower() not in (".jpg", ".jpeg"):
        return None
    try:
        encoded = path.read_bytes()
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        if colorspace not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(encoded, "RGB"))
    except (OSError, ValueError):
        return None
    return tv_tensors.Image(pixels.permute(2, 0, 1))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalises images by channel.

    Args:
        images: Images (..., C, H, W), uint8.
        mean: Mean of each channel, in 0…1.
        std: Standard deviation of each channel, in 0…1.

    Returns:
        (value / 255 - mean) / std, float32, of the same shape.
    """
    scaled = transforms.to_dtype(images, torch.float32, scale=True)
    # In place, since a photograph of 48 megapixels takes 0.6 GB; to_dtype returns float32 images as they are.
    normalized: Tensor = transforms.normalize(scaled, list(mean), list(std), inplace=scaled is not images)
    return normalized


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalize`, for display.

    Args:
        images: Normalised images (..., C, H, W); uint8 images are only scaled.
        mean: Mean of each channel, in 0…1.
        std: Standard deviation of each channel, in 0…1.

    Returns:
        float32 in 0…1, of the same shape.
    """
    if images.dtype == torch.uint8:
        return images / 255
    shift, scale = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images.float() * scale + shift).clamp(0, 1)
