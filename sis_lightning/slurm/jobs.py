"""Jobs for SLURM: a readable script, submitted by `sbatch`; and the state of runs."""

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
from sis_lightning.run import history


@dataclass(frozen=True)
class Cluster:
    """The properties of a cluster that a script needs: a file in `configs/slurm/`.

    Attributes:
        partition: Partition of sbatch; None for the cluster's default.
        account: Account of sbatch; None for the user's default.
        qos: Quality of service of sbatch; None for the default.
        constraint: Constraint of sbatch on the nodes; None for none.
        cpus_per_task: Number of cores of each process, for the DataModule's workers.
        mem: Memory of each node, such as `64G`; None for the cluster's default.
        modules: Environment modules to load.
        setup: Lines of shell before the run.
        container: Command before python, such as `apptainer exec --nv image.sif`.
        python: The Python in which sis-lightning is installed.
        signal_seconds: Seconds before the time limit at which the run is saved and the job requeued.
        max_restarts: Maximum number of requeues of a job.
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
    """Reads a file of `configs/slurm/`.

    Args:
        name: Name of the file, without its ending.

    Raises:
        UsageError: If there is no such file, or it has an unknown key or an invalid value.
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
    """The seeds that `seeds=0..4` or `seeds=0,2,7` names.

    Raises:
        UsageError: If it is neither.
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
        cluster: The cluster on which it runs.
        command: `fit` and its options.
        name: Name of the job.
        log: Folder of its output.
        nodes: Number of nodes.
        gpus_per_node: Number of GPUs of each node, 0 for none.
        tasks_per_node: Number of processes of each node, one for each device.
        time: Time limit, as sbatch takes it.
        seeds: Seeds of a job array, one element for each; None for a single job.
        then_test: Whether `test` follows when the fit has ended.
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
    lines.append("# SLURM's signal before the time limit may come before Python has started: until then it is ignored.")
    for one in [command, *([["test", *command[1:]]] if then_test else [])]:
        lines += [
            # Since SLURM 22.05 srun does not inherit it from the job.
            f"srun --cpus-per-task={cluster.cpus_per_task} --kill-on-bad-exit=1 "
            'bash -c \'trap "" USR1; exec "$@"\' - \\',
            "  " + " \\\n  ".join([" ".join(map(shlex.quote, [*start, *one])), *seed]),
        ]
    return "\n".join(lines) + "\n"


def sbatch(path: Path) -> str:
    """Submits a script; returns the job's number.

    Raises:
        DataError: If there is no SLURM, or it refuses the job; the message quotes it.
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
    """Writes a job's script into a folder and submits it.

    Args:
        command: `fit` and its options.
        folder: Folder for the script and the job's output.
        cluster: The cluster on which it runs.
        nodes: Number of nodes.
        gpus_per_node: Number of GPUs of each node, 0 for none.
        tasks_per_node: Number of processes of each node.
        time: Time limit, as sbatch takes it.
        seeds: Seeds of a job array; None for a single job.
        then_test: Whether `test` follows when the fit has ended.
        dry_run: Whether only the text is returned, and nothing written or submitted.

    Returns:
        The script's text if `dry_run`, otherwise a line with the job's number.

    Raises:
        DataError: If there is no SLURM, or it refuses the job.
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
    """The states of jobs: by squeue if they are in the queue, by sacct otherwise; unknown ones are left out."""
    found: dict[str, str] = {}
    with contextlib.suppress(DataError):
        found |= _asked(jobs, "sacct", "--parsable2", "--allocations", "--format=JobID,State")
    with contextlib.suppress(DataError):
        found |= queued(jobs)
    return found


def queued(jobs: Sequence[str]) -> dict[str, str]:
    """The states of those jobs that wait or run, the elements of an array separately.

    Raises:
        DataError: If SLURM does not answer.
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
    """The number of a job; later jobs have larger ones, and all elements of an array the same."""
    number = (job or "").partition("_")[0]
    return int(number) if number.isdigit() else -1


def status(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The state of runs: of each directory below `folders` in which a fit was started or from which one was submitted.

    Args:
        folders: Folders to search.

    Returns:
        For each run a mapping with `run`, `state`, `job`, `step` and `epoch` reached, newest `metric` and `restarts`.

    Raises:
        DataError: If a folder does not exist.
    """
    runs: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such directory")
        runs += sorted({path.parent for name in (history.FILE, "jobs.txt") for path in folder.rglob(name)})
    known = {run: history.read_history(run) for run in runs}
    # An array's own folder says nothing that its elements do not say.
    runs = [run for run in runs if known[run] or not any(run in other.parents and known[other] for other in runs)]
    submitted = {run: (run / "jobs.txt").read_text().split() if (run / "jobs.txt").is_file() else [] for run in runs}
    of_slurm = states(
        [job for run in runs for job in submitted[run]] + [start.job for r in runs for start in known[r] if start.job]
    )
    rows = []
    for run in runs:
        starts = known[run]
        job = max([starts[-1].job if starts else None, *submitted[run][-1:]], key=_number)
        state = of_slurm.get(job or "")
        if state in (None, "completed", "failed", "cancelled", "timeout", "node_fail", "requeued"):
            ended = starts[-1].how if starts else None
            noted = "running" if history.is_running(run) else ended or ("killed" if starts else state or "submitted")
            state = f"{noted} (SLURM: {state})" if state and not noted.startswith(state) else noted
        newest = history.newest_metrics(run)
        metric = next((key for key in sorted(newest) if key.startswith("val/") and key.count("/") == 1), None)
        # The history knows the steps up to the newest checkpoint; the log may be ahead of it.
        logged = int(newest["step"]) + 1 if "step" in newest else 0
        rows.append(
            {
                "run": str(run),
                "state": state,
                "job": job,
                "step": max(
                    [start.step for start in starts[-1:]] + ([logged] if state == "running" else []), default=0
                ),
                "epoch": starts[-1].epoch if starts else 0,
                "metric": f"{metric} {float(newest[metric]):.4f}" if metric else "",
                "restarts": max(0, len(starts) - 1),
            }
        )
    return rows
