"""The command line as users type it: whole runs on small data, and what they are told when something is wrong."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sis_lightning.config_files import config_names

RUN = Path("runs/seg_voc/res2net14-4w4s-basic-8ch/seed0")


def mean_iou(predictions: Path, truth: Path) -> float:
    """Mean IoU over the classes that occur, from the PNGs alone."""
    confusion = np.zeros((21, 21), dtype=np.int64)
    for path in sorted(predictions.glob("*.png")):
        with Image.open(path) as mask, Image.open(truth / path.name) as true:
            assert mask.mode == "P"
            assert mask.size == true.size
            predicted, wanted = np.array(mask), np.array(true)
        known = wanted != 255
        np.add.at(confusion, (wanted[known], predicted[known]), 1)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float(np.mean(confusion.diagonal()[union > 0] / union[union > 0]))


def test_a_whole_segmentation_run(command, tiny, synthetic, tmp_path):
    schedule = ["--model.lr_scheduler.init_args.total_steps", 6]
    fit = command("fit", *tiny, *schedule)
    assert fit.code == 0, fit.err
    for words in [
        "synthetic (seed 1",
        "stage 1 basic",
        "4 images a step",
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
    with Image.open(next((RUN / "pictures").glob("*.png"))) as picture:
        assert np.asarray(picture).std() > 10
    for name in ("last", "best"):
        checkpoint = torch.load(RUN / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["hyper_parameters"]["backbone"]["operator"] == "basic"

    # The figure does not depend on the batch size, and is that of the files predict writes.
    figures = []
    for size in (1, 3):
        test = command("test", *tiny, "--data.batch_size", size)
        assert test.code == 0, test.err
        record = json.loads((RUN / "test.json").read_text())
        figures.append(record["metrics"])
        assert record["data"]["identity"].startswith("synthetic")
    assert figures[0] == figures[1]
    assert f"{figures[0]['test/miou']:.4f}" in test.out
    predict = command("predict", *tiny)
    assert predict.code == 0, predict.err
    truth = synthetic / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    assert mean_iou(RUN / "predictions" / "masks", truth) == pytest.approx(figures[0]["test/miou"], abs=1e-6)

    # A second fit refuses to write over the first, and does when told to.
    again = command("fit", *tiny)
    assert again.code == 2
    assert "holds a run already" in again.err
    assert "--overwrite true" in again.err
    assert command("fit", *tiny, *schedule, "--overwrite", "true").code == 0
    assert not (RUN / "test.json").exists()

    # The resolved configuration alone repeats the run's test.
    repeat = command("test", "--config", RUN / "config.yaml")
    assert repeat.code == 0, repeat.err
    assert json.loads((RUN / "test.json").read_text())["metrics"] == figures[0]

    # Another network's checkpoint is refused, naming what differs.
    last = RUN / "checkpoints" / "last.ckpt"
    other = command("test", *tiny, "--model.backbone.operator", "recurrent1", "--ckpt_path", last)
    assert other.code == 1
    assert "model.backbone.operator: 'basic' in the checkpoint, 'recurrent1' asked for" in other.err

    # A folder of anyone's pictures, of any size and mode.
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    Image.new("RGB", (50, 37), "red").save(tmp_path / "photos" / "a.jpg")
    Image.new("L", (21, 64), 9).save(tmp_path / "photos" / "deep" / "b.png")
    photos = command("predict", *tiny, "--data.predict_path", tmp_path / "photos")
    assert photos.code == 0, photos.err
    for name, size in {"a": (50, 37), "deep/b": (21, 64)}.items():
        for path in (RUN / "predictions" / "masks" / f"{name}.png", RUN / "predictions" / "overlays" / f"{name}.jpg"):
            with Image.open(path) as image:
                assert image.size == size
    table = json.loads((RUN / "predictions" / "predictions.json").read_text())
    assert [row["name"] for row in table] == ["a", "deep/b"]
    assert all(abs(sum(row["shares"].values()) - 1) < 0.01 for row in table)
    # What an earlier predict wrote is gone: the folder holds one prediction, not two mixed. Others' files stay.
    assert len(list((RUN / "predictions" / "masks").rglob("*.png"))) == 2
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


def test_a_whole_classification_run(command, synthetic, tmp_path):
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
    assert "p(plain_disc)" in row  # the names of the classes come with the checkpoint
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
    assert "the loss (cross_entropy" in result.err
    assert len(result.err.splitlines()) <= 5
    last = RUN / "checkpoints" / "last.ckpt"
    assert "last good checkpoint: " in result.err
    assert "step-0" in result.err
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] > 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_weights_that_are_not_finite_are_never_saved(command, tiny, monkeypatch):
    from sis_lightning.tasks import SegmentationTask

    def spoil(task, optimizer):  # the loss of the epoch's last step is finite, its gradients are not
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


def one_test_image_less(synthetic: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "odd" / "cifar-100-python"
    shutil.copytree(synthetic / "cifar-100-python", folder)
    content = pickle.loads((folder / "test").read_bytes(), encoding="bytes")
    content = {key: value[:-1] if key in (b"data", b"fine_labels") else value for key, value in content.items()}
    (folder / "test").write_bytes(pickle.dumps(content, protocol=2))
    return folder.parent


@pytest.mark.parametrize("task", config_names("tasks"))
def test_two_ranks_measure_what_one_does(synthetic, small, tmp_path, task):
    options = [*small(task, steps=2), "--run_dir", "run"]
    if task.startswith("det"):
        options += ["--model.detector.box_score_thresh", "0.0", "--data.limit", "5"]  # two steps find little to score
    if task == "cls_cifar100":
        options += ["--data.root", str(one_test_image_less(synthetic, tmp_path))]
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]

    def call(*arguments: str) -> str:
        line = [sys.executable, "-m", "sis_lightning", *arguments]
        result = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "4 images a step = 2 on each of 2 device(s)" in call("fit", *options, *ranks)
    figures = []
    for extra in ([], ranks):
        call("test", *options, *extra)
        record = json.loads((tmp_path / "run" / "test.json").read_text())
        assert record["data"]["images"] % 2 == 1  # dealt out unevenly
        figures.append(record["metrics"])
    assert figures[0] == figures[1]
    assert len(figures[0]) > 3


def test_one_image_a_step_where_batch_norm_needs_two(command, tiny):
    result = command("fit", *tiny, "--data.batch_size", 1)
    assert result.code == 2
    assert "--data.batch_size" in result.err
    assert "2" in result.err


def voc(synthetic: Path, tmp_path: Path) -> Path:
    shutil.copytree(synthetic / "VOCdevkit", tmp_path / "own" / "VOCdevkit")
    return tmp_path / "own" / "VOCdevkit" / "VOC2012"


def truncate_image(home: Path) -> None:
    for path in (home / "JPEGImages").glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:200])


def spoil_mask(home: Path) -> None:
    for path in (home / "SegmentationClass").glob("*.png"):
        with Image.open(path) as mask:
            size = mask.size
        Image.new("L", size, 77).save(path)


def shrink_masks(home: Path) -> None:
    for path in (home / "SegmentationClass").glob("*.png"):
        Image.new("L", (9, 8)).save(path)


def empty_split(home: Path) -> None:
    (home / "ImageSets" / "Segmentation" / "train.txt").write_text("")


def name_missing_file(home: Path) -> None:
    (home / "ImageSets" / "Segmentation" / "train.txt").write_text("2012_999999\n")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate_image, ["JPEGImages", ".jpg", "truncated"]),
        (spoil_mask, ["SegmentationClass", "77", "0…20"]),
        (shrink_masks, ["SegmentationClass", "9×8"]),
        (empty_split, ["train split is empty"]),
        (name_missing_file, ["2012_999999.jpg: does not exist", "train.txt names it"]),
    ],
)
def test_damaged_data_is_named(command, tiny, synthetic, tmp_path, spoil, words, workers):
    home = voc(synthetic, tmp_path)
    spoil(home)
    result = command("fit", *tiny, "--data.root", home.parents[1], "--data.num_workers", workers)
    assert result.code == 1, result.err
    assert all(word in result.err for word in words), result.err
    assert len(result.err.splitlines()) <= 5
    assert "Traceback" not in result.err


SEG = ["--config", "tasks/seg_voc.yaml"]
CLS = ["--config", "tasks/cls_cifar100.yaml"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fti", *SEG], 2, ["fti", "fit"]),
        (["fit", "--config", "tasks/seg_vok.yaml"], 2, ["seg_vok", "seg_voc"]),
        (["fit", "--config", "seg_vok"], 2, ["seg_vok", "seg_voc"]),
        (["fit", "--config"], 2, ["--config"]),
        (["fit"], 2, ["--config"]),
        (["fit", *SEG, "--trainer.max_step", "5"], 2, ["max_step", "max_steps"]),
        (["fit", *SEG, "--data.batchsize", "5"], 2, ["batchsize", "batch_size"]),
        (["fit", *SEG, "--model.backbone.operater", "basic"], 2, ["operater", "operator"]),
        (["fit", *SEG, "--model.backbone", "sis5O"], 2, ["sis5O", "sis50"]),
        (["fit", *SEG, "--model.backbone.operator", "basik"], 2, ["basik", "basic"]),
        (["fit", *SEG, "--model.backbone.family", "resnett"], 2, ["resnett", "resnet"]),
        (["fit", *SEG, "--model.backbone.depth", "34"], 2, ["34", "50"]),
        (["fit", *SEG, "--model.backbone.width", "0"], 2, ["width", "0"]),
        (["fit", *SEG, "--model.backbone.steps", "3"], 2, ["steps", "basic"]),
        (["fit", *SEG, "--model.output_stride", "12"], 2, ["output_stride", "12", "8"]),
        (["fit", *SEG, "--model.lr_interval", "stepp"], 2, ["stepp", "step"]),
        (["fit", *SEG, "--data.batch_size", "many"], 2, ["batch_size", "many"]),
        (["fit", *SEG, "--data.batch_size", "0"], 2, ["batch_size", "0"]),
        (["fit", *SEG, "--data", "vok"], 2, ["vok", "voc_segmentation"]),
        (["fit", *SEG, "--model", "SegmentationTsk"], 2, ["SegmentationTsk", "SegmentationTask"]),
        (["fit", *SEG, "--model.optimizer.class_path", "torch.optim.SDG"], 2, ["SDG", "SGD"]),
        (["fit", *SEG, "--trainer", "gpuu"], 2, ["gpuu", "gpu"]),
        (["fit", *SEG, "--data.root", "nowhere"], 1, ["nowhere", "VOCdevkit/VOC2012", "configs/demo.yaml"]),
        (
            ["fit", "--config", "tasks/cls_cifar100.yaml", "--data.root", "no"],
            1,
            ["no", "cifar-100-python", "download"],
        ),
        (["synth"], 2, ["ROOT"]),
        (["synth", "x", "--kinds", "vok"], 2, ["vok", "voc"]),
        (["synth", "x", "--image", "5"], 2, ["--image"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_named_with_the_nearest_right_word(command, arguments, code, words):
    result = command(*arguments)
    assert result.code == code, result.err
    assert all(word in result.err for word in words), result.err
    assert len(result.err.splitlines()) <= 5, result.err
    assert "Traceback" not in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(("subcommand", "path"), [("test", "last"), ("predict", "other.ckpt")])
def test_a_checkpoint_that_is_not_there(command, tiny, subcommand, path):
    result = command(subcommand, *tiny, "--ckpt_path", path)
    assert result.code == 1
    assert f"{path.removesuffix('.ckpt')}.ckpt" in result.err
    assert "sis-lightning fit" in result.err


def test_debug_shows_the_traceback(command):
    from sis_lightning.errors import UsageError

    with pytest.raises(UsageError):
        command("fit", "--config", "nothing", "--debug")


def test_help_needs_no_torch():
    probe = (
        "import sys; from sis_lightning.commands.main import main\n"
        "for line in ('--help', 'fit --help', '--version', 'fit --config nothing'): main(line.split())\n"
        "assert not {'torch', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules), 'heavy imports'"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: sis-lightning COMMAND" in result.stdout
    assert "--model.backbone.operator" in result.stdout
    assert "no configuration file 'nothing'" in result.stderr


def test_mismatched_torch_and_torchvision_get_one_sentence(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "sis_lightning", "fit", "--config", "tasks/seg_voc.yaml"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]), "PATH": ""},
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert "torchvision" in result.stderr
    assert "does not load beside torch" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 5
