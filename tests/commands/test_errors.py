"""What the command line says about mistakes and damaged data: one to five lines, the right exit code, no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


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
        mask = Image.new("L", (9, 8))
        mask.putpixel((0, 0), 1)
        mask.save(path)


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
        (["train", *SEG], 2, ["train", "did you mean 'fit'"]),
        (["evalute", "--type", "bbox"], 2, ["evaluate"]),
        (["flops"], 2, ["complexity"]),
        (["fit", "--config", "tasks/seg_vok.yaml"], 2, ["seg_vok", "seg_voc"]),
        (["fit", "--config", "seg_vok"], 2, ["seg_vok", "seg_voc"]),
        (["fit", "--config"], 2, ["--config"]),
        (["fit"], 2, ["--config"]),
        (["fit", "--config", "configs/demo.yaml"], 2, ["needs a task", "seg_voc"]),
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["synth", "/proc/nothing"], ["/proc/nothing"]),
        (["bench", "--eval", "--images", "1", "--out", "/proc/nothing"], ["/proc/nothing"]),
        (["tables", "render", "--results", "/proc/nothing"], ["/proc/nothing"]),
    ],
    ids=lambda value: value[0],
)
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
def test_folders_that_cannot_be_written_are_named(command, arguments, words):
    result = command(*arguments)
    assert result.code == 1, result.err
    assert all(word in result.err for word in words), result.err
    assert len(result.err.splitlines()) == 1
    with pytest.raises(OSError):  # noqa: PT011 - the traceback is what --debug is for
        command(*arguments, "--debug")


def test_a_reader_that_closes_the_pipe_ends_the_command_quietly():
    line = f"{sys.executable} -m sis_lightning fit --help | head -1"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.stdout.startswith("usage: sis-lightning fit")
    assert result.stderr == ""


def test_an_interrupt_ends_the_command_with_130(command, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("sis_lightning.datasets.synthetic.write_synthetic", interrupt)
    result = command("synth", "somewhere")
    assert (result.code, result.err) == (130, "sis-lightning: interrupted\n")


def test_debug_shows_the_traceback(command):
    from sis_lightning.errors import UsageError

    with pytest.raises(UsageError):
        command("fit", "--config", "nothing", "--debug")


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
    assert "does not load with torch" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 5
