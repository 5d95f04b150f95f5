"""Synthetic data, read by independent means: pickle, ElementTree, pycocotools, the palette of VOC's devkit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from sis_lightning.datasets.constants import COCO_CATEGORIES, SYNTHETIC_MARKER, VOC_CLASSES
from sis_lightning.datasets.synthetic import write_synthetic
from sis_lightning.datasets.synthetic.drawing import BACKGROUNDS, SHAPES, TEXTURES, Layer, Stage, compose, small_image
from sis_lightning.datasets.synthetic.formats import COCO_SHAPES, encode_mask, polygons
from sis_lightning.errors import UsageError

# pycocotools 2.0.11 predates the keyword that numpy 2 passes to __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

IMAGES, SIZE, LEAST = 40, 96, 12
EDGE = 1  # px by which the void border of images of this size shrinks an object


def write(root: Path, **changes: object) -> Path:
    arguments = {"images": IMAGES, "size": SIZE, "seed": 3, "min_object": LEAST, **changes}
    return write_synthetic(root, **arguments)


def tree(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "all"
    assert write(root) == root / "contact_sheet.png"
    return root


# Whole data sets


def test_output_depends_only_on_the_arguments(drawn, tmp_path):
    write(tmp_path / "again")
    assert tree(tmp_path / "again") == tree(drawn)
    write(tmp_path / "other", seed=4)
    ours, theirs = tree(drawn), tree(tmp_path / "other")
    images = [name for name in ours if name.endswith(".jpg")]
    assert len(images) == IMAGES + IMAGES // 2 + IMAGES
    assert all(ours[name] != theirs[name] for name in images)


def test_an_image_does_not_depend_on_how_many_there_are(drawn, tmp_path):
    write(tmp_path / "few", images=10, kinds=["voc"])
    for name in ("JPEGImages/2012_000007.jpg", "SegmentationObject/2012_000007.png", "Annotations/2012_000007.xml"):
        part = Path("VOCdevkit", "VOC2012", name)
        assert (tmp_path / "few" / part).read_bytes() == (drawn / part).read_bytes()


def test_every_folder_says_that_it_is_synthetic(drawn):
    folders = ("", "cifar-100-python", "VOCdevkit/VOC2012", "VOCdevkit/VOC2007", "coco", "ilsvrc")
    for folder in folders:
        marker = json.loads((drawn / folder / SYNTHETIC_MARKER).read_text())
        assert marker["synthetic"] is True
        assert marker["generator"] == "sis-lightning synth"
        assert (marker["images"], marker["size"], marker["seed"]) == (IMAGES, SIZE, 3)
    assert len(list(drawn.rglob(SYNTHETIC_MARKER))) == len(folders)
    with Image.open(drawn / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_only_the_asked_kinds_are_written(tmp_path):
    write(tmp_path / "new", images=10, kinds=("voc",))
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"VOCdevkit", SYNTHETIC_MARKER, "contact_sheet.png"}


def test_importing_needs_no_torch():
    code = "import sys, sis_lightning.datasets.synthetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kinds": ["cifar", "vox"]}, ["kinds", "'vox'", "'voc'"]),
        ({"kinds": []}, ["kinds", "[]", "cifar, voc, coco"]),
        ({"images": 9}, ["images", "9", "at least 10"]),
        ({"size": 31}, ["size", "31", "at least 32"]),
        ({"seed": -1}, ["seed", "-1", "0 or more"]),
        ({"size": 64, "min_object": 32}, ["min_object", "32", "half of size (64)"]),
        ({"min_object": 3}, ["min_object", "3", "4 or more"]),
        ({"rotation": 181.0}, ["rotation", "181", "0 to 180"]),
        ({"rotation": float("nan")}, ["rotation", "nan", "0 to 180"]),
    ],
)
def test_wrong_arguments_are_named(tmp_path, changes, words):
    with pytest.raises(UsageError) as raised:
        write(tmp_path / "new", **changes)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert not list(tmp_path.iterdir())


# A folder that exists already


def test_existing_data_of_the_same_arguments_is_not_changed(drawn):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    assert write(drawn) == drawn / "contact_sheet.png"
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before


def test_data_of_other_arguments_is_refused(drawn):
    before = tree(drawn)
    with pytest.raises(UsageError, match=r"other arguments.*choose another folder") as raised:
        write(drawn, rotation=10)
    assert str(drawn) in str(raised.value)
    assert tree(drawn) == before


@pytest.mark.parametrize("place", ["new", "new.partial"])
def test_real_data_is_never_touched(tmp_path, place):
    real = tmp_path / place / "VOCdevkit" / "real.txt"
    real.parent.mkdir(parents=True)
    real.write_text("real")
    with pytest.raises(UsageError, match="choose another folder") as raised:
        write(tmp_path / "new")
    assert str(tmp_path / place) in str(raised.value)
    assert tree(tmp_path).keys() == {f"{place}/VOCdevkit/real.txt"}


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "new").write_text("real")
    with pytest.raises(UsageError, match="choose another folder"):
        write(tmp_path / "new")


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    root = tmp_path / "new"
    root.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("sis_lightning.datasets.synthetic.write_voc", killed)
        with pytest.raises(KeyboardInterrupt):
            write(root, images=10, kinds=["voc"])
    assert not list(root.iterdir())
    assert (tmp_path / "new.partial").exists()
    write(root, images=10, kinds=["voc"])
    assert (root / SYNTHETIC_MARKER).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


# Drawing


def test_nearer_objects_hide_farther_ones():
    def block(left: int, top: int, side: int) -> Layer:
        ones = np.ones((side, side), dtype=np.float32)
        return Layer(0, left, top, ones[..., None] * np.float32([1, 0.5, 0]), ones)

    canvas = np.zeros((20, 30, 3), dtype=np.float32)
    scene = compose(canvas, [block(2, 2, 10), block(4, 4, 3), block(3, 3, 7), block(25, 15, 10)], 4)
    assert [instance.box for instance in scene.instances] == [(2, 2, 12, 12), (3, 3, 10, 10), (25, 15, 30, 20)]
    back, front, cut = scene.instances
    assert back.visible == 0.51
    assert (back.occluded, front.occluded, cut.occluded) == (True, False, False)
    assert (back.truncated, front.truncated, cut.truncated) == (False, False, True)
    assert np.array_equal(np.bincount(scene.owners.ravel()), [600 - 125, 51, 49, 25])
    assert scene.image[5, 5].tolist() == [255, 128, 0]
    assert scene.image[0, 0].tolist() == [0, 0, 0]


def test_shapes_differ_in_silhouette_whatever_their_rotation():
    """Moments that rotation and reflection leave alone tell mean silhouettes apart."""

    def signature(shape: int) -> np.ndarray:
        values = []
        for index in range(6):
            scene = Stage(128, 8, 180).shapes(np.random.default_rng([index]), first=shape)
            first = scene.instances[0]
            if first.label == shape and not (first.truncated or first.occluded):
                y, x = np.nonzero(scene.owners == 1)
                z = (x - x.mean() + 1j * (y - y.mean())) / np.sqrt(len(x))
                powers = ((2, 0), (3, 0), (4, 0), (5, 0), (2, 1), (1, 1), (2, 2))
                values.append([abs(np.mean(z**p * z.conj() ** q)) ** (1 / (p + q)) for p, q in powers])
        assert values
        return np.mean(values, axis=0)

    signatures = np.array([signature(shape) for shape in range(len(SHAPES))])
    apart = np.abs(signatures[:, None] - signatures[None]).max(axis=2)
    assert apart[~np.eye(len(SHAPES), dtype=bool)].min() > 0.025


def test_small_images_are_bright_enough_to_see_something():
    rng = np.random.default_rng(0)
    for shape in range(len(SHAPES)):
        image = small_image(rng, shape, shape % len(TEXTURES))
        assert image.shape == (32, 32, 3)
        assert image.std() > 10
    assert len(set(BACKGROUNDS)) == len(BACKGROUNDS)


# CIFAR-100


class Restricted(pickle.Unpickler):
    ALLOWED = ("_reconstruct", "ndarray", "dtype", "encode")

    def find_class(self, module: str, name: str) -> object:
        assert module.split(".")[0] in ("numpy", "_codecs"), module
        assert name in self.ALLOWED, name
        return super().find_class(module, name)


def unpickle(path: Path) -> dict[bytes, object]:
    with path.open("rb") as file:
        return Restricted(file, encoding="bytes").load()


def test_cifar_has_the_official_layout(drawn):
    folder = drawn / "cifar-100-python"
    assert {path.name for path in folder.iterdir()} == {"train", "test", "meta", SYNTHETIC_MARKER}
    meta = unpickle(folder / "meta")
    fine, coarse = meta[b"fine_label_names"], meta[b"coarse_label_names"]
    assert (len(set(fine)), len(set(coarse))) == (100, 20)
    rows = []
    for split, count in (("train", 3), ("test", 1)):
        batch = unpickle(folder / split)
        assert batch.keys() == {b"filenames", b"batch_label", b"fine_labels", b"coarse_labels", b"data"}
        assert Counter(batch[b"fine_labels"]) == dict.fromkeys(range(100), count)
        assert batch[b"data"].shape == (100 * count, 3072)
        assert batch[b"data"].dtype == np.uint8
        for label, group, name in zip(batch[b"fine_labels"], batch[b"coarse_labels"], batch[b"filenames"], strict=True):
            texture, shape = fine[label].split(b"_")
            assert shape == coarse[group] == SHAPES[group].encode()
            assert texture.decode() in TEXTURES
            assert name.startswith(fine[label])
        rows += [row.tobytes() for row in batch[b"data"]]
    assert len(set(rows)) == 400


@pytest.mark.parametrize("images", [10, 37, 100])
def test_each_class_of_cifar_is_split_four_to_one(tmp_path, monkeypatch, images):
    blank = np.zeros(3072, dtype=np.uint8)
    monkeypatch.setattr("sis_lightning.datasets.synthetic.formats._cifar_row", lambda *_: blank)
    monkeypatch.setattr("sis_lightning.datasets.synthetic.write_contact_sheet", lambda *_: None)
    write(tmp_path / "new", images=images, kinds=["cifar"])
    counts = [Counter(unpickle(tmp_path / "new/cifar-100-python" / s)[b"fine_labels"]) for s in ("train", "test")]
    assert sum(counts[0].values()) + sum(counts[1].values()) == max(200, 10 * images)
    for label in range(100):
        total = counts[0][label] + counts[1][label]
        assert total - max(200, 10 * images) // 100 in (0, 1)
        assert counts[1][label] == max(1, round(total / 5))


def test_cifar_rows_are_channels_of_rows(drawn):
    batch = unpickle(drawn / "cifar-100-python" / "train")
    images = batch[b"data"].reshape(-1, 3, 32, 32).astype(float)
    channels = np.abs(images[:, 0] - images[:, 1]).mean()
    beside = np.abs(np.diff(images, axis=3)).mean()
    scrambled = np.abs(np.diff(batch[b"data"].reshape(-1, 32, 32, 3).astype(float), axis=2)).mean()
    assert beside < scrambled
    assert channels > 0


# Pascal VOC


def devkit_colour(label: int) -> tuple[int, int, int]:
    red = green = blue = 0
    for bit in range(8):
        red |= (label & 1) << (7 - bit)
        green |= (label >> 1 & 1) << (7 - bit)
        blue |= (label >> 2 & 1) << (7 - bit)
        label >>= 3
    return red, green, blue


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def voc_objects(path: Path) -> list[dict[str, object]]:
    found = []
    for node in ElementTree.parse(path).getroot().iter("object"):
        sides = ("xmin", "ymin", "xmax", "ymax")
        flags = ("truncated", "difficult", "occluded")
        found.append(
            {
                "name": node.findtext("name"),
                "box": [int(node.findtext(f"bndbox/{side}")) for side in sides],
                **{flag: node.findtext(flag) == "1" for flag in flags},
            }
        )
    return found


@pytest.fixture(params=["VOC2012", "VOC2007"])
def year(drawn, request) -> Path:
    return drawn / "VOCdevkit" / request.param


def test_voc_masks_agree_with_the_annotations(year):
    kinds = Counter()
    for path in sorted((year / "JPEGImages").iterdir()):
        image = opened(path)
        root = ElementTree.parse(year / "Annotations" / f"{path.stem}.xml").getroot()
        classes = opened(year / "SegmentationClass" / f"{path.stem}.png")
        instances = opened(year / "SegmentationObject" / f"{path.stem}.png")
        assert root.findtext("folder") == year.name
        assert root.findtext("filename") == path.name
        size = tuple(int(root.findtext(f"size/{side}")) for side in ("width", "height", "depth"))
        assert size == (*image.size, 3) == (*classes.size, 3) == (*instances.size, 3)
        assert max(size) == SIZE
        for mask in (classes, instances):
            assert mask.mode == "P"
            palette = np.array(mask.getpalette()).reshape(-1, 3)
            assert [tuple(row) for row in palette.tolist()] == [devkit_colour(i) for i in range(256)]
        labels, numbers = np.array(classes), np.array(instances)
        objects = voc_objects(year / "Annotations" / f"{path.stem}.xml")
        assert objects
        clear = [entry for entry in objects if not entry["difficult"]]
        expected = {VOC_CLASSES.index(entry["name"]) for entry in clear}
        assert set(np.unique(labels)) - {0, 255} == expected
        assert 255 in labels
        assert np.array_equal(labels == 255, numbers == 255)
        for number, entry in enumerate(objects, start=1):
            kinds.update(flag for flag in ("truncated", "difficult", "occluded") if entry[flag])
            kinds["all"] += 1
            left, top, right, bottom = entry["box"]
            assert 1 <= left <= right <= size[0]
            assert 1 <= top <= bottom <= size[1]
            assert max(right - left, bottom - top) + 1 >= LEAST
            y, x = np.nonzero(numbers == number)
            assert bool(len(x)) is not entry["difficult"]
            if len(x):
                assert set(labels[y, x]) == {VOC_CLASSES.index(entry["name"])}
                inner = np.array([x.min() + 1, y.min() + 1, x.max() + 1, y.max() + 1])
                assert np.all(np.abs(inner - entry["box"]) <= EDGE)
    assert kinds["all"] > 1.5 * len(list((year / "JPEGImages").iterdir()))
    assert 0 < kinds["truncated"] < kinds["all"]
    assert 0 < kinds["occluded"] < kinds["all"]
    assert kinds["difficult"] < 0.2 * kinds["all"]


def test_voc_lists_are_disjoint_and_complete(year):
    stems = {path.stem for path in (year / "JPEGImages").iterdir()}
    for folder in ("SegmentationClass", "SegmentationObject", "Annotations"):
        assert {path.stem for path in (year / folder).iterdir()} == stems
    for task in ("Segmentation", "Main"):
        lists = {path.stem: path.read_text().split() for path in (year / "ImageSets" / task).iterdir()}
        parts = ["train", "val", "test"] if year.name == "VOC2007" else ["train", "val"]
        assert lists.keys() == {*parts, "trainval"}
        assert lists["trainval"] == lists["train"] + lists["val"]
        assert sorted(name for part in parts for name in lists[part]) == sorted(stems)
        counts = [len(lists[part]) for part in parts]
        assert counts == ([5, 5, 10] if year.name == "VOC2007" else [32, 8])


def test_voc_scenes_are_balanced_and_a_third_is_foreground():
    stage, share = Stage(96, 16, 30), []
    pixels = np.zeros(len(SHAPES))
    for index in range(200):
        scene = stage.shapes(np.random.default_rng([0, 1, index]), first=index % len(SHAPES))
        share.append((scene.owners > 0).mean())
        for number, instance in enumerate(scene.instances, start=1):
            pixels[instance.label] += np.count_nonzero(scene.owners == number)
    assert 0.25 < np.mean(share) < 0.4
    assert pixels.min() > 0.3 * pixels.mean()


# COCO


def read_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.fixture(scope="module")
def coco(drawn) -> dict[str, COCO]:
    names = [f"{task}_{split}2017" for task in ("instances", "person_keypoints") for split in ("train", "val")]
    return {name: read_coco(drawn / "coco" / "annotations" / f"{name}.json") for name in names}


def both(coco: dict[str, COCO], task: str) -> list[dict]:
    return [row for split in ("train", "val") for row in coco[f"{task}_{split}2017"].anns.values()]


def test_coco_names_and_numbers_are_the_official_ones(drawn, coco):
    instances = coco["instances_train2017"]
    categories = instances.loadCats(instances.getCatIds())
    assert len(categories) == 80
    missing = set(range(1, 91)) - {category["id"] for category in categories}
    assert missing == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    by_name = {category["name"]: (category["id"], category["supercategory"]) for category in categories}
    assert by_name["person"] == (1, "person")
    assert by_name["toothbrush"] == (90, "indoor")
    assert by_name["dining table"] == (67, "furniture")
    assert set(COCO_SHAPES) == set(SHAPES)
    shapes = set(COCO_SHAPES.values())
    assert len(shapes) == 20
    assert shapes <= {number for members in COCO_CATEGORIES.values() for number in members} - {1}
    for split, count in (("train2017", 32), ("val2017", 8)):
        names = {path.name for path in (drawn / "coco" / split).iterdir()}
        assert names == {image["file_name"] for image in coco[f"instances_{split}"].imgs.values()}
        assert len(names) == count
        for image in coco[f"instances_{split}"].imgs.values():
            assert image["file_name"] == f"{image['id']:012d}.jpg"
            with Image.open(drawn / "coco" / split / image["file_name"]) as opened_image:
                assert opened_image.size == (image["width"], image["height"])


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_coco_masks_agree_with_areas_and_boxes(coco, split):
    instances = coco[f"instances_{split}"]
    for row in instances.anns.values():
        mask = instances.annToMask(row)
        assert mask.sum() == pytest.approx(row["area"], rel=0.03)
        y, x = np.nonzero(mask)
        left, top, width, height = row["bbox"]
        box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert np.all(np.abs(box - [left, top, left + width, top + height]) <= 1)
        assert max(width, height) >= LEAST
        assert isinstance(row["segmentation"], dict if row["iscrowd"] else list)


def test_coco_has_crowds_and_empty_images(coco):
    rows = both(coco, "instances")
    crowds = [row for row in rows if row["iscrowd"]]
    assert len(crowds) == 2
    assert all(row["segmentation"].keys() == {"counts", "size"} for row in crowds)
    filled = {row["image_id"] for row in rows}
    assert set(range(1, IMAGES + 1)) - filled == {18}


def test_coco_persons(coco):
    persons = both(coco, "person_keypoints")
    objects = {row["id"]: row for row in both(coco, "instances")}
    assert len(objects) == len({row["id"] for row in persons}) + sum(r["category_id"] != 1 for r in objects.values())
    assert len({row["image_id"] for row in persons}) >= 0.4 * IMAGES
    seen, front = Counter(), Counter()
    for row in persons:
        other = objects[row["id"]]
        assert all(row[key] == other[key] for key in other)
        assert "keypoints" not in other
        keypoints = np.array(row["keypoints"]).reshape(17, 3)
        assert row["num_keypoints"] == np.count_nonzero(keypoints[:, 2])
        assert np.all(keypoints[keypoints[:, 2] == 0] == 0)
        seen.update(keypoints[:, 2].tolist())
        left, top, width, height = row["bbox"]
        shown = keypoints[keypoints[:, 2] == 2, :2]
        assert np.all(shown >= (left - 2, top - 2))
        assert np.all(shown <= (left + width + 2, top + height + 2))
        if np.all(keypoints[[5, 6], 2] == 2):
            towards = keypoints[0, 2] > 0
            front[bool(towards)] += 1
            if towards:
                assert keypoints[5, 0] > keypoints[6, 0]  # facing us, the left shoulder is on the right
            else:
                assert keypoints[5, 0] < keypoints[6, 0]
    assert set(seen) == {0, 1, 2}
    assert seen[2] > 0.6 * sum(seen.values())
    assert min(front[True], front[False]) >= 5
    category = coco["person_keypoints_val2017"].cats[1]
    assert len(category["keypoints"]) == 17
    assert category["keypoints"][5:7] == ["left_shoulder", "right_shoulder"]
    assert len(category["skeleton"]) == 19
    assert set(coco["person_keypoints_val2017"].cats) == {1}


def test_polygons_and_run_lengths_are_exact():
    rng = np.random.default_rng(0)
    masks = [np.array(rng.random((9, 13)) < share) for share in (0.2, 0.5, 0.8, 1.0)]
    ring = np.ones((9, 13), dtype=bool)
    ring[3:6, 2:9] = False
    for mask in [*masks, ring]:
        height, width = mask.shape
        again = rle.decode(rle.merge(rle.frPyObjects(polygons(mask), height, width)))
        assert np.array_equal(again, mask)
        encoded = encode_mask(mask)
        assert np.array_equal(rle.decode(encoded), mask)
        assert encoded["size"] == [height, width]
        assert json.loads(json.dumps(encoded)) == encoded
    assert polygons(np.zeros((3, 3), dtype=bool)) == []
    assert polygons(np.ones((2, 3), dtype=bool)) == [[0, 0, 3, 0, 3, 2, 0, 2]]
