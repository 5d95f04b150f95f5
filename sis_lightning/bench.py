"""`sis-lightning bench`: times what is worth timing, and keeps the figures with the machine that they are of."""

from __future__ import annotations

import io
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from sis_lightning.errors import DataError, UsageError
from sis_lightning.files import write_text
from sis_lightning.metrics.coco import COCOTruth, Evaluator

_CLASSES, _BOXES, _FALSE = 80, 36, 4  # of --eval: classes of the set; boxes and false detections of an image
_SIDE = 640


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


def time_evaluators(images: int = 5000) -> Benchmark:
    """Times COCO's twelve box figures by pycocotools and by faster-coco-eval, one after the other in this process.

    The boxes are drawn from a fixed seed: 36 an image of 80 classes, each found with a jitter, and 4 false detections.
    Checking and indexing the truth is timed apart from scoring; importing the libraries is not timed.

    Raises:
        DataError: Where the figures differ by more than 1e-12.
        UsageError: For less than one image, or where faster-coco-eval is not installed.
    """
    if images < 1:
        raise UsageError(f"--images {images}: at least 1 is needed")
    truth, found = _boxes(images)
    rows: list[dict[str, str | float]] = []
    figures = []
    evaluators: tuple[Evaluator, ...] = get_args(Evaluator)
    for evaluator in evaluators:
        COCOTruth({"images": [], "categories": []}, "bbox", evaluator)  # imports
        begun = time.perf_counter()
        known = COCOTruth(truth, "bbox", evaluator)
        indexed, indexed_cpu = time.perf_counter(), time.process_time()
        figures.append(known.score(found))
        scored, scored_cpu = time.perf_counter(), time.process_time()
        rows.append(
            {
                "evaluator": evaluator,
                "index truth s": round(indexed - begun, 2),
                "score s": round(scored - indexed, 2),
                "score CPU s": round(scored_cpu - indexed_cpu, 2),
                "AP": figures[-1]["AP"],
            }
        )
    one, other = (np.array(list(values.values())) for values in figures)
    if not np.allclose(one, other, rtol=0, atol=1e-12, equal_nan=True):
        raise DataError(f"the evaluators differ: {figures[0]} and {figures[1]}")
    difference = np.nanmax(np.abs(one - other))
    ratio = float(rows[0]["score s"]) / max(float(rows[1]["score s"]), 0.01)
    return Benchmark(
        name="coco_eval",
        title=(
            f"COCO's box figures: {images:,} images × {_CLASSES} classes × {_BOXES} boxes an image, "
            f"{_BOXES + _FALSE} detections an image"
        ),
        command="sis-lightning bench --eval" + ("" if images == 5000 else f" --images {images}"),
        rows=rows,
        note=f"faster-coco-eval scores {ratio:.1f} times as fast; the figures differ by at most {difference:.1g}.",
        machine=_machine(),
        versions={name: version(name) for name in (*evaluators, "numpy")},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


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
    return Benchmark(
        name=name,
        title=f"Runs of {name}",
        command=f"make {name}",
        rows=rows,
        note="Validations and checkpoints are part of the time.",
        machine=_machine(),
        versions={package: version(package) for package in ("torch", "torchvision", "lightning")},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _boxes(images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A truth in COCO's format, and detections of it."""
    rng = np.random.default_rng(0)
    count = images * _BOXES
    owner = np.repeat(np.arange(1, images + 1), _BOXES)
    labels = rng.integers(1, _CLASSES + 1, count)
    # Sides of 4…400 px, as many of each octave: COCO's small, medium and large objects all occur.
    sides = np.exp(rng.uniform(np.log(4), np.log(400), (count, 2)))
    corners = rng.uniform(0, _SIDE - sides)
    boxes = np.concatenate([corners, sides], axis=1)
    crowds = rng.random(count) < 0.01
    jitter = rng.normal(0, 0.1, boxes.shape) * np.concatenate([sides, sides], axis=1)
    near = np.concatenate([boxes[:, :2] + jitter[:, :2], np.abs(sides + jitter[:, 2:]) + 0.1], axis=1)
    false = np.concatenate(
        [rng.uniform(0, _SIDE / 2, (images * _FALSE, 2)), rng.uniform(4, 300, (images * _FALSE, 2))], 1
    )
    found = np.concatenate([near, false])
    owners = np.concatenate([owner, np.repeat(np.arange(1, images + 1), _FALSE)])
    named = np.concatenate([labels, rng.integers(1, _CLASSES + 1, len(false))])
    scores = np.concatenate([rng.beta(4, 2, count), rng.beta(2, 4, len(false))])
    truth = {
        "images": [{"id": number, "width": _SIDE, "height": _SIDE} for number in range(1, images + 1)],
        "categories": [{"id": number, "name": str(number)} for number in range(1, _CLASSES + 1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for i, (image, label, box, crowd) in enumerate(
                zip(owner.tolist(), labels.tolist(), boxes.tolist(), crowds.tolist(), strict=True), start=1
            )
        ],
    }
    rows = [
        {"image_id": image, "category_id": label, "bbox": box, "score": score}
        for image, label, box, score in zip(
            owners.tolist(), named.tolist(), found.tolist(), scores.tolist(), strict=True
        )
    ]
    return truth, rows


def _machine() -> dict[str, str | int]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    # The cores that this process may use, not those of the machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def write(benchmark: Benchmark, folder: Path) -> None:
    """Writes `NAME.json`, and `README.md` anew from all benchmarks of the folder."""
    text = json.dumps(asdict(benchmark), indent=2, ensure_ascii=False)
    write_text(folder / f"{benchmark.name}.json", text + "\n")
    sections = []
    for path in sorted(folder.glob("*.json")):
        try:
            sections.append(_to_markdown(Benchmark(**json.loads(path.read_bytes()))))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path} is not the result of a benchmark ({error}); the folder is for these alone"
            ) from None
    write_text(
        folder / "README.md", "\n".join(["# Benchmarks\n", "Made by `sis-lightning bench`; do not edit.\n", *sections])
    )


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
