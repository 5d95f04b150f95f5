"""Top-down keypoints: crops, the loss of heatmaps, person boxes, and the files of whole runs."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from sis_lightning.backbones import backbone_config
from sis_lightning.datamodules import COCOKeypointsDataModule
from sis_lightning.datamodules.coco_keypoints import PersonCrops
from sis_lightning.datasets.coco import COCOKeypointsDataset
from sis_lightning.datasets.constants import COCO_FLIP_PAIRS, COCO_KEYPOINTS, flip_order
from sis_lightning.datasets.person_boxes import read_person_boxes
from sis_lightning.errors import DataError, UsageError
from sis_lightning.tasks import KeypointTask

FLIPPED = list(flip_order(17, COCO_FLIP_PAIRS))
SMALL = backbone_config("sis_demo", channels=8, width=4)
ADAM = functools.partial(torch.optim.Adam, lr=0.001)


def task_of(**arguments) -> KeypointTask:
    return KeypointTask(**{"backbone": SMALL, "optimizer": ADAM, "deconv_channels": (8, 8, 8), **arguments})


@pytest.fixture
def data(synthetic) -> COCOKeypointsDataModule:
    module = COCOKeypointsDataModule(str(synthetic), (64, 32), batch_size=4, num_workers=0)
    module.setup("fit")
    return module


def test_the_head_is_that_of_simple_baselines():
    task = KeypointTask(backbone_config("resnet50"), optimizer=ADAM)
    kinds = [type(module).__name__ for module in task.model.deconvs]
    assert kinds == ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * 3
    # Simple Baselines' published pose_resnet_50 has 34.0 M parameters.
    assert sum(weight.numel() for weight in task.parameters()) == 33_999_697
    with torch.no_grad():
        assert task.eval()(torch.zeros(1, 3, 256, 192)).shape == (1, 17, 64, 48)


def test_the_loss_is_the_mean_squared_error_of_annotated_keypoints():
    torch.manual_seed(0)
    task = task_of(sigma=1.0)
    keypoints = torch.cat([torch.rand(3, 17, 2) * 30, torch.randint(0, 3, (3, 17, 1)).float()], dim=2)
    image = torch.randn(3, 3, 64, 32)
    got = task.training_loss({"image": image, "keypoints": keypoints})["heatmaps"]
    heatmaps = task(image)
    wanted, _ = task.codec(image).encode(keypoints)
    total = 0.0
    for keypoint in range(17):  # keypoint by keypoint, as JointsMSELoss of Simple Baselines
        weight = (keypoints[:, keypoint, 2] > 0).float()[:, None]
        one, other = heatmaps[:, keypoint].flatten(1) * weight, wanted[:, keypoint].flatten(1) * weight
        total = total + 0.5 * nn.functional.mse_loss(one, other)
    torch.testing.assert_close(got, total / 17)
    keypoints[..., 2] = 0
    assert task.training_loss({"image": image, "keypoints": keypoints})["heatmaps"] == 0


def test_the_flip_test_of_a_symmetric_network_only_shifts(data):
    task = task_of().eval()
    heatmaps = torch.rand(1, 17, 16, 8)
    mirrored = heatmaps[:, FLIPPED].flip(-1)
    calls = iter([heatmaps, mirrored])
    task.forward = lambda crops: next(calls)
    got = task._heatmaps(torch.zeros(1, 3, 64, 32))
    want = heatmaps.clone()
    want[..., 1:] = (heatmaps[..., 1:] + heatmaps[..., :-1]) / 2
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: task_of(sigma=0), "sigma"),
        (lambda: task_of(deconv_channels=()), "deconv_channels"),
        (lambda: task_of(deconv_channels=(4,) * 6), "deconv_channels"),
        (lambda: COCOKeypointsDataModule("x", (100, 96)), "divisible by 32"),
        (lambda: COCOKeypointsDataModule("x", (0, 96)), "divisible by 32"),
        (lambda: COCOKeypointsDataModule("x", scale=1.0), "scale"),
        (lambda: COCOKeypointsDataModule("x", rotation=-1), "rotation"),
    ],
)
def test_invalid_arguments(build, words):
    with pytest.raises(UsageError, match=words):
        build()


# data


def test_training_takes_all_people_with_keypoints(synthetic, data):
    raw = json.loads((synthetic / "coco" / "annotations" / "person_keypoints_train2017.json").read_text())
    people = [row for row in raw["annotations"] if row["num_keypoints"] and not row["iscrowd"]]
    assert len(data.datasets["train"]) == len(people)
    lacking = len([row for row in raw["annotations"] if not row["num_keypoints"]])
    assert (f"{lacking} people without keypoints" in data.notes.get("train without", "")) == bool(lacking)


def test_keypoints_follow_their_pixels_through_augmentation(data):
    sample = dict(data.datasets["train"][0])
    keypoint = next(i for i in range(17) if sample["keypoints"][i, 2] == 2)
    x, y = sample["keypoints"][keypoint, :2].astype(int)
    mark = torch.zeros_like(sample["image"])
    mark[:, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = 255
    hits = 0
    for seed in range(20):
        np.random.seed(seed)
        got = data.train_transform({**sample, "image": mark})
        assert got["image"].shape == (3, 64, 32)
        places = {keypoint, FLIPPED[keypoint]}
        peak = divmod(int(got["image"][0].argmax()), 32)
        near = [np.hypot(*(got["keypoints"][place, :2].numpy() - peak[::-1])) for place in places]
        if got["image"].max() > 100:
            hits += 1
            assert min(near) < 3
    assert hits > 10


def test_half_are_flipped_and_most_are_rotated(data):
    sample = data.datasets["train"][0]
    crops = []
    for seed in range(200):
        np.random.seed(seed)
        crops.append(data.train_transform(dict(sample))["keypoints"])
    left, right = COCO_KEYPOINTS.index("left_shoulder"), COCO_KEYPOINTS.index("right_shoulder")
    assert all(torch.isfinite(keypoints).all() for keypoints in crops)
    assert {tuple(keypoints[:, 2].tolist()) for keypoints in crops} <= {
        tuple(sample["keypoints"][:, 2]),
        tuple(sample["keypoints"][FLIPPED, 2]),
    }
    assert len({round(float(keypoints[left, 0] - keypoints[right, 0]), 2) for keypoints in crops}) > 100


def test_evaluation_crops_people_with_keypoints_by_their_boxes(synthetic, data):
    source = data.datasets["val"]
    raw = json.loads((synthetic / "coco" / "annotations" / "person_keypoints_val2017.json").read_text())
    assert len(source) == len(raw["images"])
    for index, image in enumerate(raw["images"]):
        rows = [row for row in raw["annotations"] if row["image_id"] == image["id"] and row["num_keypoints"]]
        sample = data.eval_transform(source[index])
        assert sample["crops"].shape == (len(rows), 3, 64, 32)
        assert sample["box_scores"].tolist() == [1] * len(rows)
    assert data.notes["person boxes"] == "ground truth"


# whole runs

RUN = Path("runs/kpt_coco/res2net14-4w4s-basic-8ch/seed0")


def test_a_whole_run(command, small, synthetic, tmp_path):
    options = small("kpt_coco")
    fit = command("fit", *options)
    assert fit.code == 0, fit.err
    assert "person boxes  ground truth" in fit.out
    with Image.open(next((RUN / "images").glob("*.png"))) as image:
        assert np.asarray(image).std() > 10
    test = command("test", *options)
    assert test.code == 0, test.err
    record = json.loads((RUN / "test.json").read_text())
    assert record["data"]["notes"]["person boxes"] == "ground truth"
    results = RUN / "test_results" / "person_keypoints_val2017_sis-lightning_results.json"
    truth = synthetic / "coco" / "annotations" / "person_keypoints_val2017.json"
    again = command("evaluate", "--type", "keypoints", "--truth", truth, "--results", results, "--json")
    assert again.code == 0, again.err
    metrics = json.loads(again.out)["metrics"]
    assert set(record["metrics"]) == {
        f"test/{key}" for key in ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
    }
    assert metrics["AP"] == pytest.approx(record["metrics"]["test/AP"], abs=1e-6)

    # Boxes of a detector: the run, the record and every row name their file.
    raw = json.loads(truth.read_text())
    boxes = [
        {"image_id": row["image_id"], "category_id": 1, "bbox": row["bbox"], "score": 0.5 + 0.01 * i}
        for i, row in enumerate(raw["annotations"])
    ]
    boxes.append({**boxes[0], "category_id": 3})
    Path("boxes.json").write_text(json.dumps(boxes))
    detected = command("test", *options, "--data.person_boxes", "boxes.json", "--data.least_box_score", 0.505)
    assert detected.code == 0, detected.err
    assert (
        f"boxes.json ({len(raw['annotations']) - 1}"
        in json.loads((RUN / "test.json").read_text())["data"]["notes"]["person boxes"]
    )
    assert "boxes.json" in detected.out
    assert len(json.loads(results.read_text())) == len(raw["annotations"]) - 1

    predict = command("predict", *options, "--model.shown_score", 0.0)
    assert predict.code == 0, predict.err
    table = json.loads((RUN / "predictions" / "predictions.json").read_text())
    assert len(table) == len(raw["images"])
    assert all(set(person["keypoints"]) == set(COCO_KEYPOINTS) for row in table for person in row["people"])
    for row in table:
        with Image.open(RUN / "predictions" / row["image"]) as image:
            assert max(image.size) >= 480

    # The predictions of our own detection are matched by the names of the images.
    names = {image["id"]: image["file_name"] for image in raw["images"]}
    own = [
        {"name": names[row["image_id"]], "objects": [{"class": "person", "score": 0.9, "box": [0, 0, 60, 60]}]}
        for row in raw["annotations"]
    ]
    Path("own.json").write_text(json.dumps(own))
    again = command("test", *options, "--data.person_boxes", "own.json")
    assert again.code == 0, again.err
    assert len(json.loads(results.read_text())) >= len({row["image_id"] for row in raw["annotations"]})

    # A folder of photographs: each image as one person, or in the boxes that our own detection predicted.
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (50, 37), "red").save(tmp_path / "photos" / "a.jpg")
    Image.new("RGB", (50, 60), "blue").save(tmp_path / "photos" / "b.jpg")
    photos = ["--data.predict_path", tmp_path / "photos", "--model.shown_score", 0.0]
    whole = command("predict", *options, *photos)
    assert whole.code == 0, whole.err
    table = json.loads((RUN / "predictions" / "predictions.json").read_text())
    assert [row["found"] for row in table] == [1, 1]
    assert all("taken as one person" in row["person boxes"] for row in table)
    found = {"class": "person", "score": 0.9, "box": [3, 3, 20, 30]}
    ours = [{"name": "b", "objects": [found, {**found, "class": "cat"}, {**found, "box": [25, 3, 50, 55]}]}]
    Path("predictions.json").write_text(json.dumps(ours))
    boxed = command("predict", *options, *photos, "--data.person_boxes", "predictions.json")
    assert boxed.code == 0, boxed.err
    table = json.loads((RUN / "predictions" / "predictions.json").read_text())
    assert [row["found"] for row in table] == [0, 2]


def test_another_category_id_and_a_split_without_annotations(command, small, synthetic, tmp_path):
    root = tmp_path / "own"
    shutil.copytree(synthetic / "coco", root / "coco")
    for split in ("train2017", "val2017"):
        path = root / "coco" / "annotations" / f"person_keypoints_{split}.json"
        content = json.loads(path.read_text())
        content["categories"][0]["id"] = 7
        for row in content["annotations"]:
            row["category_id"] = 7
        path.write_text(json.dumps(content))
    options = [*small("kpt_coco", steps=1), "--data.root", root]
    assert command("fit", *options).code == 0
    assert command("test", *options).code == 0
    results = RUN / "test_results" / "person_keypoints_val2017_sis-lightning_results.json"
    assert {row["category_id"] for row in json.loads(results.read_text())} == {7}
    score = command("evaluate", "--type", "keypoints", "--truth", path, "--results", results)
    assert score.code == 0, score.err

    # COCO's test-dev: all categories, no annotations.
    content = json.loads((synthetic / "coco" / "annotations" / "instances_val2017.json").read_text())
    del content["annotations"]
    (root / "coco" / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    (root / "coco" / "test2017").symlink_to(root / "coco" / "val2017")
    options += ["--data.test_split", "test-dev2017"]
    refused = command("test", *options)
    assert refused.code == 2
    assert "person_boxes" in refused.err
    box = {"category_id": 1, "bbox": [5, 5, 30, 40], "score": 0.9}
    Path("boxes.json").write_text(json.dumps([{**box, "image_id": image["id"]} for image in content["images"]]))
    test = command("test", *options, "--data.person_boxes", "boxes.json")
    assert test.code == 0, test.err
    assert "no annotations to score against" in test.out
    results = RUN / "test_results" / "person_keypoints_test-dev2017_sis-lightning_results.json"
    assert len(json.loads(results.read_text())) == len(content["images"])


def without_people(content):
    content["annotations"] = []


def without_keypoints(content):
    for row in content["annotations"]:
        row["keypoints"], row["num_keypoints"] = [0] * 51, 0


@pytest.mark.parametrize("change", [without_people, without_keypoints])
def test_a_split_without_people_has_undefined_metrics(command, small, synthetic, tmp_path, change):
    root = tmp_path / "own"
    shutil.copytree(synthetic / "coco", root / "coco")
    path = root / "coco" / "annotations" / "person_keypoints_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    options = [*small("kpt_coco", steps=1), "--data.root", root]
    assert command("fit", *options).code == 0
    test = command("test", *options)
    assert test.code == 1
    assert "test/AP is not defined (nan): the test split has nothing to score" in test.err
    assert set(json.loads((RUN / "test.json").read_text())["metrics"].values()) == {None}
    train = root / "coco" / "annotations" / "person_keypoints_train2017.json"
    content = json.loads(train.read_text())
    change(content)
    train.write_text(json.dumps(content))
    fit = command("fit", *options, "--run_dir", "other")
    assert fit.code == 1
    assert "no person in it has annotated keypoints" in fit.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("{", "not valid JSON"),
        ({"annotations": []}, "a list of objects with image_id"),
        ([{"image_id": 1}], "entry 0 is not a detection"),
        ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3], "score": 1}], "entry 0 is not a detection"),
        ([{"image_id": [1], "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}], "entry 0 is not a detection"),
        ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": "high"}], "entry 0 is not a detection"),
        ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, "x"], "score": 1}], "entry 0 is not a detection"),
        (
            [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": float("nan")}],
            "entry 0 is not a detection",
        ),
        ([{"name": "a", "objects": [{"class": "person"}]}], "entry 0 is not a detection"),
    ],
)
def test_invalid_person_boxes(tmp_path, content, words):
    path = tmp_path / "boxes.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=words):
        read_person_boxes(path)


def predicted(name, count):
    person = {"class": "person", "score": 0.9, "box": [1, 2, 30, 40]}
    return {"name": name, "objects": [person] * count}


@pytest.fixture
def cameras(synthetic, tmp_path):
    """COCO's layout with images of the same file name in two folders."""
    root = tmp_path / "cameras"
    shutil.copytree(synthetic / "coco", root / "coco")
    path = root / "coco" / "annotations" / "person_keypoints_val2017.json"
    content = json.loads(path.read_text())
    for place, image in enumerate(content["images"]):
        name = f"cam{'AB'[place % 2]}/{place // 2:06d}.jpg"
        (root / "coco" / "val2017" / name).parent.mkdir(exist_ok=True)
        (root / "coco" / "val2017" / image["file_name"]).rename(root / "coco" / "val2017" / name)
        image["file_name"] = name
    path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("camA/000000.jpg", "camB/000000.jpg"),
        ("camA/000000", "camB/000000"),
        ("000000", "000000"),  # as earlier releases wrote them, in the order of the images
    ],
)
def test_images_of_one_file_name_in_two_folders_keep_their_own_boxes(cameras, names):
    path = cameras / "predictions.json"
    path.write_text(json.dumps([predicted(names[0], 7), predicted(names[1], 5)]))
    data = COCOKeypointsDataset(cameras, "val2017", evaluation=True, person_boxes=path)
    found = {sample["name"]: len(sample["person_boxes"]) for sample in data}
    assert found["camA/000000.jpg"] == 7
    assert found["camB/000000.jpg"] == 5
    assert sum(found.values()) == 12
    assert ("taken in their order" in data.notes["person boxes"]) == (names[0] == names[1])


@pytest.mark.parametrize("rows", [[predicted("000000", 3)], [predicted("000000", 1)] * 3])
def test_boxes_that_may_be_of_several_images_are_refused(cameras, rows):
    path = cameras / "predictions.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"entries are named '000000', which may be camA/000000.jpg or camB/000000.jpg"):
        COCOKeypointsDataset(cameras, "val2017", evaluation=True, person_boxes=path)


def test_boxes_without_area_and_of_other_classes_are_left_out(tmp_path):
    path = tmp_path / "boxes.json"
    good = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}
    rows = [good, {**good, "bbox": [1, 2, 0, 4]}, {**good, "category_id": 1}, {**good, "score": 0.1}]
    path.write_text(json.dumps(rows))
    people, dropped = read_person_boxes(path, 0.2, category=7)
    assert ([boxes.tolist() for boxes in people[1]], dropped) == ([[[1, 2, 4, 6, 0.5]]], 1)


def test_person_boxes_of_another_split(command, small, synthetic):
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]
    Path("boxes.json").write_text(json.dumps(boxes))
    result = command("fit", *small("kpt_coco"), "--data.person_boxes", "boxes.json")
    assert result.code == 1
    assert "none of its 1 images" in result.err
    assert "another split" in result.err


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["arrays", "tensors"])
def test_another_loader_validates(synthetic, tmp_path, kind):
    dataset = COCOKeypointsDataset(synthetic, "val2017", evaluation=True)
    crop = PersonCrops((32, 64))
    samples = [crop(sample) for sample in dataset]
    for sample in samples:
        sample.update({key: kind(sample[key]) for key in ("to_image", "box_scores", "areas")})
    loader = DataLoader(
        samples, batch_size=2, collate_fn=lambda rows: {key: [row[key] for row in rows] for key in rows[0]}
    )
    data = COCOKeypointsDataModule(str(synthetic), batch_size=2, num_workers=0, input_size=(64, 32))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    task = KeypointTask(SMALL, deconv_channels=(8, 8, 8))
    found = [
        Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet).validate(task, given, verbose=False)
        for given in (loader, data)
    ]
    assert "val/AP" in found[0][0]
    assert found[0][0] == pytest.approx(found[1][0], nan_ok=True)
