"""The quick way to read COCO's large files, and the cache of what was read: the same as entry by entry."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sis_lightning.datasets import annotations_cache, coco_reader
from sis_lightning.datasets.annotations import PER_OBJECT, Annotations
from sis_lightning.datasets.coco_columns import decode
from sis_lightning.datasets.coco_reader import read_coco
from sis_lightning.errors import DataError

NAMES = {"bbox": "instances_val2017", "keypoints": "person_keypoints_val2017"}


def content_of(synthetic: Path, kind: str) -> dict:
    return json.loads((synthetic / "coco" / "annotations" / f"{NAMES[kind]}.json").read_text())


def assert_same(one: Annotations, other: Annotations) -> None:
    for name in (*PER_OBJECT, "sizes"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)
    for name in ("class_names", "category_ids", "image_ids", "splits", "notes", "annotated", "dropped", "skeleton"):
        assert getattr(one, name) == getattr(other, name), name
    assert list(one.paths) == list(other.paths)
    assert [(d.where, d.what, d.remedy) for d in one.defects] == [(d.where, d.what, d.remedy) for d in other.defects]


def first(content):
    return content["annotations"][0]


CHANGES = {
    "nothing": lambda content: None,
    "another skeleton": lambda content: content["categories"][0].update(keypoints=[f"k{i}" for i in range(17)]),
    "a skeleton without names": lambda content: content["categories"][0].pop("keypoints", 0),
    "a deviation each": lambda content: content["categories"][0].update(sigmas=[0.01 * i for i in range(1, 18)]),
    "no area": lambda content: first(content).pop("area"),
    "no flag": lambda content: first(content).pop("iscrowd"),
    "a true flag": lambda content: first(content).update(iscrowd=True),
    "a flag of 1.0": lambda content: first(content).update(iscrowd=1.0),
    "a flag in words": lambda content: first(content).update(iscrowd="0"),
    "no id": lambda content: first(content).pop("id"),
    "a named annotation": lambda content: first(content).update(id="a1"),
    "an id twice": lambda content: first(content).update(id=content["annotations"][1]["id"]),
    "an image twice": lambda content: content["images"].append(content["images"][0]),
    "a category twice": lambda content: content["categories"].append(content["categories"][0]),
    "no such image": lambda content: first(content).update(image_id=10**7),
    "no such category": lambda content: first(content).update(category_id=12),
    "no box": lambda content: first(content).pop("bbox"),
    "three numbers": lambda content: first(content)["bbox"].pop(),
    "five numbers": lambda content: first(content)["bbox"].append(1),
    "not a number": lambda content: first(content).update(bbox=[math.nan, 1, 2, 3]),
    "over the border": lambda content: first(content)["bbox"].__setitem__(3, 5000),
    "outside": lambda content: first(content)["bbox"].__setitem__(0, 5000),
    "a box without area": lambda content: first(content)["bbox"].__setitem__(2, 0),
    "turned round": lambda content: first(content)["bbox"].__setitem__(2, -3),
    "an area in words": lambda content: first(content).update(area="9"),
    "an area below 0": lambda content: first(content).update(area=-9),
    "an area of null": lambda content: first(content).update(area=None),
    "a huge area": lambda content: first(content).update(area=10**30),
    "no size": lambda content: content["images"][0].pop("width"),
    "a size in words": lambda content: content["images"][0].update(width="64"),
    "no file name": lambda content: content["images"][0].pop("file_name"),
    "a named category": lambda content: content["categories"][0].pop("name"),
    "categories in another order": lambda content: content["categories"].reverse(),
    "images in another order": lambda content: content["images"].reverse(),
    "no annotations": lambda content: content["annotations"].clear(),
    "not annotated": lambda content: content.pop("annotations"),
    "the same again": lambda content: content["annotations"].append({**first(content), "id": 10**6}),
    "extra keys": lambda content: first(content).update(attributes={"occluded": False}, score=[None]),
}
OF_KEYPOINTS = {
    "no keypoints": lambda content: first(content).pop("keypoints"),
    "sixteen keypoints": lambda content: first(content).update(keypoints=first(content)["keypoints"][:48]),
    "a visibility of 3": lambda content: first(content)["keypoints"].__setitem__(2, 3),
    "far away": lambda content: first(content).update(keypoints=[900, 5, 2] * 17),
    "none stated": lambda content: first(content).pop("num_keypoints"),
    "0 stated": lambda content: first(content).update(num_keypoints=0),
    "-1 stated": lambda content: first(content).update(num_keypoints=-1),
    "no area to divide by": lambda content: first(content).update(area=0),
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [*(("bbox", name) for name in CHANGES), *(("keypoints", name) for name in (CHANGES | OF_KEYPOINTS))],
)
def test_a_file_is_judged_alike_by_the_quick_way_and_entry_by_entry(synthetic, tmp_path, kind, change):
    content = content_of(synthetic, kind)
    (CHANGES | OF_KEYPOINTS)[change](content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert_same(read_coco(path, kind=kind), read_coco(copy.deepcopy(content), kind=kind))


@pytest.mark.parametrize("kind", NAMES)
def test_sound_files_are_read_the_quick_way(synthetic, kind):
    path = synthetic / "coco" / "annotations" / f"{NAMES[kind]}.json"
    assert decode(path, 17 if kind == "keypoints" else 0) is not None


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of a cache that also small files are kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(annotations_cache, "_LEAST_BYTES", 0)
    return tmp_path / "cache" / "sis-lightning" / "annotations"


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that are parsed, and do not come from the cache."""
    parsed: list[Path] = []
    monkeypatch.setattr(coco_reader, "decode", lambda path, count: parsed.append(path) or decode(path, count))
    return parsed


@pytest.mark.parametrize("kind", NAMES)
def test_the_cache_gives_what_the_file_gives(synthetic, tmp_path, cache, reads, kind):
    content = content_of(synthetic, kind)
    first(content)["bbox"][3] = 5000  # a defect with a remedy
    del content["annotations"][1]["area"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    images = synthetic / "coco" / "val2017"
    made, found = (read_coco(path, images, kind, split="val2017") for _ in range(2))
    assert len(reads) == 1
    assert len(list(cache.glob("*.npz"))) == 1
    assert_same(made, found)
    assert [str(defect) for defect in found.defects] == [str(defect) for defect in made.defects]
    assert found.defects[0].remedy == "clipped"
    assert_same(found, read_coco(content, images, kind, split="val2017"))
    # The file elsewhere is the same file, with its own name in messages.
    moved = path.rename(tmp_path / "b.json")
    assert read_coco(moved, images, kind).defects[0].file == moved
    assert len(reads) == 1


def test_another_content_and_another_kind_are_other_entries(synthetic, tmp_path, cache, reads):
    content = content_of(synthetic, "keypoints")
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    status = path.stat()
    assert read_coco(path).keypoints is None
    assert read_coco(path, kind="keypoints").keypoints is not None
    first(content)["bbox"] = [1.0, 2.0, 3.0, 4.0]
    path.write_text(json.dumps(content))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [1, 2, 3, 4] in read_coco(path).extents.tolist()
    assert len(reads) == len(list(cache.glob("*.npz"))) == 3


@pytest.mark.parametrize("damage", ["truncated", "a bit", "empty", "no archive"])
def test_a_damaged_entry_is_ignored_and_written_again(synthetic, tmp_path, cache, reads, damage):
    path = synthetic / "coco" / "annotations" / "instances_val2017.json"
    want = read_coco(path)
    (entry,) = cache.glob("*.npz")
    whole = entry.read_bytes()
    at = whole.index(want.extents.astype(np.int16).tobytes())
    entry.write_bytes(
        {
            "truncated": whole[:at],
            "a bit": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "empty": b"",
            "no archive": b"{}" * 50,
        }[damage]
    )
    assert_same(read_coco(path), want)
    assert len(reads) == 2
    assert entry.read_bytes() == whole
    assert_same(read_coco(path), want)
    assert len(reads) == 2


def test_no_changed_byte_of_an_entry_changes_what_is_read(synthetic, cache):
    path = synthetic / "coco" / "annotations" / "instances_val2017.json"
    want = read_coco(path)
    (entry,) = cache.glob("*.npz")
    whole = entry.read_bytes()
    for at in np.random.default_rng(0).choice(len(whole), 150, replace=False).tolist():
        entry.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert_same(read_coco(path), want)


def test_a_file_with_defects_that_stop_is_not_kept(synthetic, tmp_path, cache):
    content = content_of(synthetic, "bbox")
    first(content)["iscrowd"] = "0"
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    for _ in range(2):
        with pytest.raises(DataError, match="iscrowd is '0'"):
            read_coco(path).require_sound()
    assert not list(cache.glob("*.npz"))


def test_a_cache_that_cannot_be_written_stops_nothing(synthetic, tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = synthetic / "coco" / "annotations" / "instances_val2017.json"
    assert_same(read_coco(path), read_coco(json.loads(path.read_text())))


def test_only_the_entries_that_were_used_last_are_kept(synthetic, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(annotations_cache, "_KEPT", 2)
    content = content_of(synthetic, "bbox")
    for number in range(4):
        (tmp_path / f"{number}.json").write_text(json.dumps({**content, "number": number}))
        read_coco(tmp_path / f"{number}.json")
    assert len(list(cache.glob("*.npz"))) == len(list(cache.glob("*.lock"))) == 2


def test_processes_that_start_together_parse_a_file_once(synthetic, tmp_path, cache):
    script = f"""
import time
from pathlib import Path
from sis_lightning.datasets import annotations_cache, coco_reader
annotations_cache._LEAST_BYTES = 0
decode = coco_reader.decode
def slow(path, count):
    with open({str(tmp_path / "parsed")!r}, "a") as file:
        file.write("parsed\\n")
    time.sleep(1.5)
    return decode(path, count)
coco_reader.decode = slow
print(len(coco_reader.read_coco(Path({str(synthetic / "coco" / "annotations" / "instances_val2017.json")!r})).image))
"""
    ranks = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert len(set(printed)) == 1
    assert int(printed[0]) > 0
    assert (tmp_path / "parsed").read_text() == "parsed\n"
