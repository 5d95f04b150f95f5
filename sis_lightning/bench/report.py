"""Results of benchmarks, with the machine that they were measured on: tables, JSON files and their README."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import yaml
from rich.table import Table

from sis_lightning.config_files import PACKAGED
from sis_lightning.errors import DataError
from sis_lightning.files import write_text
from sis_lightning.machine import processor_name, usable_cores
from sis_lightning.run.environment import Code, Environment, Machine
from sis_lightning.run.record import (
    TestData,
    TestedCheckpoint,
    TestRecord,
    Training,
    read_record,
    write_record,
)
from sis_lightning.text_tables import table_to_text


@dataclass(frozen=True)
class Benchmark:
    """The result of one benchmark.

    Attributes:
        name: Name of its file, without ending.
        title: Title of its table.
        command: Command that repeats it.
        rows: Rows of its table; all have the same keys.
        note: Sentences below the table.
        machine: Processor, number of cores, operating system and Python.
        versions: Versions of the packages that matter, by name.
        date: Time of the measurement in ISO 8601, UTC.
    """

    name: str
    title: str
    command: str
    rows: list[dict[str, str | float]]
    note: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    date: str


def benchmark(
    name: str, title: str, command: str, rows: list[dict[str, str | float]], note: str, packages: Sequence[str]
) -> Benchmark:
    """A result of this machine and time.

    Args:
        name: Name of its file, without ending.
        title: Title of its table.
        command: Command that repeats it.
        rows: Rows of its table; all have the same keys.
        note: Sentences below the table.
        packages: Names of the packages that matter.
    """
    versions = {package: version(package) for package in packages}
    return Benchmark(
        name, title, command, rows, note, _machine(), versions, datetime.now(UTC).isoformat(timespec="seconds")
    )


def time_start(rounds: int = 11) -> Benchmark:
    """Times commands that compute nothing, as whole processes.

    Args:
        rounds: Number of starts of each command, after one that warms the disk cache.
    """
    rows: list[dict[str, str | float]] = []

    def measure(what: str, arguments: Sequence[str]) -> None:
        taken = []
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-m", "sis_lightning", *arguments], check=True, capture_output=True)
            taken.append(time.perf_counter() - begun)
        rows.append({"command": what, "seconds": round(sorted(taken[1:])[rounds // 2], 3)})

    measure("--help", ["--help"])
    measure("--version", ["--version"])
    for command in ("fit", "tables"):
        measure(f"{command} --help", [command, "--help"])
    for records in (0, 1, 5000):
        with tempfile.TemporaryDirectory() as folder:
            _fill_results(Path(folder), records)
            measure(f"tables render, {records:,} records", ["tables", "render", "--results", folder])
    return benchmark("start", "Commands that compute nothing", "sis-lightning bench --start", rows, "Medians.", ())


def _fill_results(folder: Path, records: int) -> None:
    """Writes the table specs, the counts, and made-up records, each of another seed."""
    source = Path("results") if any(Path("results").glob("*.yaml")) else PACKAGED / "results"
    for path in (*source.glob("*.yaml"), source / "models.json"):
        shutil.copy(path, folder)
    for seed in range(records):
        write_record(folder / "records" / f"{seed}.json", _made_up_record(seed))


def _made_up_record(seed: int) -> TestRecord:
    return TestRecord(
        task="seg_voc",
        backbone="sis50-26w4s-basic",
        primary_metric="test/miou",
        metrics={"test/miou": 0.5},
        data=TestData(root="data", identity="other", fingerprint="0", images=1, trained_on=["0"]),
        seed=seed,
        config={},
        config_hash="0",
        recipe_hash="0",
        checkpoint=TestedCheckpoint(file="last.ckpt", sha256=str(seed), step=1, epoch=1, finished=True),
        training=Training(restarts=0, seconds=1.0, devices=1),
        environment=Environment(
            code=Code(sis_lightning="0"),
            machine=Machine(device="cpu", processor="", instructions="", threads=1),
            python="3",
            packages={},
        ),
        date="2026-01-01",
    )


def collect_runs(folders: Sequence[Path], name: str) -> Benchmark:
    """Collects the primary metric of tested runs, and the time from config.yaml to last.ckpt.

    Args:
        folders: Directories of runs.
        name: Name of the benchmark.

    Raises:
        DataError: If a run has not been tested.
    """
    rows: list[dict[str, str | float]] = []
    for folder in folders:
        record, last = folder / "test.json", folder / "checkpoints" / "last.ckpt"
        if not record.is_file() or not last.is_file():
            raise DataError(f"{folder}: not a tested run (it needs test.json and checkpoints/last.ckpt)")
        content = read_record(record)
        minutes = (last.stat().st_mtime - (folder / "config.yaml").stat().st_mtime) / 60
        value = content.metrics.get(content.primary_metric)
        rows.append(
            {
                "run": folder.name,
                "data": content.data.identity,
                "metric": content.primary_metric.removeprefix("test/"),
                "value": "–" if value is None else value,
                "minutes of training": round(minutes, 1),
            }
        )
    note = "The time includes validation and checkpoints."
    return benchmark(name, f"Runs of {name}", f"make {name}", rows, note, ("torch", "torchvision", "lightning"))


def _machine() -> dict[str, str | int]:
    return {
        "cpu": processor_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Target:
    """A target of a benchmark: an entry of the folder's `targets.yaml`.

    Attributes:
        what: Name for people.
        benchmark: Name of the benchmark's file, without ending.
        row: Values that select rows; the worst of these rows counts.
        column: Column of the value; of an interval, the median counts.
        at_least: Lower bound, or None.
        at_most: Upper bound, or None.
        note: Why it was missed, or how to read it.
    """

    what: str
    benchmark: str
    row: dict[str, str | int | list[str | int]]
    column: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    def cells(self, known: dict[str, Benchmark]) -> list[str]:
        """Cells of its table row: name, bound, value, whether reached, note."""
        bound = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        if self.benchmark not in known:
            return [self.what, bound, "not measured yet", "", self.note]
        rows = [
            row
            for row in known[self.benchmark].rows
            if all(row[key] in (wanted if isinstance(wanted, list) else [wanted]) for key, wanted in self.row.items())
        ]
        if not rows:
            raise DataError(f"targets.yaml: {self.benchmark}.json has no row {self.row}")
        if any(row.get(self.column, "unknown") == "unknown" for row in rows):  # by an earlier release
            return [self.what, bound, "not measured yet", "", self.note]
        values = {_text(row[self.column]): float(str(row[self.column]).split()[0]) for row in rows}
        worst = (min if self.at_least is not None else max)(values, key=lambda text: values[text])
        limit = self.at_least if self.at_least is not None else self.at_most
        assert limit is not None
        reached = values[worst] >= limit if self.at_least is not None else values[worst] <= limit
        return [self.what, bound, worst, "reached" if reached else "missed", self.note]


def _targets(folder: Path, known: dict[str, Benchmark]) -> list[str]:
    path = folder / "targets.yaml"
    if not path.is_file():
        return []
    rows = [Target(**entry).cells(known) for entry in yaml.safe_load(path.read_text())]
    lines = ["## Targets", "", "| what | target | measured | | |", "|---|---|---|---|---|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def write(benchmark: Benchmark, folder: Path) -> None:
    """Writes `NAME.json`, and rewrites `README.md` from all benchmarks and targets of the folder."""
    text = json.dumps(asdict(benchmark), indent=2, ensure_ascii=False)
    write_text(folder / f"{benchmark.name}.json", text + "\n")
    sections = []
    known = {}
    for path in sorted(folder.glob("*.json")):
        try:
            one = known[path.stem] = Benchmark(**json.loads(path.read_bytes()))
            sections.append(_to_markdown(one))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path} is not the result of a benchmark ({error}); the folder may contain no other JSON"
            ) from None
    head = ["# Benchmarks\n", "Written by `sis-lightning bench`; do not edit.\n"]
    write_text(folder / "README.md", "\n".join([*head, *_targets(folder, known), *sections]))


def _to_markdown(benchmark: Benchmark) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in {**benchmark.machine, **benchmark.versions}.items())
    headings = list(benchmark.rows[0])
    lines = [f"## {benchmark.title}", "", f"`{benchmark.command}`, {benchmark.date}; {machine}", ""]
    lines += ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(_text(value) for value in row.values()) + " |" for row in benchmark.rows]
    return "\n".join([*lines, "", benchmark.note, ""])


def to_table(benchmark: Benchmark) -> str:
    """The result as a text table."""
    table = Table(title=benchmark.title, caption=benchmark.note, title_justify="left", caption_justify="left")
    for heading, value in benchmark.rows[0].items():
        table.add_column(heading, justify="left" if isinstance(value, str) else "right")
    for row in benchmark.rows:
        table.add_row(*(_text(value) for value in row.values()))
    return table_to_text(table)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
