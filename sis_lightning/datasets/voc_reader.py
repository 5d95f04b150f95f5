"""The reader and validator of Pascal VOC's lists of images and XML annotations. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sis_lightning.datasets.annotations import Annotations, Defect, check_boxes, file_names
from sis_lightning.datasets.constants import IMAGE_ENDINGS
from sis_lightning.datasets.paths import PathArray
from sis_lightning.errors import DataError


def read_names(path: Path) -> list[str]:
    """Reads a list of image names, one per line, as in VOC's `ImageSets/`.

    A name may have spaces. If each line ends with a word of -1, 0 or 1, as in the lists of single classes, this word is
    left out. Empty lines and repetitions do not count.

    Args:
        path: A text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: If it does not exist (the message names the other lists of its folder) or is not UTF-8 text.
    """
    return _read_list(path)[0]


def _read_list(path: Path) -> tuple[list[str], int]:
    """The names in a list, and the number of lines with a name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        known = sorted(item.stem for item in path.parent.glob("*.txt") if "_" not in item.stem)
        raise DataError(f"{path} does not exist" + (f"; there are: {', '.join(known)}" if known else "")) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = [line.rsplit(maxsplit=1) for line in lines]
    if all(len(pair) == 2 and pair[1] in ("-1", "0", "1") for pair in words):
        lines = [pair[0] for pair in words]
    return list(dict.fromkeys(lines)), len(lines)


def repeated(path: Path) -> str:
    """Says how often a list names an image again; empty if it does not. Raises as `read_names`."""
    names, lines = _read_list(path)
    return f"{lines - len(names)} times in {path.name}, which count once" if lines > len(names) else ""


def files_by_name(folder: Path, endings: Sequence[str], wanted: Collection[str] = ()) -> dict[str, str]:
    """The files of a folder by their names without ending; empty if there is no such folder.

    Args:
        folder: The folder.
        endings: The endings that count, in lower case.
        wanted: The names that will be read.

    Raises:
        DataError: If two files have the same wanted name but for the ending.
    """
    wanted = set(wanted)
    found: dict[str, str] = {}
    for file in sorted(file_names(folder)):
        name, dot, ending = file.rpartition(".")
        if dot + ending.lower() not in endings or file.startswith("."):
            continue
        if name in found and name in wanted:
            raise DataError(f"{folder}: {found[name]} and {file} are both the image {name}: remove one of them")
        found[name] = file
    return found


def voc_list(home: Path, task: str, split: str) -> Path:
    """The list of a split in VOC's layout.

    Args:
        home: The folder of a year, with `ImageSets/`.
        task: `Main` (detection) or `Segmentation`.
        split: The name of the split, such as `trainval`.
    """
    return home / "ImageSets" / task / f"{split}.txt"


def read_voc(
    homes_and_names: Sequence[tuple[Path, Sequence[str]]],
    class_names: Sequence[str],
    *,
    images: bool = True,
    splits: Sequence[tuple[str, ...]] = (),
) -> Annotations:
    """Reads Pascal VOC's XML.

    Args:
        homes_and_names: Folders with `Annotations/` and `JPEGImages/`, each with the names of its images.
        class_names: Class names by label.
        images: Whether a missing image file is a defect; False to score results, which needs no images.
        splits: Names of the splits that list each image, for results files.

    Returns:
        The annotations. What is wrong with single entries is in `defects`.

    Raises:
        DataError: If a file is not XML at all.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    defects: list[Defect] = []
    paths: list[Path] = []
    sizes: list[tuple[int, int]] = []
    objects: list[tuple[int, int, bool, list[float], str, Path]] = []
    for home, names in homes_and_names:
        found, described = files_by_name(home / "JPEGImages", IMAGE_ENDINGS, names), file_names(home / "Annotations")
        for name in names:
            image_file = home / "JPEGImages" / found.get(name, f"{name}.jpg")
            file = home / "Annotations" / f"{name}.xml"
            paths.append(image_file)
            sizes.append((0, 0))
            if images and name not in found:
                defects.append(Defect(image_file, "", "no such file"))
            if file.name not in described:
                defects.append(Defect(file, "", "no such file"))
                continue
            tree = _parse_xml(file)
            sizes[-1] = (_whole(tree.findtext("{*}size/{*}width")), _whole(tree.findtext("{*}size/{*}height")))
            for place, node in enumerate(tree.findall("{*}object"), start=1):
                known = (node.findtext("{*}name") or "").strip()
                if known not in label_of:
                    defects.append(Defect(file, f"object {place}", f"unknown class {known!r}"))
                    continue
                box = [_float(node.findtext("{*}bndbox/{*}" + key)) for key in ("xmin", "ymin", "xmax", "ymax")]
                flag = (node.findtext("{*}difficult") or "0").strip().lower()
                if flag not in ("0", "1", "false", "true"):
                    defects.append(Defect(file, f"object {place}, {known}", f"difficult is {flag!r}, not 0 or 1"))
                    continue
                difficult = flag in ("1", "true")
                objects.append((len(paths) - 1, label_of[known], difficult, box, f"object {place}, {known}", file))
    boxes = np.array([item[3] for item in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, :2] -= 1
    image = np.array([item[0] for item in objects], dtype=np.int64)
    wide = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    sound = check_boxes(boxes, wide[image], lambda place: (objects[place][5], objects[place][4]), defects)
    return Annotations(
        source=homes_and_names[0][0] if homes_and_names else Path(),
        class_names=tuple(class_names),
        category_ids=tuple(range(len(class_names))),
        paths=PathArray(paths),
        image_ids=[path.stem for path in paths],
        sizes=wide,
        image=image[sound],
        boxes=boxes[sound],
        labels=np.array([item[1] for item in objects], dtype=np.int64)[sound],
        ignored=np.array([item[2] for item in objects], dtype=np.bool_)[sound],
        splits=list(splits),
        defects=defects,
    )


def _parse_xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # an unknown encoding is a LookupError
        raise DataError(f"{file}: not valid XML ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None


def _float(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return math.nan


def _whole(text: str | None) -> int:
    value = _float(text)
    return int(value) if math.isfinite(value) else 0
