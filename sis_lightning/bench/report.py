"""What a benchmark measured, kept with the machine that it is of."""

from __future__ import annotations

import io
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
from rich.console import Console
from rich.table import Table

from sis_lightning.errors import DataError
from sis_lightning.files import write_text
from sis_lightning.machine import usable_cores
from sis_lightning.run.record import write_with_checksum
from sis_lightning.tables.spec import spec_files


@dataclass(frozen=True)
class Benchmark:
    """What one benchmark measured.

    Attributes:
        name: Of its file.
        title: What was timed on what.
        command: Repeats it.
        rows: Of its table; all have the same keys.
        note: What else was found.
        machine: Processor, cores, operating system and Python.
        versions: Of the packages that matter.
        date: UTC.
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
    """What was measured here and now.

    Args:
        name: Of its file.
        title: What was timed on what.
        command: Repeats it.
        rows: Of its table; all have the same keys.
        note: What else was found.
        packages: Whose versions matter.
    """
    versions = {package: version(package) for package in packages}
    return Benchmark(
        name, title, command, rows, note, _machine(), versions, datetime.now(UTC).isoformat(timespec="seconds")
    )


def time_start(rounds: int = 11) -> Benchmark:
    """How long commands take that compute nothing: whole processes, by the clock.

    Args:
        rounds: Starts of each, after one that warms the disk's cache.
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
    example = next(Path("results", "records").glob("*.json"), None)
    for records in (0, 1, 5000) if example else (0,):
        with tempfile.TemporaryDirectory() as folder:
            _fill_results(Path(folder), example, records)
            measure(f"tables render, {records:,} records", ["tables", "render", "--results", folder])
    return benchmark("start", "Commands that compute nothing", "sis-lightning bench --start", rows, "Medians.", ())


def _fill_results(folder: Path, example: Path | None, records: int) -> None:
    """The specs, what the code counts for them, and so many copies of a record, each of a seed of its own."""
    specs = spec_files(Path("results"))
    for path in (*specs, specs[0].with_name("models.json")):
        shutil.copy(path, folder)
    for seed in range(records if example else 0):
        record = json.loads(example.read_bytes()) if example else {}
        record.pop("checksum")
        record["checkpoint"]["sha256"] = str(seed)
        write_with_checksum(folder / "records" / f"{seed}.json", {**record, "seed": seed})


def collect_runs(folders: Sequence[Path], name: str) -> Benchmark:
    """What runs that were tested measured, and how long they trained: from config.yaml to last.ckpt.

    Args:
        folders: Run directories.
        name: Of the benchmark.

    Raises:
        DataError: For a directory without a test.
    """
    rows: list[dict[str, str | float]] = []
    for folder in folders:
        record, last = folder / "test.json", folder / "checkpoints" / "last.ckpt"
        if not record.is_file() or not last.is_file():
            raise DataError(f"{folder}: no run that was tested (test.json and checkpoints/last.ckpt)")
        content = json.loads(record.read_bytes())
        minutes = (last.stat().st_mtime - (folder / "config.yaml").stat().st_mtime) / 60
        headline = content["headline"]
        rows.append(
            {
                "run": folder.name,
                "data": content["data"]["identity"],
                "metric": headline.removeprefix("test/"),
                "value": content["metrics"][headline],
                "minutes of training": round(minutes, 1),
            }
        )
    note = "Validations and checkpoints are part of the time."
    return benchmark(name, f"Runs of {name}", f"make {name}", rows, note, ("torch", "torchvision", "lightning"))


def _machine() -> dict[str, str | int]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Target:
    """What a benchmark is to reach: an entry of the folder's `targets.yaml`.

    Attributes:
        what: For people.
        benchmark: Name of its file, without ending.
        row: Values by which its rows are found; the worst of them counts.
        column: Where the value stands; of an interval its median counts.
        at_least: Or `at_most`: the bound.
        note: Why it was missed, or how else to read it.
    """

    what: str
    benchmark: str
    row: dict[str, str | int | list[str | int]]
    column: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    def cells(self, known: dict[str, Benchmark]) -> list[str]:
        """What, bound, measured, and whether reached."""
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
        if any(row.get(self.column, "unknown") == "unknown" for row in rows):  # an earlier release, another system
            return [self.what, bound, "not measured yet", "", self.note]
        values = {_shown(row[self.column]): float(str(row[self.column]).split()[0]) for row in rows}
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
    """Writes `NAME.json`, and `README.md` anew from all benchmarks and targets of the folder."""
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
                f"{path} is not the result of a benchmark ({error}); the folder is for these alone"
            ) from None
    head = ["# Benchmarks\n", "Made by `sis-lightning bench`; do not edit.\n"]
    write_text(folder / "README.md", "\n".join([*head, *_targets(folder, known), *sections]))


def _to_markdown(benchmark: Benchmark) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in {**benchmark.machine, **benchmark.versions}.items())
    headings = list(benchmark.rows[0])
    lines = [f"## {benchmark.title}", "", f"`{benchmark.command}`, {benchmark.date}; {machine}", ""]
    lines += ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(_shown(value) for value in row.values()) + " |" for row in benchmark.rows]
    return "\n".join([*lines, "", benchmark.note, ""])


def to_table(benchmark: Benchmark) -> str:
    """A table for people."""
    table = Table(title=benchmark.title, caption=benchmark.note, title_justify="left", caption_justify="left")
    for heading, value in benchmark.rows[0].items():
        table.add_column(heading, justify="left" if isinstance(value, str) else "right")
    for row in benchmark.rows:
        table.add_row(*(_shown(value) for value in row.values()))
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    return text.getvalue()


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
