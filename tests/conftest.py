"""Small synthetic data in the real layouts, and real calls of the command line."""

from __future__ import annotations

import dataclasses
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sis_lightning import datamodules
from sis_lightning.commands.main import main
from sis_lightning.datasets.download import md5
from sis_lightning.datasets.synthetic import write_synthetic

os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> Path:
    """CIFAR-100's, VOC's and COCO's layout with a few small pictures. Read only: copy it to change something."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    write_synthetic(root, images=24, size=64, seed=1, min_object=12)
    return root


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path, monkeypatch, capfd) -> Callable[..., Result]:
    """Calls `sis-lightning` in an empty folder."""
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


#: What makes a run of each task one of seconds, beside what does so for all of them.
SMALLER = {
    "seg_voc": ["--data.crop_size", "32"],
    "cls_cifar100": [],
    "det_voc": ["--model.min_size", "64", "--model.max_size", "64"],
    "det_coco": ["--model.min_size", "64", "--model.max_size", "64"],
    "kpt_coco": ["--data.input_size", "[64,32]"],
}


@pytest.fixture
def small(synthetic) -> Callable[..., list[str]]:
    """Options that make a run of any task one of seconds."""

    def options(task: str, steps: int = 4) -> list[str]:
        return [
            *("--config", f"tasks/{task}.yaml", "--config", "configs/demo.yaml", "--data.root", str(synthetic)),
            *("--model.backbone.channels", "8", "--model.backbone.width", "4", *SMALLER[task]),
            *("--data.batch_size", "4", "--data.num_workers", "0", "--trainer.max_steps", str(steps)),
            *("--model.lr_scheduler.init_args.total_steps", str(steps), "--trainer.check_val_every_n_epoch", "1"),
            *("--trainer.log_every_n_steps", "1"),
        ]

    return options


#: Each task's DataModule, and which folders of the synthetic data its archives hold.
PUBLISHED = {
    "cls_cifar100": (datamodules.CIFAR100DataModule, "", [["cifar-100-python"]]),
    "seg_voc": (datamodules.VOCSegmentationDataModule, "", [["VOCdevkit/VOC2012"]]),
    "det_voc": (datamodules.VOCDetectionDataModule, "", [["VOCdevkit/VOC2007"], [], ["VOCdevkit/VOC2012"]]),
    "det_coco": (datamodules.COCODetectionDataModule, "coco", [["train2017"], ["val2017"], ["annotations"]]),
    "kpt_coco": (datamodules.COCOKeypointsDataModule, "coco", [["train2017"], ["val2017"], ["annotations"]]),
}


def pack(path: Path, root: Path, folders: list[str]) -> None:
    """A tar or zip, by its name."""
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
    """Packs the synthetic data of a task into archives, as if it were published in them."""

    def packed(task: str, folder: Path) -> None:
        kind, below, contents = PUBLISHED[task]
        folder.mkdir()
        made = []
        for archive, folders in zip(kind.archives, contents, strict=True):
            pack(folder / archive.file, synthetic / below, folders)
            made.append(dataclasses.replace(archive, md5=md5(folder / archive.file)))
        monkeypatch.setattr(kind, "archives", tuple(made))

    return packed


@pytest.fixture
def tiny(small) -> list[str]:
    """Options that make a segmentation run one of seconds."""
    return small("seg_voc")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real images, which the project does not ship."""
    folder = os.environ.get("SIS_SHARED")
    if not folder or not Path(folder, "data").is_dir():
        pytest.skip("no real images here: SIS_SHARED names no folder with data/")
    return Path(folder, "data")
