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
from typing import Literal, get_args

from sis_lightning.config.compose import resolve
from sis_lightning.errors import DataError
from sis_lightning.run.environment import Environment, running_code
from sis_lightning.run.recipe import changes, recipe, settled
from sis_lightning.run.record import TestRecord, read_record
from sis_lightning.run.resume.checkpoints import resume_point
from sis_lightning.tables.cells import FilledTable
from sis_lightning.tables.judge import Evidence
from sis_lightning.tables.models import Model, Models
from sis_lightning.tables.plan import directory
from sis_lightning.tables.spec import Experiment
from sis_lightning.tasks.checkpoint_files import read_checkpoint, tensors_digest

Outcome = Literal["verified by re-training", "verified by re-test", "not confirmed", "recorded only", "contradicted"]

#: A second test in the environment of the first gives the same metrics but for this share of their range; GPUs do not
#: sum in the same order each time.
SAME_PLACE = 1e-5
#: Elsewhere it may differ by this share or by five images, whichever is more; metrics of a class by ten times as much.
ELSEWHERE = 1e-3
_CONFIDENCE = 0.99


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
        values: The metric of all seeds of the cell, in its own unit.
    """

    table: str
    row: str
    column: str
    metric: str
    experiment: Experiment
    model: Model
    evidence: Evidence
    values: tuple[float, ...]

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
                values = tuple(value / column.scale for value in cell.values.values())
                found += [
                    Recorded(
                        *(filled.table.id, line.row.label, column.label, column.metric),
                        *(experiment, model, by_name[name], values),
                    )
                    for name in cell.records
                ]
    return found


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
        tolerance: Largest difference between the metric of a cell and that of a second training; None: it must be
            within the interval in which another seed is with 99 % (Student's t, from the seeds of the cell).
        say: Prints a line.

    Returns:
        Whether nothing contradicts a record.
    """
    by_record: dict[str, list[Recorded]] = {}
    for entry in entries:
        by_record.setdefault(entry.evidence.name, []).append(entry)
    chosen = [*by_record]
    if sample is not None and sample < len(chosen):
        # Nobody who writes records can know which are drawn.
        chosen = random.SystemRandom().sample(chosen, sample)
    again = sorted(chosen, key=lambda name: by_record[name][0].model.macs)[:retrain]
    outcomes: dict[tuple[str, str], Outcome] = {}
    for name in chosen:
        cells = by_record[name]
        try:
            outcome, why = _retested(cells[0], roots)
        except DataError as error:
            outcome, why = "recorded only", str(error)
        say(f"{cells[0]}: {outcome}: {why}")
        outcomes |= {(name, cell.metric): outcome for cell in cells}
        if name in again and outcome != "contradicted":
            try:
                second: TestRecord | str = _second_training(cells[0], roots)
            except DataError as error:
                second = str(error)
            for cell in cells:
                outcome, why = (
                    ("recorded only", second) if isinstance(second, str) else _judged(cell, second, tolerance)
                )
                say(f"{cell}, second training: {outcome}: {why}")
                if outcome != "recorded only":  # a re-test that succeeded stays one
                    outcomes[name, cell.metric] = outcome
    for line in _summary(entries, outcomes):
        say(line)
    return "contradicted" not in outcomes.values()


def _summary(entries: Sequence[Recorded], outcomes: Mapping[tuple[str, str], Outcome]) -> Iterator[str]:
    """A line for each cell: how many of its records were verified, and how."""
    cells: dict[str, list[Outcome]] = {}
    for entry in entries:
        outcome = outcomes.get((entry.evidence.name, entry.metric), "recorded only")
        cells.setdefault(f"table {entry.table}, {entry.row}, {entry.column}", []).append(outcome)
    for name, found in cells.items():
        yield f"{name}: " + ", ".join(f"{found.count(kind)} {kind}" for kind in get_args(Outcome) if kind in found)


def _retested(entry: Recorded, roots: Mapping[str, str]) -> tuple[Outcome, str]:
    """Tests the stored weights of a record again, and compares everything that a test says about them."""
    record = entry.evidence.record
    folder = directory(entry.experiment, entry.model, entry.evidence.seed)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        return "recorded only", f"{checkpoint} is not here"
    content = read_checkpoint(checkpoint, mmap=True)
    if tensors_digest(content["state_dict"]) != record.checkpoint.sha256:
        return "recorded only", f"{checkpoint} holds other weights than those of the record"
    if (point := resume_point(content)) is None:
        return "recorded only", f"{checkpoint} does not say how it was trained"
    # Before the test, which fails for weights of another network.
    if other_option := next(changes(recipe(record.config), recipe(point.config)), None):
        key, then, now = other_option
        said = f"{key} is {then!r} in the record, {now!r} in the checkpoint"
        return "contradicted", f"the checkpoint was trained with another configuration: {said}"
    with tempfile.TemporaryDirectory(prefix="sis-lightning-verify-") as place:
        options = [*_options(entry, roots, tested=True), "--run_dir", place, "--ckpt_path", str(checkpoint.absolute())]
        _call(["test", *options], None, record.environment.machine.threads)
        second = read_record(Path(place, "test.json"))
    if second.data.fingerprint != record.data.fingerprint:
        return "recorded only", "the data here is not that of the record"
    # What the checkpoint says about its training.
    for what, read in _FACTS.items():
        if (then := read(record)) != (now := read(second)):
            return "contradicted", f"{what} is {then} in the record, {now} in the checkpoint"
    other = _other_place(record.environment, second.environment)
    name, excess = _worst(record, second, None if other else SAME_PLACE)
    if excess > 1:
        values = f"{record.metrics.get(name)} in the record, now {second.metrics.get(name)}"
        return "contradicted", f"{name} is {values} ({other or 'in the same environment'})"
    return (
        "verified by re-test",
        f"largest difference {_largest(record, second):.1g} of a range" + f" ({other})" * bool(other),
    )


#: What a record says about the training of its checkpoint, and the checkpoint says, too.
_FACTS: Mapping[str, Callable[[TestRecord], object]] = {
    "the seed": lambda record: record.seed,
    "the backbone": lambda record: record.backbone,
    "the step": lambda record: record.checkpoint.step,
    "the epoch": lambda record: record.checkpoint.epoch,
    "whether it is finished": lambda record: record.checkpoint.finished,
    "the training data": lambda record: record.data.trained_on,
    "what was changed on the way": lambda record: record.training.changed,
    "the weights at the start": lambda record: record.training.start_weights,
    "the code of the training": lambda record: [entry.code for entry in record.training.environments],
}


def _second_training(entry: Recorded, roots: Mapping[str, str]) -> TestRecord:
    """Trains and tests a run again by the code of its record, and returns the second record.

    Raises:
        DataError: If the commit or the data is not here, or a command fails.
    """
    record = entry.evidence.record
    started = record.training.environments[0]
    checkout = ["git", "-C", str(Path(__file__).parents[2]), "worktree"]
    with tempfile.TemporaryDirectory(prefix="sis-lightning-verify-") as place:
        source = None
        here = running_code({})
        if started.code.commit and (started.code.commit != here.commit or here.dirty):
            source = Path(place, "code")
            line = [*checkout, "add", "--detach", str(source), started.code.commit]
            if subprocess.run(line, capture_output=True, check=False).returncode:
                raise DataError(f"its commit {started.code.commit[:12]} is not here")
        try:
            options = [*_options(entry, roots, tested=False), "--run_dir", str(Path(place, "run"))]
            for command in ("fit", "test"):
                _call([command, *options], source, started.machine.threads)
            second = read_record(Path(place, "run", "test.json"))
        finally:
            if source is not None:
                subprocess.run([*checkout, "remove", "--force", str(source)], capture_output=True, check=False)
    if (second.data.trained_on, second.data.fingerprint) != (record.data.trained_on, record.data.fingerprint):
        raise DataError("the data here is not that of the record")
    return second


def _judged(entry: Recorded, second: TestRecord, tolerance: float | None) -> tuple[Outcome, str]:
    """Compares the metric of a cell with that of a second training."""
    record = entry.evidence.record
    if second.metrics == record.metrics and second.curves == record.curves:
        return "verified by re-training", "all metrics and curves are the same to the last digit"
    then, now = record.metrics.get(entry.metric), second.metrics.get(entry.metric)
    said = f"{entry.metric} is {then} in the record, now {now}"
    first, last = record.training.environments[0], second.training.environments[0]
    other = _other_place(first, last)
    if now is None or then is None:
        return "contradicted", said
    if tolerance is not None:
        within = abs(then - now) <= tolerance
        return ("verified by re-training" if within else "contradicted"), f"{said} (allowed: ± {tolerance:g})"
    if not other and first.machine.device == "cpu" and first.code == last.code:
        return "contradicted", f"{said}, in the same environment, which gives the same bits"
    n = len(entry.values)
    if n < 2:
        return (
            "not confirmed",
            f"{said} ({other or 'GPUs differ from time to time'}); one seed says nothing about chance",
        )
    from scipy.special import stdtrit

    mean = statistics.fmean(entry.values)
    half = float(stdtrit(n - 1, (1 + _CONFIDENCE) / 2)) * statistics.stdev(entry.values) * math.sqrt(1 + 1 / n)
    interval = f"another seed is within {mean - half:.4g} … {mean + half:.4g} with {100 * _CONFIDENCE:g} %"
    outcome: Outcome = "verified by re-training" if abs(now - mean) <= half else "not confirmed"
    return outcome, f"{said} ({interval}; {other or 'the same environment'})"


def _options(entry: Recorded, roots: Mapping[str, str], *, tested: bool) -> list[str]:
    """Options that repeat the test or the training of a record here, computed in the same way."""
    record = entry.evidence.record
    options = [*entry.experiment.options(), "--seed_everything", str(entry.evidence.seed)]
    layers, _ = resolve(options)
    configured = entry.experiment.run.options.get("data.root") or layers["data"]["init_args"].get("root")
    root = Path(roots.get(entry.experiment.run.name) or str(configured))
    options += ["--data.root", str(root.absolute())] if root.exists() else []
    environment = record.environment if tested else record.training.environments[0]
    options += ["--trainer.accelerator", "cpu" if environment.machine.device == "cpu" else "auto"]
    options += ["--trainer.devices", "1" if tested else str(record.training.devices or 1)]
    # How numbers are computed, such as the precision, is not part of the recipe.
    numerics = {key: value for key, value in settled(record.config).items() if key not in recipe(record.config)}
    if tested:
        numerics |= {key: change.tested for key, change in record.computed_otherwise.items()}
    for key, value in numerics.items():
        if isinstance(value, str | int | float) and value is not False:
            options += [f"--{key.replace('.init_args', '')}", str(value).lower() if value is True else str(value)]
    return options


def _call(arguments: Sequence[str], source: Path | None, threads: int) -> None:
    """Runs a command of this package, or of another checkout of it, in a process of its own.

    Raises:
        DataError: If it fails; the message holds the end of what it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if source is not None:
        known = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(source), *([known] if known else [])])
    line = [sys.executable, "-m", "sis_lightning", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).rpartition("sis-lightning: ")[2][-500:]
        raise DataError(f"{arguments[0]} failed ({done.returncode}): {said}")


def _shares(record: TestRecord, second: TestRecord) -> Iterator[tuple[str, float]]:
    """By how much of its range each metric differs."""
    for name in dict.fromkeys([*record.metrics, *second.metrics]):
        then, now = record.metrics.get(name), second.metrics.get(name)
        if then is None or now is None:
            yield name, 0.0 if then is now else math.inf
        else:
            scale = 100.0 if name.endswith("_percent") else max(1.0, abs(then))
            yield name, abs(then - now) / scale


def _largest(record: TestRecord, second: TestRecord) -> float:
    return max((share for _, share in _shares(record, second)), default=0.0)


def _worst(record: TestRecord, second: TestRecord, allowed: float | None) -> tuple[str, float]:
    """The metric that differs most, and by how many times of what is allowed; None allows what other places do."""
    worst, largest = "", 0.0
    for name, share in _shares(record, second):
        usual = max(ELSEWHERE, 5 / max(1, record.data.images)) * (10 if name.count("/") > 1 else 1)
        times = share / (usual if allowed is None else allowed)
        if times > largest:
            worst, largest = name, times
    return worst, largest


def _other_place(then: Environment, now: Environment) -> str:
    """In what two environments differ on which numbers depend to the last bit; empty if they do not."""
    found = [
        f"{name} {getattr(then.machine, name)} then, {getattr(now.machine, name)} now"
        for name in ("device", "instructions", "threads")
        if getattr(then.machine, name) != getattr(now.machine, name)
    ]
    torch_then, torch_now = (entry.packages.get("torch") for entry in (then, now))
    found += [f"torch {torch_then} then, {torch_now} now"] if torch_then != torch_now else []
    return ", ".join(found)
