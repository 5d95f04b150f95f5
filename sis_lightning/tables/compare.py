"""Two runs, or two operators under one configuration, side by side: where nothing else differs.

A comparison of operators is worth something only if nothing else changed. What else differs is refused, by its key.
"""

from __future__ import annotations

import copy
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor, nn

from sis_lightning.bench.paired import take_turns, waits_for
from sis_lightning.config.compose import resolve, settled
from sis_lightning.config_files import config_names
from sis_lightning.errors import DataError, UsageError
from sis_lightning.models import complexity
from sis_lightning.operators import list_operators
from sis_lightning.run.lightning_cli import run
from sis_lightning.run.record import Record, read_record
from sis_lightning.tables.cells import shortcomings
from sis_lightning.tasks import BaseTask

_OPERATOR = "model.init_args.backbone.operator"


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: As it was asked for.
        settings: What settles its result, by dotted keys; of a record, its data too.
        size: Parameters and MACs.
        backbone: With fresh weights.
        record: What it measured, where it was tested.
    """

    name: str
    settings: dict[str, Any]
    size: complexity.Complexity
    backbone: nn.Module
    record: Record | None


def _side(text: str, arguments: Sequence[str]) -> Side:
    """From a run's directory or record; under `arguments`, from BACKBONE[:OPERATOR] or OPERATOR."""
    record: Record | None = None
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
        layers, rest = resolve([*arguments, *options])
    else:
        record, layers = _run(Path(text))
        rest = []
    cli = run(None, layers, rest)
    # Built for no run, a trainer is not the one that was asked for: of a run, what its own file says.
    config = cli.resolved if arguments else {**layers, "seed_everything": cli.resolved.get("seed_everything")}
    settings = {**settled(config), "seed_everything": config.get("seed_everything")}
    if record:
        data = record["data"]
        settings["devices"] = record["training"]["devices"]
        settings |= {"test data": data["fingerprint"][:12], "training data": [name[:12] for name in data["trained_on"]]}
        settings |= {f"in test: {key}": value[1] for key, value in record["tested_otherwise"].items()}
    assert isinstance(cli.model, BaseTask)
    body = copy.deepcopy(cli.model.backbone)  # counting leaves a model on the meta device; the body is timed
    return Side(text, settings, complexity.of_cli(cli, text), body, record)


def _run(path: Path) -> tuple[Record | None, dict[str, Any]]:
    """A run's record, where it was tested, and its configuration."""
    if path.is_file():
        record = read_record(path)
        return record, record["config"]
    if not path.is_dir():
        raise DataError(f"{path}: neither a run's directory nor a record; operators need --config tasks/NAME.yaml")
    if (path / "test.json").is_file():
        record = read_record(path / "test.json")
        return record, record["config"]
    if not (path / "config.yaml").is_file():
        raise DataError(f"{path}: no run in it (no config.yaml)")
    return None, yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))


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
    """Resolves both, and refuses what may not differ.

    Args:
        first: A run's directory or record; under `arguments`, BACKBONE[:OPERATOR] or an operator.
        second: The like.
        arguments: Of `fit`; none for runs.
        allow: Keys that may differ besides the operator, or parts of them: `backbone`, `steps`.
        rounds: Turns of each in which the bodies are timed; 0 for none.
        device: Where: `cpu` or `cuda`.

    Raises:
        UsageError: Where anything else differs, or nothing does: the keys with both values.
        DataError: For runs that are not there.
    """
    sides = (_side(first, arguments), _side(second, arguments))
    before, now = (side.settings for side in sides)
    absent = object()
    keys = [key for key in sorted({*before, *now}) if before.get(key, absent) != now.get(key, absent)]
    others = [key for key in keys if not _allowed(key, allow)]
    if others:
        lines = [f"  {key}: {before.get(key)!r} of A, {now.get(key)!r} of B" for key in others[:2]]
        lines += [f"  and {len(others) - 2} more"] if len(others) > 2 else []
        lines.append(f"  Make them the same, or say that they may differ: --allow {shlex.join(others[:2])}")
        raise UsageError("\n".join([f"{first} and {second} differ in more than the operator:", *lines]))
    if not keys:
        raise UsageError(f"{first} and {second} differ in nothing: there is nothing to compare")
    return Comparison(*sides, tuple(keys), _timed(sides, rounds, torch.device(device)) if rounds > 0 else ())


def _timed(sides: tuple[Side, Side], rounds: int, device: torch.device) -> tuple[tuple[str, str, str], ...]:
    """Training passes of the bodies alone, in turns."""
    wait, on_gpu = waits_for(device.type), device.type == "cuda"
    # On a CPU so many images as take a few seconds at most: a recipe's own batch can take minutes a pass.
    batch = 8 if on_gpu else max(1, min(8, round(20e9 / max(side.size.model_macs for side in sides))))
    what = f"{batch} × {sides[0].size.height}×{sides[0].size.width}"
    print(
        f"timing both backbones on {what}, forward and backward, {rounds} turns each (--rounds 0: not)", file=sys.stderr
    )
    works: list[Callable[[], object]] = []
    for side in sides:
        image = torch.randn(batch, 3, side.size.height, side.size.width, device=device)
        image = image.contiguous(memory_format=torch.channels_last)
        side.backbone.to(device)

        def work(body: nn.Module = side.backbone, image: Tensor = image) -> None:
            torch.autograd.backward(list(body(image).values())[-1].mean())

        works.append(work)
    a, b = take_turns(works, rounds=rounds, seconds=0.5, warmup=5 if on_gpu else 1, wait=wait)
    ratio = a.faster_than(b)
    head = f"backbone, images/s ({what}, forward and backward, {device.type})"
    verdict = {"faster": "A faster", "slower": "A slower"}.get(ratio.verdict, "not told apart")
    return ((head, f"{batch / median(a.wall):.3g}", f"{batch / median(b.wall):.3g}"), ("A / B", str(ratio), verdict))


@dataclass(frozen=True)
class Comparison:
    """What two sides have in common, and in what they differ.

    Attributes:
        first: A.
        second: B.
        keys: The settings that differ.
        timed: Rows of what was timed.
    """

    first: Side
    second: Side
    keys: tuple[str, ...]
    timed: tuple[tuple[str, str, str], ...]

    def rows(self) -> list[tuple[str, str, str]]:
        """What, A, B."""
        a, b = self.first, self.second
        rows = [(key.rpartition(".")[2], str(a.settings.get(key)), str(b.settings.get(key))) for key in self.keys]
        rows.append(("parameters, M", f"{a.size.model_parameters / 1e6:.3f}", f"{b.size.model_parameters / 1e6:.3f}"))
        rows.append(("MACs, G", f"{a.size.model_macs / 1e9:.3f}", f"{b.size.model_macs / 1e9:.3f}"))
        rows += self.timed
        ours, its = (side.record["metrics"] if side.record else {} for side in (a, b))
        for key in dict.fromkeys([*ours, *its]):
            if key.count("/") == 1:
                rows.append((key, *(_shown(metrics.get(key)) for metrics in (ours, its))))
        for name, (left, right) in self.curves().items():
            steps = sorted({*left} & {*right})
            for step in steps[:: -(-len(steps) // 6) or 1]:
                rows.append((f"{name}, step {step:,}", _shown(left[step]), _shown(right[step])))
        return rows

    def curves(self) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
        """How both learnt: value by step, of each metric that both records have."""
        found = [side.record["curves"] if side.record else {} for side in (self.first, self.second)]
        return {name: (dict(found[0][name]), dict(found[1][name])) for name in found[0] if name in found[1]}

    def to_table(self) -> str:
        """For people."""
        a, b = self.first, self.second
        data = a.record["data"]["identity"] if a.record else None
        table = RichTable(title=f"A: {a.name}\nB: {b.name}", title_justify="left", caption_justify="left")
        if a.record and b.record:
            seeds = list(dict.fromkeys([a.record["seed"], b.record["seed"]]))
            table.caption = f"On {data} data, seed {' and '.join(map(str, seeds))}."
        for name, side in (("A", a), ("B", b)):
            if side.record and (flaws := shortcomings(side.record)):
                table.caption = f"{table.caption or ''} {name}: {', '.join(flaws)}.".strip()
        for heading in ("", "A", "B"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in self.rows():
            table.add_row(*row)
        text = io.StringIO()
        Console(file=text, width=140).print(table)
        return text.getvalue()

    def draw(self, path: Path) -> None:
        """Draws the curves of both.

        Raises:
            UsageError: Where there are none.
        """
        from sis_lightning.tables.figures import draw_pair

        curves = {name: pair for name, pair in self.curves().items() if pair[0] and pair[1]}
        if not curves:
            raise UsageError("--out draws learning curves, but not both sides are runs that were tested")
        labels = ("A: " + self.first.size.config, "B: " + self.second.size.config)
        draw_pair(curves, labels, path)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
