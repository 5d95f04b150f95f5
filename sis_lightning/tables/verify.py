"""Measures recorded values again: tests stored checkpoints, or trains runs again, and compares with the records.

A record can be written by anyone. That its value is what these weights give on this data is shown by testing the
weights again; that these weights are what the recipe gives, by training them again.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sis_lightning.config.compose import resolve
from sis_lightning.errors import DataError
from sis_lightning.files import digest_files
from sis_lightning.run.environment import running_code
from sis_lightning.run.record import TestRecord, read_record
from sis_lightning.tables.cells import Cell, FilledTable
from sis_lightning.tables.judge import Evidence
from sis_lightning.tables.models import Model, Models
from sis_lightning.tables.plan import directory
from sis_lightning.tables.spec import Experiment

Outcome = Literal["verified by re-test", "verified by re-training", "recorded only", "contradicted"]

#: Metrics of a second test may differ by this share of their range: other devices and releases round otherwise.
RETEST_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Recorded:
    """A record that counts for a cell.

    Attributes:
        table: Id of the table.
        row: Label of the row.
        column: Label of the column.
        metric: The metric of the column.
        experiment: The experiment of the cell.
        model: Its model.
        evidence: The record.
        spread: Standard deviation of the metric over the seeds of the cell, in the metric's own unit; None for one.
    """

    table: str
    row: str
    column: str
    metric: str
    experiment: Experiment
    model: Model
    evidence: Evidence
    spread: float | None

    def __str__(self) -> str:
        return f"table {self.table}, {self.row}, {self.column}, seed {self.evidence.seed}"


def recorded(tables: Sequence[FilledTable], evidence: Sequence[Evidence], models: Models) -> list[Recorded]:
    """The records behind the cells of tables, each with every cell that it fills.

    Args:
        tables: The filled tables.
        evidence: All records.
        models: The models of the experiments.
    """
    by_name = {piece.name: piece for piece in evidence}
    found = []
    for filled in tables:
        for line in filled.lines:
            for column, cell in zip(filled.table.columns, line.cells, strict=True):
                experiment = line.row.experiment(column)
                model = models.by_key.get(experiment.key)
                if model is None:
                    continue
                spread = _spread(cell, column.scale)
                found += [
                    Recorded(
                        *(filled.table.id, line.row.label, column.label, column.metric),
                        *(experiment, model, by_name[name], spread),
                    )
                    for name in cell.records
                ]
    return found


def _spread(cell: Cell, scale: float) -> float | None:
    return statistics.stdev(cell.values.values()) / scale if len(cell.values) > 1 else None


def verify(
    entries: Sequence[Recorded],
    roots: Mapping[str, str],
    *,
    sample: int | None = None,
    retrain: int = 0,
    tolerance: float | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Measures records again, and prints a line for each and one for each cell.

    Args:
        entries: The records behind cells.
        roots: Folders with the data of runs, by the names of the runs.
        sample: Number of records to measure again, drawn at random; None for all.
        retrain: Number of records to train again: those of the fewest MACs.
        tolerance: Largest difference between the value of a cell's metric and that of a second training; None: twice
            the standard deviation over the seeds of the cell, and 0 for a single seed.
        say: Prints a line.

    Returns:
        Whether nothing contradicts a record.
    """
    by_record: dict[str, Recorded] = {}
    for entry in entries:
        by_record.setdefault(entry.evidence.name, entry)
    chosen = [*by_record.values()]
    if sample is not None and sample < len(chosen):
        # Nobody who writes records can know which are drawn.
        chosen = random.SystemRandom().sample(chosen, sample)
    again = {entry.evidence.name for entry in sorted(chosen, key=lambda entry: entry.model.macs)[:retrain]}
    outcomes: dict[str, Outcome] = {}
    for entry in chosen:
        outcome, why = _retested(entry, roots)
        if entry.evidence.name in again and outcome != "contradicted":
            outcome, why = _retrained(entry, roots, tolerance)
        outcomes[entry.evidence.name] = outcome
        say(f"{entry}: {outcome}: {why}")
    for line in _summary(entries, outcomes):
        say(line)
    return "contradicted" not in outcomes.values()


def _summary(entries: Sequence[Recorded], outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """A line for each cell: how many of its records were verified, and how."""
    cells: dict[str, list[Outcome]] = {}
    for entry in entries:
        outcome = outcomes.get(entry.evidence.name, "recorded only")
        cells.setdefault(f"table {entry.table}, {entry.row}, {entry.column}", []).append(outcome)
    for name, found in cells.items():
        yield f"{name}: " + ", ".join(f"{found.count(kind)} {kind}" for kind in dict.fromkeys(found))


def _retested(entry: Recorded, roots: Mapping[str, str]) -> tuple[Outcome, str]:
    record = entry.evidence.record
    folder = directory(entry.experiment, entry.model, entry.evidence.seed)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        return "recorded only", f"{checkpoint} is not here"
    if digest_files([checkpoint], checkpoint.parent) != record.checkpoint.sha256:
        return "recorded only", f"{checkpoint} holds other weights than those of the record"
    with tempfile.TemporaryDirectory(prefix="sis-lightning-verify-") as place:
        options = [*_options(entry, roots), "--run_dir", place, "--ckpt_path", str(checkpoint.absolute())]
        _call(["test", *options], Path.cwd(), None)
        second = read_record(Path(place, "test.json"))
    if second.data.fingerprint != record.data.fingerprint:
        return "recorded only", "the data here is not that of the record"
    if second.recipe_hash != record.recipe_hash:
        return "contradicted", f"the checkpoint was trained with another configuration: {_other_option(second, record)}"
    if second.seed != record.seed:
        return "contradicted", f"the checkpoint was trained with seed {second.seed}"
    name, largest = _largest_difference(second, record)
    if largest > RETEST_TOLERANCE:
        return "contradicted", f"{name} is {record.metrics.get(name)} in the record, now {second.metrics.get(name)}"
    return "verified by re-test", f"largest difference {largest:.1g} of a metric's range"


def _retrained(entry: Recorded, roots: Mapping[str, str], tolerance: float | None) -> tuple[Outcome, str]:
    record = entry.evidence.record
    started = record.training.environments[0]
    with tempfile.TemporaryDirectory(prefix="sis-lightning-verify-") as place:
        source = None
        here = running_code({})
        if started.code.commit and (started.code.commit != here.commit or here.dirty):
            source = Path(place, "code")
            line = ["git", "-C", str(Path(__file__).parents[2]), "worktree", "add", "--detach", str(source)]
            done = subprocess.run([*line, started.code.commit], capture_output=True, text=True, check=False)
            if done.returncode:
                return "recorded only", f"its commit {started.code.commit[:12]} is not here"
        try:
            options = [*_options(entry, roots), "--run_dir", "run"]
            for command in ("fit", "test"):
                _call([command, *options], Path(place), source, started.machine.threads)
            second = read_record(Path(place, "run", "test.json"))
        finally:
            if source is not None:
                remove = ["git", "-C", str(Path(__file__).parents[2]), "worktree", "remove", "--force", str(source)]
                subprocess.run(remove, capture_output=True, check=False)
    if second.data.trained_on != record.data.trained_on:
        return "recorded only", "the data here is not that of the record"
    then, now = record.metrics.get(entry.metric), second.metrics.get(entry.metric)
    same = _largest_difference(second, record)[1] == 0 and second.curves == record.curves
    if same:
        return "verified by re-training", "all metrics and curves are the same to the last digit"
    allowed = tolerance if tolerance is not None else 2 * (entry.spread or 0)
    difference = abs(then - now) if then is not None and now is not None else math.inf
    said = (
        f"{entry.metric} is {then} in the record, now {now} (allowed: {allowed:.3g}; {_other_machine(second, record)})"
    )
    return ("verified by re-training" if difference <= allowed else "contradicted"), said


def _options(entry: Recorded, roots: Mapping[str, str]) -> list[str]:
    """Options of `fit` and `test` that repeat a record here."""
    options = [*entry.experiment.options(), "--seed_everything", str(entry.evidence.seed)]
    layers, _ = resolve(options)
    configured = entry.experiment.run.options.get("data.root") or layers["data"]["init_args"].get("root")
    root = Path(roots.get(entry.experiment.run.name) or str(configured))
    return [*options, "--data.root", str(root.absolute())] if root.exists() else options


def _call(arguments: Sequence[str], folder: Path, source: Path | None, threads: int | None = None) -> None:
    """Runs a command of this package, or of another checkout of it, in a process of its own.

    Raises:
        DataError: If it fails; the message holds the end of what it said.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    line = [sys.executable, "-m", "sis_lightning", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-500:]
        raise DataError(f"verify: sis-lightning {arguments[0]} failed ({done.returncode}): {said}")


def _largest_difference(second: TestRecord, record: TestRecord) -> tuple[str, float]:
    """The metric that differs most, and its difference as a share of its range."""
    worst, largest = "", 0.0
    for name in dict.fromkeys([*record.metrics, *second.metrics]):
        then, now = record.metrics.get(name), second.metrics.get(name)
        if then is None or now is None:
            share = 0.0 if then is now else math.inf
        else:
            share = abs(then - now) / (100 if name.endswith("_percent") else 1)
        if share > largest:
            worst, largest = name, share
    return worst, largest


def _other_option(second: TestRecord, record: TestRecord) -> str:
    from sis_lightning.run.recipe import changes, recipe

    key, then, now = next(iter(changes(recipe(record.config), recipe(second.config))), ("its hash", "", ""))
    return f"{key} is {then!r} in the record, {now!r} in the checkpoint"


def _other_machine(second: TestRecord, record: TestRecord) -> str:
    """In what the environments differ on which numbers depend to the last bit."""
    then, now = record.environment, second.environment
    found = [
        f"{name} {getattr(then.machine, name)} then, {getattr(now.machine, name)} now"
        for name in ("device", "instructions", "threads")
        if getattr(then.machine, name) != getattr(now.machine, name)
    ]
    torch_then, torch_now = (entry.packages.get("torch") for entry in (then, now))
    found += [f"torch {torch_then} then, {torch_now} now"] if torch_then != torch_now else []
    return ", ".join(found) or "on the same kind of machine"
