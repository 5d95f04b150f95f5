"""What `fit`, `validate`, `test` and `predict` share: short help, the full list of options, and the start of a run.

Lightning's parser, which takes seconds to import, parses these commands; the parsers here only explain the options that
most runs need.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

from sis_lightning.commands.arguments import Parser, require_torch
from sis_lightning.commands.imports import quick_imports
from sis_lightning.commands.operator_listing import listed_operators
from sis_lightning.config.compose import resolve
from sis_lightning.config_files import config_names
from sis_lightning.errors import UsageError

_USAGE = "--config FILE [--config FILE ...] [--KEY VALUE ...]"
_MERGING = (
    "A run is described by YAML files and options. Later files override earlier ones, and options override all files."
)


def run_parser(command: str, description: str, examples: Sequence[tuple[str, str]]) -> Parser:
    """The parser that explains a command, with the options that all four commands have.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        description: What it does.
        examples: Example command lines, as for `Parser`.
    """
    parser = Parser(command, f"{description} {_MERGING}", examples, usage=_USAGE)
    what = parser.add_argument_group("configuration")
    what.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help=f"Configuration file; may be repeated. First a task, tasks/NAME.yaml with NAME one of {_listed('tasks')}. "
        "Then files that override it, such as configs/demo.yaml (synthetic data, minutes on a CPU) and after it "
        "configs/overfit.yaml (four images of your data, for detection and keypoints).",
    )
    what.add_argument("--print_config", action="store_true", help="Print the merged configuration, and stop.")
    what.add_argument(
        "--help-all",
        action="store_true",
        help="List all options of the Trainer; with --config also those of the task and its data.",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model.backbone", metavar="NAME", help=f"Backbone: one of {_listed('configs/backbones')}.")
    model.add_argument(
        "--model.backbone.operator",
        metavar="NAME",
        help=f"Operator in place of the backbone's 3x3 convolutions: one of {', '.join(listed_operators())} "
        "(default: the backbone's own).",
    )
    model.add_argument(
        "--model.backbone.steps", metavar="T", help="Number of time steps in a recurrent operator (default: 2)."
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="NAME", help=f"Data in place of the task's own: one of {_listed('datamodules')}."
    )
    data.add_argument("--data.root", metavar="DIR", help="Folder that contains the data set.")
    data.add_argument("--data.batch_size", metavar="N", help="Number of images per step, in total over all devices.")
    data.add_argument("--data.num_workers", metavar="N", help="Number of data-loading processes per device.")
    if command != "predict":
        data.add_argument(
            "--data.person_boxes",
            metavar="FILE",
            help="For keypoints: results file of a detector, whose person boxes replace the ground truth boxes in "
            "evaluation.",
        )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--trainer",
        metavar="NAME",
        help=f"Devices and precision, as a file in configs/trainers sets them: one of {_listed('configs/trainers')} "
        "(default: as the configuration says, else Lightning's defaults).",
    )
    run.add_argument(
        "--run_dir",
        metavar="DIR",
        help="Directory for the run's configuration, checkpoints, logs and results "
        "(default: runs/TASK/BACKBONE-OPERATOR/seedN).",
    )
    run.add_argument(
        "--seed_everything", metavar="N", help="Random seed, which is also part of the default --run_dir (default: 0)."
    )
    if command != "fit":
        run.add_argument(
            "--ckpt_path",
            metavar="PATH",
            help="Checkpoint: last (default) or best of the run, or the path of a checkpoint.",
        )
        run.add_argument(
            "--deploy",
            metavar="BOOL",
            help="If true, use the deployed (fused) model: batch norm is folded into the convolutions, which is faster "
            "and gives the same outputs up to rounding.",
        )
    run.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _listed(folder: str) -> str:
    return ", ".join(config_names(folder))


def start(parser: Parser, command: str, arguments: list[str]) -> int:
    """Prints help, or runs the command.

    Args:
        parser: The parser that explains the command.
        command: `fit`, `validate`, `test` or `predict`.
        arguments: Arguments as typed, without the command.

    Returns:
        The exit code.

    Raises:
        UsageError: If no task is named.
    """
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        return 0
    everything = "--help-all" in arguments
    layers, options = resolve([argument for argument in arguments if argument != "--help-all"])
    if everything:
        require_torch()
        _print_all_options(layers)
        return 0
    named = any(re.fullmatch(r"--model(\.class_path)?(=.*)?", option) for option in options)
    if "class_path" not in layers.get("model", {}) and not named:
        raise UsageError(f"{command} needs a task: --config tasks/NAME.yaml, with NAME one of {_listed('tasks')}")
    if command == "fit":
        from sis_lightning.run.resume.signals import remember_early

        remember_early()
    with quick_imports():
        require_torch()
        from sis_lightning.run.start import start as start_run
    start_run(command, layers, options, arguments)
    return 0


def _print_all_options(layers: dict[str, Any]) -> None:
    """Prints every option of a command: of the run and the Trainer, of the task, and of its data."""
    from sis_lightning.run.parser import run_parser as all_options

    sections = {"--help": "Options of the run and of Lightning's Trainer"}
    for part in ("model", "data"):
        if name := layers.get(part, {}).get("class_path"):
            sections[f"--{part}.help={name}"] = f"Options of {name.rpartition('.')[2]}"
    for option, title in sections.items():
        # Each of these options prints its part of the help, and leaves.
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            all_options().parse_args([option])
        # The usage lists all options a first time, without explanations.
        body = printed.getvalue().partition("\n\n")[2]
        print(f"{title}\n{'=' * len(title)}\n{re.sub(r'^Help for --.*$', '', body, flags=re.M).strip()}\n")
    if len(sections) < 3:
        print("The options of a task and its data are listed with its configuration: --config tasks/NAME.yaml")
