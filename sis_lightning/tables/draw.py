"""Plots figures by name: of filled tables, and of what operators and networks see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sis_lightning.errors import UsageError, nearest
from sis_lightning.tables.cells import FilledTable
from sis_lightning.tables.figures import accuracy, by_size, curves
from sis_lightning.tables.judge import Evidence
from sis_lightning.tables.plotting import write_both
from sis_lightning.tables.render import plotted_content

#: Names of the figures.
FIGURES = ("accuracy", "sizes", "curves", "receptive-fields", "activation-maps")


def draw(
    names: Sequence[str],
    tables: Sequence[FilledTable],
    evidence: Sequence[Evidence],
    folder: Path,
    runs: Sequence[Path] = (),
) -> list[Path]:
    """Plots figures, each as PNG and SVG; figures without data are left out.

    Args:
        names: Some of `FIGURES`; empty for all, of which `activation-maps` needs `runs`.
        tables: Filled tables, each with figures of its own.
        evidence: The records that they were filled from.
        folder: Folder to write to: `accuracy_table_3.png`, `receptive_fields.svg` and so on.
        runs: Directories of classification runs, for `activation-maps`.

    Returns:
        The files written.

    Raises:
        UsageError: If a name does not exist, or the runs cannot be shown together.
        DataError: If a run, its checkpoint or its data is missing.
    """
    for name in names:
        if name not in FIGURES:
            raise UsageError(f"there is no figure '{name}': {nearest(name, FIGURES)}")
    if "activation-maps" in names and not runs:
        raise UsageError("activation-maps needs trained classification runs: --runs DIR DIR")
    wanted = [name for name in FIGURES if name in names or (not names and (name != "activation-maps" or runs))]
    of_tables: dict[str, Callable[[FilledTable], Figure | None]] = {
        "accuracy": accuracy,
        "sizes": lambda filled: by_size(filled, evidence),
        "curves": lambda filled: curves(filled, evidence),
    }
    written = []
    for name in wanted:
        if name == "receptive-fields":
            from sis_lightning.tables.attribution import receptive_fields  # imports torch

            written += write_both(receptive_fields(), folder / "receptive_fields")
        elif name == "activation-maps":
            from sis_lightning.tables.attribution import activation_maps

            written += write_both(activation_maps(runs), folder / "activation_maps")
        else:
            for filled in tables:
                figure = of_tables[name](filled)
                if figure is not None:
                    written += write_both(figure, folder / f"{name}_{filled.table.slug}", plotted_content(filled))
    return written
