"""Lists of image names, one a line, as in VOC's `ImageSets/`. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from sis_lightning.errors import DataError


def read_names(path: Path) -> list[str]:
    """Reads a list of image names: the first word of each line; empty lines and repetitions do not count.

    Args:
        path: A text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: If it does not exist (the message names the other lists of its folder) or is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        known = sorted(item.stem for item in path.parent.glob("*.txt") if "_" not in item.stem)
        raise DataError(f"{path} does not exist" + (f"; there are: {', '.join(known)}" if known else "")) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return list(dict.fromkeys(line.split()[0] for line in text.splitlines() if line.strip()))


def voc_list(home: Path, task: str, split: str) -> Path:
    """The list of a split in VOC's layout.

    Args:
        home: The folder of a year, with `ImageSets/`.
        task: `Main` (detection) or `Segmentation`.
        split: The name of the split, such as `trainval`.
    """
    return home / "ImageSets" / task / f"{split}.txt"
