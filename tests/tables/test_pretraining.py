"""Rows that start from the weights of another run: what is planned, run, submitted and counted, and what it costs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sis_lightning.run.history import begin, end
from sis_lightning.tables.cells import Model
from sis_lightning.tables.cost import cost_of
from sis_lightning.tables.plan import MissingRun
from sis_lightning.tables.spec import DataSet, Experiment, RunSpec

SLUG = "res2net14-4w4s-basic-8ch"
FIRST = Path("runs", "toy_first", SLUG, "seed0")


def test_the_plan_lists_the_weights_once_and_first(start_tables):
    code, out, _ = start_tables("plan")
    assert code == 0
    entries = re.findall(r"^table (\d), (.+?), (\w+) on (\S+), seed (\d)", out, re.MULTILINE)
    assert [entry[1] for entry in entries] == ["weights for Basic SIS", *["ResNet"] * 2, *["Basic SIS"] * 2]
    assert entries[0] == ("8", "weights for Basic SIS", "toy_first", SLUG, "0")
    assert out.count(f"after {FIRST}, whose weights it starts from") == 2
    commands = re.findall(r"^  (sis-lightning .*)$", out, re.MULTILINE)
    assert "--model.backbone_weights timm:resnet14t.c3_in1k" in commands[1]
    assert all("--model.backbone_weights run:toy_first" in command for command in commands[3:])
    begin(Path(FIRST), 0)
    end(Path(FIRST), "finished")
    _, out, _ = start_tables("plan")
    assert "weights for" not in out
    assert "whose weights" not in out


def test_the_weights_are_trained_before_the_runs_that_start_from_them(start_tables):
    code, out, err = start_tables("run", "--rows", "basic", "--seeds", "1", "--jobs", "2")
    assert code == 0, err
    assert re.findall(r"^\[\d/2\] table 8, (.+?), seed 0: runs", out, re.MULTILINE) == [
        "weights for Basic SIS",
        "Basic SIS",
    ]
    assert not (FIRST / "test.json").exists()
    assert len(list(Path("results/records").glob("*.json"))) == 1


def test_without_the_weights_nothing_starts(start_tables):
    code, _, err = start_tables(
        "run", "--rows", "basic", "--seeds", "1", "--", "--data.root", "nowhere", "--data.synthetic", "null"
    )
    assert code == 1
    assert f"waits for the weights of {FIRST}" in err
    assert not list(Path("runs").glob("toy_later/**/config.yaml"))


def test_a_dry_run_says_what_will_be_waited_for(start_tables):
    code, out, _ = start_tables("run", "--rows", "basic", "--launcher", "slurm", "--", "--dry-run")
    assert code == 0
    first, later = out.split(f"# with --dependency afterok: the job of {FIRST}\n")
    assert re.findall(r"sis_lightning (\w+)", first) == ["fit"]
    assert re.findall(r"sis_lightning (\w+)", later) == ["fit", "test"]


def test_costs_follow_from_images_and_operations(tmp_path):
    """12 epochs of 1,000 images with 2 GMAC; checkpoints of SGD have two values for each weight."""
    run = RunSpec("det_coco", ("tasks/det_coco.yaml",), DataSet("some", "official", train_images=1000))
    model = Model("", "", 30_000_000, 2_000_000_000, (800, 1344))
    entry = MissingRun("2", "row", Experiment(run, "sis50"), model, 0, tmp_path, "not begun", "")
    cost = cost_of(entry, 10)
    assert cost.images == 12_000
    assert cost.hours == pytest.approx(12_000 * 2e9 * 6 / 10e12 / 3600)
    assert cost.disk == 4 * 2 * 4 * 30_000_000
    steps = RunSpec("seg_voc", ("tasks/seg_voc.yaml",), DataSet("some", "official"))
    fewer = RunSpec(**{**vars(steps), "options": {"trainer.max_steps": 10, "data.batch_size": 3}})
    entry = MissingRun("3", "", Experiment(fewer, "sis50"), model, 0, tmp_path, "not begun", "")
    assert cost_of(entry, 1).images == 30
    assert (
        cost_of(MissingRun("3", "", Experiment(steps, "sis50"), model, 0, tmp_path, "not begun", ""), 1).images
        == 480_000
    )


def test_the_cost_of_a_table_is_printed(start_tables):
    code, out, _ = start_tables("cost", "--tflops", "0.001")
    assert code == 0
    assert "ImageNet weights" in out
    assert "0.001 TFLOP/s" in out
    assert start_tables("cost", "--tflops", "0")[0] == 2


def test_a_start_from_no_run_is_refused(start_tables, tmp_path):
    path = tmp_path / "results" / "toys.yaml"
    path.write_text(path.read_text().replace("run: toy_first, published", "run: toy_frist, published"))
    code, _, err = start_tables("plan")
    assert code == 2
    assert "runs.toy_later.pretrained.run: there is no 'toy_frist'" in err
