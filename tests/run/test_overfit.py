"""Overfitting one photograph, a shorter form of configs/overfit.yaml: data, labels and loss fit together."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest


def losses(run: Path) -> list[float]:
    with (run / "csv" / "fit" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize(
    ("task", "smaller", "metric", "minimum"),
    [
        (
            "det_coco",
            ["--model.min_size", 192, "--model.max_size", 256, "--data.limit", 1, "--data.batch_size", 1],
            "test/AP50",
            0.3,
        ),
        ("kpt_coco", ["--data.input_size", "[96,96]"], "test/AP", 0.3),
    ],
)
def test_a_photograph_is_overfitted(command, shared, task, smaller, metric, minimum):
    options = ["--config", f"tasks/{task}.yaml", "--config", "configs/demo.yaml", "--config", "configs/overfit.yaml"]
    options += ["--data.root", shared / "coco_mini", "--data.num_workers", 0, "--run_dir", "run", *smaller]
    options += ["--trainer.max_steps", 120, "--model.lr_scheduler.init_args.total_steps", 120]
    fit = command("fit", *options, "--trainer.log_every_n_steps", 1)
    assert fit.code == 0, fit.err
    loss = losses(Path("run"))
    assert sum(loss[-10:]) < 0.5 * sum(loss[:10])
    test = command("test", *options)
    assert test.code == 0, test.err
    assert json.loads(Path("run/test.json").read_text())["metrics"][metric] > minimum
