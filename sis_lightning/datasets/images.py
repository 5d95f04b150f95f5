"""Decoding of images, and their normalisation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from sis_lightning.errors import DataError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def open_image(path: Path) -> Image.Image:
    """Opens and decodes an image.

    Args:
        path: The image file.

    Returns:
        The decoded image, in the mode of the file.

    Raises:
        DataError: If the file is missing, truncated or not an image.
    """
    try:
        image = Image.open(path)
        try:
            image.load()
        except BaseException:
            image.close()
            raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UNREADABLE as error:
        raise DataError(f"{path}: unreadable or truncated image ({error})") from None
    return image


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
            "  Convert it to 8 or 16 bits per channel."
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
