"""The run's metrics as CSV, which a resumed run goes on with: no row lost, none twice."""

from __future__ import annotations

import csv
import io
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from sis_lightning.files import write_text


def curves(run: Path, metric: str, points: int = 200) -> dict[str, list[tuple[int, float]]]:
    """How a run learnt: (steps done, value) of its loss and of `metric`, thinned to at most `points` each."""
    path = run / "csv" / "fit" / "metrics.csv"
    found: dict[str, list[tuple[int, float]]] = {"train/loss": [], metric: []}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, values in found.items():
                    if row.get(key) and math.isfinite(float(row[key])):
                        values.append((int(row["step"]) + 1, round(float(row[key]), 6)))
    return {key: values[:: -(-len(values) // points) or 1] for key, values in found.items()}


class MetricsCSV(Logger):
    """`metrics.csv`: a row for each call of `log_metrics`, a column for each metric.

    A file that is there already begins anew, unless `resume` keeps its first rows.

    Args:
        folder: Where it lies.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.columns = ["epoch", "step"]
        self.waiting: list[dict[str, Any]] = []
        self.rows = 0
        self._started = False
        self._keep = 0

    @property
    def name(self) -> str:
        """The folder's."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    @property
    def save_dir(self) -> str:
        """Where it lies."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds a row; a metric that is new adds a column."""
        row = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        self.waiting.append({**row, "step": step})
        self.rows += 1
        if len(self.waiting) >= 100:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Brings the waiting rows into the file."""
        if not self._started:
            self._start()
        if not self.waiting:
            return
        new = [key for row in self.waiting for key in row if key not in self.columns]
        if new:
            self.columns += sorted(dict.fromkeys(new))
            self._rewrite(self._read()[1] + self.waiting)
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerows(self.waiting)
        self.waiting = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Saves."""
        self.save()

    @rank_zero_only
    def _start(self) -> None:
        self._started = True
        columns, rows = self._read()
        kept = rows[: self._keep]
        self.rows -= self._keep - len(kept)  # another directory's file, or one that lost rows with its machine
        # Columns that only rows after the kept ones had will come again, in the order in which they came.
        used = {key for row in kept for key, value in row.items() if value}
        self.columns = [key for key in columns if key in used or key in ("epoch", "step")] or self.columns
        self._rewrite(kept)

    def resume(self, rows: int) -> None:
        """Keeps the first `rows` rows of the file that is there."""
        self._keep = self.rows = rows

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        if not self.path.is_file():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            return list(reader.fieldnames or []), rows

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
