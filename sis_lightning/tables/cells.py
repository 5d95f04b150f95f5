"""Fills the cells of tables from records: which records count for a cell, their mean and spread, and what is missing.

A record counts for a cell if its recipe is the cell's, its files are those whose fingerprints the table spec lists, its
training reached the end of its schedule, and nothing in it contradicts itself. Names of folders, runs and data sets
decide nothing. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sis_lightning.errors import DataError
from sis_lightning.run.environment import Environment
from sis_lightning.tables.differences import Difference, holm, welch
from sis_lightning.tables.judge import STATES, Evidence, environments
from sis_lightning.tables.models import Model, Models
from sis_lightning.tables.spec import Column, Experiment, Group, Row, Table, TableSpec


@dataclass(frozen=True)
class Cell:
    """A place in a table.

    Attributes:
        reported: The paper's value, or None.
        values: Our values by seed, in the unit of the table.
        missing: Seeds that the run needs and that have no value yet.
        state: `reproduced`, `synthetic`, `other data`, `other recipe`, `running`, `not run` or `counted`; empty for an
            impossible experiment.
        records: File names of the records that count.
        rejected: Values of records that do not count.
        reasons: Why they do not count, each with the file name of its record.
        superseded: Number of records that count, but whose seed was measured again later.
    """

    reported: float | None
    values: Mapping[int, float]
    missing: tuple[int, ...]
    state: str
    records: tuple[str, ...] = ()
    rejected: tuple[float, ...] = ()
    reasons: tuple[str, ...] = ()
    superseded: int = 0

    @cached_property
    def mean(self) -> float | None:
        """Mean over the seeds; None without any."""
        return statistics.fmean(self.values.values()) if self.values else None

    @cached_property
    def std(self) -> float | None:
        """Standard deviation over the seeds, with n - 1 in the denominator; None for fewer than two seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Our mean minus the reported value; None unless both have the same data and recipe."""
        comparable = self.state in ("reproduced", "counted")
        return self.mean - self.reported if comparable and self.mean is not None and self.reported is not None else None


@dataclass(frozen=True)
class FilledRow:
    """A row with its cells.

    Attributes:
        group: Its group.
        row: The row.
        cells: Its cells, by column.
        differences: Its differences from the group's baseline, by column.
        mixed: In what the records of its cells differ that should be the same, such as `torch 2.14.0, 2.15.0`.
    """

    group: Group
    row: Row
    cells: tuple[Cell, ...]
    differences: tuple[Difference | None, ...]
    mixed: tuple[str, ...] = ()


@dataclass(frozen=True)
class FilledTable:
    """A table with filled rows."""

    table: Table
    lines: tuple[FilledRow, ...]


def fill(
    spec: TableSpec, evidence: Sequence[Evidence], models: Models, running: Iterable[str] = ()
) -> list[FilledTable]:
    """Fills every cell.

    Args:
        spec: The tables.
        evidence: All records.
        models: The models of the experiments.
        running: Keys of experiments that are being trained right now.

    Raises:
        DataError: If an experiment has not been counted yet.
    """
    by_recipe: dict[str, list[Evidence]] = defaultdict(list)
    by_name: dict[tuple[str, str], list[Evidence]] = defaultdict(list)
    by_weights: dict[str, list[Evidence]] = defaultdict(list)
    for piece in evidence:
        by_recipe[piece.recipe].append(piece)
        by_name[piece.record.task, piece.record.backbone].append(piece)
        by_weights[piece.weights].append(piece)
    busy = set(running)

    def cell(row: Row, column: Column, reported: float | None) -> Cell:
        experiment = row.experiment(column)
        if experiment.key not in models.by_key:
            raise DataError(f"'{experiment.key}' has not been counted yet: sis-lightning tables count")
        model = models.by_key[experiment.key]
        if model is None:
            return Cell(reported, {}, (), "")
        if column.counted:
            return Cell(reported, {0: getattr(model, column.metric) * column.scale}, (), "counted")
        known = {piece.name: piece for piece in by_recipe[model.recipe]}
        known |= {piece.name: piece for piece in by_name[experiment.run.name, model.slug]}
        # One file of weights is that of one row; nobody can tell of which.
        shared = {
            name: other.name
            for name, piece in known.items()
            for other in by_weights[piece.weights]
            if other.recipe != piece.recipe
        }
        return _cell(column, experiment, model, list(known.values()), shared, reported, experiment.key in busy)

    by_file = {piece.name: piece for piece in evidence}
    tables = []
    for table in spec.tables:
        cells: dict[tuple[int, str], tuple[Cell, ...]] = {}
        for number, group in enumerate(table.groups):
            for row in group.rows:
                reported = row.reported or (None,) * len(table.columns)
                cells[number, row.label] = tuple(cell(row, *pair) for pair in zip(table.columns, reported, strict=True))
        differences = [_differences(table, column, cells) for column in range(len(table.columns))]
        lines = [
            FilledRow(
                table.groups[number],
                next(row for row in table.groups[number].rows if row.label == label),
                own,
                tuple(of_column.get((number, label)) for of_column in differences),
                mixed([[by_file[name] for name in cell.records] for cell in own]),
            )
            for (number, label), own in cells.items()
        ]
        tables.append(FilledTable(table, tuple(lines)))
    return tables


def _differences(
    table: Table, column: int, cells: Mapping[tuple[int, str], Sequence[Cell]]
) -> dict[tuple[int, str], Difference | None]:
    """The differences of a column from the baselines, corrected for the number of rows that are compared."""
    found: dict[tuple[int, str], Difference | None] = {}
    for (number, label), own in cells.items():
        baseline = table.groups[number].baseline or ""
        base = cells.get((number, baseline))  # None without a baseline, and if only other rows were selected
        if base is not None and label != baseline and not table.columns[column].counted:
            found[number, label] = welch(own[column].values.values(), base[column].values.values())
    return dict(zip(found, holm(list(found.values())), strict=True))


#: What the records of one row should have in common, by a name for people.
_COMMON: Mapping[str, Callable[[Environment], str]] = {
    "commits": lambda entry: (entry.code.commit or entry.code.digest or entry.code.sis_lightning)[:8],
    "torch": lambda entry: entry.packages.get("torch", "unknown"),
    "devices": lambda entry: entry.machine.device,
}


def mixed(cells: Sequence[Sequence[Evidence]]) -> tuple[str, ...]:
    """In what the records of a row differ that should be the same, given those of each of its cells.

    Commit, release of torch and device in the whole row; the weights at the start within a cell, since columns may have
    networks of different depths.
    """
    every = [entry for pieces in cells for piece in pieces for entry in environments(piece.record)]
    found = {name: sorted({read(entry) for entry in every}) for name, read in _COMMON.items()}
    for pieces in cells:
        starts = [piece.record.training.start_weights for piece in pieces]
        weights = {start.sha256[:8] if start else "random" for start in starts}
        if len(weights) > 1:
            found["start weights"] = sorted(weights)
    return tuple(f"{name} {', '.join(values)}" for name, values in found.items() if len(values) > 1)


def _cell(
    column: Column,
    experiment: Experiment,
    model: Model,
    known: list[Evidence],
    shared: Mapping[str, str],
    reported: float | None,
    busy: bool,
) -> Cell:
    """Fills the cell of a metric from the records that have its recipe or its name."""
    full: dict[int, Evidence] = {}
    seeds: dict[str, int] = {}
    superseded, rejected, reasons, states = 0, [], [], []
    counting = []
    for piece in sorted(known, key=lambda piece: piece.record.date):
        value = piece.record.metrics.get(column.metric)
        if value is None:
            reasons.append(f"{piece.name}: it has no {column.metric}")
            continue
        state, why = piece.judge(experiment, model)
        if not why and piece.name in shared:
            state, why = "other recipe", [f"{shared[piece.name]} has the same weights with another configuration"]
        if why:
            states.append(state)
            rejected.append(value * column.scale)
            reasons += [f"{piece.name}: {reason}" for reason in why[:1]]
            continue
        counting.append(piece)
    for piece in counting:
        if piece.operators != (newest := counting[-1]).operators:
            reasons.append(
                f"{piece.name}: its operator differs from that of seed {newest.seed}, which was measured later"
            )
            continue
        twin = seeds.setdefault(piece.weights, piece.seed)
        if twin != piece.seed:
            reasons.append(f"{piece.name}: its weights are the same as those of seed {twin}")
            continue
        superseded += piece.seed in full and full[piece.seed].weights != piece.weights
        full[piece.seed] = piece
    measured = {seed: full[seed].record.metrics[column.metric] for seed in sorted(full)}
    values = {seed: value * column.scale for seed, value in measured.items() if value is not None}
    missing = tuple(seed for seed in experiment.run.seeds if seed not in values)
    state = "running" if busy and missing else "not run"
    if values:
        state = STATES[experiment.run.data.kind]
    elif states and not busy:
        state = states[-1]
    names = tuple(full[seed].name for seed in sorted(full))
    return Cell(reported, values, missing, state, names, tuple(rejected), tuple(reasons), superseded)
