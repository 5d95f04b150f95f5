"""Fixtures: small synthetic data in the real formats, calls of the command line, and options that make runs short."""

from __future__ import annotations

import dataclasses
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from sis_lightning import datamodules
from sis_lightning.commands.main import main
from sis_lightning.datasets.download import md5
from sis_lightning.datasets.synthetic import write_synthetic

os.environ.setdefault("MPLBACKEND", "agg")
# How long examples take says something about the machine, which other tests keep busy, and nothing about the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the tests that wait for SLURM first: at the end, one worker would wait for them with nothing beside it."""
    items.sort(key=lambda item: "slurm" not in item.keywords)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> Path:
    """A few small images in the formats of CIFAR-100, VOC and COCO. Read only: copy the folder to change something."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    write_synthetic(root, images=24, size=64, seed=1, min_object=12)
    return root


@dataclass(frozen=True)
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path, monkeypatch, capfd) -> Callable[..., Result]:
    """A function that calls `sis-lightning` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SIS_CONFIG_PATH", raising=False)

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # --print_config and --help-all leave inside jsonargparse
            code = int(leaving.code or 0)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


#: Options that make a run of a task take seconds, besides those that do so for all tasks.
SMALLER = {
    "seg_voc": ["--data.crop_size", "32"],
    "cls_cifar100": [],
    "cls_imagenet": ["--data.image_size", "32"],
    "det_voc": ["--model.min_size", "64", "--model.max_size", "64"],
    "det_coco": ["--model.min_size", "64", "--model.max_size", "64"],
    "kpt_coco": ["--data.input_size", "[64,32]"],
}


@pytest.fixture
def small(synthetic) -> Callable[..., list[str]]:
    """A function that returns options with which a run of a task takes seconds."""

    def options(task: str, steps: int = 4) -> list[str]:
        return [
            *("--config", f"tasks/{task}.yaml", "--config", "configs/demo.yaml", "--data.root", str(synthetic)),
            *("--model.backbone.channels", "8", "--model.backbone.width", "4", *SMALLER[task]),
            *("--data.batch_size", "4", "--data.num_workers", "0", "--trainer.max_steps", str(steps)),
            *("--model.lr_scheduler.init_args.total_steps", str(steps), "--trainer.check_val_every_n_epoch", "1"),
            *("--trainer.log_every_n_steps", "1"),
        ]

    return options


#: DataModule of each task, and the folders of the synthetic data that its archives contain.
PUBLISHED = {
    "cls_cifar100": (datamodules.CIFAR100DataModule, "", [["cifar-100-python"]]),
    "seg_voc": (datamodules.VOCSegmentationDataModule, "", [["VOCdevkit/VOC2012"]]),
    "det_voc": (datamodules.VOCDetectionDataModule, "", [["VOCdevkit/VOC2007"], [], ["VOCdevkit/VOC2012"]]),
    "det_coco": (datamodules.COCODetectionDataModule, "coco", [["train2017"], ["val2017"], ["annotations"]]),
    "kpt_coco": (datamodules.COCOKeypointsDataModule, "coco", [["train2017"], ["val2017"], ["annotations"]]),
}


def pack(path: Path, root: Path, folders: list[str]) -> None:
    """Writes a tar or zip archive, as the ending of its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for folder in folders:
                for file in sorted((root / folder).rglob("*")):
                    archive.write(file, file.relative_to(root))
    else:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
            for folder in folders:
                archive.add(root / folder, folder)


@pytest.fixture
def publish(synthetic, monkeypatch) -> Callable[[str, Path], None]:
    """A function that packs the synthetic data of a task into archives, as if they were the published ones."""

    def packed(task: str, folder: Path) -> None:
        kind, below, contents = PUBLISHED[task]
        folder.mkdir()
        made = []
        for archive, folders in zip(kind.archives, contents, strict=True):
            pack(folder / archive.file, synthetic / below, folders)
            made.append(dataclasses.replace(archive, md5=md5(folder / archive.file)))
        monkeypatch.setattr(kind, "archives", tuple(made))

    return packed


@pytest.fixture(scope="session")
def mean_iou() -> Callable[[Path, Path], float]:
    """A function that computes the mean IoU of two folders of PNG masks, by numpy alone."""

    def measure(predictions: Path, ground_truth: Path) -> float:
        """Mean IoU over the classes that occur, from the PNGs alone."""
        confusion = np.zeros((21, 21), dtype=np.int64)
        for path in sorted(predictions.glob("*.png")):
            with Image.open(path) as mask, Image.open(ground_truth / path.name) as true:
                assert mask.mode == "P"
                assert mask.size == true.size
                predicted, wanted = np.array(mask), np.array(true)
            known = wanted != 255
            np.add.at(confusion, (wanted[known], predicted[known]), 1)
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        return float(np.mean(confusion.diagonal()[union > 0] / union[union > 0]))

    return measure


@pytest.fixture
def tiny(small) -> list[str]:
    """Options with which a segmentation run takes seconds."""
    return small("seg_voc")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real images, which are not part of the project."""
    folder = os.environ.get("SIS_SHARED")
    if not folder or not Path(folder, "data").is_dir():
        pytest.skip("no real images here: SIS_SHARED names no folder with data/")
    return Path(folder, "data")


#: A run that starts from the weights of another one, in two tables.
START_SPEC = """
data:
  toys: {{title: toy images, kind: synthetic}}
runs:
  toy_first:
    config: [tasks/cls_imagenet.yaml, configs/demo.yaml]
    options: &options
      {{data.root: {root}, model.backbone.channels: 8, model.backbone.width: 4, data.batch_size: 4, data.num_workers: 0,
       trainer.max_steps: 2, model.lr_scheduler.init_args.total_steps: 2, trainer.limit_val_batches: 1,
       trainer.limit_test_batches: 1}}
    data: toys
    seeds: [0]
  toy_later:
    config: [tasks/seg_voc.yaml, configs/demo.yaml, configs/from_imagenet.yaml]
    options: {{<<: *options, data.crop_size: 32}}
    data: toys
    seeds: [0, 1]
    pretrained: {{run: toy_first, published: {{resnet_demo: "timm:resnet14t.c3_in1k"}}}}
tables:
  - id: "8"
    title: Toys
    columns: [{{label: mIoU, run: toy_later, metric: test/miou, digits: 4}}]
    groups: &groups
      - {{host: sis_demo, rows: [{{label: ResNet, backbone: resnet_demo}}, {{label: Basic SIS, operator: basic}}]}}
  - id: "9"
    title: Toys again
    columns: [{{label: pixels, run: toy_later, metric: test/pixel_accuracy, digits: 4}}]
    groups: *groups
"""


@pytest.fixture
def start_tables(synthetic, tmp_path, monkeypatch, capfd):
    """Calls `sis-lightning tables` in a folder with `START_SPEC`; returns the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "toys.yaml").write_text(START_SPEC.format(root=synthetic))

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["tables", *map(str, arguments)])
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return call
