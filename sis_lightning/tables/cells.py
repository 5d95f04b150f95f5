"""Fills the cells of tables from records: which records count for a cell, their mean and spread, and what is missing.

A record counts for a cell if its recipe is the cell's, its files are those whose fingerprints the table spec lists, and
its training reached the end of its schedule. Names of folders, runs and data sets decide nothing. Imports neither torch
nor Lightning.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from sis_lightning.errors import DataError
from sis_lightning.run.environment import Code
from sis_lightning.run.record import TestRecord, read_record, read_with_checksum, write_with_checksum
from sis_lightning.tables.spec import Column, Experiment, Group, Row, Table, TableSpec

#: State of a cell with at least one record that counts, by the kind of its data.
STATES = {"official": "reproduced", "synthetic": "synthetic", "stand-in": "other data"}


@dataclass(frozen=True)
class Model:
    """The model of an experiment, as the current code builds and counts it.

    Attributes:
        recipe: Digest of the resolved configuration, without the seed and without options that do not affect the
            result.
        slug: Short name of the backbone.
        parameters: Number of parameters of the whole model.
        macs: Multiply-accumulates of the whole model for one image.
        image: Height and width of that image in px.
        source: Digest of the YAML and the options that the configuration was resolved from.
        pretraining: `recipe` of the experiment whose weights the backbone starts from; empty without one.
    """

    recipe: str
    slug: str
    parameters: int
    macs: int
    image: tuple[int, int]
    source: str = ""
    pretraining: str = ""


@dataclass(frozen=True)
class Models:
    """The models of all experiments, as the code builds and counts them: `models.json` of a results folder.

    Attributes:
        code: Digest of the code that determines it.
        operators: Names of all registered operators, the paper's first.
        by_key: Models by the keys of the experiments; None for an experiment that is impossible, such as several steps
            of an operator without recurrence.
    """

    code: str
    operators: tuple[str, ...]
    by_key: Mapping[str, Model | None]

    @classmethod
    def read(cls, path: Path) -> Models:
        """Reads the file; without a file, there are no models.

        Raises:
            DataError: If the file was edited.
        """
        if not path.is_file():
            return cls("", (), {})
        content = read_with_checksum(path, "sis-lightning tables count")
        models = {
            key: Model(**{**value, "image": tuple(value["image"])}) if value else None
            for key, value in content["models"].items()
        }
        return cls(content["code"], tuple(content["operators"]), models)

    def write(self, path: Path) -> None:
        """Writes the file, with a checksum."""
        models = {key: asdict(model) if model else None for key, model in self.by_key.items()}
        write_with_checksum(path, {"code": self.code, "operators": list(self.operators), "models": models})


def shortcomings(record: TestRecord) -> list[str]:
    """Why a record counts for no cell, whatever it measured."""
    reasons = []
    if not record.checkpoint.finished:
        reasons.append("its weights are not from the end of the schedule")
    codes = _codes(record)
    if any(code.dirty for code in codes):
        reasons.append("its code had uncommitted changes")
    if any(code.operators != codes[0].operators for code in codes):
        reasons.append("its operator was changed between training and test")
    if record.seed is None:
        reasons.append("it was trained without a seed")
    if record.training.changed:
        reasons.append(f"its {record.training.changed[0]} was changed during training")
    return reasons


def _codes(record: TestRecord) -> list[Code]:
    """The code of the test and of each start of the training."""
    return [entry.code for entry in (record.environment, *record.training.environments)]


@dataclass(frozen=True)
class Evidence:
    """A record and the name of its file."""

    name: str
    record: TestRecord

    @property
    def recipe(self) -> str:
        """Digest of the recipe that was trained."""
        return self.record.recipe_hash

    @property
    def seed(self) -> int:
        """Seed of the training; only of a record that counts."""
        assert self.record.seed is not None
        return self.record.seed

    @property
    def weights(self) -> str:
        """SHA-256 of the checkpoint."""
        return self.record.checkpoint.sha256

    @property
    def operators(self) -> Mapping[str, str]:
        """Digests of the source files of operators that are not built in, by name."""
        return self.record.environment.code.operators

    def judge(self, experiment: Experiment, model: Model) -> tuple[str, list[str]]:
        """Decides whether the record counts for an experiment.

        Args:
            experiment: The experiment.
            model: What the code makes of it.

        Returns:
            The state that the record gives to a cell, and the reasons why it does not count; no reasons if it counts.
        """
        run, record = experiment.run, self.record
        reasons = []
        if record.data.fingerprint not in run.data.test:
            reasons.append(f"its files are not those of {run.data.title}")
        if not record.data.trained_on or not {*record.data.trained_on} <= {*run.data.train}:
            reasons.append(f"it was not trained on {run.data.title}")
        on_other_data = bool(reasons)
        if self.recipe != model.recipe:
            reasons.append("its configuration is not that of the row")
        start = record.training.start_weights
        if model.pretraining and (start is None or start.recipe_hash != model.pretraining or not start.finished):
            reasons.append("its backbone did not start from the finished ImageNet run of the row")
        elif start and experiment.pretraining and not {*start.trained_on} <= {*experiment.pretraining.run.data.train}:
            reasons.append(f"its backbone was not trained on {experiment.pretraining.run.data.title}")
        changed = [
            key
            for key, change in record.tested_otherwise.items()
            # A switch that is off is the same as one that does not exist.
            if not all(value is None or value is False for value in (change.trained, change.tested))
        ]
        if changed:
            reasons.append(f"it was tested with another {changed[0]}")
        reasons += shortcomings(record)
        if run.data.kind == "official" and not all(code.commit for code in _codes(record)):
            reasons.append("its code belongs to no commit: it was installed, and may have been changed")
        if not on_other_data:
            return (STATES[run.data.kind] if not reasons else "other recipe"), reasons
        return ("synthetic" if record.data.identity.startswith("synthetic") else "other data"), reasons


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
class PairedDifference:
    """Difference between a row and its baseline, paired by seed.

    Attributes:
        mean: Mean of the differences.
        low: Lower end of the 95 % confidence interval of the mean (Student's t); None for a single seed.
        high: Upper end of the interval.
        seeds: Seeds that both rows have.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, values: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference | None:
        """The difference between values by seed; None if the two share no seed."""
        seeds = tuple(sorted(values.keys() & baseline.keys()))
        if not seeds:
            return None
        differences = [values[seed] - baseline[seed] for seed in seeds]
        mean = statistics.fmean(differences)
        if len(seeds) == 1:
            return cls(mean, None, None, seeds)
        from scipy.special import stdtrit  # takes a third of a second, which tables without seeds need not wait for

        half = float(stdtrit(len(seeds) - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(len(seeds))
        return cls(mean, mean - half, mean + half, seeds)


@dataclass(frozen=True)
class FilledRow:
    """A row with its cells, and its differences from the group's baseline, both by column."""

    group: Group
    row: Row
    cells: tuple[Cell, ...]
    paired: tuple[PairedDifference | None, ...]


@dataclass(frozen=True)
class FilledTable:
    """A table with filled rows."""

    table: Table
    lines: tuple[FilledRow, ...]


def read_records(folder: Path) -> list[Evidence]:
    """Reads all records of a folder.

    Raises:
        DataError: If a file is not a record, or was edited.
    """
    collecting = gc.isenabled()
    gc.disable()  # takes a fifth of the time with thousands of records, in which there is nothing to collect
    try:
        paths = sorted(folder.glob("*.json"), key=lambda path: path.name)
        return [Evidence(path.name, read_record(path)) for path in paths]
    finally:
        if collecting:
            gc.enable()


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
    for piece in evidence:
        by_recipe[piece.recipe].append(piece)
        by_name[piece.record.task, piece.record.backbone].append(piece)
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
        return _cell(column, experiment, model, list(known.values()), reported, experiment.key in busy)

    tables = []
    for table in spec.tables:
        lines = []
        for group in table.groups:
            rows = {}
            for row in group.rows:
                reported = row.reported or (None,) * len(table.columns)
                rows[row.label] = tuple(cell(row, *pair) for pair in zip(table.columns, reported, strict=True))
            base = rows.get(group.baseline or "")
            for row in group.rows:
                pairs: list[PairedDifference | None] = [None] * len(table.columns)
                if base is not None and row.label != group.baseline:
                    pairs = [
                        None if column.counted else PairedDifference.of(ours.values, its.values)
                        for column, ours, its in zip(table.columns, rows[row.label], base, strict=True)
                    ]
                lines.append(FilledRow(group, row, rows[row.label], tuple(pairs)))
        tables.append(FilledTable(table, tuple(lines)))
    return tables


def _cell(
    column: Column, experiment: Experiment, model: Model, known: list[Evidence], reported: float | None, busy: bool
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
