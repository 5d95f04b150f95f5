"""Filled tables as Markdown, CSV, LaTeX and HTML. Imports neither torch nor matplotlib."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sis_lightning.files import digest, write_text
from sis_lightning.tables.cells import Cell, Filled, Line, Paired
from sis_lightning.tables.spec import Book, Column

_MEANING = {
    "reproduced": "the published files (by fingerprints), the row's recipe to the letter and its end, code of a commit",
    "synthetic": "measured on pictures that this project draws: says nothing about the paper's data",
    "other data": "measured on other files than the published ones, such as a stand-in",
    "other recipe": "the table's files, but another configuration, not to its end, or by code that no commit holds",
    "running": "a fit is busy with it",
    "not run": "nobody has measured it",
}


def number(value: float, column: Column, sign: str = "") -> str:
    """A figure with the column's digits, and a true minus."""
    return f"{value:{sign}.{column.digits}f}".replace("-", "−")


def ours(cell: Cell, column: Column) -> str:
    """Our figure: the mean over the seeds, and their standard deviation."""
    if cell.mean is None:
        return ""
    spread = f" ± {number(cell.std, column)}" if cell.std is not None else ""
    difference = f" ({number(cell.difference, column, '+')})" if cell.difference is not None else ""
    return number(cell.mean, column) + spread + difference


def standing(cell: Cell, column: Column) -> str:
    """What a cell is, and how many of the seeds it wants it has."""
    if cell.state in ("", "counted"):
        return ""
    if cell.values:
        wanted = len(cell.values) + len(cell.missing)
        seeds = f"n = {len(cell.values)}" + (f" of {wanted}" if cell.missing else "")
        return f"{cell.state}, {seeds}"
    aside = f": {number(cell.aside[-1], column)}" if cell.aside and cell.state not in ("running", "not run") else ""
    return f"{cell.state}{aside}"


def paired(pair: Paired | None, column: Column) -> str:
    """A difference from the baseline, with its interval."""
    if pair is None:
        return ""
    if pair.low is None or pair.high is None:
        return f"{number(pair.mean, column, '+')} (one seed)"
    low, high = number(pair.low, column, "+"), number(pair.high, column, "+")
    return f"{number(pair.mean, column, '+')} ({low} … {high}), n = {len(pair.seeds)}"


def render(book: Book, tables: Sequence[Filled], folder: Path) -> dict[Path, str]:
    """The texts of all forms by their files: TABLES.md, tables.csv, latex/*.tex, tables.html.

    Args:
        book: With the notes.
        tables: To write.
        folder: For results; figures that lie in its `figures/` go into the page.
    """
    figures = sorted((folder / "figures").glob("*.svg"))
    return {
        folder / "TABLES.md": to_markdown(book, tables, figures),
        folder / "tables.csv": to_csv(tables),
        **{folder / "latex" / f"{filled.table.slug}.tex": to_latex(book, filled) for filled in tables},
        folder / "tables.html": to_html(book, tables, figures),
    }


def drawn_from(filled: Filled) -> str:
    """Digest of what the figures of a table show; each carries that of which it was drawn."""
    return digest(to_csv([filled]))


def stale_figures(tables: Sequence[Filled], folder: Path) -> list[Path]:
    """Figures of tables that were drawn of other cells than there are now."""
    figures = sorted((folder / "figures").glob("*.*"))
    sources = [(drawn_from(filled).encode(), _of(filled, figures)) for filled in tables]
    return [path for source, paths in sources for path in paths if source not in path.read_bytes()]


def write_tables(book: Book, tables: Sequence[Filled], folder: Path) -> list[Path]:
    """Writes what `render` gives; returns the files. One of a table that is no more is removed."""
    texts = render(book, tables, folder)
    for path in (folder / "latex").glob("table_*.tex"):
        if path not in texts:
            path.unlink()
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _summary(tables: Sequence[Filled]) -> Counter[str]:
    cells = [cell for filled in tables for line in filled.lines for cell in line.cells]
    return Counter(cell.state for cell in cells if cell.state not in ("", "counted"))


def _has_printed(filled: Filled, index: int) -> bool:
    return any(line.cells[index].printed is not None for line in filled.lines)


def _head(filled: Filled, index: int) -> str:
    column = filled.table.columns[index]
    return column.label + (f" [{column.headed}]" if column.headed else "")


class _Footnotes:
    """Numbers footnotes in the order in which a table comes to them."""

    def __init__(self, book: Book, filled: Filled) -> None:
        self.texts = book.notes
        self.numbers: dict[str, int] = {}
        for name in filled.table.notes:
            self.of([name])
        self.general = list(self.numbers.values())

    def of(self, names: Sequence[str]) -> list[int]:
        return [self.numbers.setdefault(name, len(self.numbers) + 1) for name in names]

    def lines(self) -> list[tuple[int, str]]:
        return [(number, self.texts[name].strip()) for name, number in self.numbers.items()]


def _evidence(filled: Filled) -> list[str]:
    """What the figures of a table come from, for people."""
    names = sorted({name for line in filled.lines for cell in line.cells for name in cell.records})
    later = sum(cell.superseded for line in filled.lines for cell in line.cells)
    reasons = dict.fromkeys(reason for line in filled.lines for cell in line.cells for reason in cell.reasons)
    missing = sorted({seed for line in filled.lines for cell in line.cells if cell.values for seed in cell.missing})
    lines = [f"{len(names)} record(s)" if names else "no records"]
    if missing:
        lines.append(f"rows with fewer seeds than wanted lack some of {', '.join(map(str, missing))}")
    if later:
        lines.append(f"{later} figure(s) of seeds that were measured again later are not counted")
    lines += [f"not counted: {reason}" for reason in list(reasons)[:5]]
    if len(reasons) > 5:
        lines.append(f"and {len(reasons) - 5} more that are not counted")
    return lines


def to_markdown(book: Book, tables: Sequence[Filled], figures: Sequence[Path] = ()) -> str:
    """All tables as one page, with the figures that were drawn of them."""
    summary = _summary(tables)
    lines = [
        "# Tables",
        "",
        "Made by `sis-lightning tables render` of the paper's printed figures (`paper.yaml`), sealed records of runs",
        "(`records/`) and what the code counts (`models.json`). `sis-lightning tables check` finds what was edited.",
        "",
        "In a cell stands the paper's figure, if it has one; below it ours: mean ± standard deviation over the seeds,",
        "in brackets the difference from the paper, where both are of the same data and recipe; and what ours is:",
        "",
        *(f"- *{name}* ({summary[name]} cells): {meaning}" for name, meaning in _MEANING.items()),
        "",
        "Parameters and multiply-accumulates (MACs of one image, for the whole model) are counted by the code.",
        "",
    ]
    for filled in tables:
        lines += _markdown_table(book, filled)
        lines += [f"![{_said(path)}](figures/{path.name})\n" for path in _of(filled, figures)]
    general = [path for path in figures if not any(path in _of(filled, figures) for filled in tables)]
    lines += ["## Figures\n", *(f"![{_said(path)}](figures/{path.name})\n" for path in general)] if general else []
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> str:
    """Text that ends no cell of Markdown."""
    return text.replace("|", "\\|")


def _of(filled: Filled, figures: Sequence[Path]) -> list[Path]:
    """The figures of a table."""
    return [path for path in figures if path.stem.endswith(f"_{filled.table.slug}")]


def _said(figure: Path) -> str:
    return figure.stem.replace("_", " ")


def _markdown_cell(cell: Cell, column: Column, has_printed: bool) -> str:
    parts = ["–" if cell.printed is None else number(cell.printed, column)] if has_printed else []
    said = standing(cell, column)
    parts += [text for text in (ours(cell, column), f"*{said}*" if said else "") if text]
    return "<br>".join(parts)


def _markdown_table(book: Book, filled: Filled) -> list[str]:
    table, notes = filled.table, _Footnotes(book, filled)
    title = f"Table {table.id}: {table.title}"
    lines = [f"## {title}{_marks(notes.general)}", "", table.caption, ""]
    heads = [_plain(_head(filled, index)) for index in range(len(table.columns))]
    lines += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for group in table.groups:
        if group.title:
            lines.append(f"| **{_plain(group.title)}** |" + " |" * len(heads))
        for line in filled.lines:
            if line.group is not group:
                continue
            label = _plain(line.row.label) + _marks(notes.of(line.row.notes))
            cells = [
                _markdown_cell(cell, column, _has_printed(filled, index))
                for index, (cell, column) in enumerate(zip(line.cells, table.columns, strict=True))
            ]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += _markdown_differences(filled)
    lines += [f"{mark}. {text}" for mark, text in notes.lines()]
    lines += ["", "Evidence: " + "; ".join(_evidence(filled)) + ".", ""]
    return lines


def _marks(marks: Sequence[int]) -> str:
    return f"<sup>{','.join(map(str, marks))}</sup>" if marks else ""


def _compared(filled: Filled) -> list[int]:
    """Columns in which any row is compared with its baseline."""
    return [i for i in range(len(filled.table.columns)) if any(line.paired[i] for line in filled.lines)]


def _markdown_differences(filled: Filled) -> list[str]:
    columns = _compared(filled)
    if not columns:
        return []
    lines = ["Differences over the seeds that both have (mean, 95 % interval):", ""]
    lines += ["| | " + " | ".join(_plain(filled.table.columns[i].label) for i in columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    group = None
    for line in filled.lines:
        if any(line.paired):
            if line.group is not group:
                group = line.group
                title = f"{group.title}: " if group.title else ""
                lines.append(f"| **{_plain(title)}from {_plain(str(group.baseline))}** |" + " |" * len(columns))
            cells = [paired(line.paired[i], filled.table.columns[i]) for i in columns]
            lines.append(f"| {_plain(line.row.label)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def to_csv(tables: Sequence[Filled]) -> str:
    """A line for each cell, for other programs: all digits."""
    text = io.StringIO()
    fields = ["table", "group", "row", "backbone", "operator", "column", "metric", "run", "state", "printed", "mean"]
    fields += ["std", "n", "missing_seeds", "difference", "baseline", "paired_mean", "paired_low", "paired_high"]
    fields += ["paired_n", "records"]
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for filled in tables:
        for line in filled.lines:
            for column, cell, pair in zip(filled.table.columns, line.cells, line.paired, strict=True):
                writer.writerow(_csv_row(filled, line, column, cell, pair))
    return text.getvalue()


def _csv_row(filled: Filled, line: Line, column: Column, cell: Cell, pair: Paired | None) -> Mapping[str, Any]:
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
        "printed": cell.printed,
        "mean": cell.mean,
        "std": cell.std,
        "n": len(cell.values),
        "missing_seeds": " ".join(map(str, cell.missing)),
        "difference": cell.difference,
        "records": " ".join(cell.records),
    }
    if pair is not None:
        row |= {"baseline": line.group.baseline, "paired_mean": pair.mean, "paired_low": pair.low}
        row |= {"paired_high": pair.high, "paired_n": len(pair.seeds)}
    return row


_TEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"×": "$\\times$", "±": "$\\pm$", "−": "$-$", "…": "\\dots{}", "–": "--", "→": "$\\to$"},
        **{"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\\": "\\textbackslash{}"},
    }
)


def tex(text: str) -> str:
    """Plain text for LaTeX."""
    return text.translate(_TEX)


def to_latex(book: Book, filled: Filled) -> str:
    r"""A `table` in booktabs' style, to be `\input`: the paper's figure, a slash, ours."""
    table, notes = filled.table, _Footnotes(book, filled)
    width = len(table.columns)
    lines = [
        "% Made by sis-lightning tables render; needs \\usepackage{booktabs}.",
        "\\begin{table}",
        "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}",
        f"\\caption{{{tex(table.title)}. {tex(table.caption)}{_tex_marks(notes.general)}}}",
        f"\\label{{tab:sis-{table.id}}}",
        f"\\begin{{tabular}}{{l{'r' * width}}}",
        "\\toprule",
        " & ".join(["", *(tex(_head(filled, index)) for index in range(width))]) + " \\\\",
    ]
    for group in table.groups:
        lines.append("\\midrule")
        if group.title:
            lines.append(f"\\multicolumn{{{width + 1}}}{{l}}{{\\emph{{{tex(group.title)}}}}} \\\\")
        for line in filled.lines:
            if line.group is group:
                label = tex(line.row.label) + _tex_marks(notes.of(line.row.notes))
                cells = [
                    _tex_cell(cell, column, _has_printed(filled, index))
                    for index, (cell, column) in enumerate(zip(line.cells, table.columns, strict=True))
                ]
                lines.append(" & ".join([label, *cells]) + " \\\\")
    said = [f"${{}}^{{{mark}}}$~{tex(text)}" for mark, text in notes.lines()]
    measured = [cell for line in filled.lines for cell in line.cells if cell.values and cell.state != "counted"]
    if measured:
        states = ", ".join(dict.fromkeys(cell.state for cell in measured))
        said.append(f"Ours: {states}; mean $\\pm$ standard deviation, and in small print the number of seeds.")
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += ["\\par\\raggedright " + " ".join(said)] if said else []
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _tex_marks(marks: Sequence[int]) -> str:
    return f"$^{{{','.join(map(str, marks))}}}$" if marks else ""


def _tex_cell(cell: Cell, column: Column, has_printed: bool) -> str:
    mean = tex(number(cell.mean, column)) if cell.mean is not None else "--"
    spread = f"\\,$\\pm$\\,{number(cell.std, column)}" if cell.std is not None else ""
    if cell.values and cell.state != "counted":
        spread += f"\\,{{\\tiny {len(cell.values)}}}"
    if not has_printed:
        return mean + spread
    printed = "--" if cell.printed is None else number(cell.printed, column)
    return f"{printed} / {mean}{spread}"


def to_html(book: Book, tables: Sequence[Filled], figures: Sequence[Path]) -> str:
    """A page with all tables, the records behind each cell, and the figures that were drawn."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("sis_lightning", "results"), autoescape=True, trim_blocks=True)
    shown = []
    for filled in tables:
        notes = _Footnotes(book, filled)
        groups = []
        for group in filled.table.groups:
            rows = []
            for line in (line for line in filled.lines if line.group is group):
                cells = [
                    {
                        "printed": ("–" if cell.printed is None else number(cell.printed, column))
                        if _has_printed(filled, index)
                        else "",
                        "ours": ours(cell, column),
                        "state": standing(cell, column),
                        "kind": cell.state.replace(" ", "-"),
                        "paired": paired(line.paired[index], column),
                        "records": cell.records,
                        "missing": cell.missing if cell.values else (),
                        "reasons": cell.reasons,
                    }
                    for index, (cell, column) in enumerate(zip(line.cells, filled.table.columns, strict=True))
                ]
                rows.append({"label": line.row.label, "marks": notes.of(line.row.notes), "cells": cells})
            groups.append({"title": group.title, "baseline": group.baseline, "rows": rows})
        shown.append(
            {
                "table": filled.table,
                "heads": [_head(filled, index) for index in range(len(filled.table.columns))],
                "groups": groups,
                "marks": notes.general,
                "notes": notes.lines(),
                "compared": bool(_compared(filled)),
                "evidence": _evidence(filled),
                "figures": [path.name for path in _of(filled, figures)],
            }
        )
    general = [path.name for path in figures if not any(path in _of(filled, figures) for filled in tables)]
    page = environment.get_template("tables.html.jinja")
    return page.render(tables=shown, meaning=_MEANING, summary=_summary(tables), figures=general) + "\n"
