"""`sis-lightning complexity`: counts parameters and multiply-accumulates."""

from __future__ import annotations

from sis_lightning.commands.arguments import Parser, config_options, require_at_least, require_torch
from sis_lightning.config_files import config_names


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(
        "complexity",
        "Count the parameters of networks, and their multiply-accumulates (MACs) for one image. The networks are "
        "backbones, alone and as classifiers; or, with --config, the whole model of a run.",
        [
            ("complexity sis50 res2net50 resnet50", ""),
            ("complexity sis50 --operator interactive1 --size 256", ""),
            ("complexity --config tasks/seg_voc.yaml --json", "the whole model of a run"),
        ],
        usage="[BACKBONE ...] [options]\n       sis-lightning complexity --config FILE [options] [options of fit]",
        more="With --config, further options are those of fit, such as --model.backbone.operator.",
    )
    names = config_names("configs/backbones")
    of_run = any(argument.partition("=")[0] in ("-c", "--config") for argument in arguments)
    if (
        not of_run or "--help" in arguments or "-h" in arguments
    ):  # else values of fit's options would be taken for names
        parser.add_argument("names", nargs="*", metavar="BACKBONE", help=f"Any of {', '.join(names)} (default: all).")
    parser.add_config(help="Configuration file of a run, whose whole model is counted; as for fit, may be repeated.")
    parser.add_argument("--operator", metavar="NAME", help="Operator that replaces the backbone's own.")
    parser.add_argument(
        "--size",
        type=int,
        metavar="PX",
        help="Side of the square image in px (default: for a backbone, 32 with the CIFAR stem and 224 otherwise; for a "
        "run, the size that it trains on).",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="Number of classes of the classifier (default: 100 with the CIFAR stem, 1000 otherwise).",
    )
    parser.add_json()
    chosen, options = parser.parse_known_args(arguments)
    require_at_least(parser, chosen, {"size": 1, "num_classes": 1})
    if not chosen.config:
        parser.refuse_unknown(options)
    for option in ("operator", "num_classes") if chosen.config else ():
        if getattr(chosen, option) is not None:
            parser.error(
                f"--{option.replace('_', '-')} is for named backbones; with --config, give "
                "--model.backbone.operator or --model.num_classes"
            )
    require_torch()
    from sis_lightning.models import complexity

    if chosen.config:
        from sis_lightning.run.run import Run
        from sis_lightning.tables.counting import count_run

        run = Run.from_arguments(config_options(chosen.config, options))
        rows = [count_run(run, run.options.task, chosen.size)]
    else:
        size = (chosen.size, chosen.size) if chosen.size else None
        rows = complexity.measure_backbones(chosen.names or names, chosen.operator, size, chosen.num_classes)
    print(complexity.to_json(rows) if chosen.json else complexity.to_table(rows), end="")
    return 0
