"""`sis-lightning status`: lists runs and how far they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sis_lightning.commands.arguments import Parser

_STATES = {
    "running": "a process is training",
    "finished": "training reached its end",
    "stopped early": "training reached trainer.max_time, and can be resumed",
    "killed": "the process ended without recording why, such as by SIGKILL",
    "requeued": "the job has requeued itself in SLURM",
    "a signal": "such as SIGTERM: the signal stopped training, which can be resumed",
    "an exception": "such as DataError: training failed with it",
    "gone": "the job never started the run, and SLURM has forgotten it: see slurm-JOB.out",
    "other states": "submitted, or the state of the SLURM job, such as pending or failed",
}


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(
        "status",
        "List runs. Each row has the state of the run, its SLURM job, the step and epoch that it has reached, its "
        "newest validation metric and its number of restarts.",
        [("status", "all runs below runs/"), ("status runs/seg_voc --json", "")],
        more="states:\n" + "\n".join(f"  {name:<15}{meaning}" for name, meaning in _STATES.items()),
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="Folders that contain runs (default: runs).")
    parser.add_json()
    chosen = parser.parse_args(arguments)
    from sis_lightning.slurm import jobs as slurm

    folders = [Path(folder) for folder in chosen.folders] or [path for path in [Path("runs")] if path.is_dir()]
    rows = slurm.status(folders)
    if chosen.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print(_aligned(rows))
    else:
        print("no runs in " + (", ".join(chosen.folders) or "runs"))
    return 0


def _aligned(rows: list[dict[str, Any]]) -> str:
    """Rows as lines with aligned columns, for the terminal and for `grep`."""
    heads = {key: key for key in rows[0]}
    lines = [{key: "-" if row[key] in (None, "") else str(row[key]) for key in heads} for row in [heads, *rows]]
    widths = {key: max(len(line[key]) for line in lines) for key in heads}
    return "\n".join("  ".join(line[key].ljust(widths[key]) for key in heads).rstrip() for line in lines)
