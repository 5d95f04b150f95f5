"""Data sets of drawn shapes and persons in the layouts of CIFAR-100, Pascal VOC, COCO and ImageNet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from sis_lightning.datasets.constants import SYNTHETIC_MARKER
from sis_lightning.datasets.synthetic.contact_sheet import write_contact_sheet
from sis_lightning.datasets.synthetic.drawing import Stage
from sis_lightning.datasets.synthetic.formats import write_cifar, write_coco, write_imagenet, write_voc
from sis_lightning.errors import UsageError, nearest
from sis_lightning.version import __version__

__all__ = ["KINDS", "SYNTHETIC_MARKER", "write_synthetic"]

KINDS = ("cifar", "voc", "coco", "imagenet")


def write_synthetic(
    root: str | Path,
    *,
    images: int = 1000,
    size: int = 256,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    min_object: int = 8,
    rotation: float = 180.0,
) -> Path:
    """Draws images with labels and writes them in the layouts in which the real data sets are published.

    What is written follows from the arguments, byte for byte. A folder that already holds the same data is not
    changed.

    Args:
        root: Folder in which ``cifar-100-python``, ``VOCdevkit``, ``coco`` and ``ilsvrc`` are made.
        images: Number of images of VOC2012 and of COCO; VOC2007 has half as many, ImageNet four times
            and CIFAR ten times as many.
        size: Longer side of the images of VOC and COCO in px; the other is as long or 3/4 of it.
        seed: Seed of everything random.
        kinds: The data sets to write, of `KINDS`.
        min_object: Minimum size (longer side of the box) of the visible part of an object in VOC and COCO, in px.
        rotation: Maximum rotation of the shapes of VOC and COCO in degrees, either way.

    Returns:
        The path of a contact sheet, an image that shows some images of each kind.

    Raises:
        UsageError: If an argument is out of range, or `root` holds something else.
    """
    _check(images, size, seed, kinds, min_object, rotation)
    root = Path(root).absolute()
    kinds = [kind for kind in KINDS if kind in kinds]
    marker = {
        "synthetic": True,
        "generator": "sis-lightning synth",
        "version": __version__,
        **{"images": images, "size": size, "seed": seed, "kinds": kinds},
        **{"min_object": min_object, "rotation": float(rotation)},
    }
    if not _is_free(root, marker):
        return root / "contact_sheet.png"
    partial = _empty_sibling(root)
    _write_marker(partial, marker)
    stage = Stage(size, min_object, rotation)
    if "cifar" in kinds:
        write_cifar(partial / "cifar-100-python", 10 * images, seed)
        _write_marker(partial / "cifar-100-python", marker)
    if "voc" in kinds:
        for year, count in ((2012, images), (2007, images // 2)):
            write_voc(partial / "VOCdevkit", year, count, stage, seed)
            _write_marker(partial / "VOCdevkit" / f"VOC{year}", marker)
    if "coco" in kinds:
        write_coco(partial / "coco", images, stage, seed)
        _write_marker(partial / "coco", marker)
    if "imagenet" in kinds:
        write_imagenet(partial / "ilsvrc", 4 * images, seed)
        _write_marker(partial / "ilsvrc", marker)
    write_contact_sheet(partial, kinds)
    if root.exists():
        root.rmdir()
    partial.rename(root)
    return root / "contact_sheet.png"


def _check(images: int, size: int, seed: int, kinds: Sequence[str], min_object: int, rotation: float) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"kinds: there is no {kind!r}; {nearest(kind, KINDS)}")
    limits = (
        ("kinds", list(kinds), len(kinds) > 0, f"at least one of {', '.join(KINDS)}"),
        ("images", images, images >= 10, "at least 10"),
        ("size", size, size >= 32, "at least 32 pixels"),
        ("seed", seed, seed >= 0, "0 or more"),
        ("min_object", min_object, 4 <= min_object < size / 2, f"4 or more and less than half of size ({size})"),
        ("rotation", rotation, 0 <= rotation <= 180, "0 to 180 degrees"),
    )
    for name, value, allowed, rule in limits:
        if not allowed:
            raise UsageError(f"{name} is {value}; allowed: {rule}")


def _is_free(root: Path, marker: dict[str, object]) -> bool:
    """Returns whether `root` is still to be written; False if it holds the same data already."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return True
    found = root / SYNTHETIC_MARKER
    if not found.is_file():
        raise UsageError(f"{root} holds something that is not synthetic data; choose another folder")
    # Another release draws the same images, or its changelog says so.
    if {**json.loads(found.read_text(encoding="utf-8")), "version": marker["version"]} != marker:
        raise UsageError(
            f"{root} holds synthetic data of other arguments (see {SYNTHETIC_MARKER} there); choose another folder"
        )
    return False


def _empty_sibling(root: Path) -> Path:
    """Makes the folder that becomes `root` at the end, so that a killed run leaves nothing that looks complete."""
    partial = root.with_name(root.name + ".partial")
    if partial.exists():
        if any(partial.iterdir()) and not (partial / SYNTHETIC_MARKER).is_file():
            raise UsageError(f"{partial} is in the way and holds no synthetic data; move it or choose another folder")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def _write_marker(folder: Path, marker: dict[str, object]) -> None:
    text = json.dumps(marker, indent=2, sort_keys=True) + "\n"
    (folder / SYNTHETIC_MARKER).write_text(text, encoding="utf-8")
