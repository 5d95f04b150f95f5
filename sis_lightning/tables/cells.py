"""Cells filled from records: which record counts for which cell, what it amounts to, and what is missing.

A record counts for a cell where its configuration is the cell's to the letter (but for what changes no result), its
files are those whose fingerprints the book names, and its training came to the end of its schedule. Names of folders,
runs and data sets decide nothing. Imports neither torch nor Lightning.
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
from typing import Any

from sis_lightning.config.compose import NOT_OF_THE_RECIPE, WEIGHTS_IN_16_BITS, recipe
from sis_lightning.errors import DataError
from sis_lightning.files import digest
from sis_lightning.run.record import Record, read_record, read_sealed, write_sealed
from sis_lightning.tables.spec import Book, Column, Experiment, Group, Row, Table

#: What a cell on data of a kind is called once it is measured in full.
STATES = {"official": "reproduced", "synthetic": "synthetic", "stand-in": "other data"}


@dataclass(frozen=True)
class Model:
    """What an experiment resolves to: counted, and identified, by the code.

    Attributes:
        recipe: Digest of its configuration, but for the seed and for what changes no result.
        slug: Of its backbone.
        parameters: Of the whole model.
        macs: Of one image.
        image: Its height and width.
        source: Digest of the YAML and the options that it was resolved from.
    """

    recipe: str
    slug: str
    parameters: int
    macs: int
    image: tuple[int, int]
    source: str = ""


@dataclass(frozen=True)
class Models:
    """What all experiments resolve to: `models.json` of a results folder.

    Attributes:
        code: Digest of the code that settles it.
        operators: Registered ones, the paper's first.
        by_key: Of the experiments; None of one that cannot be, such as steps of an operator without recurrence.
    """

    code: str
    operators: tuple[str, ...]
    by_key: Mapping[str, Model | None]

    @classmethod
    def read(cls, path: Path) -> Models:
        """From its file; empty where there is none.

        Raises:
            DataError: Where it was edited.
        """
        if not path.is_file():
            return cls("", (), {})
        content = read_sealed(path, "sis-lightning tables count")
        models = {
            key: Model(**{**value, "image": tuple(value["image"])}) if value else None
            for key, value in content["models"].items()
        }
        return cls(content["code"], tuple(content["operators"]), models)

    def write(self, path: Path) -> None:
        """Into its file, sealed."""
        models = {key: asdict(model) if model else None for key, model in self.by_key.items()}
        write_sealed(path, {"code": self.code, "operators": list(self.operators), "models": models})


def shortcomings(record: Record) -> list[str]:
    """Why a record counts for nothing, whatever it is of."""
    reasons = []
    if not record["checkpoint"]["finished"]:
        reasons.append("its weights are not from the end of the schedule")
    codes = _codes(record)
    if any(code.get("dirty") for code in codes):
        reasons.append("its code had changes that no commit holds")
    if any(code.get("operators") != codes[0].get("operators") for code in codes):
        reasons.append("its operator was changed on the way")
    if type(record["seed"]) is not int:
        reasons.append("it was trained without a seed")
    if record["training"].get("changed"):
        reasons.append(f"its {record['training']['changed'][0]} was changed on the way")
    return reasons


def _codes(record: Record) -> list[dict[str, Any]]:
    """Of test and training; older records hold that of the test alone."""
    return [record["code"], *record["training"].get("code", [])]


@dataclass(frozen=True)
class Evidence:
    """A record as the tables see it: what is needed of it alone.

    Attributes:
        name: Of its file.
        record: All of it.
        recipe: Of its training.
    """

    name: str
    record: Record
    recipe: str

    @property
    def seed(self) -> int:
        """Of its training, where it counts."""
        return int(self.record["seed"])

    @property
    def weights(self) -> str:
        """SHA-256 of its checkpoint."""
        return str(self.record["checkpoint"].get("sha256", self.name))

    @property
    def operators(self) -> Mapping[str, str] | None:
        """Digests of the sources of operators that are not ours."""
        found: Mapping[str, str] | None = self.record["code"].get("operators")
        return found

    def judged(self, experiment: Experiment, model: Model) -> tuple[str, list[str]]:
        """What a record is for an experiment, and why it does not count.

        Returns:
            A state, and the reasons; none for one that counts.
        """
        run, data = experiment.run, self.record["data"]
        reasons = []
        if data["fingerprint"] not in run.data.test:
            reasons.append(f"its files are not those of {run.data.title}")
        if not data["trained_on"] or not {*data["trained_on"]} <= {*run.data.train}:
            reasons.append(f"it was not trained on {run.data.title}")
        of_data = bool(reasons)
        if self.recipe != model.recipe:
            reasons.append("its configuration is not the row's")
        otherwise = [
            key
            for key, values in self.record["tested_otherwise"].items()
            if not all(value is None or value is False for value in values)
            and (not key.startswith(NOT_OF_THE_RECIPE) or any(str(value) in WEIGHTS_IN_16_BITS for value in values))
        ]
        if otherwise:
            reasons.append(f"it was tested under another {otherwise[0]}")
        reasons += shortcomings(self.record)
        training = self.record["training"]
        if run.data.kind == "official" and not all("commit" in code for code in _codes(self.record)):
            reasons.append("its code is of no commit: it was installed, and may have been changed")
        # A recipe's batch, which is that of all devices together, is what batch norm sees on one of them.
        if (training["devices"] or 1) > 1 and not self.record["config"]["trainer"].get("sync_batchnorm"):
            reasons.append("its batch norm saw one device at a time")
        if not of_data:
            return (STATES[run.data.kind] if not reasons else "other recipe"), reasons
        return ("synthetic" if data["identity"].startswith("synthetic") else "other data"), reasons


@dataclass(frozen=True)
class Cell:
    """A place in a table.

    Attributes:
        printed: The paper's.
        values: Ours by seed, in the table's unit.
        missing: Seeds that the run wants and nobody has measured.
        state: `reproduced`, `synthetic`, `other data`, `other recipe`, `running`, `not run`, `counted`; empty where
            nothing belongs.
        records: Names of those that it is made of.
        aside: Figures of records that do not count, for the state's sake.
        reasons: Why they do not.
        superseded: Records of seeds that were measured again later.
    """

    printed: float | None
    values: Mapping[int, float]
    missing: tuple[int, ...]
    state: str
    records: tuple[str, ...] = ()
    aside: tuple[float, ...] = ()
    reasons: tuple[str, ...] = ()
    superseded: int = 0

    @cached_property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.fmean(self.values.values()) if self.values else None

    @cached_property
    def std(self) -> float | None:
        """Over the seeds, with n - 1; None of a single one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, where both are of the same data and recipe."""
        comparable = self.state in ("reproduced", "counted")
        return self.mean - self.printed if comparable and self.mean is not None and self.printed is not None else None


@dataclass(frozen=True)
class Paired:
    """How far a row is from the baseline, seed by seed.

    Attributes:
        mean: Of the differences.
        low: End of its 95 % confidence interval (Student's t); None of a single seed.
        high: The other end.
        seeds: That both have.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
        """Over the seeds that both have; None where there is none."""
        seeds = tuple(sorted(values.keys() & baseline.keys()))
        if not seeds:
            return None
        differences = [values[seed] - baseline[seed] for seed in seeds]
        mean = statistics.fmean(differences)
        if len(seeds) == 1:
            return cls(mean, None, None, seeds)
        from scipy.special import stdtrit  # a third of a second, which tables without seeds need not wait for

        half = float(stdtrit(len(seeds) - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(len(seeds))
        return cls(mean, mean - half, mean + half, seeds)


@dataclass(frozen=True)
class Line:
    """A row with its cells, and how it compares with the group's baseline, column by column."""

    group: Group
    row: Row
    cells: tuple[Cell, ...]
    paired: tuple[Paired | None, ...]


@dataclass(frozen=True)
class Filled:
    """A table with what is known."""

    table: Table
    lines: tuple[Line, ...]


def read_records(folder: Path) -> list[Evidence]:
    """All records of a folder.

    Raises:
        DataError: For one that was edited, or is none.
    """
    found = []
    recipes: dict[str, str] = {}  # the seeds of a row share one, and a record's hash of its configuration is sealed
    collecting = gc.isenabled()
    gc.disable()  # a fifth of the time with thousands of records, in which there is nothing to collect
    try:
        for path in sorted(folder.glob("*.json"), key=lambda path: path.name):
            record = read_record(path)
            try:
                known = record["config_hash"]
                if known not in recipes:
                    recipes[known] = digest(recipe(record["config"]))
                found.append(Evidence(path.name, record, recipes[known]))
            except (KeyError, AttributeError) as error:
                raise DataError(f"{path}: not a record of a run ({error} is missing)") from None
    finally:
        if collecting:
            gc.enable()
    return found


def fill(book: Book, evidence: Sequence[Evidence], models: Models, running: Iterable[str] = ()) -> list[Filled]:
    """Fills every cell.

    Args:
        book: The tables.
        evidence: What was measured.
        models: What the experiments resolve to.
        running: Keys of experiments that a fit is busy with.

    Raises:
        DataError: Where an experiment was never counted.
    """
    by_recipe: dict[str, list[Evidence]] = defaultdict(list)
    by_name: dict[tuple[str, str], list[Evidence]] = defaultdict(list)
    for piece in evidence:
        by_recipe[piece.recipe].append(piece)
        by_name[piece.record["task"], piece.record["backbone"]].append(piece)
    busy = set(running)

    def cell(row: Row, column: Column, printed: float | None) -> Cell:
        experiment = row.experiment(column)
        if experiment.key not in models.by_key:
            raise DataError(f"'{experiment.key}' was never counted: sis-lightning tables count")
        model = models.by_key[experiment.key]
        if model is None:
            return Cell(printed, {}, (), "")
        if column.counted:
            return Cell(printed, {0: getattr(model, column.metric) * column.scale}, (), "counted")
        known = {piece.name: piece for piece in by_recipe[model.recipe]}
        known |= {piece.name: piece for piece in by_name[experiment.run.name, model.slug]}
        return _cell(column, experiment, model, list(known.values()), printed, experiment.key in busy)

    tables = []
    for table in book.tables:
        lines = []
        for group in table.groups:
            rows = {}
            for row in group.rows:
                printed = row.printed or (None,) * len(table.columns)
                rows[row.label] = tuple(cell(row, *pair) for pair in zip(table.columns, printed, strict=True))
            base = rows.get(group.baseline or "")
            for row in group.rows:
                pairs: list[Paired | None] = [None] * len(table.columns)
                if base is not None and row.label != group.baseline:
                    pairs = [
                        None if column.counted else Paired.of(ours.values, its.values)
                        for column, ours, its in zip(table.columns, rows[row.label], base, strict=True)
                    ]
                lines.append(Line(group, row, rows[row.label], tuple(pairs)))
        tables.append(Filled(table, tuple(lines)))
    return tables


def _cell(
    column: Column, experiment: Experiment, model: Model, known: list[Evidence], printed: float | None, busy: bool
) -> Cell:
    """A cell of a metric, from the records that bear its recipe or its name."""
    full: dict[int, Evidence] = {}
    seeds: dict[str, int] = {}
    superseded, aside, reasons, states = 0, [], [], []
    counting = []
    for piece in sorted(known, key=lambda piece: str(piece.record["date"])):
        value = piece.record["metrics"].get(column.metric)
        if value is None:
            reasons.append(f"{piece.name}: it has no {column.metric}")
            continue
        state, why = piece.judged(experiment, model)
        if why:
            states.append(state)
            aside.append(value * column.scale)
            reasons += [f"{piece.name}: {reason}" for reason in why[:1]]
            continue
        counting.append(piece)
    for piece in counting:
        if piece.operators != (newest := counting[-1]).operators:
            reasons.append(f"{piece.name}: its operator's source is not that of seed {newest.seed}, measured later")
            continue
        twin = seeds.setdefault(piece.weights, piece.seed)
        if twin != piece.seed:
            reasons.append(f"{piece.name}: its weights are those of seed {twin}")
            continue
        superseded += piece.seed in full and full[piece.seed].weights != piece.weights
        full[piece.seed] = piece
    values = {seed: full[seed].record["metrics"][column.metric] * column.scale for seed in sorted(full)}
    missing = tuple(seed for seed in experiment.run.seeds if seed not in values)
    state = "running" if busy and missing else "not run"
    if values:
        state = STATES[experiment.run.data.kind]
    elif states and not busy:
        state = states[-1]
    names = tuple(full[seed].name for seed in sorted(full))
    return Cell(printed, values, missing, state, names, tuple(aside), tuple(reasons), superseded)
