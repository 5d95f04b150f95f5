"""Real photographs, if `SIS_SHARED` names the folder that has them."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from pathlib import Path

import pytest

SMALL = ["--model.backbone.channels", "8", "--model.backbone.width", "4", "--data.num_workers", "0"]


def test_voc_fits_tests_and_predicts(command, shared, mean_iou):
    root = shared / "voc2012_mini"
    options = ["--config", "tasks/seg_voc.yaml", "--data.root", root, "--model.backbone", "sis_demo", *SMALL]
    fit = command("fit", *options, "--data.crop_size", 97, "--data.batch_size", 4, "--trainer.max_steps", 2)
    assert fit.code == 0, fit.err
    assert "other; 43 train, 25 val" in fit.out
    test = command("test", *options)
    assert test.code == 0, test.err
    predict = command("predict", *options)
    assert predict.code == 0, predict.err
    run = Path("runs/seg_voc/res2net14-4w4s-basic-8ch/seed0")
    measured = json.loads((run / "test.json").read_text())["metrics"]["test/miou"]
    truth = root / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    assert len(list((run / "predictions" / "masks").glob("*.png"))) == 25
    assert mean_iou(run / "predictions" / "masks", truth) == pytest.approx(measured, abs=1e-6)


def test_photographs_sorted_into_folders(command, shared, tmp_path):
    with tarfile.open(shared / "tinyimagenet100_32" / "jpeg.tar.xz") as tar:
        counts: dict[str, int] = {}
        for member in itertools.takewhile(lambda item: not item.name.startswith("train/n01774"), tar):
            folder = member.name.rpartition("/")[0]
            counts[folder] = counts.get(folder, 0) + 1
            if counts[folder] <= 12:
                tar.extract(member, tmp_path / "photos", filter="data")
    classes = len(list((tmp_path / "photos" / "train").iterdir()))
    assert classes >= 3
    options = ["--config", "tasks/cls_cifar100.yaml", "--data", "image_folder", "--data.root", tmp_path / "photos"]
    options += ["--data.crop", "pad", "--data.image_size", 32, "--data.batch_size", 12, "--model.num_classes", classes]
    options += ["--model.backbone.width", 4, "--model.backbone.channels", 8, "--data.num_workers", 0]
    fit = command("fit", *options, "--trainer.max_steps", 2)
    assert fit.code == 0, fit.err
    assert f"{0.05 * 12 / 64:g} at the start (linear rule from batch 64)" in fit.out
    test = command("test", *options)
    assert test.code == 0, test.err
    assert "top1_error_percent" in test.out


FEW_STEPS = ["--trainer.max_steps", 2, "--model.lr_scheduler.init_args.total_steps", 2]


@pytest.mark.parametrize(
    ("task", "folder", "options", "counts"),
    [
        ("det_coco", "coco_mini", ["--data.batch_size", 4], "80 train, 79 val"),
        (
            "det_voc",
            "voc2012_mini",
            ["--data.batch_size", 4, "--data.train_splits", "[2012/train]", "--data.test_splits", "[2012/val]"],
            "train,",
        ),
        ("kpt_coco", "coco_mini", ["--data.batch_size", 8], "86 train, 79 val"),
    ],
)
def test_boxes_and_keypoints_of_photographs(command, shared, task, folder, options, counts):
    options = ["--config", f"tasks/{task}.yaml", "--config", "configs/demo.yaml", *SMALL, *options]
    options += ["--data.root", shared / folder]
    check = command("check-data", *options)
    assert check.code == 0, check.out
    fit = command("fit", *options, *FEW_STEPS)
    assert fit.code == 0, fit.err
    assert counts in fit.out
    test = command("test", *options)
    assert test.code == 0, test.err
    run = Path(f"runs/{task}/res2net14-4w4s-basic-8ch/seed0")
    record = json.loads((run / "test.json").read_text())
    assert record["data"]["identity"] == "other"
    assert len(record["metrics"]) >= 10
    predict = command("predict", *options)
    assert predict.code == 0, predict.err
    rows = json.loads((run / "predictions" / "predictions.json").read_text())
    assert len(rows) == record["data"]["images"]
    assert len(list((run / "predictions" / "images").glob("*.jpg"))) == len(rows)


def test_keypoints_in_a_real_detectors_boxes(command, shared, tmp_path):
    home = tmp_path / "coco"
    (home / "annotations").mkdir(parents=True)
    source = shared / "mmpose_coco4"
    for split in ("train2017", "val2017"):
        (home / split).symlink_to(source)
        (home / "annotations" / f"person_keypoints_{split}.json").symlink_to(source / "test_coco.json")
    options = ["--config", "tasks/kpt_coco.yaml", "--config", "configs/demo.yaml", *SMALL, "--data.root", tmp_path]
    options += ["--data.batch_size", 4, "--data.person_boxes", source / "test_coco_det_AP_H_56.json"]
    fit = command("fit", *options, *FEW_STEPS)
    assert fit.code == 0, fit.err
    assert "12 train, 4 val" in fit.out
    assert "2 persons without keypoints" in fit.out
    test = command("test", *options)
    assert test.code == 0, test.err
    run = Path("runs/kpt_coco/res2net14-4w4s-basic-8ch/seed0")
    record = json.loads((run / "test.json").read_text())
    assert "test_coco_det_AP_H_56.json" in record["data"]["notes"]["person boxes"]
    results = json.loads((run / "test_results" / "person_keypoints_val2017_sis-lightning_results.json").read_text())
    boxes = json.loads((source / "test_coco_det_AP_H_56.json").read_text())
    assert 0 < len(results) <= len(boxes)
    assert {row["image_id"] for row in results} == {row["image_id"] for row in boxes}
    predict = command("predict", *options, "--data.predict_path", source)
    assert predict.code == 0, predict.err
    rows = json.loads((run / "predictions" / "predictions.json").read_text())
    assert len(rows) == 4
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(source / "000000000785.jpg", tmp_path / "elsewhere" / "mine.jpg")
    stranger = command("predict", *options, "--data.predict_path", tmp_path / "elsewhere")
    assert stranger.code == 1
    assert "none of the 1 images" in stranger.err
