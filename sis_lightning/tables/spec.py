"""Table specs: which run measures each cell of a table, and what the paper reports there.

A table spec is a YAML file such as `results/paper.yaml`:

    reported_by: whose values stand beside ours, such as `the paper` (optional)
    data:    data sets by name, with the fingerprints that identify them; `data_sets.py` has the published ones
    runs:    configurations by name, the data that they are tested on, and the seeds that a cell needs
    notes:   footnotes by name
    tables:  columns (a run and one of its metrics) and rows (a backbone, or an operator in the group's host)

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from sis_lightning.config_files import PACKAGED
from sis_lightning.errors import DataError, UsageError, nearest
from sis_lightning.tables.data_sets import OFFICIAL, DataSet

#: The convolution and the operators of the paper. An operator of any other name gets a row in every table by itself.
BUILT_IN = ("conv", "basic", "interactive1", "interactive2", "recurrent1", "recurrent2")


@dataclass(frozen=True)
class Pretrained:
    """Where the backbones of a run start.

    Attributes:
        run: The run that makes the weights of a backbone, with its first seed.
        published: Published weights by backbone, such as `resnet50`, or `resnet50 depth=101` with changed fields;
            these need no run.
    """

    run: RunSpec
    published: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSpec:
    """A configuration that is the same for all rows except for the backbone.

    Attributes:
        name: Key in the table spec, and value of the option `--task`.
        config: Configuration files, as for `fit`.
        data: The data set that it is tested on.
        options: Options of the command line, by their keys.
        seeds: The seeds that a cell needs.
        pretrained: Where the backbones start; None for random weights.
    """

    name: str
    config: Annotated[tuple[str, ...], Field(min_length=1)]
    data: DataSet
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    pretrained: Pretrained | None = None


@dataclass(frozen=True)
class Experiment:
    """A run with one backbone: everything but the seed.

    Attributes:
        run: The configuration.
        backbone: Name of a file in `configs/backbones/`.
        fields: Fields of the backbone that are changed, such as `operator`, `steps` or `depth`, with their values.
    """

    run: RunSpec
    backbone: str
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Text that identifies the experiment in the table spec."""
        return " ".join([self.run.name, self.backbone, *(f"{name}={value}" for name, value in self.fields)])

    @property
    def _published(self) -> str | None:
        """Published weights of the backbone that the run starts from; None if there are none."""
        known = self.run.pretrained.published if self.run.pretrained else {}
        return known.get(" ".join([self.backbone, *(f"{name}={value}" for name, value in self.fields)]))

    @property
    def pretraining(self) -> Experiment | None:
        """The experiment whose weights the backbone starts from; None for published or random weights."""
        if self.run.pretrained is None or self._published:
            return None
        return Experiment(self.run.pretrained.run, self.backbone, self.fields)

    def options(self) -> list[str]:
        """The options of `fit` that describe it, without the seed."""
        line = [part for path in self.run.config for part in ("--config", path)]
        if Path(self.run.config[0]).stem != self.run.name:
            line += ["--task", self.run.name]
        line += ["--model.backbone", self.backbone]
        line += [part for name, value in self.fields for part in (f"--model.backbone.{name}", str(value))]
        if self.run.pretrained:
            line += ["--model.backbone_weights", self._published or f"run:{self.run.pretrained.run.name}"]
        return line + [part for key, value in self.run.options.items() for part in (f"--{key}", str(value))]


@dataclass(frozen=True)
class Column:
    """What a column shows.

    Attributes:
        label: Heading of the column.
        run: The run that measures it.
        metric: Name of the metric in test.json, or `parameters` or `macs`, which are counted.
        digits: Number of digits after the decimal point.
        scale: Factor from the metric to the unit of the table.
        better: Whether higher or lower values are better.
        reported_label: Heading of the column in the paper, if it differs from `label`.
        backbone: Fields of the rows' backbones that the column changes, such as `depth`.
    """

    label: str
    run: RunSpec
    metric: str
    digits: int
    scale: float = 1.0
    better: Literal["higher", "lower"] = "higher"
    reported_label: str = ""
    backbone: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counted(self) -> bool:
        """Whether the code counts the values, so that no run is needed."""
        return self.metric in ("parameters", "macs")


@dataclass(frozen=True)
class Row:
    """A network.

    Attributes:
        label: Name for people.
        backbone: Name of a file in `configs/backbones/`.
        operator: Operator that replaces the one in the file.
        reported: The paper's value for each column, or None; empty if the paper has none at all.
        fields: Further fields of the backbone that are changed, with their values.
        notes: Names of footnotes.
    """

    label: str
    backbone: str
    operator: str | None = None
    reported: tuple[float | None, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def experiment(self, column: Column) -> Experiment:
        """The experiment that measures the cell of a column."""
        fields = {**({"operator": self.operator} if self.operator else {}), **self.fields, **column.backbone}
        return Experiment(column.run, self.backbone, tuple(fields.items()))

    def matches(self, name: str) -> bool:
        """Whether `name` is the label, backbone or operator of the row, in any case."""
        return name.lower() in (self.label.lower(), self.backbone.lower(), (self.operator or "").lower())


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other.

    Attributes:
        rows: The rows, in the table's order.
        title: Heading of the group, if the table has several groups.
        host: Name of the backbone whose convolutions the operators replace.
        fields: Fields of the host that are changed, with their values.
        baseline: Label of the row that the others are compared with.
    """

    rows: tuple[Row, ...]
    title: str = ""
    host: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None

    def with_operators(self, names: Iterable[str]) -> Group:
        """The group with one more row for each operator that is not built in."""
        if self.host is None:
            return self
        known = {row.operator for row in self.rows}
        own = [name for name in names if name not in BUILT_IN and name not in known]
        more = tuple(Row(name, self.host, name, (), self.fields) for name in own)
        return dataclasses.replace(self, rows=self.rows + more)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        id: Number or short name, such as `3` or `1-1`.
        title: Heading of the table.
        columns: The columns, from left to right.
        groups: Groups of rows, from top to bottom.
        reported_by: Source of the values beside ours, such as `the paper`; empty if nobody reported any.
        caption: One or two sentences that readers of the table need.
        notes: Names of footnotes of the whole table.
    """

    id: str
    title: str
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]
    reported_by: str = ""
    caption: str = ""
    notes: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """Name of the table in file names."""
        return "table_" + re.sub(r"[^a-z0-9.-]+", "_", self.id.lower())


@dataclass(frozen=True)
class TableSpec:
    """All tables of one or more spec files, and the footnotes, runs and data sets that they name."""

    tables: tuple[Table, ...]
    notes: Mapping[str, str]
    data: Mapping[str, DataSet]
    runs: Mapping[str, RunSpec]

    def selected(self, ids: Sequence[str], rows: Sequence[str] = ()) -> TableSpec:
        """The spec with some tables and rows.

        Args:
            ids: Tables to keep; empty for all.
            rows: Rows to keep, by label, backbone or operator; empty for all.

        Raises:
            UsageError: If there is no such table or row.
        """
        for name in ids:
            if name not in (known := [table.id for table in self.tables]):
                raise UsageError(f"there is no table '{name}': {nearest(name, known)}")
        tables = [table for table in self.tables if not ids or table.id in ids]
        if rows:
            every = [row for table in tables for group in table.groups for row in group.rows]
            for name in rows:
                if not any(row.matches(name) for row in every):
                    names = {part for row in every for part in (row.label, row.operator) if part}
                    raise UsageError(f"there is no row '{name}': {nearest(name, names)}")
            tables = [_rows_of(table, rows) for table in tables]
        return dataclasses.replace(self, tables=tuple(table for table in tables if table.groups))

    def with_operators(self, names: Iterable[str]) -> TableSpec:
        """The spec with a row for each operator that is not built in, in every group that has a host."""
        names = tuple(names)
        tables = [
            dataclasses.replace(table, groups=tuple(group.with_operators(names) for group in table.groups))
            for table in self.tables
        ]
        return dataclasses.replace(self, tables=tuple(tables))

    def experiments(self) -> dict[str, Experiment]:
        """All experiments by their keys, in the order of the tables, each behind the one that it starts from."""
        found: dict[str, Experiment] = {}
        for table in self.tables:
            for group in table.groups:
                for row in group.rows:
                    for column in table.columns:
                        experiment = row.experiment(column)
                        if experiment.pretraining:
                            found.setdefault(experiment.pretraining.key, experiment.pretraining)
                        found.setdefault(experiment.key, experiment)
        return found


def _rows_of(table: Table, names: Sequence[str]) -> Table:
    groups = [
        dataclasses.replace(group, rows=tuple(r for r in group.rows if any(r.matches(name) for name in names)))
        for group in table.groups
    ]
    return dataclasses.replace(table, groups=tuple(group for group in groups if group.rows))


def spec_files(folder: Path) -> list[Path]:
    """The table specs of a results folder: its YAML files, or the packaged ones if it has none."""
    return sorted(folder.glob("*.yaml")) or sorted((PACKAGED / "results").glob("*.yaml"))


def read_specs(paths: Sequence[Path]) -> TableSpec:
    """Reads table specs, and merges them into one.

    Raises:
        UsageError: If a file is not a valid table spec; the message names file, place and key.
    """
    specs = [_read(path) for path in paths]
    tables = [table for spec in specs for table in spec.tables]
    slugs = [table.slug for table in tables]
    twice = [table.id for table in tables if slugs.count(table.slug) > 1]
    if twice:
        raise UsageError(f"table '{twice[0]}' is in two of {', '.join(map(str, paths))}")
    # Tables of a paper come before ours; within each file the order is that of the file.
    tables.sort(key=lambda table: not table.reported_by)
    named: dict[str, dict[str, Any]] = {"notes": {}, "data": {}, "runs": {}}
    for spec, path in zip(specs, paths, strict=True):
        for kind, known in named.items():
            for key, value in getattr(spec, kind).items():
                if known.setdefault(key, value) != value:
                    raise UsageError(f"{path}, {kind}.{key}: another table spec defines it differently")
    return TableSpec(tuple(tables), **named)


def _data_set(reader: _Reader, key: str, value: Any) -> DataSet:
    """A data set of a table spec, which cannot be a published one."""
    if key in OFFICIAL:
        raise UsageError(f"{reader.path}, data.{key}: a published data set, which is not defined in a table spec")
    made: DataSet = reader.make(DataSet, value, f"data.{key}")
    if made.kind == "official":
        raise UsageError(
            f"{reader.path}, data.{key}.kind: must be synthetic or stand-in; the official data sets are "
            f"{', '.join(OFFICIAL)}, and a run names them"
        )
    return made


def _read(path: Path) -> TableSpec:
    try:
        content = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a table spec is a mapping with the keys data, runs, notes and tables")
    reader = _Reader(path)
    sections = {key: reader.mapping(content.pop(key, {}), key) for key in ("data", "runs", "notes")}
    data = {key: _data_set(reader, key, value) for key, value in sections["data"].items()}
    runs: dict[str, RunSpec] = {}
    for key, value in sections["runs"].items():
        value = {"name": key, **reader.mapping(value, f"runs.{key}")}
        if "pretrained" in value:
            start = reader.mapping(value["pretrained"], f"runs.{key}.pretrained")
            start["run"] = reader.find(start.get("run"), runs, f"runs.{key}.pretrained.run")
            value["pretrained"] = reader.make(Pretrained, start, f"runs.{key}.pretrained")
        runs[key] = reader.make(
            RunSpec,
            {**value, "data": reader.find(value.get("data"), {**OFFICIAL, **data}, f"runs.{key}.data")},
            f"runs.{key}",
        )
    notes = {key: reader.of_type(str, text, f"notes.{key}") for key, text in sections["notes"].items()}
    reported_by = reader.of_type(str, content.pop("reported_by", ""), "reported_by")
    entries = [{"reported_by": reported_by, **entry} for entry in reader.entries(content, "tables", "")]
    tables = tuple(reader.table(entry, runs, notes) for entry in entries)
    if content:
        raise UsageError(
            f"{path}: a table spec has no key '{next(iter(content))}': data, runs, notes, reported_by, tables"
        )
    return TableSpec(tables, notes, data, runs)


@cache
def _type_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@dataclass(frozen=True)
class _Reader:
    """Builds objects from mappings; its errors name the place."""

    path: Path

    def make(self, kind: type[Any], content: Any, where: str) -> Any:
        """Builds an object of a dataclass from a mapping with its fields."""
        known = [entry.name for entry in dataclasses.fields(kind)]
        for key in self.mapping(content, where):
            if key not in known:
                raise UsageError(f"{self.path}, {where}: no key '{key}': {nearest(str(key), known)}")
        return self.of_type(kind, content, where)

    def of_type(self, kind: Any, content: Any, where: str) -> Any:
        """Validates a value, and converts it to a type."""
        try:
            return _type_of(kind).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join([where, *map(str, first["loc"])])
            is_ = "" if first["type"].startswith("missing") else f", is {first['input']!r}"
            raise UsageError(f"{self.path}, {place}: {first['msg']}{is_}") from None

    def mapping(self, content: Any, where: str) -> dict[Any, Any]:
        """A copy of a mapping, since several places may share one through an anchor of YAML."""
        if not isinstance(content, dict):
            raise UsageError(f"{self.path}, {where}: must be a mapping of keys, is {content!r}")
        return dict(content)

    def entries(self, content: dict[str, Any], key: str, where: str) -> list[dict[Any, Any]]:
        """Removes a list of mappings from a mapping, and returns it."""
        found = content.pop(key, [])
        where = f"{where}, {key}" if where else key
        if not isinstance(found, list):
            raise UsageError(f"{self.path}, {where}: must be a list, is {found!r}")
        return [self.mapping(entry, f"{where} {number}") for number, entry in enumerate(found, 1)]

    def find(self, name: Any, known: Mapping[str, Any], where: str) -> Any:
        """Looks up a name."""
        if not isinstance(name, str) or name not in known:
            raise UsageError(f"{self.path}, {where}: there is no '{name}': {nearest(str(name), known)}")
        return known[name]

    def table(self, entry: dict[str, Any], runs: Mapping[str, RunSpec], notes: Mapping[str, str]) -> Table:
        """Builds a table; the columns of its `complexity` come before its own."""
        where = f"table {entry.get('id')}"
        columns: list[Column] = []
        for number, value in enumerate(self.entries(entry, "complexity", where), 1):
            place = f"{where}, complexity {number}"
            # One entry makes two columns, parameters and MACs; MACs get one more digit.
            asked = {"digits": 1, **value, "metric": "parameters", "scale": 1e-6, "label": str(value.get("label", ""))}
            sizes: Column = self.make(Column, {**asked, "run": self.find(value.get("run"), runs, place)}, place)
            label = f" ({sizes.label})" if sizes.label else ""
            columns.append(dataclasses.replace(sizes, label=f"Params{label}, M"))
            macs = dataclasses.replace(sizes, label=f"MACs{label}, G", metric="macs")
            columns.append(dataclasses.replace(macs, digits=sizes.digits + 1, scale=1e-9))
        leading = len(columns)
        for number, value in enumerate(self.entries(entry, "columns", where), 1):
            place = f"{where}, column {number}"
            columns.append(self.make(Column, {**value, "run": self.find(value.get("run"), runs, place)}, place))
        found = self.entries(entry, "groups", where)
        groups = [self._group(group, where, leading, len(columns), notes) for group in found]
        built: Table = self.make(Table, {**entry, "columns": columns, "groups": groups}, where)
        for name in built.notes:
            self.find(name, notes, f"{where}, notes")
        return built

    def _group(self, entry: dict[str, Any], where: str, leading: int, width: int, notes: Mapping[str, str]) -> Group:
        host, fields = entry.get("host"), self.mapping(entry.get("fields", {}), f"{where}, fields")
        rows = []
        for value in self.entries(entry, "rows", where):
            place = f"{where}, row {value.get('label')}"
            if "operator" in value and "backbone" not in value:
                own = self.mapping(value.get("fields", {}), f"{place}, fields")
                value = {"backbone": host, **value, "fields": {**fields, **own}}
            reported = self.of_type(list[float | None], value.pop("reported", []), f"{place}, reported")
            if reported and len(reported) + leading != width:
                raise UsageError(f"{self.path}, {place}: {len(reported)} reported values for {width - leading} columns")
            row: Row = self.make(Row, {**value, "reported": [None] * leading + reported if reported else []}, place)
            for name in row.notes:
                self.find(name, notes, place)
            rows.append(row)
        labels = [row.label for row in rows]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise UsageError(f"{self.path}, {where}: two rows of a group are called '{twice[0]}'")
        group: Group = self.make(Group, {**entry, "rows": rows}, where)
        if group.baseline is not None:
            self.find(group.baseline, {row.label: row for row in rows}, f"{where}, baseline")
        return group
