"""Crops of persons: their place in the image, their pixels, and the coordinates of keypoints in them.

The crops are those of Simple Baselines (Xiao et al. 2018), with two differences to the authors' code. A crop is flipped
within itself, whereas flipping the image moves the crop by a pixel. And ground-truth boxes are not shortened by a pixel
first.

Coordinates of keypoints are pixel indices, as in COCO's files: the centre of the first pixel is at 0. Every change of
coordinates is one affine matrix (2, 3), so that its inverse undoes everything that was done to a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image, possibly rotated, that is resampled to an image of a fixed size, possibly flipped.

    Attributes:
        centre: x and y of the centre in the image, in pixels.
        size: Width and height in the image, in pixels.
        output: Width and height of the resampled crop, in pixels.
        rotation: Angle in degrees by which the content turns clockwise.
        flipped: Whether left and right of the resampled crop are exchanged.
    """

    centre: tuple[float, float]
    size: tuple[float, float]
    output: tuple[int, int]
    rotation: float = 0.0
    flipped: bool = False

    @classmethod
    def around(cls, box: NDArray[np.float64], output: tuple[int, int], margin: float = 1.25) -> Crop:
        """Creates the crop of a box, whose shorter side is extended to the proportions of the output.

        Args:
            box: x1, y1, x2, y2 in pixels of the image.
            output: Width and height of the resampled crop, in pixels.
            margin: Factor by which the crop is larger than the extended box.
        """
        x1, y1, x2, y2 = (float(value) for value in box)
        width, height = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
        aspect = output[0] / output[1]
        width, height = max(width, height * aspect), max(height, width / aspect)
        return cls(((x1 + x2) / 2, (y1 + y2) / 2), (width * margin, height * margin), output)

    @property
    def to_crop(self) -> Matrix:
        """The affine matrix (2, 3) from the image to the resampled crop."""
        scale = self.output[0] / self.size[0]
        angle = math.radians(self.rotation)
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        shift = np.array(self.output) / 2 - turn @ np.array(self.centre)
        matrix = np.column_stack([turn, shift])
        if self.flipped:
            matrix[0] = -matrix[0]
            matrix[0, 2] += self.output[0] - 1
        return matrix

    @property
    def to_image(self) -> Matrix:
        """The affine matrix (2, 3) from the resampled crop to the image."""
        return invert(self.to_crop)

    def cut(self, image: Tensor) -> Tensor:
        """Resamples the crop bilinearly, with 0 outside of the image.

        Args:
            image: uint8 or float32 (C, H, W).

        Returns:
            (C, output height, output width) of the same type.
        """
        (a, b, c), (d, e, f) = self.to_image.tolist()
        # PIL samples at the centre of each pixel, which is half a pixel from its index.
        data = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)

        def resample(pixels: NDArray[Any]) -> NDArray[Any]:
            source = Image.fromarray(pixels)
            return np.array(source.transform(self.output, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))

        if len(image) == 3 and image.dtype == torch.uint8:
            return torch.from_numpy(resample(image.permute(1, 2, 0).contiguous().numpy())).permute(2, 0, 1).contiguous()
        return torch.stack([torch.from_numpy(resample(channel.contiguous().numpy())) for channel in image])

    def move_keypoints(self, keypoints: NDArray[np.float64], flip_order: Sequence[int]) -> NDArray[np.float64]:
        """Moves keypoints from the image to the resampled crop.

        Args:
            keypoints: (…, K, 3) with x, y in pixels of the image, and visibility.
            flip_order: For each keypoint, the index of the keypoint whose place it takes in a flipped crop.

        Returns:
            (…, K, 3) with x, y in pixels of the crop, and visibility.
        """
        moved = keypoints.copy()
        moved[..., :2] = apply(self.to_crop, keypoints[..., :2])
        return moved[..., list(flip_order), :] if self.flipped else moved


def invert(matrix: Matrix) -> Matrix:
    """Returns the inverse of an affine matrix (2, 3)."""
    inverse = np.linalg.inv(matrix[:, :2])
    return np.column_stack([inverse, -inverse @ matrix[:, 2]])


def apply(matrix: Matrix, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Maps points (…, 2) by an affine matrix (2, 3)."""
    moved: NDArray[np.float64] = points @ matrix[:, :2].T + matrix[:, 2]
    return moved
