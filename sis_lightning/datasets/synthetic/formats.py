"""Writes scenes the way CIFAR-100, PASCAL VOC and COCO are downloaded, and a sheet that shows some of them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sis_lightning.datasets.constants import COCO_CATEGORIES, COCO_JOINTS, COCO_SKELETON, VOC_CLASSES, VOID, voc_palette
from sis_lightning.datasets.synthetic.drawing import (
    PERSON,
    SHAPES,
    TEXTURES,
    Bools,
    Bytes,
    Instance,
    Scene,
    Stage,
    small_picture,
)

COCO_SHAPES = {
    **{"disc": 34, "ring": 60, "half-disc": 51, "square": 84, "frame": 72, "bar": 39, "triangle": 59},
    **{"plus": 5, "star": 38, "crescent": 52, "heart": 53, "arrow": 10, "ell": 62, "tee": 28, "u": 47},
    **{"zigzag": 87, "hourglass": 46, "gear": 85, "trefoil": 64, "ellipse": 37},
}
"""Category of each shape, the one that it looks like where there is one."""

_CIFAR, _VOC2012, _VOC2007, _COCO = range(4)
_TINY_DIFFICULT = 0.12  # of the objects below twice the least size; makes about 3 % of all


def _save_jpeg(picture: Bytes, path: Path) -> None:
    Image.fromarray(picture).save(path, quality=92)


def _write_json(value: object, path: Path) -> None:
    path.write_text(json.dumps(value, sort_keys=True) + "\n", encoding="utf-8")


# CIFAR-100 ---------------------------------------------------------------------------------------------------


def write_cifar(folder: Path, images: int, seed: int) -> None:
    """Writes the three pickles of CIFAR-100: 20 shapes × 5 textures, four of five pictures for training.

    Args:
        folder: The new ``cifar-100-python``.
        images: Of both splits together; at least two of each class are drawn.
        seed: Of the whole data set.
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
    return small_picture(rng, *divmod(label, len(TEXTURES))).transpose(2, 0, 1).reshape(-1)


def _write_pickle(value: dict[bytes, Any], path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(value, file, protocol=2)


# PASCAL VOC --------------------------------------------------------------------------------------------------


def write_voc(devkit: Path, year: int, images: int, stage: Stage, seed: int) -> None:
    """Writes one year of VOC: pictures, both kinds of masks, boxes and lists.

    Args:
        devkit: The folder ``VOCdevkit``.
        year: 2012 (trainval only, four of five for training) or 2007 (half trainval, half test).
        images: How many.
        stage: Sizes and rotation.
        seed: Of the whole data set.
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
        _save_jpeg(scene.picture, root / "JPEGImages" / f"{stem}.jpg")
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
    """Void are, as in VOC, the borders of objects and the whole of difficult ones."""
    void = _borders(scene.owners, max(1, round(size / 200))) | np.array([False, *difficult])[scene.owners]
    labels = np.array([0, *(instance.label + 1 for instance in scene.instances)], dtype=np.uint8)
    for folder, mask in (("SegmentationClass", labels[scene.owners]), ("SegmentationObject", scene.owners)):
        image = Image.fromarray(np.where(void, np.uint8(VOID), mask))
        image.putpalette(voc_palette())
        image.save(root / folder / f"{stem}.png")


def _borders(owners: Bytes, radius: int) -> Bools:
    """Marks pixels within `radius` of another owner.

    Where an object is so thin that nothing inside of its border would be left, its pixels stay its own.
    """
    highest, lowest = ImageFilter.MaxFilter(2 * radius + 1), ImageFilter.MinFilter(2 * radius + 1)
    image = Image.fromarray(owners)
    border: Bools = np.asarray(image.filter(highest)) != np.asarray(image.filter(lowest))
    inner = Image.fromarray((~border).astype(np.uint8))
    beside_inner: Bools = np.asarray(inner.filter(highest)) > 0
    outside: Bools = owners == 0
    return border & (outside | beside_inner)


def _write_voc_xml(scene: Scene, difficult: Sequence[bool], root: Path, stem: str) -> None:
    height, width, depth = scene.picture.shape
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
    """Writes pictures, instances and keypoints in COCO 2017's layout, four of five pictures for training.

    Args:
        folder: The new ``coco``.
        images: How many.
        stage: Sizes and rotation.
        seed: Of the whole data set.
    """
    (folder / "annotations").mkdir(parents=True)
    cut = images * 4 // 5
    for split, indices in (("train2017", range(cut)), ("val2017", range(cut, images))):
        (folder / split).mkdir()
        pictures: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for index in indices:
            scene = _coco_scene(stage, seed, index)
            height, width = scene.picture.shape[:2]
            name = f"{index + 1:012d}.jpg"
            _save_jpeg(scene.picture, folder / split / name)
            pictures.append({"id": index + 1, "file_name": name, "height": height, "width": width})
            annotations += _coco_annotations(scene, index + 1)
        people = [annotation for annotation in annotations if "keypoints" in annotation]
        objects = [{key: a[key] for key in a if "keypoints" not in key} for a in annotations]
        for task, rows in (("instances", objects), ("person_keypoints", people)):
            content = {
                "info": {"description": "Synthetic shapes and figures of sis-lightning, in COCO's format"},
                "licenses": [],
                "images": pictures,
                "annotations": rows,
                "categories": list(_categories(with_joints=task == "person_keypoints")),
            }
            _write_json(content, folder / "annotations" / f"{task}_{split}.json")


def _coco_scene(stage: Stage, seed: int, index: int) -> Scene:
    rng = np.random.default_rng([seed, _COCO, index])
    if index % 50 == 17:
        return stage.empty(rng)
    if index % 2 == 0:
        return stage.people(rng)
    return stage.shapes(rng, first=index // 2 % len(SHAPES), crowd=index % 32 == 5)


def _categories(with_joints: bool) -> Iterator[dict[str, object]]:
    for group, members in COCO_CATEGORIES.items():
        for number, name in members.items():
            category: dict[str, object] = {"id": number, "name": name, "supercategory": group}
            if not with_joints:
                yield category
            elif name == "person":
                yield {**category, "keypoints": list(COCO_JOINTS), "skeleton": [list(bone) for bone in COCO_SKELETON]}


def _coco_annotations(scene: Scene, image_id: int) -> Iterator[dict[str, object]]:
    for number, instance in enumerate(scene.instances, start=1):
        left, top, right, bottom = instance.box
        mask = scene.owners == number
        annotation: dict[str, object] = {
            "id": 100 * image_id + number,
            "image_id": image_id,
            "category_id": 1 if instance.label == PERSON else COCO_SHAPES[SHAPES[instance.label]],
            "segmentation": run_lengths(mask) if instance.crowd else polygons(mask),
            "area": float(np.count_nonzero(mask)),
            "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
            "iscrowd": int(instance.crowd),
        }
        if instance.label == PERSON:
            annotation["keypoints"] = list(instance.keypoints)
            annotation["num_keypoints"] = sum(v > 0 for v in instance.keypoints[2::3])
        yield annotation


def run_lengths(mask: Bools) -> dict[str, list[int]]:
    """Encodes a mask as COCO does for crowds: lengths of runs down the columns, zeros first."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return {"counts": np.diff([0, *changes, mask.size]).tolist(), "size": list(mask.shape)}


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


# Contact sheet -----------------------------------------------------------------------------------------------

Item = TypeVar("Item")

_TILE, _GAP, _ACROSS = 176, 8, 6
_INK = ((230, 25, 75), (0, 130, 200), (60, 160, 60), (245, 130, 48), (145, 30, 180), (0, 150, 150))


def write_contact_sheet(root: Path, kinds: Sequence[str]) -> Path:
    """Shows some of what was written, read back from the files.

    Args:
        root: The folder with the data sets.
        kinds: Which of them there are.

    Returns:
        The picture's path.
    """
    sections = {"cifar": _cifar_section, "voc": _voc_section, "coco": _coco_section}
    tiles = [row for kind in kinds for row in sections[kind](root)]
    width = _GAP + _ACROSS * (_TILE + _GAP)
    height = _GAP + sum(row.height + _GAP for row in tiles)
    sheet = Image.new("RGB", (width, height), "white")
    y = _GAP
    for row in tiles:
        sheet.paste(row, (_GAP, y))
        y += row.height + _GAP
    path = root / "contact_sheet.png"
    sheet.save(path)
    return path


def _title(text: str) -> Image.Image:
    image = Image.new("RGB", (_ACROSS * (_TILE + _GAP), 26), "white")
    ImageDraw.Draw(image).text((0, 2), text, fill="black", font=ImageFont.load_default(18))
    return image


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (_ACROSS * (_TILE + _GAP) - _GAP, _TILE), "white")
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * (_TILE + _GAP), 0))
    return row


def _spread(items: list[Item]) -> list[Item]:
    """Takes as many as fit into a row, from all over the list."""
    places = np.linspace(0, len(items) - 1, min(_ACROSS, len(items)))
    return [items[int(place)] for place in places]


def _enlarge(picture: Image.Image, smooth: bool = True) -> tuple[Image.Image, float]:
    scale = _TILE / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    method = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return picture.convert("RGB").resize(size, method), scale


def _cifar_section(root: Path) -> Iterator[Image.Image]:
    with (root / "cifar-100-python" / "test").open("rb") as file:
        batch = pickle.load(file, encoding="bytes")
    labels = np.array(batch[b"fine_labels"])
    pitch = _ACROSS * (_TILE + _GAP) // len(SHAPES)
    grid = Image.new("RGB", (pitch * len(SHAPES), pitch * len(TEXTURES) + 14), "white")
    draw = ImageDraw.Draw(grid)
    for column, shape in enumerate(SHAPES):
        draw.text((column * pitch, 0), shape, fill="black", font=ImageFont.load_default(11))
        for line in range(len(TEXTURES)):
            index = np.flatnonzero(labels == column * len(TEXTURES) + line)[0]
            pixels = np.ascontiguousarray(batch[b"data"][index].reshape(3, 32, 32).transpose(1, 2, 0))
            tile = Image.fromarray(pixels).resize((pitch - 2, pitch - 2), Image.Resampling.NEAREST)
            grid.paste(tile, (column * pitch, 14 + line * pitch))
    yield _title(f"CIFAR-100 layout: {len(SHAPES)} shapes by {len(TEXTURES)} textures, 32 x 32 pixels")
    yield grid


def _voc_section(root: Path) -> Iterator[Image.Image]:
    for year in (2012, 2007):
        folder = root / "VOCdevkit" / f"VOC{year}"
        pictures, masks = [], []
        for path in _spread(sorted((folder / "JPEGImages").iterdir())):
            picture, scale = _enlarge(Image.open(path))
            draw = ImageDraw.Draw(picture)
            for number, node in enumerate(
                ElementTree.parse(folder / "Annotations" / f"{path.stem}.xml").iter("object")
            ):
                left, top, right, bottom = (float(value.text or 0) for value in node.iterfind("bndbox/*"))
                box = ((left - 1) * scale, (top - 1) * scale, right * scale - 1, bottom * scale - 1)
                draw.rectangle(box, outline=_INK[number % len(_INK)], width=2)
                draw.text(
                    (box[0] + 3, box[1] + 1),
                    node.findtext("name") or "",
                    fill="white",
                    stroke_width=1,
                    stroke_fill="black",
                )
            pictures.append(picture)
            masks.append(_enlarge(Image.open(folder / "SegmentationClass" / f"{path.stem}.png"), smooth=False)[0])
        yield _title(f"VOC{year} layout: boxes, and masks with void borders")
        yield _row(pictures)
        yield _row(masks)


def _coco_section(root: Path) -> Iterator[Image.Image]:
    folder = root / "coco"
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text(encoding="utf-8"))
    people = json.loads((folder / "annotations" / "person_keypoints_train2017.json").read_text(encoding="utf-8"))
    joints = {row["id"]: row["keypoints"] for row in people["annotations"]}
    yield _title("COCO layout: boxes, polygons and skeletons (hollow joints are hidden)")
    for parity in (1, 0):
        chosen = _spread([image for image in content["images"] if image["id"] % 2 == parity])
        yield _row([_draw_coco(folder, image, content["annotations"], joints) for image in chosen])


def _draw_coco(
    folder: Path, image: dict[str, Any], annotations: Sequence[dict[str, Any]], joints: dict[int, list[int]]
) -> Image.Image:
    picture, scale = _enlarge(Image.open(folder / "train2017" / image["file_name"]))
    draw = ImageDraw.Draw(picture)
    for annotation in annotations:
        if annotation["image_id"] != image["id"]:
            continue
        ink = _INK[annotation["id"] % len(_INK)]
        left, top, width, height = (value * scale for value in annotation["bbox"])
        draw.rectangle((left, top, left + width - 1, top + height - 1), outline=ink)
        if not annotation["iscrowd"]:
            for polygon in annotation["segmentation"]:
                draw.polygon([value * scale for value in polygon], outline=ink)
        if annotation["id"] in joints:
            _draw_skeleton(draw, np.array(joints[annotation["id"]]).reshape(-1, 3) * (scale, scale, 1))
    return picture


def _draw_skeleton(draw: ImageDraw.ImageDraw, joints: NDArray[np.float64]) -> None:
    for start, end in COCO_SKELETON:
        if joints[start - 1, 2] and joints[end - 1, 2]:
            draw.line((*joints[start - 1, :2], *joints[end - 1, :2]), fill="white", width=2)
    for number, (x, y, v) in enumerate(joints.tolist()):
        colour = "yellow" if not number else "lime" if number % 2 else "red"  # left joints are odd
        if v:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour if v > 1 else None, outline=colour)
