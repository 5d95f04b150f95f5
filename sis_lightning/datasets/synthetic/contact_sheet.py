"""One image that shows some of the images of synthetic data with their annotations, read back from the files."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sis_lightning.datasets.constants import COCO_SKELETON, voc_palette

if TYPE_CHECKING:
    from torch import Tensor

_TILE, _GAP, _ACROSS = 176, 8, 6
_COLOURS = ((230, 25, 75), (0, 130, 200), (60, 160, 60), (245, 130, 48), (145, 30, 180), (0, 150, 150))


def write_contact_sheet(root: Path, kinds: Sequence[str]) -> Path:
    """Draws the contact sheet: rows of six tiles.

    CIFAR has two rows of images; each year of VOC a row of images with boxes and one of their masks; COCO a row of
    images of persons and one of shapes, with boxes, masks and keypoints.

    Args:
        root: The folder with the data sets.
        kinds: The data sets that exist: `cifar`, `voc`, `coco`.

    Returns:
        The image file, `root/contact_sheet.png`.
    """
    import torch
    from PIL import Image
    from torchvision.utils import make_grid

    tiles = [tile for kind in kinds for tile in _TILES[kind](root)]
    grid = make_grid(torch.stack(tiles), nrow=_ACROSS, padding=_GAP, pad_value=255)
    path = root / "contact_sheet.png"
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)
    return path


def _spread(items: Sequence[int], count: int = _ACROSS) -> list[int]:
    """As many items as fit into a row, from all over the list; repeated if there are fewer."""
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, count)]


def _tile(image: Tensor, *, smooth: bool = True) -> tuple[Tensor, float]:
    """A square tile with an image (3, H, W), and by how much the image was scaled."""
    import torch
    from torchvision.transforms.v2 import functional as transforms

    height, width = image.shape[1:]
    scale = _TILE / max(height, width)
    method = transforms.InterpolationMode.BICUBIC if smooth else transforms.InterpolationMode.NEAREST_EXACT
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    resized = transforms.resize_image(image.as_subclass(torch.Tensor), size, interpolation=method)
    right, below = _TILE - resized.shape[2], _TILE - resized.shape[1]
    padded: Tensor = transforms.pad_image(resized, [0, 0, right, below], fill=[255.0] * 3)
    return padded, scale


def _with_boxes(tile: Tensor, boxes: Tensor, names: Sequence[str]) -> Tensor:
    from torchvision.utils import draw_bounding_boxes

    if not len(boxes):
        return tile
    colours = [_COLOURS[place % len(_COLOURS)] for place in range(len(boxes))]
    drawn: Tensor = draw_bounding_boxes(tile, boxes.clamp(0, _TILE - 1), list(names), colours, width=2)
    return drawn


def _cifar_tiles(root: Path) -> Iterator[Tensor]:
    from sis_lightning.datasets.cifar import CIFAR100Dataset

    dataset = CIFAR100Dataset(root, "test")
    for index in _spread(range(len(dataset)), 2 * _ACROSS):
        yield _tile(dataset[index]["image"], smooth=False)[0]


def _voc_tiles(root: Path) -> Iterator[Tensor]:
    import torch

    from sis_lightning.datasets.voc import VOCDetectionDataset, read_mask, voc_home

    palette = torch.tensor(voc_palette(), dtype=torch.uint8).view(256, 3)
    for year in ("2012", "2007"):
        dataset = VOCDetectionDataset(root, [f"{year}/trainval"])
        chosen = _spread(range(len(dataset)))
        names = dataset.meta.class_names
        for sample in map(dataset.__getitem__, chosen):
            tile, scale = _tile(sample["image"])
            yield _with_boxes(tile, sample["boxes"] * scale, [names[label - 1] for label in sample["labels"].tolist()])
        for index in chosen:
            name = dataset.annotations.image_ids[index]
            mask = read_mask(voc_home(root, year) / "SegmentationClass" / f"{name}.png", len(names) + 1)
            yield _tile(palette[mask.long()].permute(2, 0, 1), smooth=False)[0]


def _coco_tiles(root: Path) -> Iterator[Tensor]:
    import torch
    from pycocotools.coco import COCO
    from torchvision.utils import draw_keypoints, draw_segmentation_masks

    from sis_lightning.datasets.coco import COCODetectionDataset, COCOKeypointsDataset, annotation_file

    dataset = COCODetectionDataset(root, "train2017", evaluation=True)
    persons = COCOKeypointsDataset(root, "train2017", evaluation=True)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotation_file(root, "train2017", "segm")))
    names = dataset.meta.class_names
    skeleton = [(start - 1, end - 1) for start, end in COCO_SKELETON]
    for parity in (1, 0):  # images of persons have odd ids, those of shapes even ones
        for index in _spread([i for i, number in enumerate(dataset.annotations.image_ids) if number % 2 == parity]):
            sample, image_id = dataset[index], dataset.annotations.image_ids[index]
            image = sample["image"].as_subclass(torch.Tensor)
            rows = [row for row in coco.imgToAnns[image_id] if not row["iscrowd"]]
            if rows:
                with warnings.catch_warnings():  # pycocotools 2.0.11 does not know the keyword `copy` of numpy 2
                    warnings.simplefilter("ignore", DeprecationWarning)
                    masks = torch.from_numpy(np.stack([coco.annToMask(row) for row in rows])).bool()
                colours = [_COLOURS[place % len(_COLOURS)] for place in range(len(rows))]
                image = draw_segmentation_masks(image, masks, alpha=0.4, colors=colours)
            tile, scale = _tile(image)
            tile = _with_boxes(tile, sample["boxes"] * scale, [names[label - 1] for label in sample["labels"].tolist()])
            assert persons.all_objects is not None
            keypoints = torch.from_numpy(persons.all_objects.ground_truth(index)["keypoints"])
            if len(keypoints):
                places, visible = keypoints[..., :2] * scale, keypoints[..., 2] > 0
                tile = draw_keypoints(tile, places, skeleton, "yellow", radius=2, width=2, visibility=visible)
            yield tile


_TILES = {"cifar": _cifar_tiles, "voc": _voc_tiles, "coco": _coco_tiles}
