"""Compares two runs, or two operators in one configuration, if nothing else differs.

A comparison of operators means something only if nothing else changed. Other differences are refused by their keys.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table as RichTable
from torch import Tensor, nn

from sis_lightning.bench.paired import time_alternately, waits_for
from sis_lightning.config_files import config_names
from sis_lightning.errors import DataError, UsageError
from sis_lightning.models.complexity import Complexity
from sis_lightning.operators import list_operators
from sis_lightning.run.recipe import settled
from sis_lightning.run.record import TestRecord, read_record
from sis_lightning.run.run import Run
from sis_lightning.tables.counting import count_run
from sis_lightning.tables.judge import shortcomings
from sis_lightning.text_tables import table_to_text

_OPERATOR = "model.init_args.backbone.operator"


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: Name as typed.
        settings: Everything that determines the result, by dotted keys; for a tested run including its data.
        size: Parameters and MACs.
        backbone: The backbone, with new weights.
        record: The record of its test, or None.
    """

    name: str
    settings: dict[str, Any]
    size: Complexity
    backbone: nn.Module
    record: TestRecord | None


def _side(text: str, arguments: Sequence[str]) -> Side:
    """Builds a side from a run's directory or record or, with `arguments`, from BACKBONE[:OPERATOR] or OPERATOR."""
    record: TestRecord | None = None
    if arguments:
        backbone, colon, operator = text.partition(":")
        if not colon and text in list_operators():
            backbone, operator = "", text
        elif backbone not in config_names("configs/backbones"):
            raise UsageError(
                f"'{text}' is neither an operator ({', '.join(list_operators())}) nor BACKBONE[:OPERATOR]; runs are "
                "compared without --config"
            )
        options = [f"--model.backbone={backbone}"] * bool(backbone)
        options += [f"--model.backbone.operator={operator}"] * bool(operator)
        run = Run.from_arguments([*arguments, *options])
    else:
        record, run = _run(Path(text))
    settings = {**settled(run.config), "seed_everything": run.config.get("seed_everything")}
    if record:
        settings["devices"] = record.training.devices
        settings["test data"] = record.data.fingerprint[:12]
        settings["training data"] = [name[:12] for name in record.data.trained_on]
        settings |= {f"in test: {key}": change.tested for key, change in record.tested_otherwise.items()}
    backbone_copy = copy.deepcopy(run.task.backbone)  # counting moves the task to the meta device
    return Side(text, settings, count_run(run, text), backbone_copy, record)


def _run(path: Path) -> tuple[TestRecord | None, Run]:
    """A run, and its record if it was tested."""
    if not path.exists():
        raise DataError(f"{path}: neither a run's directory nor a record; operators need --config tasks/NAME.yaml")
    file = path / "test.json" if path.is_dir() else path
    if not file.is_file():
        return None, Run.from_folder(path)
    record = read_record(file)
    return record, Run(record.config)


def _allowed(key: str, names: Sequence[str]) -> bool:
    return any(f".{name}." in f".{key}." for name in (_OPERATOR, *names))


def compare(
    first: str,
    second: str,
    arguments: Sequence[str],
    allow: Sequence[str] = (),
    rounds: int = 7,
    device: str = "cpu",
) -> Comparison:
    """Builds both sides, refuses differences that are not allowed, and times the backbones.

    Args:
        first: A run's directory or record; with `arguments`, BACKBONE[:OPERATOR] or an operator.
        second: The other side, in the same form.
        arguments: Options of `fit` that both sides share; empty to compare runs.
        allow: Keys, or parts of keys, of settings that may differ besides the operator, such as `backbone`.
        rounds: Number of rounds in which both backbones are timed; 0 for none.
        device: Device of the timing, `cpu` or `cuda`.

    Raises:
        UsageError: If anything else differs, or nothing does; the message names the keys with both values.
        DataError: If a run does not exist.
    """
    sides = (_side(first, arguments), _side(second, arguments))
    untested = [side.name for side in sides if side.record is None]
    if not arguments and len(untested) == 1:
        raise UsageError(
            f"{untested[0]} has not been tested, but the other run has:\n"
            f"  sis-lightning test --config {untested[0]}/config.yaml"
        )
    before, now = (side.settings for side in sides)
    absent = object()
    keys = [key for key in sorted({*before, *now}) if before.get(key, absent) != now.get(key, absent)]
    others = [key for key in keys if not _allowed(key, allow)]
    if others:
        lines = [f"  {key}: {before.get(key)!r} of A, {now.get(key)!r} of B" for key in others[:2]]
        lines += [f"  and {len(others) - 2} more"] if len(others) > 2 else []
        lines.append(f"  Make them equal, or allow them to differ: --allow {shlex.join(others[:2])}")
        raise UsageError("\n".join([f"{first} and {second} differ in more than the operator:", *lines]))
    if not keys:
        raise UsageError(f"{first} and {second} do not differ: there is nothing to compare")
    return Comparison(*sides, tuple(keys), _timed(sides, rounds, torch.device(device)) if rounds > 0 else ())


def _timed(sides: tuple[Side, Side], rounds: int, device: torch.device) -> tuple[tuple[str, str, str], ...]:
    """Times training passes of both backbones alternately; returns rows of the table."""
    wait, on_gpu = waits_for(device.type), device.type == "cuda"
    # On a CPU, a recipe's batch can take minutes per pass: so many images as take a few seconds at most.
    batch = 8 if on_gpu else max(1, min(8, round(20e9 / max(side.size.model_macs for side in sides))))
    what = f"{batch} × {sides[0].size.height}×{sides[0].size.width}"
    print(
        f"timing both backbones on {what}, forward and backward, {rounds} rounds (--rounds 0 skips it)", file=sys.stderr
    )
    works: list[Callable[[], object]] = []
    for side in sides:
        image = torch.randn(batch, 3, side.size.height, side.size.width, device=device)
        image = image.contiguous(memory_format=torch.channels_last)
        side.backbone.to(device)

        def work(body: nn.Module = side.backbone, image: Tensor = image) -> None:
            torch.autograd.backward(list(body(image).values())[-1].mean())

        works.append(work)
    a, b = time_alternately(works, rounds=rounds, seconds=0.5, warmup=5 if on_gpu else 1, wait=wait)
    ratio = a.faster_than(b)
    head = f"backbone, images/s ({what}, forward and backward, {device.type})"
    verdict = {"faster": "A is faster", "slower": "A is slower"}.get(ratio.verdict, "no clear difference")
    return ((head, f"{batch / median(a.wall):.3g}", f"{batch / median(b.wall):.3g}"), ("A / B", str(ratio), verdict))


@dataclass(frozen=True)
class Comparison:
    """Two sides, and the settings in which they differ.

    Attributes:
        first: Side A.
        second: Side B.
        keys: Dotted keys of the settings that differ.
        timed: Rows of the timing: name, A, B.
    """

    first: Side
    second: Side
    keys: tuple[str, ...]
    timed: tuple[tuple[str, str, str], ...]

    def rows(self) -> list[tuple[str, str, str]]:
        """Rows of the table: name, A, B."""
        a, b = self.first, self.second
        rows = [(key.rpartition(".")[2], str(a.settings.get(key)), str(b.settings.get(key))) for key in self.keys]
        rows.append(("parameters, M", f"{a.size.model_parameters / 1e6:.3f}", f"{b.size.model_parameters / 1e6:.3f}"))
        rows.append(("MACs, G", f"{a.size.model_macs / 1e9:.3f}", f"{b.size.model_macs / 1e9:.3f}"))
        rows += self.timed
        ours, theirs = (side.record.metrics if side.record else {} for side in (a, b))
        for key in dict.fromkeys([*ours, *theirs]):
            if key.count("/") == 1:
                rows.append((key, _number(ours.get(key)), _number(theirs.get(key))))
        for name, (left, right) in self.curves().items():
            steps = sorted({*left} & {*right})
            for step in steps[:: -(-len(steps) // 6) or 1]:
                rows.append((f"{name}, step {step:,}", _number(left[step]), _number(right[step])))
        return rows

    def curves(self) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
        """Learning curves of both, as value by step, for each metric that both records have."""
        ours, theirs = (side.record.curves if side.record else {} for side in (self.first, self.second))
        return {name: (dict(ours[name]), dict(theirs[name])) for name in ours if name in theirs}

    def to_table(self) -> str:
        """The comparison as a text table."""
        a, b = self.first, self.second
        table = RichTable(title=f"A: {a.name}\nB: {b.name}", title_justify="left", caption_justify="left")
        if a.record and b.record:
            seeds = list(dict.fromkeys([a.record.seed, b.record.seed]))
            table.caption = f"On {a.record.data.identity} data, seed {' and '.join(map(str, seeds))}."
        for name, side in (("A", a), ("B", b)):
            if side.record and (flaws := shortcomings(side.record)):
                table.caption = f"{table.caption or ''} {name}: {', '.join(flaws)}.".strip()
        for heading in ("", "A", "B"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in self.rows():
            table.add_row(*row)
        return table_to_text(table, width=140)

    def draw(self, path: Path) -> None:
        """Plots the learning curves of both into a file.

        Raises:
            UsageError: If there are none, or the ending of the file is not that of a format.
        """
        from sis_lightning.tables.figures import draw_pair

        curves = {name: pair for name, pair in self.curves().items() if pair[0] and pair[1]}
        if not curves:
            raise UsageError("--out plots learning curves, which only tested runs have")
        labels = ("A: " + self.first.size.config, "B: " + self.second.size.config)
        draw_pair(curves, labels, path)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
