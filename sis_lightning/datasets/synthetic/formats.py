"""Writes drawn scenes in the published layouts of CIFAR-100, Pascal VOC and COCO."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pycocotools import mask as rle_tools

from sis_lightning.datasets.constants import (
    COCO_CATEGORIES,
    COCO_KEYPOINTS,
    COCO_SKELETON,
    VOC_CLASSES,
    VOID,
    voc_palette,
)
from sis_lightning.datasets.synthetic.drawing import (
    PERSON,
    SHAPES,
    TEXTURES,
    Bools,
    Bytes,
    Instance,
    Scene,
    Stage,
    small_image,
)

COCO_SHAPES = {
    **{"disc": 34, "ring": 60, "half-disc": 51, "square": 84, "frame": 72, "bar": 39, "triangle": 59},
    **{"plus": 5, "star": 38, "crescent": 52, "heart": 53, "arrow": 10, "ell": 62, "tee": 28, "u": 47},
    **{"zigzag": 87, "hourglass": 46, "gear": 85, "trefoil": 64, "ellipse": 37},
}
"""COCO category of each shape; one that looks similar if there is one."""

_CIFAR, _VOC2012, _VOC2007, _COCO, _IMAGENET = range(5)
_TINY_DIFFICULT = 0.12  # share of the objects smaller than twice the minimum size; about 3 % of all objects


def _save_jpeg(image: Bytes, path: Path) -> None:
    Image.fromarray(image).save(path, quality=92)


def _write_json(value: object, path: Path) -> None:
    path.write_text(json.dumps(value, sort_keys=True) + "\n", encoding="utf-8")


# CIFAR-100 ---------------------------------------------------------------------------------------------------


def write_cifar(folder: Path, images: int, seed: int) -> None:
    """Writes the three pickles of CIFAR-100: 20 shapes × 5 textures, four of five images for training.

    Args:
        folder: The folder ``cifar-100-python``, which must not exist.
        images: Number of images of both splits together; at least two of each class are drawn.
        seed: Seed of the whole data set.
    """
    folder.mkdir(parents=True)
    classes = len(SHAPES) * len(TEXTURES)
    splits: dict[str, list[int]] = {"train": [], "test": []}
    total = max(images, 2 * classes)
    for index in range(total):
        in_class = (total - index % classes - 1) // classes + 1
        tested = index // classes >= in_class - max(1, round(in_class / 5))
        splits["test" if tested else "train"].append(index)
    for split, indices in splits.items():
        fine = [index % classes for index in indices]
        batch = {
            b"filenames": [f"{_fine_name(index % classes)}_s_{index:06d}.png".encode() for index in indices],
            b"batch_label": {"train": b"training batch 1 of 1", "test": b"testing batch 1 of 1"}[split],
            b"fine_labels": fine,
            b"coarse_labels": [label // len(TEXTURES) for label in fine],
            b"data": np.stack([_cifar_row(seed, index, index % classes) for index in indices]),
        }
        _write_pickle(batch, folder / split)
    names = {
        b"fine_label_names": [_fine_name(label).encode() for label in range(classes)],
        b"coarse_label_names": [name.encode() for name in SHAPES],
    }
    _write_pickle(names, folder / "meta")


def _fine_name(label: int) -> str:
    return f"{TEXTURES[label % len(TEXTURES)]}_{SHAPES[label // len(TEXTURES)]}"


def _cifar_row(seed: int, index: int, label: int) -> Bytes:
    rng = np.random.default_rng([seed, _CIFAR, index])
    return small_image(rng, *divmod(label, len(TEXTURES))).transpose(2, 0, 1).reshape(-1)


def _write_pickle(value: dict[bytes, Any], path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(value, file, protocol=2)


# ImageNet ----------------------------------------------------------------------------------------------------


def write_imagenet(root: Path, images: int, seed: int) -> None:
    """Writes photographs' sizes of the shapes and textures of `write_cifar` in the layout of ILSVRC 2012.

    Args:
        root: Folder in which ``ILSVRC`` and the two files of names and labels are made.
        images: Number of images of both splits together, a quarter of them for validation; at least two of each class.
        seed: Seed of the whole data set.
    """
    home = root / "ILSVRC" / "Data" / "CLS-LOC"
    classes = len(SHAPES) * len(TEXTURES)
    synsets = [f"n{1000 + 7 * label:08d}" for label in range(classes)]
    for synset in synsets:
        (home / "train" / synset).mkdir(parents=True)
    (home / "val").mkdir()
    solution = ["ImageId,PredictionString"]
    for index in range(max(images, 2 * classes)):
        label = index % classes
        rng = np.random.default_rng([seed, _IMAGENET, index])
        drawn = small_image(rng, *divmod(label, len(TEXTURES)))
        width, height = (int(side) for side in rng.integers(48, 81, 2))
        image = Image.fromarray(drawn).resize((width, height), Image.Resampling.BICUBIC)
        if index // classes % 4 == 1:
            name = f"ILSVRC2012_val_{index:08d}"
            solution.append(f"{name},{synsets[label]} 0 0 {width - 1} {height - 1} ")
            image.save(home / "val" / f"{name}.JPEG", quality=92)
        else:
            image.save(home / "train" / synsets[label] / f"{synsets[label]}_{index}.JPEG", quality=92)
    names = [f"{synset} {_fine_name(label).replace('_', ' ')}, shape" for label, synset in enumerate(synsets)]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (root / "LOC_val_solution.csv").write_text("\n".join(solution) + "\n", encoding="utf-8")


# Pascal VOC --------------------------------------------------------------------------------------------------


def write_voc(devkit: Path, year: int, images: int, stage: Stage, seed: int) -> None:
    """Writes one year of VOC: images, both kinds of masks, boxes and lists.

    Args:
        devkit: The folder ``VOCdevkit``.
        year: 2012 (trainval only, four of five for training) or 2007 (half trainval, half test).
        images: Number of images.
        stage: Sizes and rotation.
        seed: Seed of the whole data set.
    """
    root = devkit / f"VOC{year}"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations"):
        (root / name).mkdir(parents=True)
    kind = _VOC2012 if year == 2012 else _VOC2007
    stems = [f"{year}_{number:06d}" if year == 2012 else f"{number:06d}" for number in range(1, images + 1)]
    for index, stem in enumerate(stems):
        rng = np.random.default_rng([seed, kind, index])
        scene = stage.shapes(rng, first=index % len(SHAPES))
        difficult = [_is_difficult(rng, instance, stage) for instance in scene.instances]
        _save_jpeg(scene.image, root / "JPEGImages" / f"{stem}.jpg")
        _write_masks(scene, difficult, stage.size, root, stem)
        _write_voc_xml(scene, difficult, root, stem)
    trainval = stems if year == 2012 else stems[: images // 2]
    cut = len(trainval) * 4 // 5 if year == 2012 else len(trainval) // 2
    lists = {"train": trainval[:cut], "val": trainval[cut:], "trainval": trainval}
    if year == 2007:
        lists["test"] = stems[images // 2 :]
    for task in ("Segmentation", "Main"):
        (root / "ImageSets" / task).mkdir(parents=True)
        for split, names in lists.items():
            text = "".join(f"{name}\n" for name in names)
            (root / "ImageSets" / task / f"{split}.txt").write_text(text, encoding="ascii")


def _is_difficult(rng: np.random.Generator, instance: Instance, stage: Stage) -> bool:
    tiny = instance.extent < 2 * stage.min_object and rng.random() < _TINY_DIFFICULT
    return tiny or instance.visible < 0.25


def _write_masks(scene: Scene, difficult: Sequence[bool], size: int, root: Path, stem: str) -> None:
    """Writes both masks; as in VOC, the borders of objects and all pixels of difficult ones are void."""
    void = _borders(scene.owners, max(1, round(size / 200))) | np.array([False, *difficult])[scene.owners]
    labels = np.array([0, *(instance.label + 1 for instance in scene.instances)], dtype=np.uint8)
    for folder, mask in (("SegmentationClass", labels[scene.owners]), ("SegmentationObject", scene.owners)):
        image = Image.fromarray(np.where(void, np.uint8(VOID), mask))
        image.putpalette(voc_palette())
        image.save(root / folder / f"{stem}.png")


def _borders(owners: Bytes, radius: int) -> Bools:
    """Marks pixels within `radius` of another owner.

    Pixels of objects so thin that nothing inside of the border would be left are not marked.
    """
    highest, lowest = ImageFilter.MaxFilter(2 * radius + 1), ImageFilter.MinFilter(2 * radius + 1)
    image = Image.fromarray(owners)
    border: Bools = np.asarray(image.filter(highest)) != np.asarray(image.filter(lowest))
    inner = Image.fromarray((~border).astype(np.uint8))
    beside_inner: Bools = np.asarray(inner.filter(highest)) > 0
    outside: Bools = owners == 0
    return border & (outside | beside_inner)


def _write_voc_xml(scene: Scene, difficult: Sequence[bool], root: Path, stem: str) -> None:
    height, width, depth = scene.image.shape
    tree = ElementTree.Element("annotation")
    _add(tree, folder=root.name, filename=f"{stem}.jpg")
    _add(ElementTree.SubElement(tree, "source"), database="synthetic shapes of sis-lightning")
    _add(ElementTree.SubElement(tree, "size"), width=width, height=height, depth=depth)
    _add(tree, segmented=1)
    for instance, hard in zip(scene.instances, difficult, strict=True):
        node = ElementTree.SubElement(tree, "object")
        _add(node, name=VOC_CLASSES[instance.label + 1], pose="Unspecified", truncated=int(instance.truncated))
        _add(node, difficult=int(hard), occluded=int(instance.occluded))
        left, top, right, bottom = instance.box
        box = ElementTree.SubElement(node, "bndbox")
        _add(box, xmin=left + 1, ymin=top + 1, xmax=right, ymax=bottom)  # 1-based and inclusive
    ElementTree.indent(tree, "\t")
    text = ElementTree.tostring(tree, encoding="unicode")
    (root / "Annotations" / f"{stem}.xml").write_text(text + "\n", encoding="utf-8")


def _add(parent: ElementTree.Element, **children: str | int) -> None:
    for name, value in children.items():
        ElementTree.SubElement(parent, name).text = str(value)


# COCO --------------------------------------------------------------------------------------------------------


def write_coco(folder: Path, images: int, stage: Stage, seed: int) -> None:
    """Writes images, instances and keypoints in COCO 2017's layout, four of five images for training.

    Args:
        folder: The folder ``coco``, which must not exist.
        images: Number of images.
        stage: Sizes and rotation.
        seed: Seed of the whole data set.
    """
    (folder / "annotations").mkdir(parents=True)
    cut = images * 4 // 5
    for split, indices in (("train2017", range(cut)), ("val2017", range(cut, images))):
        (folder / split).mkdir()
        entries: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for index in indices:
            scene = _coco_scene(stage, seed, index)
            height, width = scene.image.shape[:2]
            name = f"{index + 1:012d}.jpg"
            _save_jpeg(scene.image, folder / split / name)
            entries.append({"id": index + 1, "file_name": name, "height": height, "width": width})
            annotations += _coco_annotations(scene, index + 1)
        persons = [annotation for annotation in annotations if "keypoints" in annotation]
        objects = [{key: a[key] for key in a if "keypoints" not in key} for a in annotations]
        for task, rows in (("instances", objects), ("person_keypoints", persons)):
            content = {
                "info": {"description": "Synthetic shapes and figures of sis-lightning, in COCO's format"},
                "licenses": [],
                "images": entries,
                "annotations": rows,
                "categories": list(_categories(with_keypoints=task == "person_keypoints")),
            }
            _write_json(content, folder / "annotations" / f"{task}_{split}.json")


def _coco_scene(stage: Stage, seed: int, index: int) -> Scene:
    rng = np.random.default_rng([seed, _COCO, index])
    if index % 50 == 17:
        return stage.empty(rng)
    if index % 2 == 0:
        return stage.persons(rng)
    return stage.shapes(rng, first=index // 2 % len(SHAPES), crowd=index % 32 == 5)


def _categories(with_keypoints: bool) -> Iterator[dict[str, object]]:
    for group, members in COCO_CATEGORIES.items():
        for number, name in members.items():
            category: dict[str, object] = {"id": number, "name": name, "supercategory": group}
            if not with_keypoints:
                yield category
            elif name == "person":
                yield {
                    **category,
                    "keypoints": list(COCO_KEYPOINTS),
                    "skeleton": [[start + 1, end + 1] for start, end in COCO_SKELETON],
                }


def _coco_annotations(scene: Scene, image_id: int) -> Iterator[dict[str, object]]:
    for number, instance in enumerate(scene.instances, start=1):
        left, top, right, bottom = instance.box
        mask = scene.owners == number
        annotation: dict[str, object] = {
            "id": 100 * image_id + number,
            "image_id": image_id,
            "category_id": 1 if instance.label == PERSON else COCO_SHAPES[SHAPES[instance.label]],
            "segmentation": encode_mask(mask) if instance.crowd else polygons(mask),
            "area": float(np.count_nonzero(mask)),
            "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
            "iscrowd": int(instance.crowd),
        }
        if instance.label == PERSON:
            annotation["keypoints"] = list(instance.keypoints)
            annotation["num_keypoints"] = sum(v > 0 for v in instance.keypoints[2::3])
        yield annotation


def encode_mask(mask: Bools) -> dict[str, Any]:
    """Encodes a mask (H, W) as COCO's compressed run lengths: `size` [H, W] and `counts`."""
    rle = rle_tools.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def polygons(mask: Bools) -> list[list[float]]:
    """Traces the edges of a mask's pixels: one polygon x, y, x, y, … for each connected part.

    COCO's polygons have no holes, so a mask with holes is cut into columns through them.
    """
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(columns):
        return []
    loops = list(_trace(mask))
    hole = next((loop for loop in loops if _signed_area(loop) < 0), None)
    if hole is None:
        return [loop.ravel().astype(float).tolist() for loop in loops]
    cut = int(hole[:, 0].min() + hole[:, 0].max() + 1) // 2
    before = np.arange(mask.shape[1]) < cut
    return polygons(mask & before) + polygons(mask & ~before)


def _signed_area(loop: NDArray[np.int64]) -> float:
    x, y = loop.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _trace(mask: Bools) -> Iterator[NDArray[np.int64]]:
    """Follows the edges between a mask and its outside, with the mask on the right hand.

    Yields:
        The corners (x, y) of each loop: clockwise around parts, counterclockwise around holes.
    """
    columns = mask.shape[1]
    stride = columns + 1
    padded = np.pad(mask, 1)
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    steps = (1, stride, -1, -stride)  # east, south, west, north
    starts = (0, 1, stride + 1, stride)  # corner of the pixel where the edge in that direction begins
    edges: list[int] = []
    for direction in range(4):
        y, x = np.nonzero(mask & ~neighbours[direction])
        edges += ((y * stride + x + starts[direction]) * 4 + direction).tolist()
    remaining = set(edges)
    for edge in sorted(edges):  # the first edge of a loop leaves its upper left corner
        corners = []
        while edge in remaining:
            remaining.remove(edge)
            vertex, direction = divmod(edge, 4)
            corners.append((vertex % stride, vertex // stride))
            edge = _follow(remaining, vertex + steps[direction], direction)
            while edge in remaining and edge % 4 == direction:
                remaining.remove(edge)
                edge = _follow(remaining, edge // 4 + steps[direction], direction)
        if corners:
            yield np.array(corners)


def _follow(remaining: set[int], vertex: int, direction: int) -> int:
    """Prefers the right turn, which keeps parts that touch in one corner apart."""
    for turn in (1, 0, 3):
        edge = vertex * 4 + (direction + turn) % 4
        if edge in remaining:
            return edge
    return -1
