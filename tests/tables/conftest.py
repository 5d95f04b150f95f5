"""A folder of results of our own, by real commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sis_lightning.commands.main import main
from sis_lightning.run.record import read_record

_ROOT = Path(__file__).parents[2]

_SPEC = """
data:
  toys: {{title: toy images, kind: synthetic, test: [{test}], train: [{train}], test_images: {images}}}
runs:
  toy_seg:
    config: [tasks/seg_voc.yaml, configs/demo.yaml]
    options:
      {{data.root: {root}, model.backbone.channels: 8, model.backbone.width: 4, data.crop_size: 32, data.batch_size: 4,
       data.num_workers: 0, trainer.max_steps: 3, model.lr_scheduler.init_args.total_steps: 3,
       trainer.check_val_every_n_epoch: 1, trainer.log_every_n_steps: 1}}
    data: toys
    seeds: [0, 1]
notes: {{small: Of 3 steps.}}
tables:
  - id: "9"
    title: Toys
    caption: 100 % toys & more.
    notes: [small]
    complexity: [{{run: toy_seg}}]
    columns: [{{label: mIoU, run: toy_seg, metric: test/miou, digits: 4}}]
    groups:
      - {{host: sis_demo, baseline: Res2Net, rows: [{{label: Res2Net, backbone: res2net_demo}},
         {{label: Basic SIS, operator: basic}}]}}
"""


@pytest.fixture(scope="session")
def toy_spec() -> Callable[..., str]:
    """A function that returns a table spec with one small table of segmentation."""

    def text(test: str = "", train: str = "", root: Path | str = "data", images: str = "null") -> str:
        return _SPEC.format(test=test, train=train, root=root, images=images)

    return text


@pytest.fixture(scope="session")
def toys(tmp_path_factory, synthetic, toy_spec) -> Path:
    """A folder of which one row was run, by `tables run`: copy it to change something."""
    folder = tmp_path_factory.mktemp("toys")
    spec = folder / "results" / "toys.yaml"
    spec.parent.mkdir()
    spec.write_text(toy_spec(root=synthetic))
    # The package as a release has it: of a checkout with changes no record counts.
    for name in ("sis_lightning", "tasks", "datamodules", "configs"):
        shutil.copytree(_ROOT / name, folder / "release" / name, ignore=shutil.ignore_patterns("__pycache__"))
    line = [sys.executable, "-m", "sis_lightning", "tables", "run", "--rows", "Res2Net", "--jobs", "2"]
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(folder / "release")}
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment)
    shutil.rmtree(folder / "release")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 1: test/miou" in done.stdout
    record = read_record(next((folder / "results" / "records").glob("*seed1*.json")))
    data = record.data
    spec.write_text(toy_spec(data.fingerprint, data.trained_on[0], synthetic, str(data.images)))
    return folder


@pytest.fixture
def results(toys, tmp_path, monkeypatch) -> Callable[..., int]:
    """Calls `sis-lightning tables` in a copy of that folder."""
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: main(["tables", *map(str, arguments)])
