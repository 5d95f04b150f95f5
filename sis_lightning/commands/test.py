"""`sis-lightning test`: evaluates a checkpoint on the test split, and records the result."""

from __future__ import annotations

from sis_lightning.commands.run_commands import run_parser, start


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = run_parser(
        "test",
        "Evaluate a checkpoint on the test split. The metrics are written to test.json in the run's directory, "
        "together with the configuration, checkpoint, data and code that produced them. The paper's tables are filled "
        "from these records.",
        [
            (
                "test --config tasks/seg_voc.yaml --config configs/demo.yaml",
                "the last checkpoint of the demo run",
            ),
            ("test --config runs/seg_voc/sis50-26w4s-basic/seed0/config.yaml --ckpt_path best", "the best checkpoint"),
        ],
    )
    return start(parser, "test", arguments)
