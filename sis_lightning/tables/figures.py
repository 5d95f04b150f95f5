"""Figures of filled tables and of learning curves.

A row has the same colour and marker in all figures of a table, and nothing is distinguished by colour alone. Filled
markers are our values, hollow ones those that the paper reports, and the title says what ours were measured on.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sis_lightning.errors import UsageError
from sis_lightning.run.record import TestRecord
from sis_lightning.tables.cells import Cell, FilledRow, FilledTable
from sis_lightning.tables.curves import NOISY, WINDOW, over_seeds
from sis_lightning.tables.judge import Evidence
from sis_lightning.tables.plotting import ENDINGS, styled, write_figure
from sis_lightning.tables.spec import BUILT_IN, Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Metrics by the size of objects, with COCO's bounds of area, in the order in which they are plotted.
SIZES = {
    "test/APs": "AP(S)",
    "test/APm": "AP(M)",
    "test/APl": "AP(L)",
    "test/ARs": "AR(S)",
    "test/ARm": "AR(M)",
    "test/ARl": "AR(L)",
}
_AXES = {"parameters": ("parameters, M", 1e-6), "macs": ("MACs of one image, G", 1e-9)}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "<", ">", "h")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
#: Style of reported values: hollow and larger, so that it surrounds a measured value at the same place.
_HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markersize": 7.5, "zorder": 3}


@dataclass(frozen=True)
class _Series:
    """Rows of one configuration, which are compared with each other.

    Attributes:
        title: Title of their group, if several groups have the same labels.
        lines: The rows.
        columns: Indices of the columns that one run measures.
    """

    title: str
    lines: tuple[FilledRow, ...]
    columns: tuple[int, ...]


def _series(filled: FilledTable) -> list[_Series]:
    """Splits a table by runs, and by groups if a label occurs in more than one of them."""
    table = filled.table
    by_run: dict[str, list[int]] = {}
    for index, column in enumerate(table.columns):
        if not column.counted:
            by_run.setdefault(f"{column.run.name} {sorted(column.backbone.items())}", []).append(index)
    labels = [line.row.label for line in filled.lines]
    groups = [("", filled.lines)]
    if len({*labels}) < len(labels):
        groups = [(group.title, tuple(x for x in filled.lines if x.group is group)) for group in table.groups]
    return [_Series(title, lines, tuple(columns)) for columns in by_run.values() for title, lines in groups]


def _names(filled: FilledTable, chosen: Sequence[_Series]) -> list[str]:
    """Names that distinguish the series; empty for a single one."""
    heads = [filled.table.columns[series.columns[0]].label for series in chosen]
    shared = _shared(heads)
    heads = [head.removeprefix(f"{shared}, ") for head in heads]
    titles = [series.title for series in chosen]
    parts = [kind for kind in (titles, heads) if len({*kind}) > 1]
    return [", ".join(part for part in names if part) for names in zip(*parts, strict=True)] or [""] * len(chosen)


def _shared(heads: Iterable[str]) -> str:
    """What headings such as `mIoU, 50 layers` and `mIoU, 101 layers` have in common before the comma; else empty."""
    starts = {head.partition(", ")[0] for head in heads}
    return starts.pop() if len(starts) == 1 else ""


@dataclass(frozen=True)
class _Look:
    """How a row is drawn."""

    colour: str
    marker: str
    dashes: Any

    def handle(self, label: str, *, line: bool = False, hollow: bool = False) -> Line2D:
        """The row's entry in a legend."""
        face = _HOLLOW if hollow else {}
        return Line2D(
            [],
            [],
            color=self.colour,
            marker=self.marker,
            linestyle=self.dashes if line else "none",
            label=label,
            **face,
        )


def _look(number: int) -> _Look:
    colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    dashes = _DASHES[number % len(_DASHES)]
    return _Look(colours[number % len(colours)], _MARKERS[number % len(_MARKERS)], dashes)


def _looks(filled: FilledTable) -> dict[str, _Look]:
    """Looks by the labels of rows. An operator of the paper looks the same in all tables."""
    own = {name: number for number, name in enumerate(BUILT_IN[1:])}
    numbers: dict[str, int] = {}
    free = len(own)
    for line in filled.lines:
        label, operator = line.row.label, line.row.operator
        if label in numbers:
            continue
        if operator in own and own[operator] not in numbers.values():
            numbers[label] = own[operator]
        else:
            numbers[label] = free
            free += 1
    return {label: _look(number) for label, number in numbers.items()}


def _headed(figure: Figure, filled: FilledTable, *said: str) -> None:
    """Sets the title, with remarks on the values below it."""
    lines = [f"Table {filled.table.id}: {filled.table.title}"]
    lines += [part for text in said if text for part in textwrap.wrap(text, 84)]
    figure.suptitle("\n".join(lines), x=0.01, horizontalalignment="left", linespacing=1.4)


def _origin(filled: FilledTable, cells: Iterable[Cell]) -> str:
    """Says whose values are plotted, and what ours were measured on."""
    cells = list(cells)
    reported = [cell for cell in cells if filled.table.reported_by and cell.reported is not None]
    parts = []
    if reported:
        reproduced = sum(cell.state == "reproduced" for cell in reported)
        share = f", {reproduced} of {len(reported)} reproduced" if reproduced else ", not reproduced"
        parts.append(f"hollow: reported by {filled.table.reported_by}{share}")
    states = list(dict.fromkeys(cell.state for cell in cells if cell.values))
    if states:
        counts = sorted({len(cell.values) for cell in cells if cell.values})
        seeds = "one seed each" if counts == [1] else f"mean and standard deviation of {_span(counts)} seeds"
        parts.append(f"filled: ours ({', '.join(states)}), {seeds}")
    return "; ".join(parts)


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _legend(figure: Figure, filled: FilledTable, looks: Mapping[str, _Look], cells: Iterable[Cell]) -> None:
    """Adds a legend of the rows and of filled and hollow markers."""
    cells = list(cells)
    states = list(dict.fromkeys(cell.state for cell in cells if cell.values))
    reported = bool(filled.table.reported_by) and any(cell.reported is not None for cell in cells)
    handles = [look.handle(label, hollow=not states) for label, look in looks.items()]
    plain = _Look("0.35", "o", "none")
    handles += [plain.handle(f"reported by {filled.table.reported_by}", hollow=True)] if reported else []
    handles += [plain.handle(f"ours, {state}") for state in states]
    figure.legend(handles=handles, loc="outside right upper")


@styled
def accuracy(filled: FilledTable) -> Figure | None:
    """Plots the table's first metric against parameters and against MACs of the whole model, as the code counts them.

    Each row has one marker: filled for our mean over the seeds, with their standard deviation, and hollow for the value
    that the paper reports, at the size that it reports, if it does. Hollow markers at one place surround each other. If
    several columns or groups have the metric, a line joins the markers of a row.

    Args:
        filled: A table.

    Returns:
        Two panels with a common vertical axis, in the unit of the table; None if there is nothing to plot.
    """
    columns = filled.table.columns
    first = next((column for column in columns if not column.counted), None)
    if first is None:
        return None
    placed: list[tuple[_Series, int]] = []
    for series in _series(filled):
        index = next((i for i in series.columns if columns[i].metric == first.metric), None)
        cells = [line.cells[index] for line in series.lines] if index is not None else []
        if index is not None and any(_shown(filled, cell) for cell in cells):
            placed.append((series, index))
    axes_of = [metric for metric in _AXES if any(_size(filled, i, metric) is not None for _, i in placed)]
    if not axes_of:
        return None
    names, looks = _names(filled, [series for series, _ in placed]), _looks(filled)
    figure = Figure(figsize=(7.2, 3.3))
    panels = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    for metric, axis in zip(axes_of, panels, strict=True):
        _against(axis, _points(filled, placed, names, metric), looks)
        axis.set_xlabel(_AXES[metric][0])
    heads = {columns[index].label for _, index in placed}
    name = first.label if len(heads) == 1 else _shared(heads) or first.metric
    panels[0].set_ylabel(f"{name} ({first.better} is better)")
    cells = [line.cells[index] for series, index in placed for line in series.lines]
    drawn = {line.row.label for series, i in placed for line in series.lines if _shown(filled, line.cells[i])}
    _legend(figure, filled, {label: look for label, look in looks.items() if label in drawn}, cells)
    _headed(figure, filled, _origin(filled, cells))
    return figure


def _shown(filled: FilledTable, cell: Cell) -> bool:
    return bool(cell.values) or (bool(filled.table.reported_by) and cell.reported is not None)


def _size(filled: FilledTable, index: int, metric: str) -> int | None:
    """Index of the column that counts parameters or MACs of the models that another column measures."""
    columns = filled.table.columns
    own = columns[index]
    found = [
        i
        for i, column in enumerate(columns)
        if column.metric == metric and column.run.name == own.run.name and column.backbone == own.backbone
    ]
    return found[0] if found else None


@dataclass(frozen=True)
class _Point:
    """A marker of `accuracy`.

    Attributes:
        label: Label of the row.
        reported: Whether the paper reports the value; otherwise it is ours.
        series: Name of the series.
        x: Parameters in millions, or MACs in billions.
        y: Value of the metric.
        spread: Standard deviation over the seeds; None for fewer than two.
    """

    label: str
    reported: bool
    series: str
    x: float
    y: float
    spread: float | None = None


def _points(
    filled: FilledTable, placed: Sequence[tuple[_Series, int]], names: Sequence[str], metric: str
) -> list[list[_Point]]:
    """The markers of each series."""
    found: list[list[_Point]] = []
    for (series, index), name in zip(placed, names, strict=True):
        found.append([])
        size = _size(filled, index, metric)
        for line in series.lines if size is not None else ():
            counted, cell, label = line.cells[size or 0], line.cells[index], line.row.label
            if counted.mean is None:
                continue
            unit = _AXES[metric][1] / filled.table.columns[size or 0].scale
            x = counted.mean * unit
            if filled.table.reported_by and cell.reported is not None:
                theirs = x if counted.reported is None else counted.reported * unit
                found[-1].append(_Point(label, True, name, theirs, cell.reported))
            if cell.mean is not None:
                found[-1].append(_Point(label, False, name, x, cell.mean, cell.std))
    return found


def _mark(axis: Axes, points: Sequence[_Point], looks: Mapping[str, _Look]) -> None:
    spans = (
        [max(values) - min(values) or 1.0 for values in ([p.x for p in points], [p.y for p in points])]
        if points
        else []
    )
    drawn: list[_Point] = []
    for point in points:
        look = looks[point.label]
        if not point.reported:
            axis.errorbar(point.x, point.y, point.spread, fmt=look.marker, color=look.colour)
            continue
        # A marker where others are already is drawn around them.
        under = sum(
            abs(point.x - other.x) < 0.015 * spans[0] and abs(point.y - other.y) < 0.015 * spans[1] for other in drawn
        )
        size = _HOLLOW["markersize"] + 4 * under
        axis.plot(point.x, point.y, look.marker, color=look.colour, **{**_HOLLOW, "markersize": size})
        drawn.append(point)


def _against(axis: Axes, found: Sequence[Sequence[_Point]], looks: Mapping[str, _Look]) -> None:
    """Draws a panel of `accuracy`: its markers, and lines that join those of a row."""
    every = [point for points in found for point in points]
    _mark(axis, every, looks)
    chains: dict[tuple[str, bool], list[_Point]] = {}
    for point in every:
        chains.setdefault((point.label, point.reported), []).append(point)
    for (row, reported), chain in chains.items():
        if len(chain) > 1:
            way = [point.x for point in chain], [point.y for point in chain]
            axis.plot(*way, "--" if reported else "-", color=looks[row].colour, linewidth=0.7, alpha=0.6, zorder=1)
    axis.margins(0.12)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    text: dict[str, Any] = {"fontsize": 8, "color": "0.25", "textcoords": "offset points"}
    if len(found) > 1 and max(len({point.label for point in points}) for points in found) > 2:
        for points in found:
            if points:
                highest = max(points, key=lambda point: point.y + (point.spread or 0))
                place = (highest.x, highest.y + (highest.spread or 0))
                axis.annotate(highest.series, place, (0, 7), ha="center", va="bottom", **text)
    elif len(found) > 1:  # names beside each marker would overlap
        middle = sum(axis.get_xlim()) / 2
        for chain in chains.values():
            last, name = chain[-1], f"{chain[0].series} … {chain[-1].series}"
            side = 1 if last.x < middle else -1
            axis.annotate(
                name, (last.x, last.y), (9 * side, -9), ha="left" if side > 0 else "right", va="center", **text
            )
    else:
        _zoom(axis, every, looks)


def _zoom(axis: Axes, points: Sequence[_Point], looks: Mapping[str, _Look]) -> None:
    """Magnifies three or more overlapping markers in an inset, where the panel is empty."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    shares = [((point.x - left) / (right - left), (point.y - low) / (high - low)) for point in points]
    near = [[i for i, (x, y) in enumerate(shares) if abs(x - u) < 0.06 and abs(y - v) < 0.04] for u, v in shares]
    crowd = max(near, key=len, default=[])
    side = 0.42
    corners = [(x, y) for y in (0.5, 0.3, 0.1) for x in (0.3, 0.54, 0.2)]
    empty = [
        (x, y)
        for x, y in corners
        # The inset's own tick labels are left of it and below.
        if not any(x - 0.22 < u < x + side + 0.04 and y - 0.16 < v < y + side + 0.1 for u, v in shares)
    ]
    if len(crowd) < 3 or not empty:
        return
    inset = axis.inset_axes((*empty[0], side, side))
    _mark(inset, [points[i] for i in crowd], looks)
    inset.margins(0.2)
    inset.xaxis.set_major_locator(MaxNLocator(2))
    inset.yaxis.set_major_locator(MaxNLocator(3))
    inset.spines[:].set(visible=True, color="0.6")
    inset.set_title("magnified", pad=2)


def _records(series: _Series, line: FilledRow, known: Mapping[str, Evidence]) -> list[TestRecord]:
    """The records of a row, by seed."""
    names = dict.fromkeys(name for index in series.columns for name in line.cells[index].records)
    return [known[name].record for name in names if name in known]


@styled
def by_size(filled: FilledTable, evidence: Sequence[Evidence]) -> Figure | None:
    """Plots average precision and recall by the size of objects: small, medium and large, as COCO defines them.

    Args:
        filled: A table.
        evidence: All records; those of the table's cells are plotted filled, and reported values hollow.

    Returns:
        A panel for each group, in the unit of the table's first metric; None if no size was measured or reported.
    """
    known = {piece.name: piece for piece in evidence}
    columns = filled.table.columns
    chosen, found = [], []
    for series in _series(filled):
        scale = columns[series.columns[0]].scale
        values: dict[tuple[str, str], list[float]] = {}
        reported: dict[tuple[str, str], float] = {}
        for line in series.lines:
            for record in _records(series, line, known):
                for metric in SIZES:
                    if (value := record.metrics.get(metric)) is not None:
                        values.setdefault((metric, line.row.label), []).append(value * scale)
            for index in series.columns:
                cell = line.cells[index]
                if columns[index].metric in SIZES and filled.table.reported_by and cell.reported is not None:
                    reported[columns[index].metric, line.row.label] = cell.reported
        if values or reported:
            chosen.append(series)
            found.append((values, reported))
    if not chosen:
        return None
    looks = _looks(filled)
    figure = Figure(figsize=(7.2, 1.2 + 2.3 * len(chosen)))
    panels = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for axis, series, name, (values, reported) in zip(panels, chosen, _names(filled, chosen), found, strict=True):
        metrics = [metric for metric in SIZES if any(metric == key for key, _ in (*values, *reported))]
        found_rows = {row for _, row in (*values, *reported)}
        rows = [line.row.label for line in series.lines if line.row.label in found_rows]
        for place, metric in enumerate(metrics):
            if place:
                axis.axvline(place - 0.5, color="0.8", linewidth=0.6)
            for number, row in enumerate(rows):
                x = place + 0.75 * ((number + 0.5) / len(rows) - 0.5)
                look, key = looks[row], (metric, row)
                if key in reported:
                    axis.plot(x, reported[key], look.marker, color=look.colour, **_HOLLOW)
                if key in values:
                    spread = statistics.stdev(values[key]) if len(values[key]) > 1 else None
                    axis.errorbar(x, statistics.fmean(values[key]), spread, fmt=look.marker, color=look.colour)
        axis.set_xticks(range(len(metrics)), [SIZES[metric] for metric in metrics])
        axis.set_xlim(-0.5, len(metrics) - 0.5)
        axis.grid(visible=False, axis="x")
        axis.tick_params(axis="x", length=0)
        percent = columns[series.columns[0]].scale == 100
        axis.set_ylabel("AP, AR in percent" if percent else "AP, AR")
        axis.set_title(name, loc="left")
    shown = [key[1] for values, reported in found for key in (*values, *reported)]
    cells = [cell for series in chosen for line in series.lines for cell in _of_sizes(columns, series, line)]
    _legend(figure, filled, {label: look for label, look in looks.items() if label in shown}, cells)
    _headed(figure, filled, "By the size of objects (S, M, L); " + _origin(filled, cells))
    return figure


def _of_sizes(columns: Sequence[Column], series: _Series, line: FilledRow) -> list[Cell]:
    """The cells of a row by size of objects; without such columns its first cell, whose records have these metrics."""
    cells = [line.cells[index] for index in series.columns if columns[index].metric in SIZES]
    return cells or [dataclasses.replace(line.cells[series.columns[0]], reported=None)]


@styled
def curves(filled: FilledTable, evidence: Sequence[Evidence]) -> Figure | None:
    """Plots learning curves: the primary metric on the val split, and the training loss, by step.

    Args:
        filled: A table.
        evidence: All records; those of the table's cells are plotted.

    Returns:
        A pair of panels for each group and run: the mean over the seeds, in a band from the lowest to the highest, of
        the training loss within a moving window as well; None if nothing was measured.
    """
    known = {piece.name: piece for piece in evidence}
    chosen: list[_Series] = []
    found: list[dict[str, list[TestRecord]]] = []
    for series in _series(filled):
        of_rows = {line.row.label: _records(series, line, known) for line in series.lines}
        rows = {label: records for label, records in of_rows.items() if any(_curve(r) for r in records)}
        if rows:
            chosen.append(series)
            found.append(rows)
    if not chosen:
        return None
    looks = _looks(filled)
    figure = Figure(figsize=(7.2, 0.8 + 2.5 * len(chosen)))
    panels = figure.subplots(len(chosen), 2, squeeze=False)
    for pair, name, rows in zip(panels, _names(filled, chosen), found, strict=True):
        heads = dict.fromkeys(_curve(record) for records in rows.values() for record in records)
        for axis, key in zip(pair, (next(filter(None, heads)), "train/loss"), strict=True):
            for label, records in rows.items():
                _band(axis, looks[label], [dict(r.curves[key]) for r in records if key in r.curves], key)
            axis.set_title(f"{name}: {key}" if name else key, loc="left")
            _steps(axis)
    labels = {label for rows in found for label in rows}
    handles = [look.handle(label, line=True) for label, look in looks.items() if label in labels]
    figure.legend(handles=handles, loc="outside right upper")
    cells = [line.cells[series.columns[0]] for series in chosen for line in series.lines]
    states = ", ".join(dict.fromkeys(cell.state for cell in cells if cell.values))
    seeds = sorted({len(records) for rows in found for records in rows.values()})
    many = "one seed each" if seeds == [1] else f"mean of {_span(seeds)} seeds, band: lowest to highest"
    window = (
        f"the training loss is a mean over {100 * WINDOW:g} % of its points, in a band from the lowest to the highest"
    )
    _headed(figure, filled, f"Learning curves of ours ({states}), {many}; {window}")
    return figure


def _curve(record: TestRecord) -> str:
    """The metric on the val split of which a record has a curve; empty if it has none."""
    return next((key for key, points in record.curves.items() if key != "train/loss" and points), "")


def _band(axis: Axes, look: _Look, found: Sequence[Mapping[int, float]], key: str) -> None:
    window = WINDOW if key == NOISY else 0.0
    steps, mean, low, high = over_seeds(found, window)
    if not steps:
        return
    every = max(1, len(steps) // 6)
    axis.plot(steps, mean, color=look.colour, marker=look.marker, linestyle=look.dashes, markersize=4, markevery=every)
    if len(found) > 1 or window:
        axis.fill_between(steps, low, high, color=look.colour, alpha=0.15, linewidth=0)


def _steps(axis: Axes) -> None:
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


@styled
def draw_pair(
    found: Mapping[str, tuple[Sequence[Mapping[int, float]], Sequence[Mapping[int, float]]]],
    labels: tuple[str, str],
    path: Path,
) -> None:
    """Plots the learning curves of two sides into the same panels, for `sis-lightning compare`.

    Lines are means over the seeds and bands go from the lowest to the highest; the training loss is a moving mean.

    Args:
        found: For each metric, value by step for each seed of the first side, and of the second.
        labels: Names of the two sides.
        path: File to write, a .png, .svg or .pdf.

    Raises:
        UsageError: If the path has another ending.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(f"{path}: its ending must be one of {', '.join(ENDINGS)}")
    looks = (_look(6), _look(3))
    # At most three panels side by side.
    across = min(3, len(found))
    down = math.ceil(len(found) / across)
    figure = Figure(figsize=(max(4.5, 2.9 * across), 0.8 + 2.5 * down))
    panels = figure.subplots(down, across, squeeze=False).reshape(-1)
    for axis in panels[len(found) :]:
        axis.set_axis_off()
    for axis, (key, pair) in zip(panels, found.items(), strict=False):
        for curve, look in zip(pair, looks, strict=True):
            _band(axis, look, curve, key)
        axis.set_title(key, loc="left")
        _steps(axis)
    handles = [look.handle(label, line=True) for look, label in zip(looks, labels, strict=True)]
    figure.legend(handles=handles, loc="outside upper left")
    write_figure(figure, path)
