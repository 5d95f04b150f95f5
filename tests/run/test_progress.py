"""Progress: one line in a terminal of any width, lines elsewhere, and the words at the end."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from sis_lightning.run import start
from sis_lightning.run.reporting import progress


def test_a_short_run_prints_its_loss_and_its_end(command, small):
    options = [*small("seg_voc", steps=8), "--trainer.log_every_n_steps", "50", "--run_dir", "run"]
    result = command("fit", *options)
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("step ")]
    assert len(lines) == 8
    assert all(re.search(r"loss \d+\.\d{4}  lr ", line) for line in lines)
    assert re.search(r"finished after 8 steps, .*; val/miou 0\.\d+ last, 0\.\d+ best", result.out)
    assert "checkpoint: run/checkpoints/last.ckpt, best.ckpt beside it" in result.out
    assert "next: sis-lightning test --config run/config.yaml" in result.out
    # What it says works.
    tested = command("test", "--config", "run/config.yaml")
    assert tested.code == 0, tested.err
    assert "test/miou 0." in tested.out
    validated = command("validate", "--config", "run/config.yaml")
    assert validated.code == 0, validated.err
    assert "validation at step 8" in validated.out


def test_a_run_without_a_number_of_steps_says_so(command, small):
    endless = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:01"]
    result = command("fit", *small("seg_voc", steps=100_000), *endless)
    assert result.code == 0, result.err
    assert "       length  no limit of steps, 1 s (trainer.max_time)" in result.out.splitlines()
    assert re.search(r"^step +\d+  epoch", result.out, re.MULTILINE)
    assert not re.search(r"\b(inf|nan)\b", result.out)


def test_a_long_run_prints_about_twenty_lines(command, small):
    result = command("fit", *small("seg_voc", steps=60), "--trainer.log_every_n_steps", "50")
    assert result.code == 0, result.err
    assert len([line for line in result.out.splitlines() if line.startswith("step ")]) == 20


class EveryUpdateShown(Progress):
    """Draws at each update: by its clock, a run of a second shows some of its steps, others on each machine."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **{**kwargs, "refresh": True})


@pytest.mark.parametrize("width", [80, 120])
def test_one_line_in_a_terminal(command, small, monkeypatch, width):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=width, soft_wrap=True, highlight=False)
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(start, "console", console)
    monkeypatch.setattr(progress, "Progress", EveryUpdateShown)
    result = command("fit", *small("seg_voc", steps=8))
    assert result.code == 0, result.err
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    lines = [line for line in re.split(r"[\r\n]", plain) if line.startswith(("step", "validation"))]
    assert any("loss" in line and "lr" in line for line in lines), plain
    assert max(len(line.rstrip()) for line in lines) <= width
    assert any("images/s" in line and "left" in line for line in lines), plain


def test_the_numbers_that_do_not_fit_are_left_out():
    column = progress._Numbers(47)
    line = progress.Progress(console=Console(file=io.StringIO(), width=80))
    line.add_task("step", total=10, numbers=["loss 1.2345", "lr 0.01", "images/s 100.0", "miou 0.5000"])
    text = str(column.render(line.tasks[0]))
    assert text == "loss 1.2345  lr 0.01  -:-- left"
