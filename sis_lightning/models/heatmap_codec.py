"""From a person in an image to heatmaps of a crop, and back: the geometry of Simple Baselines (Xiao et al. 2018).

It differs from the authors' code in two things: a crop is mirrored in itself, not in the image, which moves it by a
pixel; and ground-truth boxes are not shortened by a pixel first.

Coordinates of joints are pixel indices, as in COCO's files. Every change of coordinates is one affine matrix (2, 3),
so that what was done to a crop, mirroring included, is undone by its inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sis_lightning.datasets.constants import COCO_MIRROR

Matrix = NDArray[np.float64]

# COCO's falloff of each joint (cocoeval.py): k = 2 · sigma.
OKS_SIGMAS = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89], dtype=np.float64) / 1000


@dataclass(frozen=True)
class Crop:
    """A part of an image, turned and mirrored, as a picture of a fixed size.

    Attributes:
        centre: x, y in the image.
        size: Width and height in the image.
        output: Width and height of the picture.
        rotation: Degrees, clockwise as seen.
        mirrored: Left and right exchanged, in the picture.
    """

    centre: tuple[float, float]
    size: tuple[float, float]
    output: tuple[int, int]
    rotation: float = 0.0
    mirrored: bool = False

    @classmethod
    def around(cls, box: NDArray[np.float64], output: tuple[int, int], margin: float = 1.25) -> Crop:
        """The crop of a box x1, y1, x2, y2: its shorter side extended to the picture's proportions, × `margin`."""
        x1, y1, x2, y2 = (float(value) for value in box)
        width, height = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
        aspect = output[0] / output[1]
        width, height = max(width, height * aspect), max(height, width / aspect)
        return cls(((x1 + x2) / 2, (y1 + y2) / 2), (width * margin, height * margin), output)

    @property
    def to_picture(self) -> Matrix:
        """(2, 3): image → picture."""
        scale = self.output[0] / self.size[0]
        angle = math.radians(self.rotation)
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        shift = np.array(self.output) / 2 - turn @ np.array(self.centre)
        matrix = np.column_stack([turn, shift])
        if self.mirrored:
            matrix[0] = -matrix[0]
            matrix[0, 2] += self.output[0] - 1
        return matrix

    @property
    def to_image(self) -> Matrix:
        """(2, 3): picture → image."""
        return invert(self.to_picture)

    def cut(self, image: Tensor) -> Tensor:
        """Bilinear: uint8 (3, H, W) → uint8 (3, output height, output width); black outside of the image."""
        (a, b, c), (d, e, f) = self.to_image.tolist()
        # PIL asks at the middle of each pixel, half a pixel from its index.
        data = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        cut = picture.transform(self.output, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()

    def joints(self, keypoints: NDArray[np.float64]) -> NDArray[np.float64]:
        """(…, 17, 3) x, y, v in the image → in the picture; left and right change names where it is mirrored."""
        moved = keypoints.copy()
        moved[..., :2] = apply(self.to_picture, keypoints[..., :2])
        return moved[..., list(COCO_MIRROR), :] if self.mirrored else moved


def invert(matrix: Matrix) -> Matrix:
    """The inverse of an affine map (2, 3)."""
    inverse = np.linalg.inv(matrix[:, :2])
    return np.column_stack([inverse, -inverse @ matrix[:, 2]])


def apply(matrix: Matrix, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moves points (…, 2)."""
    moved: NDArray[np.float64] = points @ matrix[:, :2].T + matrix[:, 2]
    return moved


@dataclass(frozen=True)
class HeatmapCodec:
    """Joints of a picture as heatmaps, and back (Simple Baselines).

    Attributes:
        height: Of the picture, in px.
        width: Of the picture, in px.
        stride: Picture px a heatmap px.
        sigma: Of the Gaussians, in heatmap px.
    """

    height: int = 256
    width: int = 192
    stride: int = 4
    sigma: float = 2.0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the heatmaps."""
        return self.height // self.stride, self.width // self.stride

    def encode(self, joints: Tensor) -> tuple[Tensor, Tensor]:
        """Draws a Gaussian of height 1, cut at 3 sigma, around the heatmap pixel nearest to each joint.

        Args:
            joints: (N, 17, 3) x, y, v in the picture.

        Returns:
            Heatmaps (N, 17, h, w) and weights (N, 17): 1 where v > 0 and any of the Gaussian lies in the heatmap.
        """
        height, width = self.shape
        centre = torch.floor(joints[..., :2] / self.stride + 0.5)
        reach = 3 * self.sigma
        inside = (centre >= -reach) & (centre <= torch.tensor([width - 1, height - 1], device=joints.device) + reach)
        weights = ((joints[..., 2] > 0) & inside.all(dim=-1)).to(torch.float32)
        x = torch.arange(width, device=joints.device) - centre[..., :1]  # (N, 17, w)
        y = torch.arange(height, device=joints.device) - centre[..., 1:2]

        def bell(distance: Tensor) -> Tensor:
            return torch.exp(-(distance**2) / (2 * self.sigma**2)) * (distance.abs() <= reach)

        heatmaps = bell(y)[..., :, None] * bell(x)[..., None, :]
        return heatmaps * weights[..., None, None], weights

    def decode(self, heatmaps: Tensor, to_image: Tensor) -> Tensor:
        """Finds each heatmap's maximum, and goes a quarter of a pixel towards the larger neighbour (none: 0, 0).

        Args:
            heatmaps: (N, 17, h, w).
            to_image: (N, 2, 3) from the picture to the image.

        Returns:
            (N, 17, 3): x, y in the image, and the maximum as score.
        """
        count, joints, height, width = heatmaps.shape
        scores, places = heatmaps.reshape(count, joints, -1).max(dim=-1)
        column, row = places % width, places // width
        inner = (column > 1) & (column < width - 1) & (row > 1) & (row < height - 1)
        flat = heatmaps.reshape(count, joints, -1)

        def slope(step: int) -> Tensor:
            last = height * width - 1
            after = flat.gather(-1, (places + step).clamp(0, last)[..., None])
            before = flat.gather(-1, (places - step).clamp(0, last)[..., None])
            return torch.sign(after - before)[..., 0] * inner

        points = torch.stack([column + 0.25 * slope(1), row + 0.25 * slope(width)], dim=-1) * self.stride
        points = points * (scores > 0)[..., None]
        points = points.to(to_image.dtype) @ to_image[:, :, :2].transpose(1, 2) + to_image[:, None, :, 2]
        return torch.cat([points, scores[..., None].to(points.dtype)], dim=-1)


def mirror(heatmaps: Tensor) -> Tensor:
    """The heatmaps of a mirrored picture as those of the picture: mirrored back, left and right exchanged, shifted.

    The shift of one px to the right is Simple Baselines' own (`SHIFT_HEATMAP`): pixel i of a heatmap stands for
    stride · i, whose mirror image lies between pixels.
    """
    turned = heatmaps.flip(-1)[:, list(COCO_MIRROR)]
    return torch.cat([turned[..., :1], turned[..., :-1]], dim=-1)


def oks(one: NDArray[np.float64], others: NDArray[np.float64], area: float, areas: NDArray[np.float64]) -> Matrix:
    """Similarity 0…1 of a person's joints (17, ≥2) and others' (M, 17, ≥2), by the mean of both areas in px²."""
    squared = ((others[..., :2] - one[..., :2]) ** 2).sum(axis=-1)
    spread = (2 * OKS_SIGMAS) ** 2 * (((area + areas) / 2)[:, None] + np.spacing(1)) * 2
    similarity: Matrix = np.exp(-squared / spread).mean(axis=-1)
    return similarity


def oks_nms(
    people: NDArray[np.float64], scores: NDArray[np.float64], areas: NDArray[np.float64], limit: float = 0.9
) -> list[int]:
    """Keeps, in descending score, whoever resembles no one kept by more than `limit` (Simple Baselines: 0.9).

    Args:
        people: (M, 17, ≥2).
        scores: (M,).
        areas: (M,) in px².
        limit: Of the similarity.

    Returns:
        Who is kept.
    """
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(order):
        best, rest = int(order[0]), order[1:]
        kept.append(best)
        order = rest[oks(people[best], people[rest], float(areas[best]), areas[rest]) <= limit]
    return kept


def rescore(box_score: float, joint_scores: NDArray[np.float64], visible: float = 0.2) -> float:
    """A person's score: the box's, times the mean of those joints above `visible` (Simple Baselines: 0.2)."""
    seen = joint_scores[joint_scores > visible]
    return box_score * (float(seen.mean()) if len(seen) else 0.0)
