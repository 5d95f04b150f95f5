"""One figure that shows some of the images of synthetic data with their annotations, read back from the files."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sis_lightning.datasets.annotations import Annotations
from sis_lightning.datasets.coco_reader import read_coco
from sis_lightning.datasets.constants import COCO_SKELETON, VOC_CLASSES
from sis_lightning.datasets.voc_reader import read_names, read_voc, voc_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACROSS = 6
#: A row of the figure: its title, and a function for each image that draws it.
_Row = tuple[str, list[Callable[["Axes"], Any]]]


def write_contact_sheet(root: Path, kinds: Sequence[str]) -> Path:
    """Draws the contact sheet: rows of six images.

    CIFAR has two rows of images; each year of VOC a row of images with boxes and one of their masks; COCO a row of
    images of persons and one of shapes, with boxes, polygons and keypoints; ImageNet one row of images.

    Args:
        root: The folder with the data sets.
        kinds: The data sets that exist: `cifar`, `voc`, `coco`, `imagenet`.

    Returns:
        The image file, `root/contact_sheet.png`.
    """
    from matplotlib.figure import Figure

    rows = [row for kind in kinds for row in _ROWS[kind](root)]
    figure = Figure(figsize=(2 * _ACROSS, 2.2 * len(rows)), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(len(rows), _ACROSS, squeeze=False), rows, strict=True):
        axes[0].set_title(title, loc="left", fontsize=11)
        for axis in axes:
            axis.set_axis_off()
        for axis, draw in zip(axes, images, strict=False):
            draw(axis)
    path = root / "contact_sheet.png"
    figure.savefig(path, dpi=100)
    return path


def _spread(items: Sequence[int], count: int = _ACROSS) -> list[int]:
    """Up to `count` items from all over the list."""
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, min(count, len(items)))]


def _shower(image: Any) -> Callable[[Axes], Any]:
    return lambda axis: axis.imshow(image, interpolation="nearest")


def _cifar_rows(root: Path) -> Iterator[_Row]:
    with (root / "cifar-100-python" / "test").open("rb") as file:
        data = pickle.load(file, encoding="bytes")[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    images = [_shower(data[index]) for index in _spread(range(len(data)), 2 * _ACROSS)]
    yield "CIFAR-100 layout", images[:_ACROSS]
    yield "", images[_ACROSS:]


def _voc_rows(root: Path) -> Iterator[_Row]:
    for year in (2012, 2007):
        home = root / "VOCdevkit" / f"VOC{year}"
        known = read_voc([(home, read_names(voc_list(home, "Main", "trainval")))], VOC_CLASSES[1:])
        chosen = _spread(range(len(known)))
        yield f"VOC{year} layout: boxes, and masks with void borders", [_annotated(known, index) for index in chosen]
        masks = [home / "SegmentationClass" / f"{known.image_ids[index]}.png" for index in chosen]
        yield "", [_shower(_rgb(path)) for path in masks]


def _coco_rows(root: Path) -> Iterator[_Row]:
    folder = root / "coco" / "annotations"
    images = root / "coco" / "train2017"
    known = read_coco(folder / "instances_train2017.json", images, "segm")
    persons = read_coco(folder / "person_keypoints_train2017.json", images, "keypoints")
    for parity, what in ((1, "persons"), (0, "shapes")):
        chosen = _spread([index for index, number in enumerate(known.image_ids) if number % 2 == parity])
        draws = [_annotated(known, index, persons) for index in chosen]
        yield f"COCO layout, {what}: boxes, polygons and keypoints", draws


def _imagenet_rows(root: Path) -> Iterator[_Row]:
    paths = sorted((root / "ilsvrc" / "ILSVRC" / "Data" / "CLS-LOC" / "val").iterdir())
    yield "ImageNet layout", [_shower(_rgb(paths[index])) for index in _spread(range(len(paths)))]


def _rgb(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _annotated(known: Annotations, index: int, persons: Annotations | None = None) -> Callable[[Axes], Any]:
    """A function that draws an image with its boxes, and with masks and keypoints if there are any."""

    def draw(axis: Axes) -> None:
        from matplotlib.patches import Polygon, Rectangle

        axis.imshow(_rgb(known.paths[index]))
        objects = known.objects(index)
        for place in range(objects.start, objects.stop):
            x1, y1, x2, y2 = known.boxes[place]
            colour = f"C{place - objects.start}"
            axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour))
            name = known.class_names[known.labels[place]]
            axis.text(x1, y1, name, color="white", fontsize=7, va="top", backgroundcolor=colour)
            if known.segmentations is not None and isinstance(known.segmentations[place], list):
                for ring in known.segmentations[place]:
                    corners = np.reshape(ring, (-1, 2)) - 0.5
                    axis.add_patch(Polygon(corners, alpha=0.4, facecolor=colour))
        if persons is not None and persons.keypoints is not None:
            for points in persons.keypoints[persons.objects(index)]:
                for start, end in COCO_SKELETON:
                    if points[start, 2] and points[end, 2]:
                        axis.plot(*points[[start, end], :2].T, "w-", linewidth=1.5)
                axis.plot(*points[points[:, 2] > 0, :2].T, "y.", markersize=5)

    return draw


_ROWS: dict[str, Callable[[Path], Iterator[_Row]]] = {
    "cifar": _cifar_rows,
    "voc": _voc_rows,
    "coco": _coco_rows,
    "imagenet": _imagenet_rows,
}
