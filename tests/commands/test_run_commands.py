"""`fit`, `validate`, `test` and `predict` on small data, as users type them."""

from __future__ import annotations

import csv
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO

from sis_lightning.config_files import config_names

RUN = Path("runs/seg_voc/res2net14-4w4s-basic-8ch/seed0")


# pycocotools 2.0.11 decodes masks by an interface that numpy is about to change.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_segmentation_run_from_fit_to_predict(command, tiny, synthetic, tmp_path, mean_iou):
    schedule = ["--model.lr_scheduler.init_args.total_steps", 6]
    fit = command("fit", *tiny, *schedule)
    assert fit.code == 0, fit.err
    for words in [
        "synthetic (seed 1",
        "stage 1 basic",
        "4 images per step",
        "4 steps",
        "ends at step 6",
        "images/s",
        "loss",
    ]:
        assert words in fit.out, words
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"]["channels"] == 8
    assert config["trainer"]["max_steps"] == 4
    with (RUN / "csv" / "fit" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2", "3"]
    assert any(row["val/miou"] for row in rows)
    assert list((RUN / "tensorboard" / "fit").glob("events*"))
    with Image.open(next((RUN / "images").glob("*.png"))) as figure:
        assert np.asarray(figure).std() > 10
    for name in ("last", "best"):
        checkpoint = torch.load(RUN / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["hyper_parameters"]["backbone"]["operator"] == "basic"

    # The metrics do not depend on the batch size, and agree with the files that predict writes.
    results = []
    for size in (1, 3):
        test = command("test", *tiny, "--data.batch_size", size)
        assert test.code == 0, test.err
        record = json.loads((RUN / "test.json").read_text())
        results.append(record["metrics"])
        assert record["data"]["identity"].startswith("synthetic")
    assert results[0] == results[1]
    assert f"{results[0]['test/miou']:.4f}" in test.out
    predict = command("predict", *tiny)
    assert predict.code == 0, predict.err
    ground_truth = synthetic / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    assert mean_iou(RUN / "predictions" / "masks", ground_truth) == pytest.approx(results[0]["test/miou"], abs=1e-6)

    # A second fit does not overwrite the first unless it is told to.
    again = command("fit", *tiny)
    assert again.code == 2
    assert "holds a run already" in again.err
    assert "--overwrite true" in again.err
    assert command("fit", *tiny, *schedule, "--overwrite", "true").code == 0
    assert not (RUN / "test.json").exists()

    # The resolved configuration alone repeats the test.
    repeat = command("test", "--config", RUN / "config.yaml")
    assert repeat.code == 0, repeat.err
    assert json.loads((RUN / "test.json").read_text())["metrics"] == results[0]

    # Another network's checkpoint is refused, naming what differs.
    last = RUN / "checkpoints" / "last.ckpt"
    other = command("test", *tiny, "--model.backbone.operator", "recurrent1", "--ckpt_path", last)
    assert other.code == 1
    assert "model.backbone.operator: 'basic' in the checkpoint, 'recurrent1' asked for" in other.err

    # A folder of images of any size and mode.
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    Image.new("RGB", (50, 37), "red").save(tmp_path / "photos" / "a.jpg")
    Image.new("L", (21, 64), 9).save(tmp_path / "photos" / "deep" / "b.png")
    photos = command("predict", *tiny, "--data.predict_path", tmp_path / "photos")
    assert photos.code == 0, photos.err
    for name, size in {"a.jpg": (50, 37), "deep/b.png": (21, 64)}.items():
        for path in (RUN / "predictions" / "masks" / f"{name}.png", RUN / "predictions" / "overlays" / f"{name}.jpg"):
            with Image.open(path) as image:
                assert image.size == size
    table = json.loads((RUN / "predictions" / "predictions.json").read_text())
    assert [row["name"] for row in table] == ["a.jpg", "deep/b.png"]
    assert all(abs(sum(row["shares"].values()) - 1) < 0.01 for row in table)
    assert " images/s)" in photos.out
    with (RUN / "predictions" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shares = [{key: float(value) for key, value in row.items() if key.startswith("share(")} for row in rows]
    assert list(shares[0])[:2] == ["share(background)", "share(aeroplane)"]
    assert len(shares[0]) == 21
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-4) for row in shares)
    # Into a folder of one's own, also in COCO's format, which pycocotools reads back to the same masks.
    coco = command(
        *("predict", *tiny, "--data.predict_path", tmp_path / "photos"),
        *("--output", tmp_path / "mine" / "photos", "--coco_json", "true"),
    )
    assert coco.code == 0, coco.err
    read = COCO(tmp_path / "mine" / "photos" / "coco.json")
    assert [image["file_name"] for image in read.dataset["images"]] == ["a.jpg", "deep/b.png"]
    for image in read.dataset["images"]:
        with Image.open(tmp_path / "mine" / "photos" / "masks" / f"{image['file_name']}.png") as file:
            mask = np.array(file)
        assert mask.shape == (image["height"], image["width"])
        found = np.zeros_like(mask)
        for annotation in read.imgToAnns[image["id"]]:
            found += annotation["category_id"] * read.annToMask(annotation)
        assert np.array_equal(found, mask)
    # Earlier predictions are removed, so that the folder never mixes two; other files stay.
    assert len(list((RUN / "predictions" / "masks").rglob("*.png"))) == 2
    # Unreadable images are all named before anything is written, or at the end; hidden files are no images.
    (tmp_path / "photos" / "._a.jpg").write_text("of macOS")
    (tmp_path / "photos" / "torn.jpg").write_bytes((tmp_path / "photos" / "a.jpg").read_bytes()[:300])
    (tmp_path / "photos" / "empty.png").write_bytes(b"")
    bad = command("predict", *tiny, "--data.predict_path", tmp_path / "photos")
    assert bad.code == 1
    assert "2 of 4 images cannot be read: empty.png (" in bad.err
    assert "torn.jpg (" in bad.err
    assert json.loads((RUN / "predictions" / "predictions.json").read_text()) == table
    (tmp_path / "photos" / "deep" / "b.png").unlink()
    skipped = command("predict", *tiny, "--data.predict_path", tmp_path / "photos", "--data.skip_bad", "true")
    assert skipped.code == 1
    assert "1 images were predicted, 2 cannot be read: empty.png (" in skipped.err
    assert [path.name for path in (RUN / "predictions" / "masks").rglob("*.png")] == ["a.jpg.png"]
    assert not list(RUN.glob("*.partial"))
    (tmp_path / "theirs" / "predictions").mkdir(parents=True)
    (tmp_path / "theirs" / "predictions" / "thesis.txt").write_text("mine")
    refused = command("predict", *tiny, "--run_dir", "theirs", "--ckpt_path", RUN / "checkpoints" / "best.ckpt")
    assert refused.code == 2
    assert "predict did not write" in refused.err
    assert (tmp_path / "theirs" / "predictions" / "thesis.txt").read_text() == "mine"

    content = torch.load(last, weights_only=True)
    content["state_dict"]["stray"] = torch.zeros(1)
    torch.save(content, last)
    stray = command("test", *tiny)
    assert stray.code == 1
    assert "another network: 1 of its weights" in stray.err
    assert "stray" in stray.err
    last.write_bytes(last.read_bytes()[:1000])
    broken = command("test", *tiny)
    assert broken.code == 1
    assert "damaged" in broken.err


def test_a_classification_run_from_fit_to_predict(command, synthetic, tmp_path):
    options = [
        *("--config", "tasks/cls_cifar100.yaml", "--config", "configs/demo.yaml", "--data.root", synthetic),
        *("--model.backbone.channels", 8, "--model.backbone.width", 4, "--data.batch_size", 8, "--data.num_workers", 0),
        *("--trainer.max_steps", 3, "--model.lr_scheduler.init_args.total_steps", 3, "--run_dir", "here"),
    ]
    fit = command("fit", *options, "--trainer.check_val_every_n_epoch", 1)
    assert fit.code == 0, fit.err
    test = command("test", *options)
    assert test.code == 0, test.err
    metrics = json.loads(Path("here/test.json").read_text())["metrics"]
    assert metrics["test/top1_error_percent"] == pytest.approx(100 - 100 * metrics["test/top1"], abs=1e-4)
    assert metrics["test/top1"] <= metrics["test/top5"]
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    predict = command("predict", *options, "--data.predict_path", photo)
    assert predict.code == 0, predict.err
    (row,) = json.loads(Path("here/predictions/predictions.json").read_text())
    assert "p(plain_disc)" in row  # class names come from the checkpoint
    refused = command("predict", *options, "--coco_json", "true")
    assert refused.code == 2
    assert "COCO's format has no place for the class of a whole image" in refused.err
    assert not Path("here/predictions.partial").exists()
    predict = command("predict", *options)
    assert predict.code == 0, predict.err
    with Path("here/predictions/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    shares = [{key: float(value) for key, value in row.items() if key.startswith("p(")} for row in rows]
    assert len(shares[0]) == 100
    assert all(sum(share.values()) == pytest.approx(1, abs=1e-3) for share in shares)
    assert all(max(share, key=share.get) == f"p({row['class']})" for share, row in zip(shares, rows, strict=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(command, tiny, tmp_path):
    (tmp_path / "explode.yaml").write_text(
        "model.init_args.optimizer: {class_path: SGD, init_args: {lr: 1e-8}}\n"
        "model.init_args.lr_scheduler:\n"
        "  class_path: torch.optim.lr_scheduler.ExponentialLR\n"
        "  init_args: {gamma: 30}\n"
    )
    tiny = tiny[: tiny.index("--model.lr_scheduler.init_args.total_steps")]
    options = ["--config", "explode.yaml", "--trainer.max_steps", "40", "--trainer.check_val_every_n_epoch", "1"]
    result = command("fit", *tiny, *options)
    assert result.code == 1, result.err
    assert "not finite at step" in result.err
    # Which overflows first, the loss or a running variance, depends on the machine.
    assert re.search(r"the loss \(cross_entropy|\d+ weights, such as \S+running_var", result.err)
    assert len(result.err.splitlines()) <= 5
    last = RUN / "checkpoints" / "last.ckpt"
    assert "last good checkpoint: " in result.err
    assert "step-0" in result.err
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] > 0
    assert [name for name, value in checkpoint["state_dict"].items() if not value.isfinite().all()] == []


def test_weights_that_are_not_finite_are_never_saved(command, tiny, monkeypatch):
    from sis_lightning.tasks import SegmentationTask

    def spoil(task, optimizer):  # the loss of the last step is finite, its gradients are not
        if task.global_step == 7:
            next(task.parameters()).grad.fill_(float("nan"))

    monkeypatch.setattr(SegmentationTask, "on_before_optimizer_step", spoil)
    tiny[tiny.index("--trainer.max_steps") + 1] = "12"
    tiny[tiny.index("--model.lr_scheduler.init_args.total_steps") + 1] = "12"
    result = command("fit", *tiny)
    assert result.code == 1
    assert "not finite at step 8" in result.err
    assert "weights" in result.err
    last = RUN / "checkpoints" / "last.ckpt"
    assert "step-0000004.ckpt" in result.err
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def without_unseen_images(synthetic: Path, tmp_path: Path) -> Path:
    """A copy of CIFAR-100 and of ImageNet whose test images are the training images but one."""
    home = tmp_path / "odd" / "ilsvrc"
    shutil.copytree(synthetic / "ilsvrc" / "ILSVRC" / "Data" / "CLS-LOC" / "train", home / "train")
    shutil.copytree(home / "train", home / "val")
    first = min((home / "val").iterdir())
    if sum(1 for path in (home / "val").rglob("*.JPEG")) % 2 == 0:
        next(first.iterdir()).unlink()
        if not any(first.iterdir()):
            first.rmdir()
    folder = tmp_path / "odd" / "cifar-100-python"
    shutil.copytree(synthetic / "cifar-100-python", folder)
    content = pickle.loads((folder / "train").read_bytes(), encoding="bytes")
    content = {key: value[:-1] if key in (b"data", b"fine_labels") else value for key, value in content.items()}
    (folder / "test").write_bytes(pickle.dumps(content, protocol=2))
    return folder.parent


#: Steps after which a task has learned something of five images, how to test it on them, and its metric.
LEARNED: dict[str, tuple[int, list[str], str]] = {
    "cls_cifar100": (80, [], "test/top5"),
    "cls_imagenet": (80, [], "test/top5"),
    "det_coco": (60, ["--data.limit", "5", "--data.val_split", "train2017"], "test/AP"),
    "det_voc": (40, ["--data.limit", "5", "--data.test_splits", "[2007/trainval]"], "test/AP50_voc07"),
    "kpt_coco": (250, ["--data.limit", "5", "--data.val_split", "train2017"], "test/AP"),
    "seg_voc": (60, [], "test/miou"),
}


@pytest.mark.parametrize("task", config_names("tasks"))
def test_two_ranks_measure_what_one_does(command, synthetic, small, tmp_path, task):
    """With a trained network: without detections, any way to combine the ranks gives the same zeros."""
    steps, tested, metric = LEARNED[task]
    options = [*small(task, steps=steps), "--run_dir", "run", "--trainer.check_val_every_n_epoch", "1000", *tested]
    if task.startswith("cls"):
        options += ["--data.root", str(without_unseen_images(synthetic, tmp_path))]
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]

    def call(*arguments: str) -> str:
        line = [sys.executable, "-m", "sis_lightning", *arguments]
        result = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "4 images per step = 2 on each of 2 device(s)" in call("fit", *options, *ranks)
    results = []
    for extra in ([], ranks):
        if extra:
            call("test", *options, *extra)
        else:
            assert command("test", *options).code == 0
        record = json.loads((tmp_path / "run" / "test.json").read_text())
        assert record["data"]["images"] % 2 == 1  # the ranks have different numbers of images
        results.append(record["metrics"])
    assert results[0] == results[1]
    assert len(results[0]) > 3
    assert results[0][metric] > 0


def test_one_image_a_step_where_batch_norm_needs_two(command, tiny):
    result = command("fit", *tiny, "--data.batch_size", 1)
    assert result.code == 2
    assert "batch_size" in result.err
    assert "2" in result.err


@pytest.mark.parametrize(("subcommand", "path"), [("test", "last"), ("predict", "other.ckpt")])
def test_a_checkpoint_that_is_not_there(command, tiny, subcommand, path):
    result = command(subcommand, *tiny, "--ckpt_path", path)
    assert result.code == 1
    assert f"{path.removesuffix('.ckpt')}.ckpt" in result.err
    assert "sis-lightning fit" in result.err


@pytest.mark.parametrize("task", ["seg_voc", "det_coco"])
def test_help_all_lists_the_options_of_run_trainer_task_and_data(command, task):
    result = command("fit", "--config", f"tasks/{task}.yaml", "--config", "configs/demo.yaml", "--help-all")
    assert result.code == 0, result.err
    words = ["--trainer.gradient_clip_val", "--checkpoint_every", "--model.backbone_weights", "--data.batch_size"]
    words += {"seg_voc": ["Options of SegmentationTask", "--model.output_stride"], "det_coco": ["--data.evaluator"]}[
        task
    ]
    for word in words:
        assert word in result.out, word


def test_help_all_without_a_task_says_how_to_list_the_rest(command):
    result = command("fit", "--help-all")
    assert result.code == 0, result.err
    assert "--trainer.max_steps" in result.out
    assert "--config tasks/NAME.yaml" in result.out
