"""A cache of judged annotations, so that a large JSON file is parsed once and not at each start. Needs no torch.

The cache is `$XDG_CACHE_HOME/sis-lightning/annotations`, or `~/.cache/sis-lightning/annotations`; it can be deleted at
any time. An entry is found by the SHA-256 of the annotation file and of the code that judges it, so it is never out of
date.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from sis_lightning.datasets.annotations import PER_OBJECT, Annotations, Defect
from sis_lightning.datasets.paths import PathArray
from sis_lightning.datasets.skeleton import Skeleton
from sis_lightning.files import write_bytes

#: Smaller files are parsed in no time.
_LEAST_BYTES = 16 * 2**20
#: Number of entries that are kept; COCO's train2017 takes some 50 MB.
_KEPT = 16
#: Seconds for which a process waits for another that parses the same file, before it does so itself.
_PATIENCE = 120.0
_MANY_DEFECTS = 1000


def cache_folder() -> Path:
    """The folder of the cache, by the rules of the XDG base directories."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "sis-lightning" / "annotations"


def cached(path: Path, kind: str, read: Callable[[], Annotations]) -> Annotations:
    """Returns the annotations of a file, from the cache if it has them.

    Args:
        path: The annotation file.
        kind: What is read of the file.
        read: Reads the file. Its result is kept unless it has defects without a remedy, masks or a folder.

    Raises:
        OSError: If the annotation file cannot be read.
    """
    if path.stat().st_size < _LEAST_BYTES:
        return read()
    with path.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        entry = cache_folder() / f"{hashlib.sha256(f'{key} {kind} {_code()}'.encode()).hexdigest()}.npz"
        entry.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return read()
    known = _load(entry, path)
    if known is None:
        # The other ranks of a node wait for the first, and then find its entry.
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError, NotImplementedError, Timeout):
                held.enter_context(FileLock(entry.with_suffix(".lock"), timeout=_PATIENCE, fallback_to_soft=False))
            known = _load(entry, path)
            if known is None:
                known = read()
                with contextlib.suppress(OSError):  # a full disk must not stop a run that has all it needs
                    _store(entry, known)
    return known


def _code() -> str:
    """A digest of the modules that decide what is read: a rule that changes makes all entries stale."""
    digest = hashlib.sha256()
    for name in ("annotations.py", "annotations_cache.py", "coco_columns.py", "coco_reader.py", "skeleton.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def _store(entry: Path, annotations: Annotations) -> None:
    defects = annotations.defects
    unusual = annotations.segmentations is not None or annotations.folder is not None or annotations.dropped
    if unusual or len(defects) > _MANY_DEFECTS or any(not defect.remedy for defect in defects):
        return
    facts = {
        "class_names": annotations.class_names,
        "category_ids": annotations.category_ids,
        "annotated": annotations.annotated,
        "skeleton": None if annotations.skeleton is None else dataclasses.asdict(annotations.skeleton),
        "notes": annotations.notes,
        "defects": [[defect.where, defect.what, defect.remedy] for defect in defects],
    }
    arrays: dict[str, Any] = {
        name: values for name in (*PER_OBJECT, "sizes") if (values := getattr(annotations, name)) is not None
    }
    content = io.BytesIO()
    stored: dict[str, Any] = {name: _smallest(values) for name, values in arrays.items()}
    np.savez(
        content,
        **stored,
        dtypes=np.array([f"{name} {values.dtype.str}" for name, values in arrays.items()]),
        image_ids=np.array(annotations.image_ids, dtype=np.int64),
        paths=annotations.paths.to_bytes(),
        facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
    )
    write_bytes(entry, content.getvalue())
    entries = sorted(entry.parent.glob("*.npz"), key=lambda path: path.stat().st_mtime)
    for old in entries[:-_KEPT]:
        old.unlink(missing_ok=True)
        old.with_suffix(".lock").unlink(missing_ok=True)


def _smallest(values: NDArray[Any]) -> NDArray[Any]:
    """The same values in fewer bytes, if they are whole numbers: keypoints, labels and indices are."""
    for dtype in (np.int16, np.int32):
        limits = np.iinfo(dtype)
        if values.dtype.itemsize > limits.bits // 8 and values.size and np.isfinite(values).all():
            if values.min() < limits.min or values.max() > limits.max:
                continue
            smaller = values.astype(dtype)
            if np.array_equal(smaller, values):
                return smaller
    return values


def _load(entry: Path, source: Path) -> Annotations | None:
    """The annotations of an entry; None if there is none, or it is damaged: then it is made again."""
    try:
        # Each array has a checksum. NumPy leaves a damaged file open that it has opened itself.
        with entry.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            arrays = {
                name: stored[name].astype(dtype, copy=False)
                for name, dtype in (text.split() for text in stored["dtypes"].tolist())
            }
            annotations = Annotations(
                source=source,
                class_names=tuple(facts["class_names"]),
                category_ids=tuple(facts["category_ids"]),
                paths=PathArray.from_bytes(stored["paths"]),
                image_ids=stored["image_ids"].tolist(),
                defects=[Defect(source, *defect) for defect in facts["defects"]],
                notes=facts["notes"],
                annotated=facts["annotated"],
                skeleton=_skeleton(facts["skeleton"]),
                **arrays,
            )
        os.utime(entry)  # the entries that were used last are kept
    except Exception:  # a damaged file leads to errors of any kind
        return None
    return annotations


def _skeleton(facts: dict[str, Any] | None) -> Skeleton | None:
    if facts is None:
        return None
    pairs = {key: tuple((start, end) for start, end in facts[key]) for key in ("flip_pairs", "edges")}
    return Skeleton(**{**facts, **pairs, "names": tuple(facts["names"]), "sigmas": tuple(facts["sigmas"])})
