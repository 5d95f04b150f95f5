"""A `Run`: what a configuration describes, without a Trainer and without leaving a trace."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sis_lightning.errors import DataError, UsageError
from sis_lightning.run import Run

SEG = ["--config", "tasks/seg_voc.yaml", "--config", "configs/demo.yaml"]


def test_building_a_run_changes_no_global_state():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    environment, filters = dict(os.environ), list(warnings.filters)
    level = logging.getLogger("lightning.pytorch").level
    run = Run.from_arguments(SEG)
    assert (run.task.num_classes, run.datamodule.batch_size) == (21, 16)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert (dict(os.environ), warnings.filters) == (environment, filters)
    assert logging.getLogger("lightning.pytorch").level == level


def test_the_seed_gives_the_weights():
    one, same, other = (Run.from_arguments([*SEG, "--seed_everything", seed]).task.state_dict() for seed in "112")
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert not all(torch.equal(value, other[key]) for key, value in one.items())


def test_directories():
    run = Run.from_arguments([*SEG, "--seed_everything", "3"])
    assert run.slug == "res2net14-16w4s-basic-16ch"
    assert run.directory == Path("runs/seg_voc/res2net14-16w4s-basic-16ch/seed3")
    assert run.family == run.directory.parent
    assert Run.from_arguments([*SEG, "--run_dir", "there"]).directory == Path("there")


@pytest.mark.parametrize(
    ("task", "size"),
    [("seg_voc", (96, 96)), ("cls_cifar100", (32, 32)), ("kpt_coco", (128, 96)), ("det_voc", (96, 96))],
)
def test_image_size(task, size):
    run = Run.from_arguments(["--config", f"tasks/{task}.yaml", "--config", "configs/demo.yaml"])
    assert run.image_size == size


def test_a_run_is_what_its_folder_says(command, tiny, tmp_path):
    assert command("fit", *tiny, "--run_dir", "run").code == 0
    given = Run.from_arguments([*tiny, "--run_dir", "run"])
    found = Run.from_folder(tmp_path / "run")
    assert found.config == given.config == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert found.directory == tmp_path / "run"
    assert found.checkpoint() == found.checkpoint("last") == tmp_path / "run" / "checkpoints" / "last.ckpt"
    task = found.load("best")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in task.state_dict().items())
    assert not task.training
    assert all(parameter.requires_grad for parameter in task.parameters())
    assert task is not found.task
    assert list(task.meta.class_names)[:2] == ["background", "aeroplane"]
    other = Run.from_arguments([*tiny, "--run_dir", "run", "--model.backbone.operator", "recurrent1"])
    with pytest.raises(DataError, match=r"backbone\.operator: 'basic' in the checkpoint, 'recurrent1' asked for"):
        other.checkpoint()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="no run in it"):
        Run.from_folder(tmp_path)
    with pytest.raises(DataError, match="no checkpoint"):
        Run.from_arguments([*SEG, "--run_dir", str(tmp_path)]).checkpoint("best")
    with pytest.raises(UsageError, match="did you mean 'batch_size'"):
        Run.from_arguments([*SEG, "--data.batchsize", "3"])
    with pytest.raises(UsageError, match="output_stride is 12"):
        _ = Run.from_arguments([*SEG, "--model.output_stride", "12"]).task
    for hidden in ("operator", "meta"):  # the backbone has the operator, the data set its description
        with pytest.raises(UsageError, match=f"model.{hidden}: there is no such key"):
            Run.from_arguments([*SEG, f"--model.{hidden}", "null"])


def test_the_package_of_runs_imports_nothing_heavy():
    code = "import sys, sis_lightning.run.record, sis_lightning.run.history, sis_lightning.run.resume.signals\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'jsonargparse')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
