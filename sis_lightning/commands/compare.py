"""`sis-lightning compare`: compares two runs or sets of runs, or two operators in one configuration."""

from __future__ import annotations

from pathlib import Path

from sis_lightning.commands.arguments import Parser, config_options, require_torch


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(
        "compare",
        "Compare two runs, two sets of runs with several seeds, or two backbones or operators in one configuration: "
        "settings that differ, parameters, MACs, speed, metrics, the classes that differ most, and learning curves. "
        "Only the operator may differ; any other difference is an error unless --allow names it.",
        [
            ("compare basic conv --config tasks/seg_voc.yaml", "two operators in one configuration"),
            ("compare sis50 resnet50 --config tasks/seg_voc.yaml --allow backbone --rounds 0", "two backbones"),
            ("compare runs/seg_voc/sis50-26w4s-basic runs/seg_voc/res2net50-26w4s-conv", "the seeds of two backbones"),
            (
                "compare runs/seg_voc/sis50-26w4s-basic/seed0 runs/seg_voc/res2net50-26w4s-conv/seed0 --out curves.svg",
                "",
            ),
        ],
        usage="A B [options]\n       sis-lightning compare A B --config FILE [options] [options of fit]",
        more="With --config, further options are those of fit.",
    )
    parser.add_argument(
        "first",
        metavar="A",
        help="A run's directory or its test.json, or a folder with runs of several seeds in seed*/; with --config an "
        "operator, or BACKBONE[:OPERATOR].",
    )
    parser.add_argument(
        "second", metavar="B", help="The run, operator or backbone that A is compared with, in the same form."
    )
    parser.add_config(help="Configuration file that A and B share; as for fit, may be repeated.")
    parser.add_argument(
        "--allow",
        nargs="+",
        default=[],
        metavar="KEY",
        help="Settings that may differ as well, by their keys or by parts of keys, such as backbone or steps.",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        metavar="N",
        help="Number of rounds in which both backbones are timed alternately; 0 skips the timing (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="Device for the timing (default: %(default)s)."
    )
    parser.add_argument(
        "--out", metavar="FILE", help="Also plot the learning curves of A and B into this file: .png, .svg or .pdf."
    )
    chosen, options = parser.parse_known_args(arguments)
    if not chosen.config:
        parser.refuse_unknown(options)
    require_torch()
    from sis_lightning.tables.compare import compare

    given = config_options(chosen.config, options)
    comparison = compare(chosen.first, chosen.second, given, chosen.allow, chosen.rounds, chosen.device)
    print(comparison.to_table(), end="")
    if chosen.out:
        comparison.draw(Path(chosen.out))
        print(f"wrote {chosen.out}")
    return 0
