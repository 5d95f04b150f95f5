"""What the missing runs of tables will take: GPU-hours and disk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sis_lightning.config.compose import resolve
from sis_lightning.tables.plan import MissingRun
from sis_lightning.text_tables import table_to_text

#: Trillions of floating-point operations per second that one GPU does in training, if nothing was measured: about 800
#: images of 224 px per second through a ResNet-50, as an A100 does in mixed precision.
ASSUMED_TFLOPS = 20.0
# A training step takes a forward pass, and a backward pass that has twice its operations; each MAC is two operations.
_OPERATIONS_PER_MAC = 6
# Adam and AdamW keep two values for each weight, SGD one.
_VALUES_OF_OPTIMIZER = {"Adam": 2, "AdamW": 2}
# last.ckpt, best.ckpt and two step-N.ckpt.
_CHECKPOINTS = 4


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        images: Number of images that the training sees; None if the size of its data set is not known.
        hours: Hours of one GPU for the training; None as for `images`.
        disk: Bytes of its checkpoints.
    """

    images: int | None
    hours: float | None
    disk: int


def measured_tflops(benchmarks: Path) -> float | None:
    """The largest speed of a network that `bench --mode train --device cuda --name gpu-train` measured, in TFLOP/s."""
    path = benchmarks / "gpu-train.json"
    if not path.is_file():
        return None
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = [float(str(row["GFLOP/s"]).split(" ")[0]) for row in rows if row.get("GFLOP/s")]
    return max(found) / 1000 if found else None


def cost_of(entry: MissingRun, tflops: float) -> Cost:
    """Estimates what a missing run takes, as if it had not begun.

    Args:
        entry: The run.
        tflops: Trillions of floating-point operations per second that one GPU does in training.
    """
    layers, _ = resolve(entry.experiment.options())
    trainer, options = layers.get("trainer", {}), entry.experiment.run.options
    batch = int(options.get("data.batch_size", layers["data"]["init_args"]["batch_size"]))
    steps, epochs = (int(options.get(f"trainer.{key}", trainer.get(key)) or -1) for key in ("max_steps", "max_epochs"))
    data = entry.experiment.run.data.train_images
    images = steps * batch * int(trainer.get("accumulate_grad_batches") or 1) if steps > 0 else None
    if images is None and data is not None and epochs > 0:
        images = epochs * data
    hours = None
    if images is not None:
        hours = images * entry.model.macs * _OPERATIONS_PER_MAC / (tflops * 1e12) / 3600
    optimizer = str(layers["model"]["init_args"].get("optimizer", {}).get("class_path", "")).rpartition(".")[2]
    values = 1 + _VALUES_OF_OPTIMIZER.get(optimizer, 1)
    return Cost(images, hours, _CHECKPOINTS * values * 4 * entry.model.parameters)


def to_text(missing: Sequence[MissingRun], tflops: float, source: str) -> str:
    """A table with a line for each table of runs, and one for the runs that give the others their weights.

    Args:
        missing: The runs.
        tflops: Speed of one GPU.
        source: Where the speed is from.
    """
    groups: dict[str, list[MissingRun]] = {}
    for entry in missing:
        groups.setdefault("ImageNet weights" if entry.trained_only else f"table {entry.table}", []).append(entry)
    rows: list[list[Any]] = []
    runs, all_hours, all_disk, unknown = 0, 0.0, 0.0, 0
    for name, entries in groups.items():
        costs = [cost_of(entry, tflops) for entry in entries]
        unknown += sum(cost.hours is None for cost in costs)
        hours, disk = math.fsum(cost.hours or 0 for cost in costs), sum(cost.disk for cost in costs) / 1e9
        rows.append([name, len(entries), f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}", f"{disk:,.1f}"])
        runs, all_hours, all_disk = runs + len(entries), all_hours + hours, all_disk + disk
    rows.append(["all", runs, f"{all_hours:,.0f}", f"{all_disk:,.1f}"])
    shown = Table(box=None)
    for heading in ("", "runs", "GPU-hours", "disk, GB"):
        shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        shown.add_row(*map(str, row))
    lines = [
        table_to_text(shown),
        f"GPU-hours: trainings alone, without validation and test, on one GPU with {tflops:g} TFLOP/s in training",
        f"  ({source}; --tflops N for another). Operations: 6 for each MAC of an image of the largest size.",
        f"disk: {_CHECKPOINTS} checkpoints a run with the state of the optimizer.",
    ]
    if unknown:
        lines.append(f"{unknown} run(s) are without hours: their table spec does not say train_images of their data")
    return "\n".join(lines) + "\n"
