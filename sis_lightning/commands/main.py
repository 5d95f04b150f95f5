"""The command `sis-lightning`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sis_lightning import __version__
from sis_lightning.config.compose import resolve
from sis_lightning.config_files import config_names
from sis_lightning.errors import UsageError, UserError, nearest

if TYPE_CHECKING:
    from sis_lightning.bench.report import Benchmark

RUN_COMMANDS = {
    "fit": "train, and validate while training",
    "validate": "score a checkpoint on the val split",
    "test": "score a checkpoint on the test split; writes test.json",
    "predict": "label a folder of pictures, or the val split",
}
COMMANDS = {
    **RUN_COMMANDS,
    "submit": "hand a fit to SLURM: a script in its directory, and sbatch",
    "status": "how runs fare: state, step, epoch, newest metric, restarts",
    "check-data": "count what a data set holds, and list everything that is wrong with it",
    "evaluate": "score a results file as COCO or VOC do",
    "export": "write a trained network as ONNX or pt2, and verify the file",
    "complexity": "parameters and MACs of backbones and of whole models",
    "tables": "the paper's tables beside ours: what is missing, how it comes about, and all cells",
    "compare": "two runs or two operators side by side, where nothing else differs",
    "bench": "time what is worth timing",
    "synth": "write small data sets in the real formats",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 (data), 2 (usage)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments)
    except UserError as error:
        if debug:
            raise
        print(f"sis-lightning: {_message(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Who read our output has gone, as `head` does; the interpreter must not complain of it again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        print(f"sis-lightning: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sis-lightning: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        print(f"sis-lightning {__version__}")
        return 0
    if command not in COMMANDS:
        raise UsageError(f"there is no command '{command}': {nearest(command, COMMANDS)}")
    if command in RUN_COMMANDS:
        return _run(command, rest)
    others = {
        "submit": _submit,
        "status": _status,
        "check-data": _check_data,
        "evaluate": _evaluate,
        "export": _export,
        "complexity": _complexity,
        "tables": _tables,
        "compare": _compare,
        "bench": _bench,
    }
    return {**others, "synth": _synth}[command](rest)


def _message(error: UserError) -> str:
    """An error's own words; what a worker process raised comes wrapped in its traceback."""
    text = str(error)
    if "in DataLoader worker process" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return "\n".join(text.rstrip().splitlines()[:5])


def _overview() -> str:
    lines = ["usage: sis-lightning COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    lines += [
        "",
        "start with:",
        "  sis-lightning fit --config tasks/seg_voc.yaml --config configs/demo.yaml",
        "",
        "sis-lightning COMMAND --help tells more; --debug anywhere shows an error's traceback.",
    ]
    return "\n".join(lines)


def _run_help(command: str) -> str:
    return f"""usage: sis-lightning {command} --config FILE [--config FILE …] [--KEY VALUE …]

{RUN_COMMANDS[command]}. Later files lie over earlier ones, options over all files.

  --config FILE               tasks: {", ".join(config_names("tasks"))}; overlays: configs/demo, configs/overfit
  --model.backbone NAME       {", ".join(config_names("configs/backbones"))}
  --model.backbone.operator   conv, basic, interactive1, interactive2, recurrent1, recurrent2
  --model.backbone.steps T    of the recurrent operators
  --data.root DIR             where the data set lies
  --data.batch_size N         images a step, over all devices together
  --data.predict_path PATH    pictures for predict
  --data.person_boxes FILE    keypoints: a detector's boxes instead of the ground truth's
  --model.backbone_weights F  fit: starts from the backbone of another task's checkpoint, or a published one
  --trainer NAME              {", ".join(config_names("configs/trainers"))}
  --trainer.max_steps N       or any other of Lightning's Trainer
  --seed_everything N         also names the run's directory
  --run_dir DIR               default: runs/TASK/BACKBONE-OPERATOR/seedN
  --resume auto               fit: goes on with the run in that directory, to the bit, if there is one
  --overwrite true            fit: removes an earlier run in that directory
  --ckpt_path PATH            last (default), best, or a file; not for fit
  --print_config              shows everything resolved, and stops
  --help-all                  every key of Trainer, model and data
  --debug                     shows an error's traceback"""


def _run(command: str, arguments: list[str]) -> int:
    """fit, validate, test, predict."""
    if "-h" in arguments or "--help" in arguments:
        print(_run_help(command))
        return 0
    if "--help-all" in arguments:
        arguments = ["--help"]
    layers, options = resolve(arguments)
    if "model" not in layers and not any(option.startswith("--model") for option in options):
        raise UsageError(f"which run? {command} needs --config tasks/NAME.yaml: {', '.join(config_names('tasks'))}")
    if command == "fit":
        from sis_lightning.run.signals import remember_early

        remember_early()
    _check_torch()
    from sis_lightning.run.lightning_cli import run

    run(command, layers, options)
    return 0


def _check_torch() -> None:
    """Torchvision's compiled ops load beside the torch they were built with alone: one sentence, not a traceback."""
    # Ours to say: torchvision's own message is a page long.
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, OSError, ImportError) as error:
        from importlib.metadata import PackageNotFoundError, version

        try:
            pair = f"torchvision {version('torchvision')} does not load beside torch {version('torch')}"
        except PackageNotFoundError as missing:
            pair = f"{missing.name} is not installed"
        raise UsageError(
            f"{pair} ({str(error).splitlines()[0]}).\n  Install the two releases that belong together: "
            'pip install --force-reinstall "torch>=2.14" "torchvision>=0.29"'
        ) from error


class _Lines(argparse.HelpFormatter):
    """Keeps the lines of a help text."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [part for line in text.splitlines() for part in super(_Lines, self)._split_lines(line, width)]


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ours."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}\n  {self.prog} --help lists the options")


def _synth(arguments: list[str]) -> int:
    """Writes synthetic data."""
    parser = _Parser(prog="sis-lightning synth", description=COMMANDS["synth"], allow_abbrev=False)
    parser.add_argument("root", metavar="ROOT", help="folder to write into")
    parser.add_argument("--images", type=int, default=1000, help="pictures of each kind (default %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="their longer side in px (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--kinds", nargs="+", default=["cifar", "voc", "coco"], help="of: cifar voc coco")
    parser.add_argument("--min-object", type=int, default=8, help="smallest object in px (default %(default)s)")
    parser.add_argument("--rotation", type=float, default=180, help="± degrees of rotation (default %(default)s)")
    chosen = parser.parse_args(arguments)
    from sis_lightning.datasets.synthetic import write_synthetic

    sheet = write_synthetic(
        Path(chosen.root),
        images=chosen.images,
        size=chosen.size,
        seed=chosen.seed,
        kinds=chosen.kinds,
        min_object=chosen.min_object,
        rotation=chosen.rotation,
    )
    print(f"wrote {', '.join(chosen.kinds)} below {chosen.root}; look at {sheet}")
    return 0


def _complexity(arguments: list[str]) -> int:
    """Counts parameters and MACs."""
    parser = _Parser(prog="sis-lightning complexity", description=COMMANDS["complexity"], allow_abbrev=False)
    of_run = any(argument.partition("=")[0] in ("-c", "--config") for argument in arguments)
    if not of_run or "--help" in arguments:
        parser.add_argument("names", nargs="*", metavar="BACKBONE", help="default: all of configs/backbones")
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help="a run: its whole model")
    parser.add_argument("--operator", help="in place of the operator that the file names")
    parser.add_argument("--size", type=int, help="side of the image in px (default: 32 or 224 by the stem)")
    parser.add_argument("--num-classes", type=int, help="of the classifier (default: 100 or 1000 by the stem)")
    parser.add_argument("--json", action="store_true", help="for machines")
    chosen, options = parser.parse_known_args(arguments)
    if options and not chosen.config:
        raise UsageError(f"unknown option {options[0]}\n  {parser.prog} --help lists the options")
    _check_torch()
    from sis_lightning.models import complexity

    if chosen.config:
        for option in ("operator", "num_classes"):
            if getattr(chosen, option) is not None:
                raise UsageError(
                    f"--{option.replace('_', '-')} is of named backbones; with --config: --model.backbone.operator, "
                    "--model.num_classes"
                )
        files = [f"--config={file}" for file in chosen.config]
        rows = complexity.of_run(*resolve([*files, *options]), chosen.size)
    else:
        names = chosen.names or config_names("configs/backbones")
        rows = complexity.of_backbones(names, chosen.operator, chosen.size, chosen.num_classes)
    print(complexity.to_json(rows) if chosen.json else complexity.to_table(rows), end="")
    return 0


def _submit_parser() -> _Parser:
    parser = _Parser(
        prog="sis-lightning submit",
        description=COMMANDS["submit"] + ". Further options are those of fit.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", required=True, metavar="FILE", help="as for fit")
    parser.add_argument("--nodes", type=int, default=1, help="default %(default)s")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="default %(default)s: on CPUs")
    parser.add_argument("--tasks-per-node", type=int, help="processes (default: one a GPU, or one)")
    parser.add_argument("--time", default="24:00:00", help="limit of one job; it goes on in the next (%(default)s)")
    parser.add_argument("--array", metavar="seeds=0..4", help="a job for each seed")
    parser.add_argument("--test", action="store_true", help="tests what the fit has trained, in the same job")
    parser.add_argument("--cluster", default="default", metavar="NAME", help="a file in configs/slurm (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="prints the script, and does no more")
    return parser


def _submit(arguments: list[str]) -> int:
    """Writes a job's script and submits it."""
    chosen, options = _submit_parser().parse_known_args(arguments)
    for key in ("nodes", "gpus_per_node", "tasks_per_node"):
        value = getattr(chosen, key)
        if value is not None and value < (key != "gpus_per_node"):
            raise UsageError(f"--{key.replace('_', '-')} is {value}, must be at least {int(key != 'gpus_per_node')}")
    for option in options:
        key = option.partition("=")[0]
        if key in ("--resume", "--overwrite"):
            raise UsageError(
                f"submit takes no {key}: a job that was put back into the queue goes on with its directory"
            )
        if key == "--run_dir" and chosen.array:
            raise UsageError("--array gives every seed a directory of its own: leave --run_dir out")
    from sis_lightning.slurm import jobs as slurm

    cluster = slurm.read_cluster(chosen.cluster)
    seeds = slurm.seeds_of(chosen.array) if chosen.array else None
    tasks = chosen.tasks_per_node or chosen.gpus_per_node or 1
    files = [f"--config={file}" for file in (*chosen.config, "configs/cluster.yaml")]
    device = [f"--trainer.num_nodes={chosen.nodes}", f"--trainer.devices={tasks}"]
    if tasks * chosen.nodes > 1 and not any(option.startswith("--trainer.strategy") for option in options):
        device.append("--trainer.strategy=ddp")
    if chosen.gpus_per_node:
        device.insert(0, "--trainer=cluster")
    given = [*files, *device, f"--max_restarts={cluster.max_restarts}", *options]
    _check_torch()
    from sis_lightning.run.lightning_cli import run

    # Everything is resolved here, so that what is wrong is said now and not when the job starts.
    cli = run(None, *resolve(given))
    folder = cli.directory(None if seeds is None else "")
    text = slurm.submit(
        ["fit", *given, *([] if seeds is not None else [f"--run_dir={folder}"])],
        folder,
        cluster,
        nodes=chosen.nodes,
        gpus_per_node=chosen.gpus_per_node,
        tasks_per_node=tasks,
        time=chosen.time,
        seeds=seeds,
        then_test=chosen.test,
        dry_run=chosen.dry_run,
    )
    print(text, end="")
    return 0


def _tables(arguments: list[str]) -> int:
    """The tables: plan, run, add, count, render, check, figures."""
    parser = _Parser(
        prog="sis-lightning tables", description=COMMANDS["tables"], allow_abbrev=False, formatter_class=_Lines
    )
    actions = {
        "plan": "what is missing, with the command of each run",
        "run": "trains and tests what is missing; goes on with what was begun. After -- options of fit (or of submit)",
        "add": "takes records of runs that were tested by hand: files, or folders of runs",
        "count": "parameters, MACs and configurations of all rows, by the code",
        "render": "writes TABLES.md, tables.csv, tables.html and latex/",
        "check": "fails where a table is stale, a record was edited, or the code counts otherwise",
        "figures": "draws them: all, or those named",
    }
    parser.add_argument(
        "action", choices=actions, metavar="ACTION", help="\n".join(f"{k}: {v}" for k, v in actions.items())
    )
    parser.add_argument("names", nargs="*", help="of add: files and folders; of figures: their names")
    parser.add_argument("--results", default="results", metavar="DIR", help="folder (default %(default)s)")
    parser.add_argument("--table", nargs="+", default=[], metavar="ID", help="of plan, run: such as 3 or 1-1")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="of plan, run: such as basic or Res2Net")
    parser.add_argument("--seeds", metavar="N|A,B|A..B", help="of plan, run: how many, or which (the runs' own)")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help="of run (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="of run, local: at once, sharing the cores (%(default)s)")
    parser.add_argument("--runs", nargs="+", default=[], metavar="DIR", help="of figures: for activation-maps")
    parser.add_argument("--roots", nargs="+", default=[], metavar="RUN=DIR", help="of plan, run: where data lies")
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    options = arguments[len(own) + 1 :]
    chosen = parser.parse_args(own)
    if options and chosen.action != "run":
        raise UsageError(f"tables {chosen.action} takes no options of fit")
    if chosen.names and chosen.action not in ("add", "figures"):
        raise UsageError(f"tables {chosen.action} takes no names; rows are named by --rows, tables by --table")
    if chosen.jobs < 1:
        raise UsageError(f"--jobs is {chosen.jobs}, must be at least 1")
    from sis_lightning.tables import results as tables
    from sis_lightning.tables.plan import run_here, submissions, to_do

    results = tables.Results(Path(chosen.results))
    if chosen.action in ("plan", "run"):
        _check_torch()
        roots = tables.roots_of(chosen.roots)
        wanted = results.missing(chosen.table, chosen.rows, tables.seeds_of(chosen.seeds), roots)
        if chosen.action == "plan" or not wanted:
            print(tables.to_text(wanted), end="")
            return 0
        there = chosen.launcher == "slurm"
        of_fit = options
        if there:  # what submit does not take for itself
            submitted, rest = _submit_parser().parse_known_args(["--config", "", *options])
            of_fit = [*(f"--config={file}" for file in submitted.config[1:]), *rest]
        left = to_do(wanted, results.records, of_fit)
        if there:
            return max([0, *(_submit(line) for line in submissions(left, options))])
        return min(run_here(left, results.records, chosen.jobs, options), 1)
    if chosen.action == "add":
        print(
            "\n".join(f"added {path}" for path in results.add([Path(name) for name in chosen.names])) or "nothing new"
        )
    elif chosen.action == "count":
        _check_torch()
        print("\n".join(results.count()) or f"{results.folder / 'models.json'} is what the code gives")
    elif chosen.action == "render":
        print("\n".join(f"wrote {path}" for path in results.render()))
    elif chosen.action == "check":
        _check_torch()
        problems = results.check()
        print("\n".join(problems) or f"{results.folder}: tables, records and counts agree")
        return min(len(problems), 1)
    else:
        if chosen.runs or not chosen.names or {*chosen.names} & {"receptive-fields", "activation-maps"}:
            _check_torch()
        print("\n".join(f"wrote {path}" for path in results.draw(chosen.names, [Path(run) for run in chosen.runs])))
    return 0


def _compare(arguments: list[str]) -> int:
    """Two runs, or two operators under one configuration."""
    parser = _Parser(
        prog="sis-lightning compare",
        description=COMMANDS["compare"] + ". Further options are those of fit.",
        allow_abbrev=False,
    )
    parser.add_argument("first", metavar="A", help="a run's directory, a record; with --config BACKBONE[:OPERATOR]")
    parser.add_argument("second", metavar="B", help="the like")
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help="what both run, as for fit")
    parser.add_argument("--allow", nargs="+", default=[], metavar="KEY", help="what else may differ, by its key")
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of each, timed; 0: not timed (default %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the turns (default %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="draws their curves: a .png, .svg or .pdf")
    chosen, options = parser.parse_known_args(arguments)
    if options and not chosen.config:
        raise UsageError(f"unknown option {options[0]}\n  {parser.prog} --help lists the options")
    _check_torch()
    from sis_lightning.tables.compare import compare

    files = [f"--config={file}" for file in chosen.config]
    comparison = compare(chosen.first, chosen.second, [*files, *options], chosen.allow, chosen.rounds, chosen.device)
    print(comparison.to_table(), end="")
    if chosen.out:
        comparison.draw(Path(chosen.out))
        print(f"wrote {chosen.out}")
    return 0


def _status(arguments: list[str]) -> int:
    """Lists runs."""
    parser = _Parser(prog="sis-lightning status", description=COMMANDS["status"], allow_abbrev=False)
    parser.add_argument("folders", nargs="*", metavar="DIR", help="default: runs")
    parser.add_argument("--json", action="store_true", help="for machines")
    chosen = parser.parse_args(arguments)
    from sis_lightning.slurm import jobs as slurm

    folders = [Path(folder) for folder in chosen.folders] or [path for path in [Path("runs")] if path.is_dir()]
    rows = slurm.status(folders)
    if chosen.json:
        print(json.dumps(rows, indent=1))
        return 0
    widths = {key: max([len(key), *(len(str(row[key])) for row in rows)]) for key in (rows[0] if rows else [])}
    for row in [{key: key for key in widths}, *rows] if rows else []:
        print("  ".join(str(row[key] if row[key] is not None else "-").ljust(widths[key]) for key in widths).rstrip())
    if not rows:
        print("no runs below " + (", ".join(chosen.folders) or "runs"))
    return 0


def _check_data(arguments: list[str]) -> int:
    """Walks a data set."""
    parser = _Parser(
        prog="sis-lightning check-data",
        description=COMMANDS["check-data"],
        epilog="Further options are those of fit: --data.root DIR and so on. Exit code 1 where anything is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", required=True, metavar="FILE", help="as for fit")
    parser.add_argument("--annotations-only", action="store_true", help="does not decode images and masks")
    parser.add_argument(
        "--archives", type=Path, metavar="DIR", help="proves by the published archives there that the data is official"
    )
    chosen, options = parser.parse_known_args(arguments)
    _check_torch()
    from sis_lightning.datasets.check import check_data

    files = [f"--config={file}" for file in chosen.config]
    pictures = not chosen.annotations_only
    return min(check_data(*resolve([*files, *options]), pictures=pictures, archives=chosen.archives), 1)


def _evaluate(arguments: list[str]) -> int:
    """Scores a results file."""
    parser = _Parser(prog="sis-lightning evaluate", description=COMMANDS["evaluate"], allow_abbrev=False)
    kinds = ("bbox", "segm", "keypoints", "voc07", "voc12")
    parser.add_argument("--type", required=True, choices=kinds, help="COCO's figures, or VOC's average precision")
    parser.add_argument("--truth", required=True, help="COCO's annotation file, or VOC's folder with Annotations/")
    parser.add_argument("--results", required=True, help="COCO's results file, or a folder with VOC's CLASS.txt")
    parser.add_argument("--json", action="store_true", help="for machines: all digits, null where nothing is to find")
    coco = parser.add_argument_group("COCO")
    evaluators = ("pycocotools", "faster-coco-eval")
    coco.add_argument("--evaluator", choices=evaluators, help="who computes (default pycocotools)")
    voc = parser.add_argument_group("VOC")
    voc.add_argument("--split", help="a list of ImageSets/Main (default: every file of Annotations/)")
    rules = "devkit (default): difficult is ignored, IoU > t; toolkit: it counts, IoU >= t"
    voc.add_argument("--voc-rule", dest="rule", choices=("devkit", "toolkit"), help=rules)
    voc.add_argument("--iou", type=float, help="t (default 0.5)")
    voc.add_argument("--classes", nargs="+", metavar="NAME", help="default: VOC's 20")
    chosen = parser.parse_args(arguments)
    of_voc = chosen.type.startswith("voc")
    options = {key: getattr(chosen, key) for key in ("split", "rule", "iou", "classes", "evaluator")}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if (key == "evaluator") == of_voc:
            option = "--voc-rule" if key == "rule" else f"--{key}"
            raise UsageError(f"{option} is of {'COCO' if of_voc else 'VOC'}, not of --type {chosen.type}")
    from sis_lightning.evaluation.files import evaluate_coco, evaluate_voc

    score = evaluate_voc if of_voc else evaluate_coco
    evaluation = score(Path(chosen.truth), Path(chosen.results), chosen.type, **given)
    print(evaluation.to_json() if chosen.json else evaluation.to_table(), end="")
    return 0


def _measured(chosen: argparse.Namespace) -> Benchmark:
    """What `bench` was asked for."""
    if chosen.runs:
        from sis_lightning.bench.report import collect_runs

        return collect_runs([Path(folder) for folder in chosen.runs], chosen.name or "runs")
    if chosen.start:
        from sis_lightning.bench.report import time_start

        return time_start()
    if chosen.eval:
        from sis_lightning.bench.evaluators import time_evaluators

        return time_evaluators(chosen.images)
    _check_torch()
    from sis_lightning.machine import keep_freed_memory

    keep_freed_memory()
    if chosen.operators:
        from sis_lightning.bench.operators import time_operators

        return time_operators(batch=chosen.batch, device=chosen.device, rounds=chosen.rounds, seconds=chosen.seconds)
    if chosen.data or chosen.loop:
        from sis_lightning.bench.pipeline import time_data, time_loop

        return time_data() if chosen.data else time_loop(chosen.rounds)
    from sis_lightning.bench.models import Settings, time_models

    settings = Settings(chosen.mode, chosen.batch, chosen.size, chosen.precision, chosen.device)
    return time_models(chosen.networks, settings, rounds=chosen.rounds, seconds=chosen.seconds)


def _export(arguments: list[str]) -> int:
    """Writes a network as a file."""
    parser = _Parser(
        prog="sis-lightning export",
        description=COMMANDS["export"] + ". Further options are those of fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", default="last", metavar="FILE", help="last (default), best, or a checkpoint")
    parser.add_argument("-c", "--config", action="append", metavar="FILE", help="default: of the checkpoint's run")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx", help="default %(default)s")
    parser.add_argument("--out", metavar="FILE", help="default: model.FORMAT in the run's directory")
    chosen, options = parser.parse_known_args(arguments)
    files = chosen.config
    if not files:
        files = [str(Path(chosen.ckpt).parent.parent / "config.yaml")]
        if not Path(files[0]).is_file():
            raise UsageError("which network? --ckpt RUN/checkpoints/last.ckpt, or --config tasks/NAME.yaml as for fit")
    _check_torch()
    from sis_lightning.models.export import export

    layers, rest = resolve([*(f"--config={file}" for file in files), *options])
    done = export(layers, rest, chosen.ckpt, chosen.format, Path(chosen.out) if chosen.out else None)
    shapes = ", ".join("×".join(map(str, shape)) for shape in done.shapes)
    print(f"{done.path}: {done.path.stat().st_size / 1e6:.1f} MB, verified with images {shapes}")
    if done.difference is None:
        print("note: nothing was found in these images, so that only the file's run was verified, not its outputs")
    else:
        print(f"largest difference from the network {done.difference:.1g} of the largest output")
    return 0


def _bench(arguments: list[str]) -> int:
    """Times what is worth timing."""
    parser = _Parser(
        prog="sis-lightning bench",
        description=COMMANDS["bench"] + ". Networks: BACKBONE[:OPERATOR], torchvision:NAME, timm:NAME; each with "
        "+deploy, +compile, +graphs, +nchw as wanted. The first is compared with each of the others.",
        allow_abbrev=False,
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="such as sis50+deploy timm:res2net50_26w_4s")
    models = parser.add_argument_group("networks")
    models.add_argument("--mode", choices=("train", "inference"), default="train", help="default %(default)s")
    models.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    models.add_argument("--size", type=int, default=224, help="px (default %(default)s)")
    models.add_argument("--precision", choices=("32", "bf16"), default="32", help="default %(default)s")
    models.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    models.add_argument("--rounds", type=int, default=11, help="turns of each (default %(default)s)")
    models.add_argument("--seconds", type=float, default=1.0, help="of a turn (default %(default)s)")
    parser.add_argument("--operators", action="store_true", help="fast forms against the equations, and against conv")
    parser.add_argument("--data", action="store_true", help="images/s of every DataModule against what its model needs")
    parser.add_argument("--loop", action="store_true", help="fit of the segmentation demo against a bare PyTorch loop")
    parser.add_argument("--start", action="store_true", help="commands that compute nothing")
    parser.add_argument("--eval", action="store_true", help="pycocotools against faster-coco-eval")
    parser.add_argument("--runs", nargs="+", metavar="DIR", help="what tested runs measured, and how long they trained")
    parser.add_argument("--name", help="of the file")
    parser.add_argument("--images", type=int, default=5000, help="of --eval (default %(default)s)")
    parser.add_argument("--out", default="results/benchmarks", help="folder to write into (default %(default)s)")
    chosen = parser.parse_args(arguments)
    kinds = {"networks": chosen.networks, "runs": chosen.runs}
    kinds |= {key: getattr(chosen, key) for key in ("operators", "data", "loop", "eval", "start")}
    if sum(map(bool, kinds.values())) != 1:
        raise UsageError(
            "what is to be timed? one of bench NETWORK…, --operators, --data, --loop, --eval, --start, --runs DIR…\n"
            "  such as: sis-lightning bench sis50 timm:res2net50_26w_4s"
        )
    for key in ("batch", "size", "rounds"):
        if getattr(chosen, key) < 1:
            raise UsageError(f"--{key} is {getattr(chosen, key)}, must be at least 1")
    from sis_lightning.bench import report

    result = _measured(chosen)
    if chosen.name:
        result = replace(result, name=chosen.name)
    report.write(result, Path(chosen.out))
    print(report.to_table(result), end="")
    return 0
