"""Renders filled tables as Markdown, CSV, LaTeX and HTML. Imports neither torch nor matplotlib.

The texts are Jinja templates in `templates/`; `_view` gives all of them the same content.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sis_lightning.files import digest, write_text
from sis_lightning.tables import paper
from sis_lightning.tables.cells import Cell, FilledRow, FilledTable
from sis_lightning.tables.differences import MIN_SEEDS, Difference
from sis_lightning.tables.spec import Column, TableSpec

if TYPE_CHECKING:
    from jinja2 import Environment

#: What the states of cells mean.
MEANING = {
    "reproduced": "measured on the published files (identified by their fingerprints), with exactly the row's recipe "
    "until its end, and by the code of a commit",
    "synthetic": "measured on images that this project draws, which says nothing about the paper's data",
    "other data": "measured on other files than the published ones, such as a stand-in",
    "other recipe": "measured on the table's data, but with another configuration, not until its end, or by "
    "uncommitted code",
    "running": "being trained",
    "not run": "not measured yet",
}


def number(value: float, column: Column, sign: str = "") -> str:
    """A value with the column's digits, and a true minus sign."""
    return f"{value:{sign}.{column.digits}f}".replace("-", "−")


def ours(cell: Cell, column: Column) -> str:
    """Our value: the mean over the seeds, their standard deviation, and the difference from the reported value."""
    if cell.mean is None:
        return ""
    spread = f" ± {number(cell.std, column)}" if cell.std is not None else ""
    difference = f" ({number(cell.difference, column, '+')})" if cell.difference is not None else ""
    return number(cell.mean, column) + spread + difference


def state(cell: Cell, column: Column) -> str:
    """The state of a cell, with the number of seeds that it has and needs, or the newest value that does not count."""
    if cell.state in ("", "counted"):
        return ""
    if cell.values:
        needed = len(cell.values) + len(cell.missing)
        seeds = f"n = {len(cell.values)}" + (f" of {needed}" if cell.missing else "")
        return f"{cell.state}, {seeds}"
    if cell.rejected and cell.state not in ("running", "not run"):
        return f"{cell.state}: {number(cell.rejected[-1], column)}"
    return cell.state


def difference(found: Difference | None, column: Column) -> str:
    """A difference from the baseline with its confidence interval, and what it shows."""
    if found is None:
        return ""
    text = number(found.mean, column, "+")
    if found.low is not None and found.high is not None:
        text += f" ({number(found.low, column, '+')} … {number(found.high, column, '+')})"
    return f"{text}, {verdict(found, column)}"


def verdict(found: Difference, column: Column) -> str:
    """What a difference shows: `better`, `worse`, `no difference shown`, or that there are too few seeds."""
    if found.p is None:
        return f"n = {' and '.join(map(str, dict.fromkeys(found.seeds)))}: too few for a statement"
    if not found.shown:
        return "no difference shown"
    return "better" if (found.mean > 0) == (column.better == "higher") else "worse"


def render(spec: TableSpec, tables: Sequence[FilledTable], folder: Path) -> dict[Path, str]:
    """Renders all forms: TABLES.md, tables.csv, latex/*.tex and tables.html.

    Args:
        spec: The table spec, for its footnotes.
        tables: The filled tables.
        folder: The results folder; plots in its `figures/` are included.

    Returns:
        The text of each file, by path.
    """
    figures = sorted((folder / "figures").glob("*.svg"))
    return {
        folder / "TABLES.md": to_markdown(spec, tables, figures),
        folder / "tables.csv": to_csv(tables),
        **{folder / "latex" / f"{filled.table.slug}.tex": to_latex(spec, filled) for filled in tables},
        folder / "tables.html": to_html(spec, tables, figures),
    }


def plotted_content(filled: FilledTable) -> str:
    """Digest of the content of a table, which each of its figures carries to show what it was plotted from."""
    return digest(to_csv([filled]))


def stale_figures(tables: Sequence[FilledTable], folder: Path) -> list[Path]:
    """Figures of tables that were plotted from other cells than there are now."""
    figures = sorted((folder / "figures").glob("*.*"))
    sources = [(plotted_content(filled).encode(), _figures_of(filled, figures)) for filled in tables]
    return [path for source, paths in sources for path in paths if source not in path.read_bytes()]


def write_tables(spec: TableSpec, tables: Sequence[FilledTable], folder: Path) -> list[Path]:
    """Writes all forms, removes LaTeX files of tables that no longer exist, and returns the files written."""
    texts = render(spec, tables, folder)
    for path in (folder / "latex").glob("table_*.tex"):
        if path not in texts:
            path.unlink()
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def to_markdown(spec: TableSpec, tables: Sequence[FilledTable], figures: Sequence[Path] = ()) -> str:
    """All tables as one Markdown page, with their figures."""
    return _page("tables.md.jinja", spec, tables, figures)


def to_html(spec: TableSpec, tables: Sequence[FilledTable], figures: Sequence[Path] = ()) -> str:
    """All tables as one HTML page, with the records of each cell and the figures."""
    return _page("tables.html.jinja", spec, tables, figures)


def to_latex(spec: TableSpec, filled: FilledTable) -> str:
    r"""One table in the style of booktabs, for `\input`: the reported value, a slash, our value."""
    return _environment("tex").get_template("table.tex.jinja").render(shown=_view(spec, filled)) + "\n"


def _page(template: str, spec: TableSpec, tables: Sequence[FilledTable], figures: Sequence[Path]) -> str:
    cells = [cell for filled in tables for line in filled.lines for cell in line.cells]
    general = [path for path in figures if not any(path in _figures_of(filled, figures) for filled in tables)]
    page = _environment(template.split(".")[1]).get_template(template)
    text = page.render(
        tables=[_view(spec, filled, figures) for filled in tables],
        meaning=MEANING,
        min_seeds=MIN_SEEDS,
        summary=Counter(cell.state for cell in cells if cell.state not in ("", "counted")),
        records=any(cell.records or cell.reasons for cell in cells),
        figures=_titled(general),
    )
    return text.rstrip() + "\n"


@cache
def _environment(form: str) -> Environment:
    """Jinja for `md`, `tex` or `html`; LaTeX is full of braces, so that its templates use << >> and <% %> instead."""
    from jinja2 import Environment, PackageLoader

    delimiters: dict[str, Any] = {
        "block_start_string": "<%",
        "block_end_string": "%>",
        "variable_start_string": "<<",
        "variable_end_string": ">>",
        "comment_start_string": "<#",
        "comment_end_string": "#>",
    }
    environment = Environment(
        loader=PackageLoader("sis_lightning.tables", "templates"),
        autoescape=form == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        **(delimiters if form == "tex" else {}),
    )
    environment.filters |= {"tex": tex, "cell": _markdown_cell}
    return environment


def _markdown_cell(text: object) -> str:
    """Text that does not end a cell of a Markdown table."""
    return str(text).replace("|", "\\|")


_TEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"×": "$\\times$", "±": "$\\pm$", "−": "$-$", "…": "\\dots{}", "–": "--", "→": "$\\to$"},
        **{"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\\": "\\textbackslash{}"},
    }
)


def tex(text: str) -> str:
    """Escapes plain text for LaTeX."""
    return text.translate(_TEX)


def _view(spec: TableSpec, filled: FilledTable, figures: Sequence[Path] = ()) -> dict[str, Any]:
    """The content of one table for all templates."""
    table, notes = filled.table, _Footnotes(spec, filled)
    has_reported = [any(line.cells[i].reported is not None for line in filled.lines) for i in range(len(table.columns))]
    groups = []
    for group in table.groups:
        rows: list[dict[str, Any]] = [
            {
                "label": line.row.label,
                "marks": notes.numbers_of(line.row.notes),
                "cells": [
                    _cell_view(cell, found, column, reported)
                    for cell, found, column, reported in zip(
                        line.cells, line.differences, table.columns, has_reported, strict=True
                    )
                ],
            }
            for line in filled.lines
            if line.group is group
        ]
        differences = [row for row in rows if any(cell["difference"] for cell in row["cells"])]
        groups.append({"title": group.title, "baseline": group.baseline, "rows": rows, "differences": differences})
    measured = [cell for line in filled.lines for cell in line.cells if cell.values and cell.state != "counted"]
    return {
        "table": table,
        "heads": [
            column.label + (f" [{column.reported_label}]" if column.reported_label else "") for column in table.columns
        ],
        "groups": groups,
        "marks": notes.general,
        "notes": notes.lines(),
        "compared": [i for i in range(len(table.columns)) if any(line.differences[i] for line in filled.lines)],
        "deviations": paper.deviations(TableSpec((table,), {}, {}, {})).get(table.id, []),
        "states": list(dict.fromkeys(cell.state for cell in measured)),
        "evidence": _evidence(filled),
        "figures": _titled(_figures_of(filled, figures)),
    }


def _cell_view(cell: Cell, found: Difference | None, column: Column, has_reported: bool) -> dict[str, Any]:
    reported = "–" if cell.reported is None else number(cell.reported, column)
    return {
        "reported": reported if has_reported else "",
        "ours": ours(cell, column),
        "mean": "" if cell.mean is None else number(cell.mean, column),
        "std": "" if cell.std is None else number(cell.std, column),
        "seeds": len(cell.values) if cell.state != "counted" else 0,
        "state": state(cell, column),
        "kind": cell.state.replace(" ", "-"),
        "difference": difference(found, column),
        "records": cell.records,
        "missing": cell.missing if cell.values else (),
        "reasons": cell.reasons,
    }


class _Footnotes:
    """Numbers footnotes in the order in which a table refers to them."""

    def __init__(self, spec: TableSpec, filled: FilledTable) -> None:
        self.texts = spec.notes
        self.numbers: dict[str, int] = {}
        self.general = self.numbers_of(filled.table.notes)

    def numbers_of(self, names: Sequence[str]) -> list[int]:
        """The numbers of named footnotes."""
        return [self.numbers.setdefault(name, len(self.numbers) + 1) for name in names]

    def lines(self) -> list[tuple[int, str]]:
        """Numbers and texts of all footnotes so far."""
        return [(number, self.texts[name].strip()) for name, number in self.numbers.items()]


def _evidence(filled: FilledTable) -> list[str]:
    """Sentences about the records behind a table."""
    names = sorted({name for line in filled.lines for cell in line.cells for name in cell.records})
    later = sum(cell.superseded for line in filled.lines for cell in line.cells)
    reasons = dict.fromkeys(reason for line in filled.lines for cell in line.cells for reason in cell.reasons)
    missing = sorted({seed for line in filled.lines for cell in line.cells if cell.values for seed in cell.missing})
    lines = [f"{len(names)} record(s)" if names else "no records"]
    if missing:
        lines.append(f"some rows lack seed {', '.join(map(str, missing))}")
    lines += [f"{line.row.label} has records of {'; '.join(line.mixed)}" for line in filled.lines if line.mixed]
    if later:
        lines.append(f"{later} value(s) were replaced by a later measurement of the same seed")
    lines += [f"not counted: {reason}" for reason in list(reasons)[:5]]
    if len(reasons) > 5:
        lines.append(f"{len(reasons) - 5} more are not counted")
    return lines


def _figures_of(filled: FilledTable, figures: Sequence[Path]) -> list[Path]:
    """The figures of a table."""
    return [path for path in figures if path.stem.endswith(f"_{filled.table.slug}")]


def _titled(figures: Sequence[Path]) -> list[dict[str, str]]:
    return [{"name": path.name, "title": path.stem.replace("_", " ")} for path in figures]


def to_csv(tables: Sequence[FilledTable]) -> str:
    """One line per cell with all digits, for other programs."""
    text = io.StringIO()
    fields = ["table", "group", "row", "backbone", "operator", "column", "metric", "run", "state", "reported", "mean"]
    fields += ["std", "n", "missing_seeds", "difference", "baseline", "difference_mean", "difference_low"]
    fields += ["difference_high", "difference_p", "difference_shows", "mixed", "records"]
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for filled in tables:
        for line in filled.lines:
            for column, cell, found in zip(filled.table.columns, line.cells, line.differences, strict=True):
                writer.writerow(_csv_row(filled, line, column, cell, found))
    return text.getvalue()


def _csv_row(
    filled: FilledTable, line: FilledRow, column: Column, cell: Cell, found: Difference | None
) -> Mapping[str, Any]:
    row = {
        "table": filled.table.id,
        "group": line.group.title,
        "row": line.row.label,
        "backbone": line.row.backbone,
        "operator": line.row.operator,
        "column": column.label,
        "metric": column.metric,
        "run": column.run.name,
        "state": cell.state,
        "reported": cell.reported,
        "mean": cell.mean,
        "std": cell.std,
        "n": len(cell.values),
        "missing_seeds": " ".join(map(str, cell.missing)),
        "difference": cell.difference,
        "mixed": "; ".join(line.mixed),
        "records": " ".join(cell.records),
    }
    if found is not None:
        row |= {"baseline": line.group.baseline, "difference_mean": found.mean, "difference_low": found.low}
        row |= {"difference_high": found.high, "difference_p": found.p, "difference_shows": verdict(found, column)}
    return row
