"""The program `sis-lightning`: finds the module of a command, runs it, and turns errors into exit codes.

Exit codes: 0 success, 1 data (missing, damaged, nothing to write to), 2 usage (a wrong option, key or name), 130
interrupted, 141 the reader of the output has gone. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from sis_lightning import __version__
from sis_lightning.errors import MissingDataError, UsageError, UserError, nearest

#: Summary of each command, in the order of the overview. The module has the command's name with `_` for `-`.
COMMANDS = {
    "fit": "train a network, and validate it during training",
    "validate": "evaluate a checkpoint on the val split",
    "test": "evaluate a checkpoint on the test split, and write test.json",
    "predict": "predict on a folder of images, or on the val split",
    "submit": "submit a training job to SLURM",
    "status": "list runs with their state, step, newest metric and number of restarts",
    "check-data": "summarise a data set, and list all of its defects",
    "evaluate": "score a results file by the rules of COCO or Pascal VOC",
    "export": "write a trained network as ONNX or pt2, and verify the file",
    "complexity": "count parameters and MACs of backbones and whole models",
    "tables": "fill the paper's tables with results: plan, run and render them",
    "compare": "compare two runs, or two operators in one configuration",
    "bench": "benchmark networks, operators, data loading and evaluators",
    "synth": "write small synthetic data sets in the real formats",
}
#: Names that other tools use for a command.
_OTHER_NAMES = {
    "train": "fit",
    "val": "validate",
    "infer": "predict",
    "inference": "predict",
    "sbatch": "submit",
    "check": "check-data",
    "flops": "complexity",
    "macs": "complexity",
    "benchmark": "bench",
    "table": "tables",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Command and options; those of the process by default.

    Returns:
        The exit code: 0, 1 (data), 2 (usage), 130 (interrupted) or 141 (broken pipe).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # a reader that has gone is noticed here, and not while the interpreter ends
        return code
    except UserError as error:
        if debug:
            raise
        return _fail(_message(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; the interpreter must not complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug or not _is_the_users(error):
            raise
        return _fail(f"{os.fsdecode(error.filename or 'writing failed')}: {error.strerror}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        print(f"sis-lightning {__version__}")
        return 0
    if command not in COMMANDS:
        meant = _OTHER_NAMES.get(command)
        raise UsageError(f"there is no command '{command}': " + _suggestion(command, meant))
    module = import_module(f"sis_lightning.commands.{command.replace('-', '_')}")
    run: Callable[[list[str]], int] = module.main
    try:
        return run(rest)
    except SystemExit as leaving:  # argparse and jsonargparse leave after --help and --print_config
        if leaving.code not in (None, 0):
            raise
        return 0


def _suggestion(command: str, meant: str | None) -> str:
    return f"did you mean '{meant}' ({COMMANDS[meant]})?" if meant else nearest(command, COMMANDS)


def _fail(message: str, code: int) -> int:
    print(f"sis-lightning: {message}", file=sys.stderr)
    return code


def _is_the_users(error: OSError) -> bool:
    """Whether a path that the user named, or a full or broken disk, is the reason; anything else is a defect."""
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _message(error: UserError) -> str:
    """The message of an error; one that a worker process raised comes wrapped in its traceback."""
    text = str(error)
    if "in DataLoader worker process" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    if isinstance(error, MissingDataError):
        text = f"{text.rstrip()}\n  Name its folder with --data.root DIR; --config configs/demo.yaml needs no data."
    return "\n".join(text.rstrip().splitlines()[:5])


def _overview() -> str:
    lines = ["usage: sis-lightning COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<12}{summary}" for name, summary in COMMANDS.items()]
    lines += [
        "",
        "To try it on synthetic data, in minutes on a CPU:",
        "  sis-lightning fit --config tasks/seg_voc.yaml --config configs/demo.yaml",
        "",
        "sis-lightning COMMAND --help explains a command. --debug, with any command, shows the traceback of an error.",
    ]
    return "\n".join(lines)
