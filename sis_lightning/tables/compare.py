"""Compares two runs, two sets of runs with several seeds, or two operators in one configuration.

A comparison of operators means something only if nothing else changed. Other differences are refused by their keys.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
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
from sis_lightning.tables.curves import over_seeds
from sis_lightning.tables.differences import MIN_SEEDS, Difference, holm, welch
from sis_lightning.tables.judge import shortcomings
from sis_lightning.text_tables import table_to_text

_OPERATOR = "model.init_args.backbone.operator"
_SEED = "seed_everything"
#: Number of classes whose metrics are shown: those that differ most.
CLASSES = 10


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: Name as typed.
        settings: Everything that determines the result, by dotted keys; for tested runs including data and code.
        size: Parameters and MACs.
        backbone: The backbone, with new weights.
        records: The records of its tests, one for each seed; empty if nothing was tested.
    """

    name: str
    settings: dict[str, Any]
    size: Complexity
    backbone: nn.Module
    records: tuple[TestRecord, ...]

    def values(self, metric: str) -> list[float]:
        """The values of a metric, one for each seed in which it is defined."""
        found = [record.metrics.get(metric) for record in self.records]
        return [value for value in found if value is not None]

    def curves(self, metric: str) -> list[dict[int, float]]:
        """The learning curves of a metric as value by step, one for each seed that has one."""
        return [dict(record.curves[metric]) for record in self.records if record.curves.get(metric)]


def _side(text: str, arguments: Sequence[str]) -> Side:
    """Builds a side from a run's directory or record or, with `arguments`, from BACKBONE[:OPERATOR] or OPERATOR."""
    records: tuple[TestRecord, ...] = ()
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
        settings = _settings(run, None)
    else:
        runs = _runs(Path(text))
        records = tuple(record for record, _ in runs if record)
        every = [_settings(run, record) for record, run in runs]
        run, settings = runs[0][1], every[0]
        for other in every[1:]:
            differing = [key for key in {**settings, **other} if key != _SEED and settings.get(key) != other.get(key)]
            if differing:
                key = differing[0]
                raise UsageError(
                    f"{text}: its runs are no set of seeds: {key} is {settings.get(key)!r} and {other.get(key)!r}"
                )
        seeds = [entry[_SEED] for entry in every]
        if len({*seeds}) < len(seeds) or len({record.checkpoint.sha256 for record in records}) < len(records):
            raise UsageError(f"{text}: two of its runs have one seed or the same weights (seeds {seeds})")
        settings[_SEED] = seeds[0] if len(seeds) == 1 else seeds
    backbone_copy = copy.deepcopy(run.task.backbone)  # counting moves the task to the meta device
    return Side(text, settings, count_run(run, text), backbone_copy, records)


def _settings(run: Run, record: TestRecord | None) -> dict[str, Any]:
    """Everything that determines the result of a run; options that are off count as absent, as in a recipe."""
    settings = {key: value for key, value in settled(run.config).items() if value is not False}
    settings[_SEED] = run.config.get(_SEED)
    if record:
        code, machine = record.environment.code, record.environment.machine
        settings["devices"] = record.training.devices
        settings["device"] = machine.device
        settings["torch"] = record.environment.packages.get("torch")
        settings["commit"] = (code.commit or code.digest or code.sis_lightning)[:12]
        settings["uncommitted changes"] = bool(code.dirty)
        settings["deployed"] = record.checkpoint.deployed
        settings["finished"] = record.checkpoint.finished
        settings["step"] = record.checkpoint.step
        settings["test images"] = record.data.images
        settings["test data"] = record.data.fingerprint[:12]
        settings["data notes"] = dict(record.data.notes)
        start = record.training.start_weights
        settings["start weights"] = start.sha256[:12] if start else None
        settings["training data"] = [name[:12] for name in record.data.trained_on]
        settings |= {f"in test: {key}": change.tested for key, change in record.tested_otherwise.items()}
    return settings


def _runs(path: Path) -> list[tuple[TestRecord | None, Run]]:
    """The runs in a place: one by its directory or record, or those of several seeds in `seed*/`, by their seeds."""
    if not path.exists():
        raise DataError(f"{path}: neither a run's directory nor a record; operators need --config tasks/NAME.yaml")
    if path.is_dir() and not (path / "config.yaml").is_file() and not (path / "test.json").is_file():
        folders = [folder for folder in path.glob("seed*") if (folder / "test.json").is_file()]
        if folders:
            pairs = [_run(folder) for folder in folders]
            return sorted(pairs, key=lambda pair: (pair[0].seed or 0) if pair[0] else 0)
    return [_run(path)]


def _run(path: Path) -> tuple[TestRecord | None, Run]:
    """A run, and its record if it was tested."""
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
        first: A run's directory or record, or a folder with the runs of several seeds (`seed*/`); with `arguments`,
            BACKBONE[:OPERATOR] or an operator.
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
    untested = [side.name for side in sides if not side.records]
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

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Rows of the table: name, A, B, A - B."""
        a, b = self.first, self.second
        rows = [(key.rpartition(".")[2], str(a.settings.get(key)), str(b.settings.get(key)), "") for key in self.keys]
        for name, left, right in (
            ("parameters, M", a.size.model_parameters / 1e6, b.size.model_parameters / 1e6),
            ("MACs, G", a.size.model_macs / 1e9, b.size.model_macs / 1e9),
        ):
            rows.append((name, f"{left:.3f}", f"{right:.3f}", f"{left - right:+.3f}"))
        rows += [(*row, "") for row in self.timed]
        metrics = self._metrics()
        rows += [row for row in metrics if row[0].count("/") == 1]
        rows += [row for row in metrics if row[0].count("/") > 1][:CLASSES]
        for name, (left_curves, right_curves) in self.curves().items():
            left_mean, right_mean = over_seeds(left_curves), over_seeds(right_curves)
            left_at, right_at = (dict(zip(found[0], found[1], strict=True)) for found in (left_mean, right_mean))
            steps = sorted({*left_at} & {*right_at})
            for step in steps[:: -(-len(steps) // 6) or 1]:
                rows.append((f"{name}, step {step:,}", f"{left_at[step]:.4f}", f"{right_at[step]:.4f}", ""))
        return rows

    def _metrics(self) -> list[tuple[str, str, str, str]]:
        """Rows of all metrics, those of classes by their difference.

        What differences show is corrected for the number of all of them, since those shown are chosen by size.
        """
        names = dict.fromkeys(
            key for side in (self.first, self.second) for entry in side.records for key in entry.metrics
        )
        pairs = {name: (self.first.values(name), self.second.values(name)) for name in names}
        found = dict(zip(pairs, holm([welch(*pair) for pair in pairs.values()]), strict=True))

        def order(name: str) -> float:
            difference = found[name]
            return 0.0 if name.count("/") == 1 or difference is None else -abs(difference.mean)

        return [
            (name, _mean(pairs[name][0]), _mean(pairs[name][1]), _shown(found[name]))
            for name in sorted(pairs, key=order)
            if name.count("/") == 1 or found[name] is not None
        ]

    def curves(self) -> dict[str, tuple[list[dict[int, float]], list[dict[int, float]]]]:
        """Learning curves of both, one for each seed as value by step, for each metric that both have."""
        names = dict.fromkeys(name for record in self.first.records for name in record.curves)
        found = {name: (self.first.curves(name), self.second.curves(name)) for name in names}
        return {name: pair for name, pair in found.items() if pair[0] and pair[1]}

    def to_table(self) -> str:
        """The comparison as a text table."""
        a, b = self.first, self.second
        table = RichTable(title=f"A: {a.name}\nB: {b.name}", title_justify="left", caption_justify="left")
        said = []
        if a.records and b.records:
            seeds = [", ".join(str(record.seed) for record in side.records) for side in (a, b)]
            said.append(f"On {a.records[0].data.identity} data, seed {' and '.join(dict.fromkeys(seeds))}.")
            if max(len(side.records) for side in (a, b)) > 1:
                said.append(
                    "A, B: mean ± standard deviation. A - B: of the means, with its 95 % confidence interval (Welch); "
                    f"what it shows has 5 % of error in all metrics together (Holm), and takes {MIN_SEEDS} seeds."
                )
        for name, side in (("A", a), ("B", b)):
            flaws = dict.fromkeys(flaw for record in side.records for flaw in shortcomings(record))
            said += [f"{name}: {', '.join(flaws)}."] if flaws else []
        table.caption = " ".join(said)
        for heading in ("", "A", "B", "A - B"):
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

        if not (curves := self.curves()):
            raise UsageError("--out plots learning curves, which only tested runs have")
        labels = ("A: " + self.first.size.config, "B: " + self.second.size.config)
        draw_pair(curves, labels, path)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _shown(difference: Difference | None) -> str:
    if difference is None:
        return ""
    text = f"{difference.mean:+.4f}"
    if difference.low is not None and difference.high is not None:
        text += f" ({difference.low:+.4f} … {difference.high:+.4f})"
    if difference.shown is not None:
        text += ", a difference" if difference.shown else ", no difference shown"
    return text
