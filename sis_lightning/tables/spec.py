"""The tables as data: which run each cell is measured by, and what the paper prints there.

A book is a YAML file such as `results/paper.yaml`:

    data:    data sets by name, with the fingerprints that prove them
    runs:    configurations by name, the data that they are tested on, and the seeds that a cell wants
    notes:   footnotes by name
    tables:  columns (a run and one of its metrics) and rows (a backbone, or an operator on the group's host)

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

#: The paper's, and the conv that they stand in for; an operator of any other name joins every table unasked.
BUILT_IN = ("conv", "basic", "interactive1", "interactive2", "recurrent1", "recurrent2")


@dataclass(frozen=True)
class DataSet:
    """What a run is tested on.

    Attributes:
        title: For people.
        kind: `official`: the published files; `synthetic`; `stand-in`: real images in the place of others.
        test: Fingerprints (`SISDataModule.fingerprint`) of the files that may be tested on.
        train: Listings (`SISDataModule.listing`) of the files that may be trained on.
    """

    title: str
    kind: Literal["official", "synthetic", "stand-in"]
    test: tuple[str, ...] = ()
    train: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A configuration, the same for all rows but for the backbone.

    Attributes:
        name: Its key in the book, and its `--task`.
        config: Files, as for `fit`.
        data: What it is tested on.
        options: Of the command line, by their keys.
        seeds: That a cell wants.
    """

    name: str
    config: Annotated[tuple[str, ...], Field(min_length=1)]
    data: DataSet
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Experiment:
    """A run on a certain backbone: everything but the seed.

    Attributes:
        run: The configuration.
        backbone: A file in `configs/backbones/`.
        fields: Of it, that are changed: `operator`, `steps`, `depth` and so on.
    """

    run: Run
    backbone: str
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Tells it from all others of the book."""
        return " ".join([self.run.name, self.backbone, *(f"{name}={value}" for name, value in self.fields)])

    def options(self) -> list[str]:
        """The command line that resolves it, without a seed."""
        line = [part for path in self.run.config for part in ("--config", path)]
        if Path(self.run.config[0]).stem != self.run.name:
            line += ["--task", self.run.name]
        line += ["--model.backbone", self.backbone]
        line += [part for name, value in self.fields for part in (f"--model.backbone.{name}", str(value))]
        return line + [part for key, value in self.run.options.items() for part in (f"--{key}", str(value))]


@dataclass(frozen=True)
class Column:
    """What a column shows.

    Attributes:
        label: Its head.
        run: That measures it.
        metric: As `test` names it; `parameters` and `macs` are counted instead.
        digits: After the point.
        scale: What a metric is multiplied by for the unit in which the table prints it.
        better: Which direction is.
        headed: What the paper has over it, where that is something else.
        backbone: Fields of the rows' backbones that the column changes, such as `depth`.
    """

    label: str
    run: Run
    metric: str
    digits: int
    scale: float = 1.0
    better: Literal["higher", "lower"] = "higher"
    headed: str = ""
    backbone: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counted(self) -> bool:
        """Whether no run is needed."""
        return self.metric in ("parameters", "macs")


@dataclass(frozen=True)
class Row:
    """A network.

    Attributes:
        label: For people.
        backbone: A file in `configs/backbones/`.
        operator: In place of the file's.
        printed: What the paper has, for each column; None where it has nothing.
        fields: Of the backbone, that are changed besides.
        notes: Names of footnotes.
    """

    label: str
    backbone: str
    operator: str | None = None
    printed: tuple[float | None, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def experiment(self, column: Column) -> Experiment:
        """What measures the cell."""
        fields = {**({"operator": self.operator} if self.operator else {}), **self.fields, **column.backbone}
        return Experiment(column.run, self.backbone, tuple(fields.items()))

    def is_called(self, name: str) -> bool:
        """Whether a user who types `name` means it."""
        return name.lower() in (self.label.lower(), self.backbone.lower(), (self.operator or "").lower())


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other.

    Attributes:
        rows: In the table's order.
        title: Where a table has several groups.
        host: The backbone that operators are put into.
        fields: Of the host, that are changed.
        baseline: Label of the row that the others are compared with.
    """

    rows: tuple[Row, ...]
    title: str = ""
    host: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None

    def with_operators(self, names: Iterable[str]) -> Group:
        """With a row for each operator that is not built in."""
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
        id: As people call it: `3`, `1-1`.
        title: Its heading.
        columns: Left to right.
        groups: Top to bottom.
        of: Whose figures stand beside ours: `the paper`; empty where there are none.
        caption: What to know when reading it.
        notes: Footnotes of the whole table.
    """

    id: str
    title: str
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]
    of: str = ""
    caption: str = ""
    notes: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """For names of files."""
        return "table_" + re.sub(r"[^a-z0-9.-]+", "_", self.id.lower())


@dataclass(frozen=True)
class Book:
    """All tables, and what they name: footnotes, runs and data sets."""

    tables: tuple[Table, ...]
    notes: Mapping[str, str]
    data: Mapping[str, DataSet]
    runs: Mapping[str, Run]

    def chosen(self, ids: Sequence[str], rows: Sequence[str] = ()) -> Book:
        """With the named tables, and in them the named rows; everything where nothing is named.

        Raises:
            UsageError: For a table or row that there is not.
        """
        for name in ids:
            if name not in (known := [table.id for table in self.tables]):
                raise UsageError(f"there is no table '{name}': {nearest(name, known)}")
        tables = [table for table in self.tables if not ids or table.id in ids]
        if rows:
            every = [row for table in tables for group in table.groups for row in group.rows]
            for name in rows:
                if not any(row.is_called(name) for row in every):
                    names = {part for row in every for part in (row.label, row.operator) if part}
                    raise UsageError(f"there is no row '{name}': {nearest(name, names)}")
            tables = [_rows_of(table, rows) for table in tables]
        return dataclasses.replace(self, tables=tuple(table for table in tables if table.groups))

    def with_operators(self, names: Iterable[str]) -> Book:
        """With a row, in every group that has a host, for each operator that is not built in."""
        names = tuple(names)
        tables = [
            dataclasses.replace(table, groups=tuple(group.with_operators(names) for group in table.groups))
            for table in self.tables
        ]
        return dataclasses.replace(self, tables=tuple(tables))

    def experiments(self) -> dict[str, Experiment]:
        """By their keys, in the order of the tables."""
        found: dict[str, Experiment] = {}
        for table in self.tables:
            for group in table.groups:
                for row in group.rows:
                    for column in table.columns:
                        experiment = row.experiment(column)
                        found.setdefault(experiment.key, experiment)
        return found


def _rows_of(table: Table, names: Sequence[str]) -> Table:
    groups = [
        dataclasses.replace(group, rows=tuple(r for r in group.rows if any(r.is_called(name) for name in names)))
        for group in table.groups
    ]
    return dataclasses.replace(table, groups=tuple(group for group in groups if group.rows))


def books_in(folder: Path) -> list[Path]:
    """The books of a results folder: its YAML files; those that are shipped where it has none."""
    return sorted(folder.glob("*.yaml")) or sorted((PACKAGED / "results").glob("*.yaml"))


def read_books(paths: Sequence[Path]) -> Book:
    """Reads books, and lays them together.

    Raises:
        UsageError: For a book that cannot be: file, place and key.
    """
    books = [_read(path) for path in paths]
    tables = [table for book in books for table in book.tables]
    slugs = [table.slug for table in tables]
    twice = [table.id for table in tables if slugs.count(table.slug) > 1]
    if twice:
        raise UsageError(f"table '{twice[0]}' is in two of {', '.join(map(str, paths))}")
    # `paper` comes before `ours`, by the paper's own order within.
    tables.sort(key=lambda table: not table.of)
    named: dict[str, dict[str, Any]] = {"notes": {}, "data": {}, "runs": {}}
    for book, path in zip(books, paths, strict=True):
        for kind, known in named.items():
            for key, value in getattr(book, kind).items():
                if known.setdefault(key, value) != value:
                    raise UsageError(f"{path}, {kind}.{key}: another book has something else under this name")
    return Book(tuple(tables), **named)


def _read(path: Path) -> Book:
    try:
        content = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a book of tables is a mapping with data, runs, notes and tables")
    reader = _Reader(path)
    sections = {key: reader.mapping(content.pop(key, {}), key) for key in ("data", "runs", "notes")}
    data = {key: reader.make(DataSet, value, f"data.{key}") for key, value in sections["data"].items()}
    runs = {}
    for key, value in sections["runs"].items():
        value = {"name": key, **reader.mapping(value, f"runs.{key}")}
        runs[key] = reader.make(
            Run, {**value, "data": reader.find(value.get("data"), data, f"runs.{key}.data")}, f"runs.{key}"
        )
    notes = {key: reader.of_type(str, text, f"notes.{key}") for key, text in sections["notes"].items()}
    of = reader.of_type(str, content.pop("of", ""), "of")
    tables = tuple(reader.table(entry, runs, notes, of) for entry in reader.entries(content, "tables", ""))
    if content:
        raise UsageError(f"{path}: a book has no '{next(iter(content))}': data, runs, notes, of, tables")
    return Book(tables, notes, data, runs)


@cache
def _type_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@dataclass(frozen=True)
class _Reader:
    """Makes objects of mappings, with errors that say where."""

    path: Path

    def make(self, kind: type[Any], content: Any, where: str) -> Any:
        """An object of a dataclass."""
        known = [entry.name for entry in dataclasses.fields(kind)]
        for key in self.mapping(content, where):
            if key not in known:
                raise UsageError(f"{self.path}, {where}: no key '{key}': {nearest(str(key), known)}")
        return self.of_type(kind, content, where)

    def of_type(self, kind: Any, content: Any, where: str) -> Any:
        """What is of a type, or can be read as one."""
        try:
            return _type_of(kind).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join([where, *map(str, first["loc"])])
            is_ = "" if first["type"].startswith("missing") else f", is {first['input']!r}"
            raise UsageError(f"{self.path}, {place}: {first['msg']}{is_}") from None

    def mapping(self, content: Any, where: str) -> dict[Any, Any]:
        """A mapping, its own copy: an anchor of YAML lets several places share one."""
        if not isinstance(content, dict):
            raise UsageError(f"{self.path}, {where}: must be a mapping of keys, is {content!r}")
        return dict(content)

    def entries(self, content: dict[str, Any], key: str, where: str) -> list[dict[Any, Any]]:
        """Takes a list of mappings out of a mapping."""
        found = content.pop(key, [])
        where = f"{where}, {key}" if where else key
        if not isinstance(found, list):
            raise UsageError(f"{self.path}, {where}: must be a list, is {found!r}")
        return [self.mapping(entry, f"{where} {number}") for number, entry in enumerate(found, 1)]

    def find(self, name: Any, known: Mapping[str, Any], where: str) -> Any:
        """What a name stands for."""
        if not isinstance(name, str) or name not in known:
            raise UsageError(f"{self.path}, {where}: there is no '{name}': {nearest(str(name), known)}")
        return known[name]

    def table(self, entry: dict[str, Any], runs: Mapping[str, Run], notes: Mapping[str, str], of: str) -> Table:
        """A table, its `complexity` columns before its own."""
        where = f"table {entry.get('id')}"
        columns: list[Column] = []
        for number, value in enumerate(self.entries(entry, "complexity", where), 1):
            place = f"{where}, complexity {number}"
            # A column of parameters, but for its label; that of MACs has a digit more.
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
        built: Table = self.make(Table, {"of": of, **entry, "columns": columns, "groups": groups}, where)
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
            printed = self.of_type(list[float | None], value.pop("printed", []), f"{place}, printed")
            if printed and len(printed) + leading != width:
                raise UsageError(f"{self.path}, {place}: {len(printed)} printed values for {width - leading} columns")
            row: Row = self.make(Row, {**value, "printed": [None] * leading + printed if printed else []}, place)
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
