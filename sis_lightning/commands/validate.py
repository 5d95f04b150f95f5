"""`sis-lightning validate`: evaluates a checkpoint on the val split."""

from __future__ import annotations

from sis_lightning.commands.run_commands import run_parser, start


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = run_parser(
        "validate",
        "Evaluate a checkpoint on the val split, and print its metrics.",
        [
            (
                "validate --config tasks/seg_voc.yaml --config configs/demo.yaml",
                "the last checkpoint of the demo run",
            )
        ],
    )
    return start(parser, "validate", arguments)
