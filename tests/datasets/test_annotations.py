"""COCO's and VOC's annotations as arrays, with every defect found and named."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from sis_lightning.datasets import coco as coco_dataset
from sis_lightning.datasets.coco import COCODetectionDataset
from sis_lightning.datasets.coco_reader import read_coco
from sis_lightning.datasets.constants import COCO_CATEGORIES, VOC_CLASSES
from sis_lightning.datasets.paths import PathArray
from sis_lightning.datasets.voc_reader import read_names, read_voc, voc_list
from sis_lightning.errors import DataError


def coco(root: Path, kind: str = "instances", split: str = "train2017") -> Path:
    return root / "coco" / "annotations" / f"{kind}_{split}.json"


def test_paths_are_kept_in_one_array():
    paths = [Path("/data/coco/train2017") / f"{index:012d}.jpg" for index in range(1000)] + [Path("bild-ä.jpg")]
    array = PathArray(paths)
    assert list(array) == paths
    assert (array[-1], list(array[2:4]), list(array[np.array([5, 0])])) == (
        paths[-1],
        paths[2:4],
        [paths[5], paths[0]],
    )
    assert list(PathArray([])) == []
    assert len(pickle.dumps(array)) < 50 * len(paths)


@pytest.mark.parametrize("evaluation", [False, True])
def test_a_dataset_copies_only_what_it_changes(synthetic, monkeypatch, evaluation):
    read = []
    original = coco_dataset.read_coco
    monkeypatch.setattr(coco_dataset, "read_coco", lambda *args, **kw: read.append(original(*args, **kw)) or read[-1])
    dataset = COCODetectionDataset(synthetic, "val2017", evaluation=evaluation)
    known = dataset.annotations
    assert known.paths is read[0].paths
    if evaluation:
        for name in ("image", "boxes", "labels", "areas", "extents"):
            assert np.shares_memory(getattr(known, name), getattr(dataset.all_objects, name))
            assert np.shares_memory(getattr(dataset.all_objects, name), getattr(read[0], name))


def test_a_change_of_a_copy_leaves_the_original(synthetic):
    annotations = read_coco(coco(synthetic))
    annotations.boxes[0] = (-5, -5, 10, 10)
    before = {name: getattr(annotations, name).copy() for name in ("image", "boxes", "labels")}
    copied = annotations.copy()
    copied.clip()
    copied.drop(copied.labels == copied.labels[0], "objects of one class")
    assert copied.boxes.min() >= 0
    assert copied.dropped["objects of one class"] > 0
    assert not annotations.dropped
    for name, values in before.items():
        np.testing.assert_array_equal(getattr(annotations, name), values)
    assert annotations.objects(len(annotations) - 1).stop == len(before["image"])


def test_coco_arrays_equal_the_file(synthetic):
    path = coco(synthetic)
    raw = json.loads(path.read_text())
    got = read_coco(path, path.parents[1] / "train2017")
    assert not got.defects
    assert got.class_names[:2] == ("person", "bicycle")
    assert got.category_ids == tuple(sorted(n for group in COCO_CATEGORIES.values() for n in group))
    assert len(got.category_ids) == 80
    assert [path.name for path in got.paths] == [image["file_name"] for image in raw["images"]]
    assert any(got.objects(index).start == got.objects(index).stop for index in range(len(got)))  # empty ones stay
    for index, image in enumerate(raw["images"]):
        rows = [row for row in raw["annotations"] if row["image_id"] == image["id"]]
        objects = got.objects(index)
        x, y, width, height = np.array([row["bbox"] for row in rows]).reshape(-1, 4).T
        np.testing.assert_allclose(got.boxes[objects], np.stack([x, y, x + width, y + height], axis=1))
        assert [got.category_ids[label] for label in got.labels[objects]] == [row["category_id"] for row in rows]
        assert got.ignored[objects].tolist() == [bool(row["iscrowd"]) for row in rows]
        assert tuple(got.sizes[index]) == (image["width"], image["height"])


def test_coco_agrees_with_pycocotools(shared):
    from pycocotools.coco import COCO

    folder = shared / "coco_mini"
    path = folder / "annotations" / "person_keypoints_val2017.json"
    got, want = read_coco(path, folder / "val2017", kind="keypoints"), COCO(str(path))
    assert got.defects == []
    assert got.keypoints.shape == (118, 17, 3)
    for index, number in enumerate(got.image_ids):
        rows = want.loadAnns(want.getAnnIds(imgIds=[number]))
        assert sorted(map(tuple, got.keypoints[got.objects(index)].reshape(-1, 51))) == sorted(
            tuple(map(float, row["keypoints"])) for row in rows
        )


def test_voc_boxes_span_their_pixels(synthetic):
    home = synthetic / "VOCdevkit" / "VOC2012"
    names = read_names(voc_list(home, "Main", "trainval"))
    got = read_voc([(home, names)], VOC_CLASSES[1:])
    assert got.defects == []
    for index, name in enumerate(names):
        nodes = ElementTree.parse(home / "Annotations" / f"{name}.xml").findall("object")
        objects = got.objects(index)
        assert [got.class_names[label] for label in got.labels[objects]] == [node.findtext("name") for node in nodes]
        assert got.ignored[objects].tolist() == [node.findtext("difficult") == "1" for node in nodes]
        for box, node in zip(got.boxes[objects], nodes, strict=True):
            inclusive = [float(node.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            assert (box + np.array([1, 1, 0, 0])).tolist() == inclusive
    with Image.open(got.paths[0]) as image:
        assert image.size == tuple(got.sizes[0])


def test_objects_are_sorted_by_image(synthetic, tmp_path):
    content = json.loads(coco(synthetic).read_text())
    shuffled = copy.deepcopy(content)
    np.random.default_rng(0).shuffle(shuffled["annotations"])
    (tmp_path / "a.json").write_text(json.dumps(shuffled))
    pictures = synthetic / "coco" / "train2017"
    one, other = read_coco(coco(synthetic), pictures), read_coco(tmp_path / "a.json", pictures)
    for index in range(len(one)):
        left, right = ({tuple(row) for row in known.boxes[known.objects(index)]} for known in (one, other))
        assert left == right


def person(content):
    return next(row for row in content["annotations"] if row["category_id"] == 1)


def of_another_image(content):
    person(content)["image_id"] = 77777
    return ["image 77777 is not listed under 'images'"], ""


def unknown_category(content):
    person(content)["category_id"] = 12
    return ["unknown category 12"], ""


def not_a_number(content):
    person(content)["bbox"][1] = math.nan
    return ["the box is not four finite numbers", "nan"], ""


def three_numbers(content):
    person(content)["bbox"].pop()
    return ["the box is not four finite numbers"], ""


def words(content):
    person(content)["bbox"] = [str(value) for value in person(content)["bbox"]]
    return ["the box is not four finite numbers"], ""


def no_area(content):
    person(content)["bbox"][2] = 0
    return ["the box has no area"], "dropped"


def outside(content):
    person(content)["bbox"][0] = 5000
    return ["is outside of the image"], "dropped"


def over_the_border(content):
    person(content)["bbox"][3] = 5000
    return ["reaches over the image's border"], "clipped"


def sixteen_joints(content):
    person(content)["keypoints"] = person(content)["keypoints"][:48]
    return ["keypoints are not 17 × (x, y, v)"], ""


def a_flag_that_is_none(content):
    person(content)["keypoints"][5] = 3
    return ["keypoints are not 17 × (x, y, v) with v 0, 1 or 2"], ""


def an_id_twice(content):
    content["annotations"][1]["id"] = content["annotations"][0]["id"]
    return [f"annotation {content['annotations'][0]['id']}", "given twice"], ""


def an_image_twice(content):
    content["images"][1]["id"] = content["images"][0]["id"]
    return [f"image {content['images'][0]['id']}", "given twice"], ""


def a_file_that_is_not_there(content):
    content["images"][0]["file_name"] = "gone.jpg"
    return ["gone.jpg", "no such file"], ""


def a_file_of_two_images(content):
    one, other = content["images"][:2]
    other |= {key: one[key] for key in ("file_name", "width", "height")}
    return [f"image {other['id']}", f"its file {one['file_name']} is that of image {one['id']}"], ""


def an_image_without_size(content):
    del content["images"][0]["width"]
    return [f"image {content['images'][0]['id']}", "width or height is missing"], ""


def a_flag_in_words(content):
    person(content)["iscrowd"] = "0"
    return ["iscrowd is '0', must be 0, 1, true or false"], ""


def an_area_of_zero(content):
    person(content)["area"] = 0
    return ["area is 0"], ""


def no_keypoint_stated(content):
    person(content)["num_keypoints"] = 0
    return ["num_keypoints is 0, but keypoints have v 1 or 2"], ""


DAMAGE = [
    *(a_file_of_two_images, a_flag_in_words, an_area_of_zero, no_keypoint_stated),
    *(of_another_image, unknown_category, not_a_number, three_numbers, words, no_area, outside, over_the_border),
    *(
        sixteen_joints,
        a_flag_that_is_none,
        an_id_twice,
        an_image_twice,
        a_file_that_is_not_there,
        an_image_without_size,
    ),
]


@pytest.fixture
def damaged(synthetic, tmp_path):
    """Writes COCO's layout with one thing wrong in the people of its train split."""

    def write(damage) -> tuple[Path, list[str], str]:
        root = tmp_path / "damaged"
        shutil.copytree(synthetic / "coco", root / "coco")
        path = coco(root, "person_keypoints")
        content = json.loads(path.read_text())
        words, remedy = damage(content)
        path.write_text(json.dumps(content))
        return root, words, remedy

    return write


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_defect_is_found_and_named(damaged, damage):
    root, words, remedy = damaged(damage)
    path = coco(root, "person_keypoints")
    got = read_coco(path, root / "coco" / "train2017", kind="keypoints")
    found = [defect for defect in got.defects if all(word in str(defect) for word in words)]
    assert len(found) == 1, got.defects
    assert found[0].remedy == remedy
    assert np.isfinite(got.boxes).all()
    got.clip()
    sides = got.boxes[:, 2:] - got.boxes[:, :2]
    assert (sides > 0).all()
    limits = got.sizes[got.image]
    assert ((got.boxes[:, 2:] <= limits) | (limits == 0)).all()
    assert (got.dropped["boxes of no area"] > 0) == (remedy == "dropped")


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_data_lists_a_defect_and_training_applies_its_remedy_or_stops(command, small, damaged, damage):
    root, words, remedy = damaged(damage)
    options = [*small("kpt_coco", steps=1), "--data.root", root]
    check = command("check-data", *options, "--annotations-only")
    assert check.code == 1, check.err
    assert all(word in check.out for word in words), check.out
    fit = command("fit", *options)
    if remedy:
        assert fit.code == 0, fit.err
        assert ("1 boxes of no area" in fit.out) == (remedy == "dropped")
    else:
        assert fit.code == 1, fit.out
        assert all(word in fit.err for word in words), fit.err
        assert len(fit.err.splitlines()) <= 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an annotation file of COCO"),
        ('{"images": [], "annotations": []}', "not an annotation file of COCO"),
        ('{"images": [3], "categories": []}', "'images' is not a list of objects"),
        (
            '{"images": [{"id": [1], "file_name": "a"}], "categories": []}',
            "entry 0 of 'images': the id is .1., not a whole",
        ),
        (
            '{"images": [], "categories": [{"id": "a", "name": "b"}]}',
            "entry 0 of 'categories': the id is 'a', not a whole",
        ),
        ('{"images": [{"id": 1}], "categories": []}', "entry 0 of 'images' has no 'file_name'"),
    ],
)
def test_files_of_other_formats_are_refused(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json.*{words}"):
        read_coco(tmp_path / "a.json", tmp_path)


def unknown_class(node):
    node.find("name").text = "unicorn"
    return "unknown class 'unicorn'", ""


def words_for_numbers(node):
    node.find("bndbox/xmin").text = "left"
    return "not four finite numbers", ""


def no_box(node):
    node.remove(node.find("bndbox"))
    return "not four finite numbers", ""


def turned_round(node):
    node.find("bndbox/xmax").text = "1"
    node.find("bndbox/xmin").text = "9"
    return "a negative width or height", ""


def too_wide(node):
    node.find("bndbox/xmax").text = "999"
    return "reaches over", "clipped"


@pytest.mark.parametrize("damage", [unknown_class, words_for_numbers, no_box, turned_round, too_wide])
def test_voc_defects_are_found_and_named(synthetic, tmp_path, damage):
    home = tmp_path / "VOC2012"
    shutil.copytree(synthetic / "VOCdevkit" / "VOC2012", home)
    names = read_names(voc_list(home, "Main", "train"))
    file = home / "Annotations" / f"{names[2]}.xml"
    tree = ElementTree.parse(file)
    words, remedy = damage(tree.find("object"))
    tree.write(file)
    (defect,) = read_voc([(home, names)], VOC_CLASSES[1:]).defects
    assert (defect.file, defect.remedy) == (file, remedy)
    assert words in defect.what
    assert "object 1" in defect.where


def test_missing_voc_files_are_defects(synthetic, tmp_path):
    home = tmp_path / "VOC2012"
    shutil.copytree(synthetic / "VOCdevkit" / "VOC2012", home)
    names = read_names(voc_list(home, "Main", "train"))
    (home / "JPEGImages" / f"{names[0]}.jpg").unlink()
    (home / "Annotations" / f"{names[1]}.xml").unlink()
    defects = read_voc([(home, names)], VOC_CLASSES[1:]).defects
    assert [defect.file.name for defect in defects] == [f"{names[0]}.jpg", f"{names[1]}.xml"]
    (home / "Annotations" / f"{names[2]}.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=rf"{names[2]}\.xml: not valid XML"):
        read_voc([(home, names)], VOC_CLASSES[1:])
    with pytest.raises(DataError, match=r"traim\.txt does not exist; there are: train, trainval, val"):
        read_names(voc_list(home, "Main", "traim"))


@pytest.mark.parametrize("task", ["seg_voc", "cls_cifar100", "det_voc", "det_coco", "kpt_coco"])
def test_check_data_finds_no_defects_in_sound_data(command, small, task):
    result = command("check-data", *small(task))
    assert result.code == 0, result.out + result.err
    assert "no defects" in result.out
    assert "synthetic" in result.out
    assert "train:" in result.out


def test_check_data_lists_unreadable_images(command, small, synthetic, tmp_path):
    root = tmp_path / "own"
    shutil.copytree(synthetic / "coco", root / "coco")
    pictures = sorted((root / "coco" / "train2017").iterdir())
    pictures[0].write_bytes(pictures[0].read_bytes()[:300])
    Image.new("RGB", (9, 8)).save(pictures[1])
    result = command("check-data", *small("det_coco"), "--data.root", root)
    assert result.code == 1
    assert f"{pictures[0].name}: unreadable or truncated" in result.out
    assert f"{pictures[1].name}: 9×8 px" in result.out
    assert "2 defect(s)" in result.out


def test_check_data_lists_defects_of_masks(command, small, synthetic, tmp_path):
    root = tmp_path / "own"
    shutil.copytree(synthetic / "VOCdevkit", root / "VOCdevkit")
    home = root / "VOCdevkit" / "VOC2012"
    names = (home / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    masks = [home / "SegmentationClass" / f"{name}.png" for name in names]
    with Image.open(masks[0]) as mask:
        Image.new("L", mask.size, 77).save(masks[0])
    masks[1].unlink()
    shutil.copy(masks[2], home / "SegmentationClass" / "stray.png")
    (home / "JPEGImages" / f"{names[3]}.jpg").unlink()
    result = command("check-data", *small("seg_voc"), "--data.root", root)
    assert result.code == 1
    for words in (
        f"{masks[0].name}: mask id 77",
        f"{masks[1].name}: does not exist",
        "stray.png: it has no image",
        f"{names[3]}.jpg: does not exist",
    ):
        assert words in result.out, result.out
