"""Real photographs, where they are at hand: `SIS_SHARED` names the folder."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path

import pytest
from test_cli import mean_iou

SMALL = ["--model.backbone.channels", "8", "--model.backbone.width", "4", "--data.num_workers", "0"]


def test_voc_fits_tests_and_predicts(command, shared):
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
    assert f"{0.1 * 12 / 256:g} at the start (linear rule from batch 256)" in fit.out
    test = command("test", *options)
    assert test.code == 0, test.err
    assert "top1_error_percent" in test.out
