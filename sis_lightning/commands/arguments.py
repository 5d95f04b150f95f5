"""What the parsers of all commands share."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from sis_lightning.errors import UsageError


class _HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs of descriptions, and keeps indented ones (examples) and line breaks of options' help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        filled = [part if re.search(r"^ ", part, re.M) else textwrap.fill(part, width) for part in paragraphs]
        return "\n\n".join(textwrap.indent(part, indent) for part in filled)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [part for line in text.splitlines() for part in textwrap.wrap(line, width, break_on_hyphens=False)]


class Parser(argparse.ArgumentParser):
    """Argument parser of a command: no abbreviations, examples below the options, and errors as `UsageError`.

    Args:
        command: Name of the command.
        description: What the command does.
        examples: Command lines that work as they stand, without the program's name, each with a comment or "".
        usage: The usage line, where argparse's own would mislead.
        more: Further paragraphs between the options and the examples.
    """

    def __init__(
        self,
        command: str,
        description: str,
        examples: Sequence[tuple[str, str]],
        *,
        usage: str | None = None,
        more: str = "",
    ) -> None:
        lines = []
        for line, comment in examples:
            lines += [f"  # {comment}"] if comment else []
            lines.append(f"  sis-lightning {line}")
        super().__init__(
            prog=f"sis-lightning {command}",
            usage=usage and f"sis-lightning {command} {usage}",
            description=description,
            epilog="\n\n".join(filter(None, [more, "examples:\n" + "\n".join(lines)])),
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises UsageError instead of printing the usage and leaving."""
        raise UsageError(f"{message}\n  {self.prog} --help lists the options")

    def refuse_unknown(self, options: Sequence[str]) -> None:
        """Raises UsageError if options are left that the command does not have."""
        if options:
            self.error(f"unknown option {options[0]}")

    def add_config(self, *, required: bool = False, help: str | None = None) -> None:
        """Adds `--config FILE`, which may be given several times."""
        text = "Configuration file, as for fit; may be repeated: first tasks/NAME.yaml, then files that override it."
        self.add_argument(
            "-c", "--config", action="append", required=required, default=[], metavar="FILE", help=help or text
        )

    def add_json(self) -> None:
        """Adds `--json`."""
        self.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def config_options(files: Sequence[str], options: Sequence[str]) -> list[str]:
    """The arguments of `fit` that name configuration files and further options."""
    return [*(f"--config={file}" for file in files), *options]


def require_at_least(parser: Parser, values: argparse.Namespace, smallest: dict[str, int]) -> None:
    """Raises UsageError if an argument is smaller than it may be.

    Args:
        parser: The parser of the command.
        values: What it parsed.
        smallest: Smallest allowed value by the argument's name; arguments that are None are skipped.
    """
    for key, least in smallest.items():
        value: Any = getattr(values, key)
        if value is not None and value < least:
            parser.error(f"--{key.replace('_', '-')} is {value}, must be at least {least}")


def require_torch() -> None:
    """Raises UsageError if torch and torchvision are not installed or do not belong together.

    The compiled operations of torchvision load only with the torch release that they were built for; torchvision's own
    message about it is a page long.
    """
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, OSError, ImportError) as error:
        from importlib.metadata import PackageNotFoundError, version

        try:
            problem = f"torchvision {version('torchvision')} does not load with torch {version('torch')}"
        except PackageNotFoundError as missing:
            problem = f"{missing.name} is not installed"
        raise UsageError(
            f"{problem} ({str(error).splitlines()[0]}).\n  Install two releases that belong together: "
            'pip install --force-reinstall "torch>=2.14" "torchvision>=0.29"'
        ) from error
