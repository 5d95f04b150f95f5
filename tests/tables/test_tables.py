"""Tables: every cell shows what was measured and on which data, and nothing else is shown."""

from __future__ import annotations

import copy
import csv
import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sis_lightning.commands.main import main
from sis_lightning.errors import UsageError
from sis_lightning.files import digest
from sis_lightning.run import record as run_record
from sis_lightning.run.recipe import recipe, settled
from sis_lightning.run.record import read_record, write_record, write_with_checksum
from sis_lightning.tables.cells import Cell, fill, mixed
from sis_lightning.tables.data_sets import DataSet
from sis_lightning.tables.differences import Difference, holm, welch
from sis_lightning.tables.judge import Evidence
from sis_lightning.tables.models import Model, Models
from sis_lightning.tables.render import to_csv, to_latex, to_markdown
from sis_lightning.tables.results import roots_of, seeds_of
from sis_lightning.tables.spec import (
    Column,
    Experiment,
    Group,
    Pretrained,
    RunSpec,
    Table,
    TableSpec,
    read_specs,
    spec_files,
)

RESULTS = Path(__file__).parents[2] / "results"
values = st.dictionaries(st.integers(0, 9), st.floats(-1e3, 1e3), min_size=2, max_size=6)


@given(values)
def test_mean_and_deviation_are_numpys(ours):
    cell = Cell(None, ours, (), "synthetic")
    assert cell.mean == pytest.approx(np.mean(list(ours.values())), rel=1e-9, abs=1e-9)
    assert cell.std == pytest.approx(np.std(list(ours.values()), ddof=1), rel=1e-6, abs=1e-6)


@given(values, values)
def test_differences_are_those_of_scipys_welch_test(ours, base):
    left, right = list(ours.values()), list(base.values())
    found = welch(left, right)
    assert found.mean == pytest.approx(np.mean(left) - np.mean(right), abs=1e-9)
    assert found.seeds == (len(left), len(right))
    if min(np.var(left), np.var(right)) > 1e-6:
        expected = scipy.stats.ttest_ind(left, right, equal_var=False)
        interval = expected.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)
        # No statement below five seeds, on either side.
        assert (found.p is None) == (min(len(left), len(right)) < 5)
        if found.p is not None:
            assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)


def test_one_seed_gives_neither_interval_nor_statement():
    assert welch([], [1.0]) is None
    assert welch([2.0], [1.0, 1.5]) == Difference(0.75, None, None, None, (1, 2))
    assert Cell(None, {3: 0.5}, (), "synthetic").std is None


@given(st.lists(st.none() | st.floats(0, 1), max_size=8))
def test_probabilities_are_corrected_as_holm_defines(ps):
    """His definition: the hypotheses are rejected in the order of p as long as p <= 0.05 / (those that are left)."""
    made = [None if p is None else Difference(1.0, 0.0, 2.0, p, (5, 5)) for p in ps]
    made.insert(1, Difference(1.0, 0.0, 2.0, None, (3, 5)))
    corrected = holm(made)
    known = sorted((p, place) for place, p in enumerate(entry and entry.p for entry in made) if p is not None)
    rejected = set()
    for rank, (p, place) in enumerate(known):
        if p * (len(known) - rank) >= 0.05:
            break
        rejected.add(place)
    assert {place for place, entry in enumerate(corrected) if entry and entry.shown} == rejected
    assert [entry and entry.p is None for entry in corrected] == [entry and entry.p is None for entry in made]


OFFICIAL = DataSet("Official", "official", ("official test",), ("official train",), test_images=1)
RUN = RunSpec("seg", ("tasks/seg_voc.yaml",), OFFICIAL, seeds=(0, 1))
CONFIG = {"trainer": {"sync_batchnorm": False, "max_steps": 1}, "data": {"init_args": {"batch_size": 4}}}
RECIPE = digest(recipe(CONFIG))


def of_code(**changes: Any) -> dict[str, Any]:
    """The environment of a test, with other code."""
    return {
        "code": {"sis_lightning": "1", "commit": "c" * 40, "dirty": False, **changes},
        "machine": {"device": "cpu", "processor": "p", "instructions": "i", "threads": 1},
        "python": "3",
        "packages": {},
    }


def piece(seed: int | None = 0, value: float | None = 0.5, name: str | None = None, **changes: Any) -> Evidence:
    """A record that counts for `RUN` on `sis50`, except for the changes, whose keys have `__` for a dot."""
    content: dict[str, Any] = {
        "task": "seg",
        "backbone": "slug-of-sis50",
        "primary_metric": "test/miou",
        "metrics": {"test/miou": value},
        "data": {
            "root": "data",
            "identity": "other",
            "fingerprint": "official test",
            "images": 1,
            "trained_on": ["official train"],
        },
        "seed": seed,
        "config": {**CONFIG, "seed_everything": seed},
        "config_hash": digest(settled(CONFIG)),
        "recipe_hash": RECIPE,
        "checkpoint": {
            "file": "last.ckpt",
            "sha256": f"weights {seed} {value}",
            "step": 1,
            "epoch": 1,
            "finished": True,
        },
        "training": {"restarts": 0, "seconds": 1.0, "devices": 1, "environments": [of_code()]},
        "environment": of_code(),
        "date": f"2026-01-0{1 + (seed or 0)}",
    }
    content = copy.deepcopy(content)
    for dotted, new in changes.items():
        place = content
        *outer, last = dotted.split("__")
        for key in outer:
            place = place[key]
        place[last] = new
    return Evidence.of(name or f"seed{seed}-{value}.json", run_record.TestRecord.model_validate(content))


def cell_of(*evidence: Evidence, run: RunSpec = RUN, running: tuple[str, ...] = ()) -> Cell:
    """The one cell of a table that is filled from those records."""
    column = Column("mIoU", run, "test/miou", 3)
    row = dataclasses.replace(_ROW, reported=(0.775,))
    table = Table("T", "t", (column,), (Group((row,)),), "the paper")
    models = Models("", (), {row.experiment(column).key: Model(RECIPE, "slug-of-sis50", 1, 1, (1, 1))})
    (filled,) = fill(TableSpec((table,), {}, {}, {}), evidence, models, running)
    return filled.lines[0].cells[0]


def test_a_record_counts_if_data_recipe_and_code_are_right():
    cell = cell_of(piece(0, 0.7), piece(1, 0.8))
    assert (cell.state, cell.values, cell.missing) == ("reproduced", {0: 0.7, 1: 0.8}, ())
    assert cell.difference == pytest.approx(0.75 - 0.775)
    assert cell.records == ("seed0-0.7.json", "seed1-0.8.json")
    one = cell_of(piece(1, 0.8))
    assert (one.state, one.values, one.missing) == ("reproduced", {1: 0.8}, (0,))
    # An option that is off is the same as one that does not exist.
    off = {"trainer.benchmark": {"trained": None, "tested": False}}
    assert cell_of(piece(tested_otherwise=off)).state == "reproduced"


def changed_for_test(key: str, trained: Any, tested: Any) -> dict[str, Any]:
    return {"tested_otherwise": {key: {"trained": trained, "tested": tested}}}


@pytest.mark.parametrize(
    ("state", "changes"),
    {
        "a folder with the right name": (
            "other data",
            {"data__root": "VOCdevkit", "data__identity": "official", "data__fingerprint": "x"},
        ),
        "the marker removed": ("other data", {"data__fingerprint": "of synthetic files"}),
        "the marker there": (
            "synthetic",
            {"data__identity": "synthetic (seed 0)", "data__fingerprint": "of synthetic files"},
        ),
        "trained on other files": ("other data", {"data__trained_on": ["of synthetic files"]}),
        "trained on other files too": ("other data", {"data__trained_on": ["official train", "of others"]}),
        "nobody knows on what": ("other data", {"data__trained_on": []}),
        "another configuration by the same name": ("other recipe", {"config__trainer__max_epochs": 9}),
        "another configuration by another name": ("not run", {"config__trainer__max_epochs": 9, "task": "mine"}),
        "the best checkpoint": ("other recipe", {"checkpoint__finished": False}),
        "some of the test images": ("other recipe", changed_for_test("trainer.limit_test_batches", None, 5)),
        "no test images": ("other recipe", changed_for_test("data.init_args.limit", None, 0)),
        "without the flipped image": ("other recipe", changed_for_test("model.init_args.flip_test", True, False)),
        "persons found by a detector": (
            "other recipe",
            changed_for_test("data.init_args.person_boxes", None, "boxes.json"),
        ),
        "uncommitted changes in the test": ("other recipe", {"environment": of_code(dirty=True)}),
        "uncommitted changes in the training": ("other recipe", {"training__environments": [of_code(dirty=True)]}),
        "a configuration that was changed during training": ("other recipe", {"training__changed": ["model.lr"]}),
        "another metric": ("not run", {"metrics": {"test/top1": 0.5}}),
        "an operator that was changed after training": (
            "other recipe",
            {
                "training__environments": [of_code(operators={"mine": "a"})],
                "environment": of_code(operators={"mine": "b"}),
            },
        ),
        "code of no commit": ("other recipe", {"environment": of_code(commit=None, dirty=None, digest="d")}),
        "training by code of no commit": (
            "other recipe",
            {"training__environments": [of_code(commit=None, dirty=None, digest="d")]},
        ),
        "a metric without a value": ("not run", {"metrics": {"test/miou": None}}),
    }.values(),
    ids=str,
)
def test_records_of_something_else_never_count(state, changes):
    cell = cell_of(piece(**changes))
    assert cell.state == state
    assert not cell.values
    assert cell.mean is None
    assert cell.difference is None
    # Beside one that counts, it changes nothing.
    both = cell_of(piece(**changes), piece(1, 0.8))
    assert (both.state, both.values, both.missing) == ("reproduced", {1: 0.8}, (0,))


def test_states_of_data_that_is_not_official():
    for kind, state in (("synthetic", "synthetic"), ("stand-in", "other data"), ("official", "reproduced")):
        run = dataclasses.replace(RUN, data=dataclasses.replace(OFFICIAL, kind=kind))
        cell = cell_of(piece(), run=run)
        assert (cell.state, cell.values) == (state, {0: 0.5})
        assert (cell.difference is not None) == (kind == "official")
        # The state of a record of other files does not depend on the kind of the table.
        assert cell_of(piece(data__fingerprint="of others"), run=run).state == "other data"
    assert cell_of().state == "not run"
    assert cell_of(running=("seg sis50 operator=basic",)).state == "running"
    assert cell_of(piece(0), running=("seg sis50 operator=basic",)).state == "reproduced"


def test_of_a_seed_that_was_measured_twice_the_later_counts_and_the_other_is_told():
    cell = cell_of(piece(0, 0.9, date="2026-02-02"), piece(0, 0.1, date="2026-01-01"))
    assert cell.values == {0: 0.9}
    assert cell.superseded == 1


_ROW = next(
    row
    for table in read_specs(spec_files(RESULTS)).tables
    if table.id == "3"
    for group in table.groups
    for row in group.rows
    if row.label == "Basic SIS"
)


# The paper's figures.


def figures_of(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w-])\d*\.\d+|\b\d+(?=[MG]\b)", text)]


def paper_rows(lines: list[str], start: str) -> dict[str, list[float]]:
    """The rows of a table as the specification lists them: `name 1.0 2.0 · name …`."""
    line = next(line for line in lines if line.startswith(start))
    line = line.partition(":")[2] or lines[lines.index(line) + 1]
    found = {}
    for part in line.split(" · "):
        match = re.match(r"\s*([A-Za-z][\w-]*)\s+(.*)", part.replace(" / ", "/"))
        found[match[1]] = figures_of(match[2])
    return found


NAMES = {
    "Interactive SIS-I": "interactive1",
    "Interactive SIS-II": "interactive2",
    "Recurrent SIS-I": "recurrent1",
    "Recurrent SIS-II": "recurrent2",
    "Basic SIS": "basic",
}


def test_every_figure_of_the_paper_is_in_the_tables(shared):
    """Read from the page that is rendered, against the specification's own listing."""
    path = shared.parent / "spec" / "PAPER.md"
    if not path.is_file():
        pytest.skip("the paper's specification is not here")
    spec = path.read_text().splitlines()
    page = (RESULTS / "TABLES.md").read_text()
    sections = {part.partition(":")[0].removeprefix("Table "): part for part in page.split("\n## ")[1:]}
    compared = 0
    blocks = {
        "1": [next(i for i, line in enumerate(spec) if line.startswith("Table 1, "))],
        "2": [next(i for i, line in enumerate(spec) if line.startswith("Table 2, "))],
        "3": [next(i for i, line in enumerate(spec) if line.startswith("Table 3, "))],
        "4": [i for i, line in enumerate(spec) if line.startswith(("- 50 layers:", "- 101 layers:"))],
    }
    for table, starts in blocks.items():
        rows = [line for line in sections[table].splitlines() if line.startswith("| ") and "<br>" in line]
        rows = [line for line in rows if not re.search(r"\| –<br>", line)]
        wanted = []
        for start in starts:
            text = spec[start].partition(": ")[2] if spec[start].startswith("- ") else spec[start + 1]
            wanted += [(m[1], figures_of(m[2])) for m in re.finditer(r"([A-Z\w][\w-]*) ([^·]+)", text)]
        ours = []
        for line in rows:
            label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            label = label.partition("<sup>")[0]
            reported = [float(cell.partition("<br>")[0]) for cell in cells if "<br>" in cell]
            ours.append((NAMES.get(label, label), reported))
        assert sorted(ours) == sorted(wanted), table
        compared += sum(len(figures) for _, figures in wanted)
    steps = next(line for line in spec if line.startswith("Table 1-1"))
    wanted = [[float(n) for n in m.split("/")] for m in re.findall(r"\d+\.\d+/\d+\.\d+/\d+\.\d+", steps)]
    lines = [line for line in sections["1-1"].splitlines() if "<br>" in line]
    assert [[float(n) for n in re.findall(r"(\d+\.\d+)<br>", line)] for line in lines] == wanted
    assert compared + sum(map(len, wanted)) == 24 + 21 + 14 + 130 + 6


def test_what_is_committed_agrees_with_records_and_code(capfd):
    assert main(["tables", "check", "--results", str(RESULTS)]) == 0, capfd.readouterr().out


# A folder of results of our own, by real commands.


def test_from_a_run_to_its_cell_and_back(results, capfd):
    assert results("render") == 0
    measured = {}
    for path in Path("results/records").glob("*.json"):
        record = read_record(path)
        measured[record.seed] = record.metrics["test/miou"]
        # Trained and tested by the same code; an installed package has a digest instead of a commit.
        code = record.environment.code
        assert [start.code for start in record.training.environments] == [code]
        assert (code.commit, bool(code.digest)) == (None, True)
        # The record is a copy of the run's.
        run = Path("runs/toy_seg", record.backbone, f"seed{record.seed}", "test.json")
        assert run.read_bytes() == path.read_bytes()
    assert sorted(measured) == [0, 1]
    mean, std = np.mean(list(measured.values())), np.std(list(measured.values()), ddof=1)
    page = Path("results/TABLES.md").read_text()
    assert f"{mean:.4f} ± {std:.4f}<br>*synthetic, n = 2*" in page
    assert "| Basic SIS |" in page
    assert "*not run*" in page
    with Path("results/tables.csv").open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["column"] == "mIoU" and row["row"] == "Res2Net"]
    assert float(row["mean"]) == pytest.approx(mean, abs=1e-12)
    assert (row["n"], row["state"], len(row["records"].split())) == ("2", "synthetic", 2)
    assert f"{mean:.4f}" in Path("results/tables.html").read_text()
    assert f"{mean:.4f}" in Path("results/latex/table_9.tex").read_text()
    assert results("check") == 0, capfd.readouterr().out
    # What was tested elsewhere is told, and how it is taken in.
    record = next(Path("results/records").glob("*seed1*.json"))
    record.unlink()
    assert results("plan", "--rows", "Res2Net") == 0
    assert f"seed 1: tested: sis-lightning tables add {run.parent.parent}" in capfd.readouterr().out
    assert results("add", "runs") == 0
    assert record.is_file()
    # `run` takes it in too, and runs nothing again.
    record.unlink()
    untouched = run.stat().st_mtime_ns
    capfd.readouterr()
    assert results("run", "--rows", "Res2Net") == 0
    assert re.fullmatch(r"table 9, Res2Net, seed 1: test/miou 0\.\d+\n", capfd.readouterr().out)
    assert record.is_file()
    assert run.stat().st_mtime_ns == untouched
    assert results("run", "--rows", "Res2Net") == 0
    assert capfd.readouterr().out == "nothing is missing\n"
    assert results("add", "runs") == 0
    assert "nothing new" in capfd.readouterr().out


def test_what_was_edited_is_found(results, capfd):
    assert results("render") == 0
    page = Path("results/TABLES.md")
    text = page.read_text()
    page.write_text(text.replace("*not run*", "0.9999"))
    assert results("check") == 1
    assert "TABLES.md does not match specs and records" in capfd.readouterr().out
    page.write_text(text)
    Path("results/tables.csv").unlink()
    assert results("check") == 1
    assert "tables.csv is missing" in capfd.readouterr().out
    assert results("render") == 0

    record = next(Path("results/records").glob("*.json"))
    content = json.loads(record.read_text())
    content["metrics"]["test/miou"] += 0.1
    record.write_text(json.dumps(content))
    for command in ("render", "check", "plan"):
        assert results(command) == 1
        assert "checksum mismatch" in capfd.readouterr().err
    assert page.read_text() == text
    record.write_text("{")
    assert results("render") == 1
    assert "not valid JSON" in capfd.readouterr().err


def test_counts_that_the_code_does_not_give_are_found(results, capfd):
    assert results("render") == 0
    kept = Path("results/models.json")
    content = json.loads(kept.read_text())
    kept.write_text(json.dumps(content).replace('"parameters": ', '"parameters": 1'))
    assert results("render") == 1
    assert "checksum mismatch" in capfd.readouterr().err
    # With a valid checksum, as if an earlier release had counted it.
    content.pop("checksum")
    content["code"] = "of an earlier release"
    next(iter(content["models"].values()))["parameters"] += 1
    write_with_checksum(kept, content)
    assert results("render") == 0
    assert results("check") == 1
    assert re.search(r"parameters was \d+, and is now \d+", capfd.readouterr().out)
    assert results("count") == 0
    assert results("render") == 0
    assert results("check") == 0
    kept.unlink()
    assert results("render") == 1
    assert "sis-lightning tables count" in capfd.readouterr().err


def test_another_recipe_under_the_same_names_is_found(results, capfd):
    """In the spec, or in a backbone of the user's own."""
    assert results("render") == 0
    spec = Path("results/toys.yaml")
    text = spec.read_text()
    spec.write_text(text.replace("data.crop_size: 32", "data.crop_size: 64"))
    assert results("check") == 1
    assert re.search(r"recipe was \w+, and is now \w+", capfd.readouterr().out)
    spec.write_text(text)
    assert results("check") == 0
    own = Path("configs/backbones/sis_demo.yaml")
    own.parent.mkdir(parents=True)
    own.write_text((RESULTS.parent / own).read_text().replace("depth: 14", "depth: 26"))
    assert results("check") == 1
    assert "toy_seg sis_demo operator=basic: " in capfd.readouterr().out


def test_what_is_missing_is_listed_with_commands_that_hold(results, capfd):
    capfd.readouterr()
    assert results("plan", "--seeds", "1,5") == 0
    out = capfd.readouterr().out
    lines = [line.strip() for line in out.splitlines() if line.startswith("  sis-lightning fit")]
    assert len(lines) == 3  # seed 5 of both rows, seed 1 of one
    assert "--seed_everything 5" in lines[0]
    assert "not begun" in out
    # What is listed is what fit resolves to the cell's recipe.
    command = lines[-1].split()[1:]
    assert main([*command, "--print_config"]) == 0
    assert "operator: basic" in capfd.readouterr().out
    assert results("plan", "--table", "10") == 2
    assert "there is no table '10'" in capfd.readouterr().err
    assert results("plan", "--rows", "bacis") == 2
    assert "did you mean 'basic'" in capfd.readouterr().err.lower()
    assert results("plan", "--roots", "toy_seg=elsewhere", "--rows", "basic") == 0
    assert "--data.root elsewhere" in capfd.readouterr().out
    assert results("plan", "--roots", "toy=elsewhere") == 2


def test_a_cluster_gets_an_array_for_each_row(results, capfd):
    capfd.readouterr()
    assert results("run", "--launcher", "slurm", "--rows", "basic", "--", "--dry-run", "--time", "0:30:00") == 0
    out = capfd.readouterr().out
    assert "#SBATCH --array=0,1" in out
    assert "#SBATCH --time=0:30:00" in out
    assert re.findall(r"sis_lightning (\w+)", out) == ["fit", "test"]
    assert out.count("--seed_everything=$SLURM_ARRAY_TASK_ID") == 2


def test_a_run_that_fails_says_so_and_the_others_go_on(results, capfd):
    assert results("run", "--rows", "basic", "--", "--data.root", "nowhere", "--data.synthetic", "null") == 1
    captured = capfd.readouterr()
    assert captured.err.count("fit failed (1)") == 2
    assert "nowhere" in captured.err
    assert not list(Path("results/records").glob("*basic*"))


def test_options_that_make_another_run_of_it_are_refused(results, capfd):
    assert results("run", "--rows", "basic", "--", "--data.crop_size", "64") == 2
    err = capfd.readouterr().err
    assert "data.init_args.crop_size: 32, with these options 64" in err
    assert len(err.splitlines()) <= 5
    for options, words in {
        ("--trainer.precision", "bf16-true"): "trainer.precision: ",
        ("--run_dir=mine",): "tables run sets --run_dir itself",
        ("--seed_everything", "7"): "tables run sets --seed_everything itself",
    }.items():
        assert results("run", "--rows", "basic", "--", *options) == 2
        assert words in capfd.readouterr().err
    # For a cluster too, whose own options are none of them.
    there = ("run", "--rows", "basic", "--launcher", "slurm", "--", "--dry-run", "--time", "1:00:00")
    assert results(*there, "--data.crop_size", "64") == 2
    assert "with these options 64" in capfd.readouterr().err
    assert not list(Path("runs/toy_seg").glob("*basic*/seed*"))


def test_what_was_run_and_does_not_count_is_told_and_left(results, capfd):
    run = next(Path("runs/toy_seg").glob("*/seed1"))
    next(Path("results/records").glob("*seed1*.json")).unlink()
    # Tested on other settings than the table's, and taken in.
    content = json.loads((run / "test.json").read_text())
    content.pop("checksum")
    write_with_checksum(run / "test.json", content | changed_for_test("data.init_args.limit", None, 2))
    capfd.readouterr()
    assert results("run", "--rows", "Res2Net") == 0
    assert "does not count: it was tested with another data.init_args.limit" in capfd.readouterr().err
    before = (run / "test.json").read_bytes()
    assert results("run", "--rows", "Res2Net") == 0
    out = capfd.readouterr().out
    assert "tested, but does not count: it was tested with another data.init_args.limit" in out
    assert "--seed_everything 1 --overwrite true" in out
    assert (run / "test.json").read_bytes() == before
    # A record that is damaged is to be measured again, and bars nothing else.
    (run / "test.json").write_text("{")
    assert results("plan", "--rows", "Res2Net") == 0
    out = capfd.readouterr().out
    assert "trained, but must be tested again" in out
    assert re.search(r"sis-lightning test .*--seed_everything 1\n", out)
    # Of several, none is taken where one is damaged.
    known = sorted(Path("results/records").iterdir())
    assert results("add", "runs") == 1
    assert "not valid JSON" in capfd.readouterr().err
    assert sorted(Path("results/records").iterdir()) == known
    (run / "test.json").write_text('{"checksum": "x", "metrics": {"test/miou": NaN}}')
    assert results("add", run) == 1
    assert "JSON has no NaN" in capfd.readouterr().err


def test_a_row_adds_to_the_fields_of_its_group(toy_spec, tmp_path):
    content = yaml.safe_load(toy_spec())
    content["tables"][0]["groups"][0]["fields"] = {"channels": 8, "width": 4}
    content["tables"][0]["groups"][0]["rows"][1]["fields"] = {"width": 12}
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    (table,) = read_specs([path]).tables
    plain, basic = table.groups[0].rows
    assert basic.fields == {"channels": 8, "width": 12}
    assert plain.fields == {}  # it names a backbone of its own


TOY = '''
from torch import Tensor
from sis_lightning.operators import SISOperator, register_operator

@register_operator("halved")
class Halved(SISOperator):
    """K2 over half of the channels that K1 gives."""

    def kernel_shapes(self):
        half = self.out_channels // 2
        return {"K1": (half, self.in_channels), "K2": (half, half)}

    def literal(self, x: Tensor) -> Tensor:
        first = self.convolve(x, self.K1, stride=self.stride)
        return self.join(first, self.convolve(first, self.K2))

    def join(self, *parts):
        import torch
        return torch.cat(parts, 1)
'''


def test_an_operator_of_a_user_is_in_every_table_unasked(toys, tmp_path):
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    (tmp_path / "halved.py").write_text(TOY)

    def call(*arguments: str) -> str:
        line = [sys.executable, "-m", "sis_lightning", *arguments]
        environment = {**os.environ, "SIS_OPERATORS": "halved"}
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = call("tables", "plan", "--rows", "halved")
    assert out.count("--model.backbone sis_demo --model.backbone.operator halved") == 2
    call("tables", "render")
    (tmp_path / "broken.py").write_text(TOY.replace("halved", "broken").replace("half, half", "half, 3"))
    line = [sys.executable, "-m", "sis_lightning", "tables", "plan"]
    environment = {**os.environ, "SIS_OPERATORS": "broken"}
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)
    # It stops its own row alone.
    assert done.returncode == 0, done.stderr
    assert "the operator 'broken' cannot be built or run" in done.stderr
    assert "Traceback" not in done.stderr
    assert "operator basic" in done.stdout
    assert "operator broken" not in done.stdout
    (line,) = [line for line in (tmp_path / "results/TABLES.md").read_text().splitlines() if "| halved |" in line]
    parameters = float(line.split("|")[2])
    assert parameters > 0
    assert "*not run*" in line
    # And in the paper's own: a row in each group that has a host.
    spec = read_specs(spec_files(RESULTS)).with_operators(("conv", "basic", "halved"))
    for table in spec.tables:
        assert any(row.operator == "halved" for group in table.groups for row in group.rows), table.id


def test_books_that_cannot_be_say_where(toy_spec, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    good = yaml.safe_load(toy_spec())

    def refused(change: Callable[[dict[str, Any]], None]) -> str:
        content = copy.deepcopy(good)
        change(content)
        Path("results/spec.yaml").write_text(yaml.safe_dump(content))
        assert main(["tables", "render"]) == 2
        err = capfd.readouterr().err
        assert "results/spec.yaml" in err
        assert len(err.splitlines()) <= 5
        return err

    assert "no key 'titel'" in refused(lambda b: b["data"]["toys"].update(titel="x"))
    assert "there is no 'toyz'" in refused(lambda b: b["runs"]["toy_seg"].update(data="toyz"))
    assert "there is no 'seg'" in refused(lambda b: b["tables"][0]["columns"][0].update(run="seg"))
    assert "3 reported values for 1 columns" in refused(
        lambda b: b["tables"][0]["groups"][0]["rows"][0].update(reported=[1, 2, 3])
    )
    assert "there is no 'tiny'" in refused(lambda b: b["tables"][0].update(notes=["tiny"]))
    assert "baseline" in refused(lambda b: b["tables"][0]["groups"][0].update(baseline="nobody"))
    assert "a table spec has no key 'table'" in refused(lambda b: b.update(table=[]))
    assert "data.toys.kind: Input should be" in refused(lambda b: b["data"]["toys"].update(kind="oficial"))
    assert "runs.toy_seg.seeds" in refused(lambda b: b["runs"]["toy_seg"].update(seeds=3))
    assert "better: Input should be" in refused(lambda b: b["tables"][0]["columns"][0].update(better="Lower"))
    assert "id: Input should be a valid string, is 9" in refused(lambda b: b["tables"][0].update(id=9))
    assert "must be a mapping" in refused(lambda b: b.update(runs=["toy_seg"]))
    assert "must be a mapping" in refused(lambda b: b["tables"][0].update(groups=["all"]))
    assert "must be a list" in refused(lambda b: b.update(tables={"9": {}}))
    assert "complexity 1: no key 'lable'" in refused(lambda b: b["tables"][0]["complexity"][0].update(lable="x"))
    assert "complexity 1.digits" in refused(lambda b: b["tables"][0]["complexity"][0].update(digits="one"))
    assert "there is no '['toy_seg']'" in refused(lambda b: b["tables"][0]["columns"][0].update(run=["toy_seg"]))
    assert "runs.toy_seg.config" in refused(lambda b: b["runs"]["toy_seg"].update(config=[]))
    assert "table 'T.1' is in two" in refused(
        lambda b: b.update(tables=[{**b["tables"][0], "id": name} for name in ("t.1", "T.1")][::-1])
    )
    other = copy.deepcopy(good)
    other["runs"]["toy_seg"]["seeds"] = [7]
    other["tables"][0]["id"] = "10"
    Path("results/another.yaml").write_text(yaml.safe_dump(other))
    assert "runs.toy_seg: another table spec defines it differently" in refused(lambda b: None)
    Path("results/another.yaml").unlink()
    Path("results/spec.yaml").write_text("tables: [")
    assert main(["tables", "render"]) == 2
    assert "not valid YAML" in capfd.readouterr().err


def test_labels_of_any_characters_are_shown_in_all_forms(toy_spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(toy_spec())
    label = "50 % | a_b & <c> $x$ #1 {y} ~^\\\\"
    content["tables"][0]["groups"][0] = {"title": label, "rows": [{"label": label, "backbone": "sis_demo"}]}
    Path("results").mkdir()
    Path("results/spec.yaml").write_text(yaml.safe_dump(content))
    assert main(["tables", "count"]) == 0
    assert main(["tables", "render"]) == 0
    row = next(line for line in Path("results/TABLES.md").read_text().splitlines() if line.startswith("| 50 %"))
    assert len(re.split(r"(?<!\\)\|", row)) == 6
    assert html.escape(label) in Path("results/tables.html").read_text()
    with Path("results/tables.csv").open(newline="") as file:
        assert {line["row"] for line in csv.DictReader(file)} == {label}
    if shutil.which("pdflatex"):
        text = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\\input{t}\\end{document}"
        Path("all.tex").write_text(text)
        shutil.copy("results/latex/table_9.tex", "t.tex")
        line = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1500:]


def test_seeds_and_roots():
    assert seeds_of(None) is None
    assert seeds_of("3") == [0, 1, 2]
    assert seeds_of("4,0,4") == [0, 4]
    assert seeds_of("0,") == [0]
    assert seeds_of("1..3") == [1, 2, 3]
    for text in ("0", "-1", "a", "3..1"):
        with pytest.raises(UsageError, match="--seeds"):
            seeds_of(text)
    assert roots_of(["det_coco=/data/coco"]) == {"det_coco": "/data/coco"}
    with pytest.raises(UsageError, match="RUN=DIR"):
        roots_of(["det_coco"])


@pytest.fixture
def many(toys, tmp_path, monkeypatch) -> Path:
    """The folder with 300 records."""
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    record = read_record(next(Path("results/records").glob("*seed0*.json")))
    for seed in range(10, 308):
        checkpoint = record.checkpoint.model_copy(update={"sha256": str(seed)})
        config = {**record.config, "seed_everything": seed}
        other = record.model_copy(update={"seed": seed, "checkpoint": checkpoint, "config": config})
        write_record(Path(f"results/records/{seed}.json"), other)
    return tmp_path


def test_rendering_needs_neither_torch_nor_matplotlib(many):
    program = (
        "import sys; from sis_lightning.commands.main import main; code = main(['tables', 'render']); "
        "heavy = {'torch', 'lightning', 'matplotlib', 'numpy.testing'} & {*sys.modules}; "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=many, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "n = 300" in (many / "results/TABLES.md").read_text()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_compiles(tmp_path):
    from sis_lightning.tables.results import Results

    results = Results(RESULTS)
    for filled in results.filled():
        (tmp_path / f"{filled.table.slug}.tex").write_text(to_latex(results.spec, filled))
    inputs = "\n".join(f"\\input{{{path.name}}}\\clearpage" for path in sorted(tmp_path.glob("*.tex")))
    head = "\\documentclass[a4paper]{article}\\usepackage{booktabs,graphicx}"
    text = f"{head}\\begin{{document}}{inputs}\\end{{document}}"
    (tmp_path / "all.tex").write_text(text)
    line = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    # On A4, no table is wider or higher than the page.
    assert "Overfull" not in done.stdout
    assert "Float too large" not in done.stdout
    assert (tmp_path / "all.pdf").stat().st_size > 10_000


def test_forms_agree_in_every_figure():
    """Markdown, CSV and LaTeX of the committed tables say the same."""
    from sis_lightning.tables.results import Results

    results = Results(RESULTS)
    tables = results.filled()
    page = to_markdown(results.spec, tables)
    rows = list(csv.DictReader(to_csv(tables).splitlines()))
    assert len(rows) == sum(len(line.cells) for filled in tables for line in filled.lines)
    columns = {(f.table.id, c.label): c for f in tables for c in f.table.columns}
    for row in rows:
        digits = columns[row["table"], row["column"]].digits
        for key in ("reported", "mean"):
            if row[key]:
                assert f"{float(row[key]):.{digits}f}" in page
    for filled in tables:
        text = to_latex(results.spec, filled)
        assert text.count("\\\\") >= len(filled.lines)
        for line in filled.lines:
            for cell, column in zip(line.cells, filled.table.columns, strict=True):
                if cell.mean is not None:
                    assert f"{cell.mean:.{column.digits}f}" in text


def test_an_experiment_is_the_command_that_makes_it():
    run = RunSpec("mine", ("tasks/seg_voc.yaml",), OFFICIAL, {"data.crop_size": 64})
    experiment = Experiment(run, "sis50", (("operator", "basic"), ("depth", 101)))
    assert experiment.key == "mine sis50 operator=basic depth=101"
    assert " ".join(experiment.options()) == (
        "--config tasks/seg_voc.yaml --task mine --model.backbone sis50 --model.backbone.operator basic "
        "--model.backbone.depth 101 --data.crop_size 64"
    )


def test_seeds_that_are_none_or_copies_do_not_count():
    unseeded = cell_of(piece(seed=1, value=0.8), piece(value=0.9, name="x.json", seed=None))
    assert unseeded.values == {1: 0.8}
    twins = cell_of(piece(0, 0.8, checkpoint__sha256="same"), piece(1, 0.8, checkpoint__sha256="same"))
    assert (twins.values, twins.missing) == ({0: 0.8}, (1,))
    assert any("its weights are the same as those of seed 0" in reason for reason in twins.reasons)
    # The same weights tested twice are one measurement.
    again = cell_of(piece(0, 0.8, checkpoint__sha256="same"), piece(0, 0.8, name="y", checkpoint__sha256="same"))
    assert (again.values, again.superseded) == ({0: 0.8}, 0)


def test_seeds_of_an_operator_that_was_changed_in_between_do_not_count_together():
    pieces = [
        piece(
            seed,
            value,
            environment=of_code(operators={"mine": name}),
            training__environments=[of_code(operators={"mine": name})],
        )
        for seed, value, name in ((0, 0.8, "a"), (1, 0.9, "b"))
    ]
    cell = cell_of(*pieces)
    assert (cell.values, cell.missing) == ({1: 0.9}, (0,))
    assert "its operator differs from that of seed 1" in cell.reasons[0]


def test_a_record_without_the_metric_says_so():
    cell = cell_of(piece(0, metrics={"test/top1": 0.5}))
    assert cell.reasons == ("seed0-0.5.json: it has no test/miou",)


def test_a_record_counts_only_with_the_weights_of_its_row():
    first = RunSpec("first", ("tasks/cls_imagenet.yaml",), DataSet("ImageNet", "official", (), ("images",)))
    later = Experiment(RunSpec(**{**vars(RUN), "pretrained": Pretrained(first)}), "sis50")
    model = Model(RECIPE, "slug-of-sis50", 1, 1, (1, 1), "", "first recipe")

    def why(**weights: object) -> list[str]:
        start = {"source": "run:first", "sha256": "a", "recipe_hash": "first recipe", "finished": True}
        record = piece(training__start_weights={**start, "trained_on": ["images"], **weights})
        return record.judge(later, model)[1]

    assert why() == []
    assert "finished ImageNet run" in why(finished=False)[0]
    assert "finished ImageNet run" in why(recipe_hash="another")[0]
    assert "not trained on ImageNet" in why(trained_on=["synthetic"])[0]
    assert "finished ImageNet run" in piece().judge(later, model)[1][0]


def test_columns_may_start_from_other_weights_and_seeds_of_a_cell_may_not():
    """Networks of 50 and of 101 layers have weights of their own."""
    first, second = (
        piece(0, training__start_weights={"source": "timm:x", "sha256": weights * 64}) for weights in ("a", "b")
    )
    assert mixed([[first], [second]]) == ()
    assert mixed([[first, second]]) == ("start weights aaaaaaaa, bbbbbbbb",)
    assert mixed([[first, piece(1)]]) == ("start weights aaaaaaaa, random",)
