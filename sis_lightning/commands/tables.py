"""`sis-lightning tables`: fills the paper's tables with our results."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sis_lightning.commands import submit
from sis_lightning.commands.arguments import Parser, require_at_least, require_torch
from sis_lightning.errors import UsageError

if TYPE_CHECKING:
    from sis_lightning.tables.results import Results

_ACTIONS = {
    "plan": "list the runs that are missing in the tables, each with its command",
    "cost": "estimate the GPU-hours and the disk that the missing runs take",
    "run": "train and test the missing runs; options of fit (with --launcher slurm: of submit) follow after --",
    "add": "add the records (test.json) of tested runs: files, or folders that contain runs",
    "count": "count the parameters and MACs of all rows, and resolve their configurations, into models.json",
    "render": "write TABLES.md, tables.csv, tables.html and latex/",
    "check": "fail if a table or figure is outdated, a record contradicts itself, or the counts have changed",
    "verify": "measure recorded values again: test the stored checkpoints, and train some runs again",
    "figures": "plot the named figures (accuracy, sizes, curves, receptive-fields, activation-maps), or all",
}


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = tables_parser()
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    options = arguments[len(own) + 1 :]
    chosen = parser.parse_intermixed_args(own)
    if options and chosen.action != "run":
        parser.error(f"only tables run takes options of fit after --, not tables {chosen.action}")
    if chosen.names and chosen.action not in ("add", "figures"):
        raise UsageError(f"tables {chosen.action} takes no names: --table names tables, --rows names rows")
    require_at_least(parser, chosen, {"jobs": 1, "retrain": 0, "sample": 1})
    from sis_lightning.tables.results import Results

    results = Results(Path(chosen.results))
    if chosen.action in ("plan", "run", "cost"):
        return _plan_or_run(results, chosen, options)
    if chosen.action == "add":
        added = results.add([Path(name) for name in chosen.names])
        print("\n".join(f"added {path}" for path in added) or "nothing new")
    elif chosen.action == "count":
        require_torch()
        print("\n".join(results.count()) or f"{results.counts} is up to date")
    elif chosen.action == "render":
        print("\n".join(f"wrote {path}" for path in results.render()))
    elif chosen.action == "check":
        require_torch()
        problems = results.check(Path(chosen.public_key) if chosen.public_key else None)
        print("\n".join(problems) or f"{results.folder}: tables, records and counts agree")
        return min(len(problems), 1)
    elif chosen.action == "verify":
        require_torch()
        from sis_lightning.tables.results import roots_of

        # As after Ctrl-C, the command that runs is ended, and temporary folders are removed.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        limits = {"sample": chosen.sample, "retrain": chosen.retrain, "tolerance": chosen.tolerance}
        return int(not results.verify(chosen.table, chosen.rows, roots_of(chosen.roots), **limits))
    else:
        if chosen.runs or not chosen.names or {*chosen.names} & {"receptive-fields", "activation-maps"}:
            require_torch()
        print("\n".join(f"wrote {path}" for path in results.draw(chosen.names, [Path(run) for run in chosen.runs])))
    return 0


def tables_parser() -> Parser:
    """The parser of the command."""
    parser = Parser(
        "tables",
        "Fill the paper's tables, and further tables of this project, with results. Cells are filled only from the "
        "records (test.json) that sis-lightning test wrote.",
        [
            ("tables plan --table 3 --rows basic Res2Net", ""),
            ("tables cost --table 3 3-imagenet", ""),
            ("tables run --table 3 --rows basic --roots seg_voc=/data/voc -- --trainer gpu", ""),
            ("tables run --table 3 --roots seg_voc=/data/voc --launcher slurm -- --gpus-per-node 4", ""),
            ("tables add runs", ""),
            ("tables verify --table 3 --sample 5 --roots seg_voc=/data/voc", ""),
            ("tables render", ""),
            ("tables figures activation-maps --runs runs/cls_cifar100/*/seed0", ""),
        ],
        more="actions:\n" + "\n".join(f"  {name:<9}{summary}" for name, summary in _ACTIONS.items()),
        usage="ACTION [NAME ...] [options] [-- options of fit]",
    )
    parser.add_argument("action", choices=_ACTIONS, metavar="ACTION", help=f"One of {', '.join(_ACTIONS)}; see below.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="add: files or folders. figures: names of figures.")
    parser.add_argument(
        "--results",
        default="results",
        metavar="DIR",
        help="Folder with the table specs (*.yaml) and the records (default: %(default)s).",
    )
    parser.add_argument(
        "--table",
        nargs="+",
        default=[],
        metavar="ID",
        help="plan, cost, run, verify: numbers of tables, such as 3 or 1-1 (default: all tables).",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="NAME",
        help="plan, cost, run, verify: rows by label, backbone or operator, such as Res2Net or basic (default: all).",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        help="plan, cost, run: number of seeds, such as 3 for the seeds 0, 1 and 2; or the seeds themselves, such as "
        "0,2 or 0..4 (for seed 0 only, with a comma: 0,). Default: the seeds of the table spec.",
    )
    parser.add_argument(
        "--roots",
        nargs="+",
        default=[],
        metavar="RUN=DIR",
        help="plan, run, verify: folder with the data of the runs that the table spec calls RUN, such as "
        "seg_voc=/data/voc.",
    )
    parser.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="run: train on this machine, or submit jobs to SLURM (default: %(default)s).",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="run with --launcher local: number of runs at the same time, which share the cores (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="N",
        help="cost: trillions of floating-point operations per second that one GPU does in training (default: as "
        "measured in results/benchmarks/gpu-train.json, else 20).",
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="verify: number of records to measure again, drawn at random (default: all).",
    )
    parser.add_argument(
        "--retrain",
        type=int,
        default=0,
        metavar="N",
        help="verify: number of records to train again from configuration, seed and commit; the smallest networks "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="verify: largest difference of a cell's metric after a second training (default: the interval in which "
        "another seed is with 99 %%, from the seeds of the cell).",
    )
    parser.add_argument(
        "--public-key",
        metavar="FILE",
        help="check: public key of minisign, with which every record must be signed (NAME.json.minisig).",
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="figures: directories of trained classification runs, which activation-maps needs.",
    )
    return parser


def _plan_or_run(results: Results, chosen: argparse.Namespace, options: list[str]) -> int:
    require_torch()
    from sis_lightning.tables.cost import ASSUMED_TFLOPS, measured_tflops
    from sis_lightning.tables.cost import to_text as cost_text
    from sis_lightning.tables.plan import run_here, submissions, to_do
    from sis_lightning.tables.results import roots_of, seeds_of, to_text

    if chosen.tflops is not None and not chosen.tflops > 0:
        raise UsageError(f"--tflops is {chosen.tflops:g}, must be above 0")
    wanted = results.missing(chosen.table, chosen.rows, seeds_of(chosen.seeds), roots_of(chosen.roots))
    if chosen.action == "cost" and wanted:
        measured = measured_tflops(results.folder / "benchmarks")
        source = "as given" if chosen.tflops else "measured" if measured else "an assumption, as nothing was measured"
        print(cost_text(wanted, chosen.tflops or measured or ASSUMED_TFLOPS, source), end="")
        return 0
    if chosen.action == "plan" or not wanted:
        print(to_text(wanted), end="")
        return 0
    if chosen.launcher == "local":
        left = to_do(wanted, results.records, options)
        return min(run_here(left, results.records, chosen.jobs, options), 1)
    # Options that submit does not take itself are those of fit.
    submitted, rest = submit.submit_parser().parse_known_args(["--config", "", *options])
    left = to_do(wanted, results.records, [*(f"--config={file}" for file in submitted.config[1:]), *rest])
    return max([0, *(submit.main(line) for line in submissions(left, options))])
