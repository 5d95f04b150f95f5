"""The run's metrics as CSV and in TensorBoard; a resumed run loses no row, and writes none twice."""

from __future__ import annotations

import csv
import io
import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from sis_lightning.errors import DataError
from sis_lightning.files import write_bytes, write_text


def curves(run: Path, metric: str, points: int = 200) -> dict[str, list[tuple[int, float]]]:
    """Learning curves of a run.

    Args:
        run: The run's directory.
        metric: Name of the metric beside the training loss, such as `val/miou`.
        points: The largest number of points of a curve; longer ones are thinned.

    Returns:
        Points (steps done, value) by metric.
    """
    path = run / "csv" / "fit" / "metrics.csv"
    found: dict[str, list[tuple[int, float]]] = {"train/loss": [], metric: []}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, values in found.items():
                    if row.get(key) and math.isfinite(float(row[key])):
                        values.append((int(row["step"]) + 1, round(float(row[key]), 6)))
    return {key: values[:: -(-len(values) // points) or 1] for key, values in found.items()}


def require_folder(folder: Path) -> None:
    """Raises DataError if a folder that this run writes into was removed."""
    if not folder.is_dir():
        raise DataError(f"{folder} was removed while the run writes into it; what it held is lost")


class MetricsCSV(Logger):
    """Writes `metrics.csv`: a row for each call of `log_metrics`, a column for each metric.

    An existing file is overwritten, unless `resume` keeps its first rows.

    Args:
        folder: Folder of the file.
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
        """Name of the folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Empty: there is one version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder."""
        return str(self.path.parent)

    def files(self) -> list[Path]:
        """The file, once it exists."""
        return [self.path] if self.path.is_file() else []

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Writes nothing: they are in config.yaml."""

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
        """Writes the waiting rows into the file.

        Raises:
            DataError: If the folder is gone.
        """
        if not self._started:
            self._start()
        else:
            require_folder(self.path.parent)
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
        """Writes the waiting rows into the file, unless its folder is gone."""
        if not self._started or self.path.parent.is_dir():
            self.save()

    @rank_zero_only
    def _start(self) -> None:
        self._started = True
        columns, rows = self._read()
        kept = rows[: self._keep]
        self.rows -= self._keep - len(kept)  # another directory's file, or one that lost rows with its machine
        # Columns that only later rows had are added again, in the order in which they were added before.
        used = {key for row in kept for key, value in row.items() if value}
        self.columns = [key for key in columns if key in used or key in ("epoch", "step")] or self.columns
        self._rewrite(kept)

    def resume(self, rows: int) -> None:
        """Keeps the first `rows` rows of the existing file."""
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


class TensorBoard(TensorBoardLogger):
    """TensorBoard's events, with the metrics of a validation at the number of steps done before it.

    Existing events are removed, but for the first `keep` bytes of a run that is resumed: what was logged after its
    checkpoint is logged again. They are kept by number and not by time, since clocks are set back.

    Args:
        folder: Folder of all commands' events.
        name: Command, such as `fit`.
        keep: The `size` at the checkpoint from which a run is resumed; None keeps all.

    Attributes:
        steps_done: Returns the number of optimizer steps done; None outside of `fit`.
    """

    #: Name of the file with the events of earlier starts: TensorBoard reads files in the order of their names, in which
    #: other files have the time of their start at this place.
    KEPT = "events.out.tfevents.0000000000.kept"

    def __init__(self, folder: Path, name: str, keep: int | None = 0) -> None:
        super().__init__(folder, name=name, version="", default_hp_metric=False)
        self.steps_done: Callable[[], int] | None = None
        self._keep = keep

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the events."""
        if self._experiment is None:
            self._cut()
        else:
            require_folder(Path(self.log_dir))
        return super().experiment

    @property
    def size(self) -> int:
        """Bytes of all events so far; they are on disk."""
        if self._experiment is None:
            return 0
        self.experiment.flush()
        return sum(path.stat().st_size for path in self.files())

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes scalars."""
        if self.steps_done is not None and any(key.startswith("val/") for key in metrics):
            step = self.steps_done()
        super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the waiting events, unless the folder is gone: the writer would wait for ever."""
        if Path(self.log_dir).is_dir():
            super().finalize(status)

    def files(self) -> list[Path]:
        """The files of the events, in the order in which TensorBoard reads them."""
        return sorted(path for path in self._all_files() if path.suffix != ".partial")

    def _all_files(self) -> list[Path]:
        return list(Path(self.log_dir).glob("events.out.tfevents.*"))

    def _cut(self) -> None:
        """Replaces the existing files by one with their first events."""
        kept = b"".join(_records(path) for path in self.files())[: self._keep]
        if kept:
            write_bytes(Path(self.log_dir) / self.KEPT, kept[: _whole(kept)])
        for path in self._all_files():
            if path.name != self.KEPT or not kept:
                path.unlink()


def _records(path: Path) -> bytes:
    """The whole events of a file: a machine that failed may have left a part of one at its end."""
    content = path.read_bytes()
    return content[: _whole(content)]


def _whole(content: bytes) -> int:
    """Bytes of the whole events at the start of a file, each with its length in front and two checksums."""
    from tensorboard.summary.writer.record_writer import masked_crc32c  # not before there are events: it is slow

    position = 0
    while position + 12 <= len(content):
        length, checksum = content[position : position + 8], content[position + 8 : position + 12]
        end = position + 16 + int.from_bytes(length, "little")
        if end > len(content) or masked_crc32c(length) != int.from_bytes(checksum, "little"):
            break
        position = end
    return position
