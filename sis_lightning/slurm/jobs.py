"""Jobs for SLURM: a script that a person can read, handed to `sbatch`; and how runs fare."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sis_lightning.config.compose import load_layer
from sis_lightning.config_files import find_config
from sis_lightning.errors import DataError, UsageError, nearest
from sis_lightning.files import write_text
from sis_lightning.run.history import is_running, last_row, read_starts


@dataclass(frozen=True)
class Cluster:
    """What a script needs to know of a cluster: a file in `configs/slurm/`.

    Attributes:
        partition: And `account`, `qos`, `constraint`: sbatch's; None for the cluster's default.
        cpus_per_task: For the DataModule's workers.
        mem: A node, such as `64G`.
        modules: To load.
        setup: Lines of shell before the run.
        container: Put before python.
        python: That sis-lightning is installed in.
        signal_seconds: Before the time limit: saves, and puts the job back into the queue.
        max_restarts: Of that kind.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int = 4
    mem: str | None = None
    modules: Sequence[str] = ()
    setup: Sequence[str] = ()
    container: str | None = None
    python: str = "python"
    signal_seconds: int = 120
    max_restarts: int = 100


def read_cluster(name: str) -> Cluster:
    """A file in `configs/slurm/` by its name.

    Raises:
        UsageError: For a file that is not there, or keys that a cluster does not have.
    """
    path = find_config(name, "configs/slurm")
    content = load_layer(path)
    known = [field.name for field in fields(Cluster)]
    for key in content:
        if key not in known:
            raise UsageError(f"{path}: a cluster has no '{key}': {nearest(key, known)}")
    try:
        return TypeAdapter(Cluster).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path}, {place}: {first['msg']}, is {first['input']!r}") from None


def seeds_of(array: str) -> list[int]:
    """The seeds of `seeds=0..4` or `seeds=0,2,7`.

    Raises:
        UsageError: For anything else.
    """
    key, _, text = array.partition("=")
    span = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if key == "seeds" and span and int(span[1]) <= int(span[2]):
        return list(range(int(span[1]), int(span[2]) + 1))
    if key == "seeds" and re.fullmatch(r"\d+(,\d+)*", text):
        return sorted({int(seed) for seed in text.split(",")})
    raise UsageError(f"--array is '{array}', must be seeds=FIRST..LAST or seeds=A,B,C, such as seeds=0..4")


def script(
    cluster: Cluster,
    command: Sequence[str],
    *,
    name: str,
    log: Path,
    nodes: int,
    gpus_per_node: int,
    tasks_per_node: int,
    time: str,
    seeds: Sequence[int] | None,
    then_test: bool = False,
) -> str:
    """The text of a job's script.

    Args:
        cluster: Where it runs.
        command: `fit` and its options.
        name: Of the job.
        log: Folder of its output.
        nodes: How many.
        gpus_per_node: Of each; 0 for none.
        tasks_per_node: Processes of each node, one a device.
        time: The limit, as sbatch takes it.
        seeds: One element of an array for each; None for a single job.
        then_test: Whether `test` follows once the fit has ended.
    """
    options: dict[str, Any] = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": tasks_per_node,
        "gpus-per-node": gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.mem,
        "time": time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "array": ",".join(map(str, seeds)) if seeds is not None else None,
        "output": log / ("slurm-%A_%a.out" if seeds is not None else "slurm-%j.out"),
        "open-mode": "append",
        "signal": f"USR1@{cluster.signal_seconds}",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None)]
    lines += ["#SBATCH --requeue", "", "set -euo pipefail"]
    lines += [f"module load {module}" for module in cluster.modules]
    lines += [*cluster.setup, ""]
    seed = ["--seed_everything=$SLURM_ARRAY_TASK_ID"] if seeds is not None else []
    start = [*shlex.split(cluster.container or ""), cluster.python, "-m", "sis_lightning"]
    lines.append("# SLURM's signal before the time limit can come before Python is up: until then it is ignored.")
    for one in [command, *([["test", *command[1:]]] if then_test else [])]:
        lines += [
            # Since SLURM 22.05 srun does not take it from the job.
            f"srun --cpus-per-task={cluster.cpus_per_task} --kill-on-bad-exit=1 "
            'bash -c \'trap "" USR1; exec "$@"\' - \\',
            "  " + " \\\n  ".join([" ".join(map(shlex.quote, [*start, *one])), *seed]),
        ]
    return "\n".join(lines) + "\n"


def sbatch(path: Path) -> str:
    """Submits a script; returns the job's number.

    Raises:
        DataError: Where there is no SLURM, or it refuses: its own words.
    """
    try:
        result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(f"there is no sbatch here; the script is in {path}") from None
    if result.returncode:
        raise DataError(f"sbatch refuses {path}: {result.stderr.strip()}")
    return result.stdout.strip().partition(";")[0]


def submit(
    command: Sequence[str],
    folder: Path,
    cluster: Cluster,
    *,
    nodes: int,
    gpus_per_node: int,
    tasks_per_node: int,
    time: str,
    seeds: Sequence[int] | None,
    then_test: bool,
    dry_run: bool,
) -> str:
    """Writes a job's script into `folder` and submits it, or gives its text alone.

    Returns:
        The script for `dry_run`, else a line with the job's number.
    """
    name = "-".join(folder.parts[-3:]) if folder.parts else "sis"
    text = script(
        cluster,
        command,
        name=name,
        log=folder,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        time=time,
        seeds=seeds,
        then_test=then_test,
    )
    if dry_run:
        return text
    path = folder / "job.sh"
    write_text(path, text)
    job = sbatch(path)
    with (folder / "jobs.txt").open("a") as file:
        file.write(f"{job}\n")
    return f"job {job}: {path}\n"


def states(jobs: Sequence[str]) -> dict[str, str]:
    """What SLURM says of jobs: of those in the queue by squeue, of others by sacct; nothing where neither answers."""
    found: dict[str, str] = {}
    with contextlib.suppress(DataError):
        found |= _asked(jobs, "sacct", "--parsable2", "--allocations", "--format=JobID,State")
    with contextlib.suppress(DataError):
        found |= queued(jobs)
    return found


def queued(jobs: Sequence[str]) -> dict[str, str]:
    """Those of the jobs that wait or are at work, an array's elements one by one, with their states.

    Raises:
        DataError: Where SLURM does not answer.
    """
    return _asked(jobs, "squeue", "--array", "--format=%i|%T")


def _asked(jobs: Sequence[str], *line: str) -> dict[str, str]:
    if not jobs:
        return {}
    wanted = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    try:
        result = subprocess.run(
            [*line, "--noheader", f"--jobs={wanted}"], capture_output=True, text=True, check=False, timeout=30
        )
    except FileNotFoundError:
        return {}
    except subprocess.TimeoutExpired:
        raise DataError(f"{line[0]} does not answer: try again when SLURM does") from None
    if result.returncode and "Invalid job id" not in result.stderr:
        raise DataError(f"{line[0]} fails, try again when SLURM answers: {result.stderr.strip()}")
    rows = [row.partition("|") for row in result.stdout.splitlines()]
    return {job: state.partition(" ")[0].lower() for job, _, state in rows}


def _number(job: str | None) -> int:
    """Jobs are numbered as they come; of an array, all elements alike."""
    number = (job or "").partition("_")[0]
    return int(number) if number.isdigit() else -1


def status(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """How runs fare: each directory below `folders` that a fit has begun in or a job was submitted from.

    Raises:
        DataError: Where a folder does not exist.
    """
    runs: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such directory")
        runs += sorted({path.parent for name in ("starts.json", "jobs.txt") for path in folder.rglob(name)})
    begun = {run: read_starts(run) for run in runs}
    # An array's own folder says nothing that its elements do not say.
    runs = [run for run in runs if begun[run] or not any(run in other.parents and begun[other] for other in runs)]
    submitted = {run: (run / "jobs.txt").read_text().split() if (run / "jobs.txt").is_file() else [] for run in runs}
    said = states(
        [job for run in runs for job in submitted[run]] + [s["job"] for r in runs for s in begun[r] if s["job"]]
    )
    rows = []
    for run in runs:
        starts = begun[run]
        job = max([starts[-1]["job"] if starts else None, *submitted[run][-1:]], key=_number)
        state = said.get(job or "")
        if state in (None, "completed", "failed", "cancelled", "timeout", "node_fail", "requeued"):
            ended = starts[-1]["how"] if starts else None
            ours = "running" if is_running(run) else ended or ("killed" if starts else state or "submitted")
            state = f"{ours} (SLURM: {state})" if state and not ours.startswith(state) else ours
        newest = last_row(run)
        metric = next((key for key in sorted(newest) if key.startswith("val/") and key.count("/") == 1), None)
        rows.append(
            {
                "run": str(run),
                "state": state,
                "job": job,
                "step": int(newest["step"]) + 1 if "step" in newest else 0,
                "epoch": int(float(newest.get("epoch", 0))),
                "metric": f"{metric} {float(newest[metric]):.4f}" if metric else "",
                "restarts": max(0, len(starts) - 1),
            }
        )
    return rows
