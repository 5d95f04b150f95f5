"""Directories whose names look like markup of the `rich` library are printed as they are."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from rich.table import Table

from sis_lightning.text_tables import table_to_text

#: A closing tag that was not opened (an error in markup); a style, an emoji and an escape.
NAMES = ["br[/x]", "br[v2]x:smile:\\[b]"]


@pytest.mark.parametrize("name", NAMES)
def test_cells_of_tables_are_printed_as_they_are(name):
    table = Table(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    assert table_to_text(table).count(name) == 4


@pytest.fixture(params=NAMES)
def odd(request, command, small, synthetic, tmp_path) -> tuple[str, list[object]]:
    """A name, and options of a run in a directory and on data of this name; after a few training steps."""
    name = request.param
    shutil.copytree(synthetic / "VOCdevkit", tmp_path / name / "VOCdevkit")
    options = [*small("seg_voc", steps=5), "--data.root", name, "--run_dir", f"runs/{name}"]
    fit = command("fit", *options)
    assert fit.code == 0, fit.err
    for line in (
        f"          run  runs/{name}",
        f"checkpoint: runs/{name}/checkpoints/last.ckpt, best.ckpt beside it",
        f"next: sis-lightning test --config runs/{name}/config.yaml",
    ):
        assert line in fit.out.splitlines(), fit.out
    assert f"         data  {name}: " in fit.out
    return name, options


def test_every_command_prints_paths_as_they_are(odd, command, tmp_path):
    name, options = odd
    again = command("fit", *options, "--resume", "auto")
    assert f"runs/{name} is finished: 5 steps, runs/{name}/checkpoints/last.ckpt" in again.out
    for what in ("validate", "test", "predict"):
        result = command(what, *options)
        assert result.code == 0, result.err
        assert f"checkpoint runs/{name}/checkpoints/last.ckpt, step 5" in result.out
    assert re.search(rf"predictions in {re.escape(f'runs/{name}')}/predictions", result.out)
    assert f"runs/{name} " in command("status").out
    assert json.loads(command("status", "--json").out)[0]["run"] == f"runs/{name}"
    assert f"\n{name}: " in command("check-data", *options[:-2]).out
    shutil.copytree(tmp_path / "runs" / name, tmp_path / "other")
    compared = command("compare", f"runs/{name}", "other", "--rounds", 0)
    assert f"runs/{name}" in compared.out + compared.err
    lost = command("test", *options, "--ckpt_path", f"{name}/lost.ckpt")
    assert lost.code == 1
    assert f"no checkpoint {name}/lost.ckpt" in lost.err


def test_evaluate_prints_paths_as_they_are(command):
    result = command("evaluate", "--type", "bbox", "--truth", "br[/x]/lost.json", "--results", "br[/x]/lost.json")
    assert result.code == 1
    assert "br[/x]/lost.json" in result.err
