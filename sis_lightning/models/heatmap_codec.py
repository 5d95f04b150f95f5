"""Heatmaps of keypoints, and the scores of people, of Simple Baselines (Xiao et al. 2018).

Coordinates of keypoints are pixel indices, as in COCO's files: the centre of the first pixel is at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class HeatmapCodec:
    """Encodes the keypoints of a crop as heatmaps, and decodes heatmaps (Simple Baselines).

    Attributes:
        height: Height of the crop in pixels.
        width: Width of the crop in pixels.
        stride: Number of pixels of the crop in a pixel of a heatmap, along each side.
        sigma: Standard deviation of the Gaussians, in pixels of a heatmap.
    """

    height: int = 256
    width: int = 192
    stride: int = 4
    sigma: float = 2.0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the heatmaps in pixels."""
        return self.height // self.stride, self.width // self.stride

    def encode(self, keypoints: Tensor) -> tuple[Tensor, Tensor]:
        """Draws a Gaussian of height 1, cut off at 3 sigma, around the heatmap pixel nearest to each keypoint.

        Args:
            keypoints: (N, K, 3) with x, y in pixels of the crop, and visibility.

        Returns:
            Heatmaps (N, K, h, w), and weights (N, K): 1 if the keypoint is annotated (visibility above 0) and its
            Gaussian reaches into the heatmap, else 0.
        """
        height, width = self.shape
        centre = torch.floor(keypoints[..., :2] / self.stride + 0.5)
        reach = 3 * self.sigma
        limit = torch.tensor([width - 1, height - 1], device=keypoints.device) + reach
        inside = (centre >= -reach) & (centre <= limit)
        weights = ((keypoints[..., 2] > 0) & inside.all(dim=-1)).to(torch.float32)
        x = torch.arange(width, device=keypoints.device) - centre[..., :1]  # (N, K, w)
        y = torch.arange(height, device=keypoints.device) - centre[..., 1:2]

        def bell(distance: Tensor) -> Tensor:
            return torch.exp(-(distance**2) / (2 * self.sigma**2)) * (distance.abs() <= reach)

        heatmaps = bell(y)[..., :, None] * bell(x)[..., None, :]
        return heatmaps * weights[..., None, None], weights

    def decode(self, heatmaps: Tensor, to_image: Tensor) -> Tensor:
        """Finds the maximum of each heatmap, and moves it by a quarter of a pixel towards the larger neighbours.

        Args:
            heatmaps: (N, K, h, w).
            to_image: Affine matrices (N, 2, 3) from the crop to the image.

        Returns:
            (N, K, 3) with x, y in pixels of the image, and the maximum as score. A heatmap without values above 0 gives
            the first pixel of the crop.
        """
        count, keypoints, height, width = heatmaps.shape
        flat = heatmaps.reshape(count, keypoints, -1)
        scores, places = flat.max(dim=-1)
        column, row = places % width, places // width
        inner = (column > 1) & (column < width - 1) & (row > 1) & (row < height - 1)

        def slope(step: int) -> Tensor:
            last = height * width - 1
            after = flat.gather(-1, (places + step).clamp(0, last)[..., None])
            before = flat.gather(-1, (places - step).clamp(0, last)[..., None])
            return torch.sign(after - before)[..., 0] * inner

        points = torch.stack([column + 0.25 * slope(1), row + 0.25 * slope(width)], dim=-1) * self.stride
        points = points * (scores > 0)[..., None]
        points = points.to(to_image.dtype) @ to_image[:, :, :2].transpose(1, 2) + to_image[:, None, :, 2]
        return torch.cat([points, scores[..., None].to(points.dtype)], dim=-1)


def flip_back(heatmaps: Tensor, flip_order: Sequence[int]) -> Tensor:
    """Converts the heatmaps of a flipped crop to those of the crop itself.

    They are flipped, left and right keypoints are exchanged, and they are shifted by one pixel to the right, as in
    Simple Baselines (`SHIFT_HEATMAP`): pixel i of a heatmap stands for pixel stride · i of the crop, whose flipped
    place is between two pixels of the heatmap.

    Args:
        heatmaps: (N, K, h, w).
        flip_order: For each keypoint, the index of the keypoint whose place it takes in a flipped crop.

    Returns:
        (N, K, h, w).
    """
    turned = heatmaps.flip(-1)[:, list(flip_order)]
    return torch.cat([turned[..., :1], turned[..., :-1]], dim=-1)


def oks(
    one: NDArray[np.float64],
    others: NDArray[np.float64],
    area: float,
    areas: NDArray[np.float64],
    sigmas: Sequence[float],
) -> NDArray[np.float64]:
    """Computes the object keypoint similarity (OKS) between a person and others, with the mean of both areas.

    Args:
        one: Keypoints (K, ≥ 2) of the person.
        others: Keypoints (M, K, ≥ 2) of the others.
        area: Area of the person in square pixels.
        areas: Areas (M,) of the others in square pixels.
        sigmas: Standard deviation of each keypoint, as in COCO's evaluation.

    Returns:
        Similarities (M,) from 0 to 1.
    """
    squared = ((others[..., :2] - one[..., :2]) ** 2).sum(axis=-1)
    variances = (2 * np.asarray(sigmas, dtype=np.float64)) ** 2
    spread = variances * (((area + areas) / 2)[:, None] + np.spacing(1)) * 2
    similarity: NDArray[np.float64] = np.exp(-squared / spread).mean(axis=-1)
    return similarity


def oks_nms(
    people: NDArray[np.float64],
    scores: NDArray[np.float64],
    areas: NDArray[np.float64],
    sigmas: Sequence[float],
    limit: float = 0.9,
) -> list[int]:
    """Removes duplicate people: in descending order of score, whoever has an OKS above `limit` with one who is kept.

    Args:
        people: Keypoints (M, K, ≥ 2).
        scores: Scores (M,).
        areas: Areas (M,) in square pixels.
        sigmas: Standard deviation of each keypoint, as in COCO's evaluation.
        limit: Largest similarity of two people (Simple Baselines: 0.9).

    Returns:
        Indices of the people kept, in descending score.
    """
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(order):
        best, rest = int(order[0]), order[1:]
        kept.append(best)
        order = rest[oks(people[best], people[rest], float(areas[best]), areas[rest], sigmas) <= limit]
    return kept


def rescore(box_score: float, keypoint_scores: NDArray[np.float64], visible: float = 0.2) -> float:
    """Computes the score of a person: the score of the box, times the mean score of its visible keypoints.

    Args:
        box_score: Score of the person's box.
        keypoint_scores: Scores (K,) of the keypoints.
        visible: Score above which a keypoint counts (Simple Baselines: 0.2).
    """
    seen = keypoint_scores[keypoint_scores > visible]
    return box_score * (float(seen.mean()) if len(seen) else 0.0)
