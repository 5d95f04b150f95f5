"""Small synthetic data in the real layouts, and real calls of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sis_lightning.cli import main
from sis_lightning.synthetic import write_synthetic

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
