"""`sis-lightning bench`: benchmarks."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sis_lightning.commands.arguments import Parser, require_at_least, require_torch
from sis_lightning.errors import UsageError

if TYPE_CHECKING:
    from sis_lightning.bench.report import Benchmark


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    kinds = {"networks": chosen.networks, "runs": chosen.runs}
    kinds |= {key: getattr(chosen, key) for key in ("operators", "loop", "eval", "start")}
    kinds["data"] = chosen.data is not None  # without folders it is an empty list
    kinds["costs"] = chosen.costs is not None
    if sum(map(bool, kinds.values())) != 1:
        raise UsageError(
            "what should be timed? name one of NETWORK..., --operators, --data, --loop, --eval, --start, --costs, "
            "--runs DIR\n"
            "  such as: sis-lightning bench sis50 timm:res2net50_26w_4s"
        )
    require_at_least(parser, chosen, {"batch": 1, "size": 1, "rounds": 1})
    if chosen.images is not None:
        require_at_least(parser, chosen, {"images": 1})
    from sis_lightning.bench import report

    result = _measure(chosen)
    if chosen.name:
        result = replace(result, name=chosen.name)
    report.write(result, Path(chosen.out))
    print(report.to_table(result), end="")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "bench",
        "Time networks, operators, data loading or evaluators. The result is printed and, with a description of the "
        "machine, written to a folder. Networks are timed alternately in one process, and the first is compared with "
        "each of the others.",
        [
            ("bench sis50 timm:res2net50_26w_4s --mode train --batch 8", ""),
            ("bench sis50:interactive2+deploy torchvision:resnet50+deploy --mode inference", ""),
            ("bench --operators --device cuda --batch 256", ""),
        ],
    )
    parser.add_argument(
        "networks",
        nargs="*",
        metavar="NETWORK",
        help="BACKBONE[:OPERATOR], torchvision:NAME or timm:NAME, followed by any of +deploy (fused batch norm), "
        "+compile (torch.compile), +graphs (torch.compile with CUDA graphs), +nchw (contiguous memory format instead "
        "of channels_last). +deploy needs --mode inference.",
    )
    models = parser.add_argument_group("how to time")
    models.add_argument(
        "--mode",
        choices=("train", "inference"),
        default="train",
        help="train: a step is forward, backward and SGD. inference: a step is a forward pass (default: %(default)s).",
    )
    models.add_argument(
        "--batch", type=int, default=8, metavar="N", help="Number of images per step (default: %(default)s)."
    )
    models.add_argument(
        "--size", type=int, default=224, metavar="PX", help="Side of the images in px (default: %(default)s)."
    )
    models.add_argument(
        "--precision",
        choices=("32", "bf16"),
        default="32",
        help="Float32, or bfloat16 autocast (default: %(default)s).",
    )
    models.add_argument("--device", default="cpu", help="Device: cpu or cuda (default: %(default)s).")
    models.add_argument(
        "--rounds", type=int, default=11, metavar="N", help="Number of timed rounds (default: %(default)s)."
    )
    models.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="Seconds for which each network or operator runs in a round (default: %(default)s).",
    )
    models.add_argument(
        "--only-speed",
        action="store_true",
        help="Leave out memory and traffic. To count them, each compiled network is compiled twice more, which takes "
        "minutes.",
    )
    others = parser.add_argument_group("what to time, instead of networks")
    others.add_argument(
        "--operators",
        action="store_true",
        help="Time the fast form of each operator against a literal form of its equations, and against a plain "
        "convolution.",
    )
    others.add_argument(
        "--data",
        nargs="*",
        type=Path,
        metavar="ROOT",
        help="Time the data loading of every task, and the training steps that it feeds, on synthetic images or on the "
        "data sets in these folders.",
    )
    others.add_argument(
        "--loop", action="store_true", help="Time fit on the segmentation demo against a plain PyTorch loop."
    )
    others.add_argument("--start", action="store_true", help="Time commands that compute nothing, such as --help.")
    others.add_argument(
        "--costs",
        nargs="?",
        const=Path(),
        type=Path,
        metavar="BEFORE",
        help="Time fit to its first step at the size of COCO, and steps with a checkpoint; BEFORE is a checkout "
        "of another version to compare with.",
    )
    others.add_argument("--eval", action="store_true", help="Time pycocotools against faster-coco-eval.")
    others.add_argument(
        "--runs", nargs="+", metavar="DIR", help="Collect the test metrics and training times of these runs."
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="Number of images for --eval and --costs (default: 5,000, and COCO's 118,287).",
    )
    parser.add_argument("--name", help="Name of the result file (default: derived from what was timed).")
    parser.add_argument(
        "--out", default="results/benchmarks", metavar="DIR", help="Folder to write to (default: %(default)s)."
    )
    return parser


def _measure(chosen: argparse.Namespace) -> Benchmark:
    """Runs the benchmark that the options ask for."""
    if chosen.runs:
        from sis_lightning.bench.report import collect_runs

        return collect_runs([Path(folder) for folder in chosen.runs], chosen.name or "runs")
    if chosen.start:
        from sis_lightning.bench.report import time_start

        return time_start()
    if chosen.costs is not None:
        require_torch()
        from sis_lightning.bench.costs import time_costs

        return time_costs(chosen.costs.absolute() if chosen.costs != Path() else None, chosen.images)
    if chosen.eval:
        from sis_lightning.bench.evaluators import time_evaluators

        return time_evaluators(chosen.images or 5000)
    require_torch()
    from sis_lightning.run.process import keep_freed_memory

    keep_freed_memory()
    if chosen.operators:
        from sis_lightning.bench.operators import time_operators

        return time_operators(batch=chosen.batch, device=chosen.device, rounds=chosen.rounds, seconds=chosen.seconds)
    if chosen.data is not None or chosen.loop:
        from sis_lightning.bench.pipeline import time_data, time_loop

        return time_loop(chosen.rounds) if chosen.loop else time_data(chosen.data)
    from sis_lightning.bench.models import Settings, time_models

    settings = Settings(chosen.mode, chosen.batch, chosen.size, chosen.precision, chosen.device)
    return time_models(
        chosen.networks, settings, rounds=chosen.rounds, seconds=chosen.seconds, only_speed=chosen.only_speed
    )
