"""Datasets alone: with plain PyTorch, without Lightning, and with the description that a task needs."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sis_lightning.datamodules import VOCSegmentationDataModule
from sis_lightning.datasets.base import collate
from sis_lightning.datasets.check import summarize
from sis_lightning.datasets.cifar import CIFAR100Dataset
from sis_lightning.datasets.coco import COCODetectionDataset, COCOKeypointsDataset
from sis_lightning.datasets.coco_reader import read_coco
from sis_lightning.datasets.constants import COCO_KEYPOINTS, VOC_CLASSES, voc_palette
from sis_lightning.datasets.folder import UnlabelledDataset
from sis_lightning.datasets.images import ImageReader, read_image
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.synthetic import write_synthetic
from sis_lightning.datasets.voc import MaskValues, VOCDetectionDataset, VOCSegmentationDataset, read_mask
from sis_lightning.datasets.voc_reader import read_names
from sis_lightning.errors import DataError, MissingDataError, UsageError
from sis_lightning.evaluation import evaluate

BUILD = {
    "cifar": lambda root: CIFAR100Dataset(root),
    "segmentation": lambda root: VOCSegmentationDataset(root),
    "voc": lambda root: VOCDetectionDataset(root, ["2012/train"]),
    "voc evaluation": lambda root: VOCDetectionDataset(root, ["2007/test"], evaluation=True),
    "coco": lambda root: COCODetectionDataset(root),
    "coco evaluation": lambda root: COCODetectionDataset(root, "val2017", evaluation=True),
    "keypoints": lambda root: COCOKeypointsDataset(root),
    "keypoints evaluation": lambda root: COCOKeypointsDataset(root, "val2017", evaluation=True),
    "unlabelled": lambda root: UnlabelledDataset(root / "coco" / "val2017"),
}
TARGETS = {
    "cifar": {"label"},
    "segmentation": {"mask"},
    "voc": {"boxes", "labels"},
    "voc evaluation": {"boxes", "labels", "truth"},
    "coco": {"boxes", "labels"},
    "coco evaluation": {"boxes", "labels", "truth"},
    "keypoints": {"box", "keypoints"},
    "keypoints evaluation": {"person_boxes", "box_source", "truth"},
    "unlabelled": set(),
}


@pytest.mark.parametrize("kind", BUILD)
def test_a_dataset_works_with_plain_pytorch(synthetic, kind):
    dataset = BUILD[kind](synthetic)
    assert isinstance(dataset, Dataset)
    assert dataset.defects == () or not [defect for defect in dataset.defects if not defect.remedy]
    assert all(path.is_file() for path in dataset.files())
    sample = dataset[0]
    assert sample.keys() == {"image", "name"} | TARGETS[kind]
    assert sample["image"].dtype == torch.uint8
    assert sample["image"].shape[0] == 3
    names = [sample["name"] for sample in dataset]
    assert len(set(names)) == len(names) == len(dataset)
    loader = DataLoader(dataset, batch_size=3, collate_fn=collate, shuffle=True)
    batch = next(iter(loader))
    assert len(batch["image"]) == len(batch["name"]) == 3


def test_no_dataset_imports_lightning():
    code = (
        "import sys, sis_lightning.datasets.coco, sis_lightning.datasets.voc, sis_lightning.datasets.cifar;"
        "import sis_lightning.datasets.folder, sis_lightning.datasets.check, sis_lightning.evaluation;"
        "sis_lightning.evaluation.COCOEvaluator; sys.exit('lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", BUILD)
def test_meta_is_plain_data(synthetic, kind):
    meta = BUILD[kind](synthetic).meta
    assert json.loads(json.dumps(meta.to_dict())) == meta.to_dict()
    assert DatasetMeta.from_dict(json.loads(json.dumps(meta.to_dict()))) == meta
    assert len(meta.mean) == len(meta.std) == 3


def test_meta_says_what_a_task_must_know(synthetic):
    metas = {kind: build(synthetic).meta for kind, build in BUILD.items()}
    assert metas["segmentation"].class_names == VOC_CLASSES
    assert metas["voc"].class_names == VOC_CLASSES[1:]
    assert (metas["voc"].protocol, metas["voc"].primary_metric) == ("voc", "AP50_voc07")
    assert (metas["coco"].protocol, metas["coco"].num_classes, metas["coco"].category_ids[-1]) == ("coco", 80, 90)
    persons = metas["keypoints"]
    assert persons.keypoint_names == COCO_KEYPOINTS
    assert len(persons.sigmas) == 17
    assert persons.skeleton[0] == (15, 13)
    flipped = [persons.keypoint_names[index] for index in persons.flip_order]
    assert flipped[0] == "nose"
    assert all(
        {one[:4], other[:4]} == {"left", "righ"} for one, other in zip(COCO_KEYPOINTS[1:], flipped[1:], strict=True)
    )
    assert metas["cifar"].image_size == (32, 32)
    with pytest.raises(UsageError, match=r"no field 'class_name': did you mean 'class_names'"):
        DatasetMeta.from_dict({"class_name": ["a"]})


def test_ground_truth_is_what_the_file_has(synthetic):
    dataset = COCODetectionDataset(synthetic, "val2017", evaluation=True)
    raw = json.loads((synthetic / "coco" / "annotations" / "instances_val2017.json").read_text())
    for sample, image in zip(dataset, raw["images"], strict=True):
        truth, rows = sample["truth"], [row for row in raw["annotations"] if row["image_id"] == image["id"]]
        assert truth["image_id"] == image["id"]
        assert truth["source"] == ("val2017",)
        assert truth["annotated"]
        assert truth["areas"].tolist() == [row["area"] for row in rows]
        assert truth["ignored"].tolist() == [bool(row["iscrowd"]) for row in rows]
        assert truth["extents"].tolist() == [row["bbox"] for row in rows]
        ids = [dataset.meta.category_ids[label - 1] for label in truth["labels"]]
        assert ids == [row["category_id"] for row in rows]
        assert len(sample["boxes"]) == len(rows) - sum(row["iscrowd"] for row in rows)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda root: CIFAR100Dataset(root, "val"), UsageError, "must be 'train' or 'test'"),
        (lambda root: VOCDetectionDataset(root, "2007/test"), UsageError, "must be a list"),
        (lambda root: VOCDetectionDataset(root, ["test"]), UsageError, "'test' is not YEAR/SPLIT"),
        (lambda root: VOCDetectionDataset(root, ["2012/vall"]), DataError, "there are: train, trainval, val"),
        (lambda root: VOCSegmentationDataset(root, "vall"), DataError, "there are: train, trainval, val"),
        (lambda root: COCODetectionDataset(root, "val2018"), MissingDataError, "instances_val2018.json does not exist"),
        (lambda root: COCODetectionDataset(root, limit=0), UsageError, "limit is 0"),
        (lambda root: CIFAR100Dataset(root / "coco"), MissingDataError, "meta does not exist"),
        (
            lambda root: COCOKeypointsDataset(root, "val2017", evaluation=True, person_boxes="no"),
            DataError,
            "no does not",
        ),
    ],
)
def test_wrong_arguments_of_datasets(synthetic, build, error, words):
    with pytest.raises(error, match=words) as raised:
        build(synthetic)
    assert "--" not in str(raised.value)


def test_lists_of_names(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\nstreet 01\r\none\n".encode())
    assert read_names(path) == ["one", "street 01"]
    path.write_text("one  1\nstreet 1 -1\ntwo  0\n")  # the list of a class
    assert read_names(path) == ["one", "street 1", "two"]
    path.write_bytes("Stra\u00dfe".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text .* at byte 4"):
        read_names(path)
    with pytest.raises(DataError, match="there are: a"):
        read_names(tmp_path / "b.txt")


# One rule for training, check-data and evaluate


def with_keypoint_flag(row):
    row["keypoints"][2] = 7


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("bbox", lambda row: row.update(bbox=[1, 2, -3, 4]), "negative width or height"),
        ("bbox", lambda row: row.update(area=None), "area is not a finite number"),
        ("bbox", lambda row: row.update(category_id=12), "unknown category 12"),
        ("bbox", lambda row: row.update(image_id="1"), "is not listed under 'images'"),
        ("keypoints", with_keypoint_flag, "with v 0, 1 or 2"),
        ("bbox", lambda row: row.update(iscrowd="0"), "iscrowd is '0', must be 0, 1, true or false"),
        ("bbox", lambda row: row.update(iscrowd=None), "iscrowd is None"),
        ("bbox", lambda row: row.update(iscrowd=2), "iscrowd is 2"),
        ("bbox", lambda row: row.update(area=-1), "area is negative"),
        ("bbox", lambda row: row.update(id=2**64), "the id 18446744073709551616 is beyond 64 bits"),
        ("keypoints", lambda row: row.update(iscrowd="1"), "iscrowd is '1'"),
        ("keypoints", lambda row: row.update(area=0), "area is 0"),
        ("keypoints", lambda row: row.update(num_keypoints=0), "num_keypoints is 0, but keypoints have v 1 or 2"),
        ("keypoints", lambda row: row.update(keypoints=[900, 5, 2] * 17), "outside of the image by more than half"),
        ("keypoints", lambda row: row.update(num_keypoints="many"), "num_keypoints is not a finite number"),
    ],
)
def test_an_entry_is_sound_or_not_for_training_and_scoring_alike(synthetic, tmp_path, kind, change, words):
    shutil.copytree(synthetic / "coco", tmp_path / "coco")
    name = "instances" if kind == "bbox" else "person_keypoints"
    path = tmp_path / "coco" / "annotations" / f"{name}_val2017.json"
    content = json.loads(path.read_text())
    change(content["annotations"][0])
    path.write_text(json.dumps(content))
    build = COCODetectionDataset if kind == "bbox" else COCOKeypointsDataset
    for evaluation in (False, True):
        with pytest.raises(DataError, match=words):
            build(tmp_path, "val2017", evaluation=evaluation).require_sound()
    with pytest.raises(DataError, match=words):
        evaluate(path, [], kind)


def annotation_content(synthetic, name="instances_val2017"):
    return json.loads((synthetic / "coco" / "annotations" / f"{name}.json").read_text())


def test_a_missing_area_is_computed_from_mask_or_box(synthetic):
    content = annotation_content(synthetic)
    areas = {kind: read_coco(content, kind=kind).areas for kind in ("bbox", "segm")}
    for row in content["annotations"]:
        del row["area"]
    boxes, masks = (read_coco(content, kind=kind) for kind in ("bbox", "segm"))
    count = len(content["annotations"])
    assert boxes.notes["areas"].startswith(f"{count} objects have no 'area' in the file: width × height")
    np.testing.assert_allclose(masks.areas, areas["segm"], rtol=0.03)
    np.testing.assert_allclose(boxes.areas, boxes.extents[:, 2] * boxes.extents[:, 3])
    table = str(evaluate(content, [], "bbox"))
    assert f"{count} objects have no 'area'" in " ".join(table.split())
    persons = annotation_content(synthetic, "person_keypoints_val2017")
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "keypoints")} | {"score": 1.0}
        for row in persons["annotations"]
    ]
    for row in persons["annotations"]:
        del row["area"]
    assert evaluate(persons, rows, "keypoints").metrics["AP"] == pytest.approx(1)


@pytest.mark.parametrize("flag", [False, 0, 0.0])
def test_flags_may_be_numbers_or_booleans(synthetic, flag):
    content = annotation_content(synthetic)
    for place, row in enumerate(content["annotations"]):
        row["iscrowd"] = bool(place % 2) if flag is False else type(flag)(place % 2)
    known = read_coco(content)
    assert not known.defects
    rows = {tuple(row["bbox"]): bool(row["iscrowd"]) for row in content["annotations"]}
    assert [rows[tuple(extent)] for extent in known.extents.tolist()] == known.ignored.tolist()
    assert known.object_count == sum(not crowd for crowd in rows.values())


@pytest.mark.parametrize("part", ["images", "categories", "annotations"])
def test_ids_beyond_64_bits_are_refused(synthetic, part):
    content = annotation_content(synthetic)
    content[part][1]["id"] = 2**63
    with pytest.raises(DataError, match=f"entry 1 of '{part}': the id 9223372036854775808 is beyond 64 bits"):
        read_coco(content)
    content[part][1]["id"] = 2**63 - 1
    read_coco(content)


def test_normalised_boxes_and_keypoints_are_refused(synthetic):
    content = annotation_content(synthetic, "person_keypoints_val2017")
    size_of = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for row in content["annotations"]:
        row["keypoints"] = [value / 100 if place % 3 < 2 else value for place, value in enumerate(row["keypoints"])]
    found = read_coco(content, kind="keypoints").defects
    assert [str(defect) for defect in found if not defect.remedy] == [
        "ground truth: all keypoints are within 0…1: they look like fractions of the image's sides, but COCO's values "
        "are in px"
    ]
    for row in content["annotations"]:
        width, height = size_of[row["image_id"]]
        row["bbox"] = [value / side for value, side in zip(row["bbox"], (width, height) * 2, strict=True)]
    with pytest.raises(DataError, match=r"all \d+ boxes are within 0…1"):
        read_coco(content).require_sound()


def test_a_box_that_is_given_twice_is_told(synthetic):
    content = annotation_content(synthetic)
    assert "boxes twice" not in read_coco(content).notes
    first = next(row for row in content["annotations"] if not row["iscrowd"])
    content["annotations"] += [{**first, "id": 10**6}, {**first, "id": 10**6 + 1, "category_id": 90}]
    assert read_coco(content).notes["boxes twice"].startswith("1 boxes are in the file more than once")


def test_objects_and_visible_keypoints_are_counted(synthetic):
    content = annotation_content(synthetic, "person_keypoints_val2017")
    known = read_coco(content, kind="keypoints")
    assert known.object_count == len(content["annotations"])
    assert known.visible_keypoint_count == sum(row["num_keypoints"] for row in content["annotations"])
    for row in content["annotations"]:
        row["iscrowd"] = 1
    crowds = read_coco(content, kind="keypoints")
    assert (crowds.object_count, crowds.visible_keypoint_count) == (0, 0)


# Exporters


def roboflow(content, root):
    """`_annotations.coco.json` beside the images, ids from 0, a supercategory as category 0."""
    numbers = {image["id"]: number for number, image in enumerate(content["images"])}
    classes = {category["id"]: number for number, category in enumerate(content["categories"], start=1)}
    for place, row in enumerate(content["annotations"]):
        row |= {"id": place, "image_id": numbers[row["image_id"]], "category_id": classes[row["category_id"]]}
    for image in content["images"]:
        image |= {"id": numbers[image["id"]], "license": 1, "extra": {"name": image["file_name"]}}
    names = [category["name"] for category in content["categories"]]
    content["categories"] = [
        {"id": 0, "name": "things", "supercategory": "none"},
        *({"id": number, "name": name, "supercategory": "things"} for number, name in enumerate(names, start=1)),
    ]
    return root / "coco" / "val2017" / "_annotations.coco.json", None


def label_studio(content, root):
    """Names behind the folder of the export, with backslashes from Windows; no `info`, no `licenses`."""
    del content["info"], content["licenses"]
    for image in content["images"]:
        image["file_name"] = f"images\\{image['file_name']}"
    (root / "coco" / "val2017").rename(root / "coco" / "images")
    return root / "coco" / "annotations" / "instances_val2017.json", "'images/' is stripped from the file names, backs"


def cvat(content, root):
    """Images below `images/`, with absolute names of another machine."""
    for image in content["images"]:
        image["file_name"] = f"/data/jobs/7/{image['file_name']}"
    (root / "coco" / "images").mkdir()
    (root / "coco" / "val2017").rename(root / "coco" / "images" / "val2017")
    return root / "coco" / "annotations" / "instances_val2017.json", "'/data/jobs/7/' is stripped from the file names"


@pytest.mark.parametrize("tool", [roboflow, label_studio, cvat])
def test_exports_of_other_tools_are_read_as_they_come(command, small, synthetic, tmp_path, tool):
    root = tmp_path / "exported"
    shutil.copytree(synthetic / "coco", root / "coco")
    content = annotation_content(synthetic)
    (root / "coco" / "annotations" / "instances_val2017.json").unlink()
    path, note = tool(content, root)
    path.write_text(json.dumps(content))
    got, want = (COCODetectionDataset(folder, "val2017", evaluation=True) for folder in (root, synthetic))
    got.require_sound()
    assert note is None or got.notes["file names"].startswith(note)
    assert ("file names" in got.notes) == (note is not None)
    for one, other in zip(got, want, strict=True):
        assert one["name"] == other["name"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["boxes"], other["boxes"])
    names = [[data.meta.class_names[label - 1] for label in data[0]["labels"].tolist()] for data in (got, want)]
    assert names[0] == names[1]
    check = command("check-data", *small("det_coco", steps=1), "--data.root", root, "--data.train_split", "val2017")
    assert check.code == 0, check.out
    assert note is None or "stripped" in check.out


def test_a_prefix_that_helps_only_some_images_leaves_the_others_as_defects(synthetic):
    content = annotation_content(synthetic)
    for image in content["images"]:
        image["file_name"] = f"images/{image['file_name']}"
    content["images"][0]["file_name"] = "images/gone.jpg"
    found = read_coco(content, synthetic / "coco" / "val2017").defects
    assert [str(defect) for defect in found] == [
        f"{synthetic / 'coco' / 'val2017' / 'gone.jpg'}, image {content['images'][0]['id']}: no such file"
    ]


def test_a_file_name_that_is_no_text_is_refused(synthetic):
    content = annotation_content(synthetic)
    content["images"][0]["file_name"] = 5
    with pytest.raises(DataError, match="entry 0 of 'images': file_name is 5, not text"):
        read_coco(content, synthetic / "coco" / "val2017")


# Chosen and merged classes


def test_classes_are_chosen_and_merged(synthetic):
    raw = annotation_content(synthetic, "instances_train2017")
    name_of = {category["id"]: category["name"] for category in raw["categories"]}
    merged = {"thing": ["airplane", "frisbee"], "people": ["person"]}
    everything = COCODetectionDataset(synthetic)
    some = COCODetectionDataset(synthetic, classes=merged)
    assert some.meta.class_names == ("thing", "people")
    assert some.meta.category_ids == (5, 1)
    assert len(some) == len(everything)
    for image, sample in zip(raw["images"], some, strict=True):
        rows = [row for row in raw["annotations"] if row["image_id"] == image["id"] and not row["iscrowd"]]
        kept = [(row["bbox"][:2], name_of[row["category_id"]]) for row in rows]
        wanted = [
            [*corner, 2 if name == "person" else 1]
            for corner, name in kept
            if name in {"airplane", "frisbee", "person"}
        ]
        found = torch.cat([sample["boxes"][:, :2], sample["labels"][:, None]], dim=1)
        assert sorted(found.tolist()) == sorted(wanted)
    others = sum(name_of[row["category_id"]] not in {"airplane", "frisbee", "person"} for row in raw["annotations"])
    assert f"{others} objects of other classes" in some.notes["without"]
    chosen = COCODetectionDataset(synthetic, "val2017", evaluation=True, classes=["person"])
    assert {label for sample in chosen for label in sample["truth"]["labels"].tolist()} == {1}


def test_images_without_objects_are_left_out_on_request(synthetic):
    whole = COCODetectionDataset(synthetic, classes=["person"])
    some = COCODetectionDataset(synthetic, classes=["person"], empty_images=False)
    wanted = [sample for sample in whole if len(sample["boxes"])]
    assert 0 < len(wanted) < len(whole)
    assert [sample["name"] for sample in some] == [sample["name"] for sample in wanted]
    for one, other in zip(some, wanted, strict=True):
        assert torch.equal(one["boxes"], other["boxes"])
        assert torch.equal(one["image"], other["image"])
    assert f"{len(whole) - len(wanted)} images without objects" in some.notes["without"]
    assert len(some.groups()) == len(some)


@pytest.mark.parametrize(
    ("classes", "error", "words"),
    [
        (["persn"], DataError, "no category 'persn' among its 80: did you mean 'person'"),
        (["person", "person"], UsageError, "classes has 'person' twice"),
        ({"a": ["person"], "b": ["person"]}, UsageError, "classes has 'person' twice"),
        ([], UsageError, "classes is "),
        ({"a": []}, UsageError, "classes is "),
        ("person", UsageError, "classes is 'person'"),
    ],
)
def test_wrong_choices_of_classes(synthetic, classes, error, words):
    with pytest.raises(error, match=words):
        COCODetectionDataset(synthetic, classes=classes)


def test_a_run_on_merged_classes_without_empty_images(command, small, tmp_path):
    options = [*small("det_coco", steps=1), "--model.num_classes", 2, "--data.empty_images", "false"]
    options += ["--data.classes", json.dumps({"people": ["person"], "flying": ["airplane", "frisbee"]})]
    fit = command("fit", *options)
    assert fit.code == 0, fit.err
    assert "images without objects" in fit.out
    check = command("check-data", *options, "--annotations-only")
    assert check.code == 0, check.out


# Data sets as people have them


@pytest.fixture
def few(tmp_path) -> Path:
    """Three images of VOC 2012 with masks and boxes, in a folder that a test may change."""
    write_synthetic(tmp_path / "data", images=10, size=64, kinds=["voc"])
    return tmp_path / "data"


def voc2012(root: Path) -> Path:
    return root / "VOCdevkit" / "VOC2012"


def paint(root: Path, value) -> None:
    for path in (voc2012(root) / "SegmentationClass").glob("*.png"):
        with Image.open(path) as mask:
            ids = np.array(mask)
        Image.fromarray(value(ids).astype(np.uint8), mode="L").save(path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda ids: np.full_like(ids, 255), "no annotated pixel in [0-9]+ masks: nothing to learn(.|\n)*means void"),
        (
            lambda ids: np.where(ids > 0, 255, 0),
            "only the class 'background' .0. in [0-9]+ masks(.|\n)*mask_values: .0, 255.",
        ),
        (np.zeros_like, "only the class 'background'"),
    ],
)
def test_masks_without_two_classes_are_refused(few, value, words):
    dataset = VOCSegmentationDataset(few, "train", ["background", "thing"])
    paint(few, value)
    with pytest.raises(DataError, match=words):
        dataset.require_targets()
    data = VOCSegmentationDataModule(str(few), classes=["background", "thing"], batch_size=2, crop_size=32)
    with pytest.raises(DataError, match=words):
        data.setup("fit")
    if 255 in read_mask(dataset.masks[0], 2):  # its mIoU would be 1
        with pytest.raises(DataError, match=words):
            data.setup("test")
        assert any("nothing to learn" in defect for defect in summarize(dataset, "val", decode=False).defects)
    else:
        data.setup("test")
    assert any("nothing to learn" in defect for defect in summarize(dataset, "train", decode=False).defects)
    paint(few, lambda ids: np.eye(len(ids), ids.shape[1]))
    dataset.require_targets()


def test_masks_of_0_and_255_by_mask_values(few):
    names = ["background", "thing"]
    paint(few, lambda ids: np.where(ids > 0, 1, 0))
    expected = [sample["mask"] for sample in VOCSegmentationDataset(few, "train", names)]
    assert any(mask.any() for mask in expected)
    paint(few, lambda ids: np.where(ids > 0, 255, 0))
    dataset = VOCSegmentationDataset(few, "train", names, [0, 255])
    dataset.require_targets()
    dataset.require_scores()
    assert all(torch.equal(sample["mask"], mask) for sample, mask in zip(dataset, expected, strict=True))
    with pytest.raises(UsageError, match="mask_values has 2 entries for 21 classes"):
        VOCSegmentationDataset(few, "train", None, [0, 255])
    with pytest.raises(UsageError, match="void_values is given without mask_values"):
        VOCSegmentationDataset(few, "train", names, None, [3])


def test_masks_in_colours_and_with_other_ids(few):
    plain = VOCSegmentationDataset(few, "train")
    expected = [sample["mask"] for sample in plain]
    assert any((mask == 255).any() for mask in expected)
    palette = np.array(voc_palette()).reshape(-1, 3)
    colours, void = palette[:21].tolist(), palette[255].tolist()
    for path in plain.masks:
        with Image.open(path) as mask:
            mask.convert("RGB").save(path)
    coloured = VOCSegmentationDataset(few, "train", None, colours, [void])
    assert all(torch.equal(sample["mask"], mask) for sample, mask in zip(coloured, expected, strict=True))
    with pytest.raises(DataError, match=r"mask of mode RGB(.|\n)*set mask_values to the colours"):
        plain[0]
    with pytest.raises(DataError, match=rf"the mask has \[{void[0]}, {void[1]}, {void[2]}\], which is neither"):
        for _ in VOCSegmentationDataset(few, "train", None, colours):
            pass
    for path, mask in zip(plain.masks, expected, strict=True):  # 16 bits, as ids from 1000 on
        Image.fromarray(np.where(mask == 255, 7, 1000 + mask.numpy().astype(np.uint16)).astype(np.uint16)).save(path)
    shifted = VOCSegmentationDataset(few, "train", None, list(range(1000, 1021)), [7])
    assert all(torch.equal(sample["mask"], mask) for sample, mask in zip(shifted, expected, strict=True))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 0], "0 is given twice"),
        ([0, [1, 2, 3]], "0 must be a number"),
        ([[1, 2], [1, 2, 3]], r"\[1, 2\] must be a number"),
        ([-1, 2], "-1 must be"),
        ([[0, 0, 256], [1, 2, 3]], r"\[0, 0, 256\] must be"),
    ],
)
def test_mask_values_that_say_nothing(values, words):
    with pytest.raises(UsageError, match=words):
        MaskValues(values)


def test_a_damaged_mask_does_not_end_the_search_for_classes_silently(few):
    paint(few, lambda ids: np.full_like(ids, 255))
    dataset = VOCSegmentationDataset(few, "train")
    dataset.masks[0].write_bytes(b"no mask")
    with pytest.raises(DataError, match=rf"{dataset.masks[0].name}: unreadable"):
        dataset.require_targets()
    defects = summarize(dataset, "train").defects
    assert sum(dataset.masks[0].name in defect for defect in defects) == 1


def test_boxes_without_an_object_to_learn_from_are_refused(few):
    for path in (voc2012(few) / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    dataset = VOCDetectionDataset(few, ["2012/trainval"])
    with pytest.raises(DataError, match=r"no object to learn from in [0-9]+ images .* difficult objects are left out"):
        dataset.require_targets()
    VOCDetectionDataset(few, ["2012/trainval"], evaluation=True).require_targets()


def test_images_have_any_usual_ending(few):
    folder = voc2012(few) / "JPEGImages"
    expected = [sample["image"].shape for sample in VOCSegmentationDataset(few, "train")]
    boxes = [sample["boxes"].shape for sample in VOCDetectionDataset(few, ["2012/train"])]
    for path, ending in zip(
        sorted(folder.iterdir()), itertools.cycle([".JPG", ".png", ".webp", ".Jpeg"]), strict=False
    ):
        Image.open(path).save(path.with_suffix(ending))
        path.unlink()
    dataset = VOCSegmentationDataset(few, "train")
    assert not dataset.defects
    assert [sample["image"].shape for sample in dataset] == expected
    assert [sample["boxes"].shape for sample in VOCDetectionDataset(few, ["2012/train"])] == boxes
    twice = sorted(folder.iterdir())[0]
    Image.open(twice).save(twice.with_suffix(".bmp"))
    with pytest.raises(DataError, match=rf"{twice.stem}\..* and {twice.stem}\..* are both the image {twice.stem}"):
        VOCSegmentationDataset(few, "train")
    kept = [name for name in read_names(voc2012(few) / "ImageSets/Segmentation/train.txt") if name != twice.stem]
    (voc2012(few) / "ImageSets/Segmentation/others.txt").write_text("\n".join(kept))
    assert len(VOCSegmentationDataset(few, "others")) == len(kept)  # the list does not name it


def test_images_that_a_list_names_again_are_told(few):
    for folder in ("Main", "Segmentation"):
        path = voc2012(few) / "ImageSets" / folder / "train.txt"
        path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    note = "1 times in train.txt, which count once"
    assert VOCSegmentationDataset(few, "train").notes["listed again"] == note
    assert VOCDetectionDataset(few, ["2012/train"]).notes["listed again"] == note
    assert "listed again" in str(summarize(VOCSegmentationDataset(few, "train"), "train", decode=False))
    data = VOCSegmentationDataModule(str(few), batch_size=2, crop_size=32)
    data.setup("fit")
    assert data.notes["train listed again"] == note


def test_an_exif_orientation_is_named_and_followed_on_request(few):
    dataset = VOCSegmentationDataset(few, "train")
    path, mask = dataset.images[0], dataset.masks[0]
    quarter = Image.Exif()
    quarter[0x0112] = 6
    with Image.open(path) as image:
        stored = image.transpose(Image.Transpose.ROTATE_90)
    stored.save(path, exif=quarter, quality=95)
    if stored.width == stored.height:
        pytest.fail("the image must not be square")
    with pytest.raises(DataError, match=rf"{mask.name}: the mask has (.|\n)*EXIF orientation 6(.|\n)*upright: true"):
        dataset[0]
    assert summarize(dataset, "train").notes["EXIF"].startswith("1 images have an orientation")
    dataset.reader = ImageReader(upright=True)
    assert dataset[0]["image"].shape[1:] == dataset[0]["mask"].shape


def test_another_palette_than_vocs_is_told(few):
    assert "masks" not in VOCSegmentationDataset(few, "train").notes
    for path in (voc2012(few) / "SegmentationClass").glob("*.png"):
        with Image.open(path) as mask:
            mask.putpalette([0, 0, 0, 0, 0, 128, 128, 0, 0])
            mask.save(path)
    assert (
        "id 1 has the colour (0, 0, 128) instead of (128, 0, 0)" in VOCSegmentationDataset(few, "train").notes["masks"]
    )
    assert "masks" not in VOCSegmentationDataset(few, "train", VOC_CLASSES).notes


def test_an_id_just_beyond_the_classes_asks_for_the_background(few):
    paint(few, lambda ids: np.where(ids > 0, 2, 0))
    with pytest.raises(DataError, match=r"mask id 2 is outside of the classes 0…1(.|\n)*begin with the background"):
        VOCSegmentationDataset(few, "train", ["cat", "dog"])[0]


def test_xml_with_a_namespace_is_read(few):
    before = VOCDetectionDataset(few, ["2012/train"]).annotations
    for path in (voc2012(few) / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("<annotation>", '<annotation xmlns="http://example.org/voc">'))
    after = VOCDetectionDataset(few, ["2012/train"]).annotations
    assert len(before.boxes)
    assert np.array_equal(after.boxes, before.boxes)
    assert np.array_equal(after.sizes, before.sizes)


@pytest.mark.parametrize(("dtype", "words"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")])
def test_pixels_without_a_known_range_are_refused(tmp_path, dtype, words):
    Image.fromarray(np.full((4, 4), 1000, dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=rf"a\.tiff: its pixels are {words}"):
        read_image(tmp_path / "a.tiff")
