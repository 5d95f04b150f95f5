"""Jobs for SLURM: a readable script, submitted by `sbatch`; and the state of runs."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sis_lightning.config.compose import load_layer
from sis_lightning.config_files import find_config
from sis_lightning.errors import DataError, UsageError, nearest
from sis_lightning.files import write_text
from sis_lightning.run import history

_NAME = r"[\w.@+:-]+"
# Values that stand in the script as they are. Each pattern leaves no room for a second option, a comment or a line.
_FORMATS = {
    "time": (
        r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|unlimited|infinite",
        "a time limit of sbatch, such as 90 (minutes), 4:00:00 or 2-12:00:00 (days-hours:minutes:seconds)",
    ),
    "mem": (r"\d+[kmgt]?", "a size of sbatch, such as 64G"),
    "partition": (rf"{_NAME}(,{_NAME})*", "names of partitions with commas between them"),
    "account": (_NAME, "one name"),
    "qos": (_NAME, "one name"),
    "constraint": (r"[\w.@+:,&|*()\[\]!-]+", "an expression of sbatch without spaces, such as 'a100&ib'"),
    "dependency": (
        r"\w+:\d+(_\d+)?(:\d+(_\d+)?)*([,?]\w+:\d+(_\d+)?(:\d+(_\d+)?)*)*|singleton",
        "what sbatch waits for, such as afterok:1234",
    ),
    "modules": (r"[\w.@+:/-]+", "one module an entry, such as cuda/12.4"),
}
_LEAST = {"cpus_per_task": 1, "signal_seconds": 1, "max_restarts": 0}
# States of jobs that have not ended; all others of SLURM are ends.
_LIVE = (
    *("pending", "configuring", "running", "completing", "suspended", "requeue_hold"),
    *("special_exit", "resizing", "signaling", "stage_out", "stopped"),
)
#: Largest number of jobs of an array; SLURM's own default limit is 1,001.
_MAX_SEEDS = 10_000


def refuse_control_characters(option: str, value: str) -> None:
    """Raises UsageError if a value has a line break or another control character, which could add lines to a script."""
    if found := re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value):
        raise UsageError(f"{option} has a control character, {found[0]!r}, which a job's script cannot have: {value!r}")


def refuse_control_characters_in(arguments: Sequence[str]) -> None:
    """Raises UsageError if a value on a command line has a control character; names its option."""
    option = "the command line"
    for argument in arguments:
        if argument.startswith("-"):
            option = argument.partition("=")[0]
            refuse_control_characters(repr(option), option)
        refuse_control_characters(option, argument.removeprefix(f"{option}="))


def _check_format(option: str, value: str) -> None:
    """Raises UsageError if the value of an option in `_FORMATS` is not of its format."""
    refuse_control_characters(option, value)
    pattern, meaning = _FORMATS[option.removeprefix("--")]
    if not re.fullmatch(pattern, value, re.ASCII | re.IGNORECASE):
        raise UsageError(f"{option} is {value!r}, must be {meaning}")


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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, str) and field.name in _FORMATS:
                    _check_format(field.name, one)
                elif isinstance(one, str):
                    refuse_control_characters(field.name, one.replace("\t", " ") if field.name == "setup" else one)
                elif field.name in _LEAST and isinstance(one, int) and one < _LEAST[field.name]:
                    raise UsageError(f"{field.name} is {one}, must be at least {_LEAST[field.name]}")
        try:
            shlex.split(self.container or "")
        except ValueError as error:
            raise UsageError(f"container is {self.container!r}: {str(error).lower()}") from None


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
        if first["type"] == "value_error":
            raise UsageError(f"{path}: {first['ctx']['error']}") from None
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
        count = int(span[2]) - int(span[1]) + 1
        if count > _MAX_SEEDS:
            raise UsageError(f"--array is '{array}', which is {count:,} jobs: an array has at most {_MAX_SEEDS:,}")
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
    dependency: str | None = None,
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
        dependency: The jobs that must end first, as sbatch takes it, such as `afterok:1234`; if they fail, the job is
            cancelled.

    Raises:
        UsageError: If a value is invalid, or has a control character.
    """
    _check_format("--time", time)
    if dependency is not None:
        _check_format("--dependency", dependency)
    refuse_control_characters_in(command)
    refuse_control_characters("the run's directory", str(log))
    if "\\" in str(log):
        # In a file name with a backslash, sbatch does not put in the job's number.
        raise UsageError(f"the directory {log} has a backslash in its name, which sbatch does not take for its output")
    output = str(log).replace("%", "%%") + ("/slurm-%A_%a.out" if seeds is not None else "/slurm-%j.out")
    options: dict[str, Any] = {
        "job-name": re.sub(r"[^\w.+=@-]", "-", name, flags=re.ASCII).lstrip("-") or "sis",
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
        "dependency": dependency,
        "kill-on-invalid-dep": "yes" if dependency else None,
        "output": output,
        "open-mode": "append",
        "signal": f"USR1@{cluster.signal_seconds}",
    }
    # sbatch reads quotes as a shell does.
    given = {key: shlex.quote(str(value)) for key, value in options.items() if value is not None}
    lines = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in given.items())]
    lines += ["#SBATCH --requeue", "", "set -euo pipefail"]
    lines += [f"module load {shlex.quote(module)}" for module in cluster.modules]
    lines += [*cluster.setup, ""]
    seed = ["--seed_everything=$SLURM_ARRAY_TASK_ID"] if seeds is not None else []
    start = [*shlex.split(cluster.container or ""), cluster.python, "-m", "sis_lightning"]
    # Since SLURM 22.05 srun does not inherit the number of cores from the job.
    srun = f"srun --cpus-per-task={cluster.cpus_per_task} --kill-on-bad-exit=1"

    def python(arguments: Sequence[str]) -> str:
        return " \\\n  ".join([" ".join(map(shlex.quote, [*start, *arguments])), *seed])

    job = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if seeds is not None else '"$SLURM_JOB_ID"'
    lines += [
        "# fit makes this file when it has saved itself before the time limit and needs another start. The job is",
        "# requeued when all processes have ended: otherwise SLURM may take their end for that of the new ones.",
        f"export {history.REQUEUE_FILE}={shlex.quote(str(log / '.requeue'))}-$SLURM_JOB_ID",
        f'rm -f "${history.REQUEUE_FILE}"',
        "code=0",
        "# SLURM's signal before the time limit may come before Python has started: until then it is ignored.",
        f'{srun} bash -c \'trap "" USR1; exec "$@"\' - \\',
        f"  {python(command)} || code=$?",
        f'if [ -e "${history.REQUEUE_FILE}" ]; then',
        f'  rm -f "${history.REQUEUE_FILE}"',
        f"  scontrol requeue {job}",
        "fi",
    ]
    if then_test:
        lines += [
            '[ "$code" -eq 0 ] || exit "$code"',
            "",
            "# A test for which too little time is left runs in the next start, where fit has nothing more to do,",
            "# but not if fit had next to nothing to do in this start already.",
            "fitted=$SECONDS",
            "requeue() {",
            f'  [ "${{SLURM_RESTART_COUNT:-0}}" -lt {cluster.max_restarts} ] && [ $((10 * fitted)) -gt "$SECONDS" ] &&',
            f"    scontrol requeue {job}",
            "}",
            "left=$((${SLURM_JOB_END_TIME:-9999999999} - $(date +%s)))",
            f'if [ "$left" -lt {cluster.signal_seconds} ] && requeue; then exit 1; fi',
            f"{srun} \\",
            f"  {python(['test', *command[1:]])} || code=$?",
            'if [ "$code" -eq 138 ]; then # ended by the signal before the time limit',
            '  requeue || echo "The time limit ended the test: submit the job again with more --time." >&2',
            "fi",
        ]
    lines.append('exit "$code"')
    return "\n".join(lines) + "\n"


def sbatch(path: Path) -> str:
    """Submits a script; returns the job's number.

    Raises:
        DataError: If there is no SLURM, or it refuses the job; the message quotes it.
    """
    try:
        result = subprocess.run(
            ["sbatch", "--parsable", str(path.absolute())], capture_output=True, text=True, check=False
        )
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
    dependency: str | None = None,
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
        dependency: The jobs that must end first, as for `script`.

    Returns:
        The script's text if `dry_run`, otherwise a line with the job's number.

    Raises:
        UsageError: If a value is invalid, or a job or a fit is at work in the folder.
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
        dependency=dependency,
    )
    if dry_run:
        return text
    _refuse_second([folder] if seeds is None else [folder / f"seed{seed}" for seed in seeds])
    path = folder / "job.sh"
    write_text(path, text)
    job = sbatch(path)
    with (folder / "jobs.txt").open("a") as file:
        file.write(f"{job}\n")
    return f"job {job}: {path}\n"


def _refuse_second(runs: Sequence[Path]) -> None:
    """Raises UsageError if one of the runs is queued or at work: a second job would only fail on the run's lock."""
    live = queued_runs(runs)
    for run in runs:
        if job := live.get(run):
            raise UsageError(
                f"{run} has a job already, {job}, which is queued or running.\n"
                f"  Wait until it ends, or cancel it (scancel {job}), and submit again: then the run is resumed.\n"
                "  Another run: --run_dir DIR"
            )
        if history.is_running(run):
            raise UsageError(
                f"a fit is writing into {run}: wait until it ends, or choose another directory (--run_dir DIR)"
            )


def queued_runs(runs: Iterable[Path]) -> dict[Path, str]:
    """Runs that are queued or running in SLURM, with their jobs: single jobs, and elements of the arrays above them.

    Args:
        runs: The directories of runs.

    Raises:
        DataError: If SLURM does not answer.
    """
    runs = list(runs)
    submitted = {
        job: folder
        for folder in dict.fromkeys([*runs, *(run.parent for run in runs)])
        if (folder / "jobs.txt").is_file()
        for job in (folder / "jobs.txt").read_text().split()
    }
    found = {}
    for element in queued(list(submitted)):
        job, array, seed = element.partition("_")
        if job in submitted:
            found[submitted[job] / f"seed{seed}" if array else submitted[job]] = element
    return found


def states(jobs: Sequence[str]) -> dict[str, str]:
    """The states of jobs and of the elements of arrays, also of ended ones; those that SLURM has forgotten are "gone".

    `squeue` knows ended jobs for some minutes, `sacct` for ever, but not every cluster has it. Jobs about which SLURM
    cannot be asked are left out.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(DataError):
        found |= _asked(jobs, "sacct", "--parsable2", "--allocations", "--format=JobID,State")
    with contextlib.suppress(DataError):
        found |= _asked(jobs, "squeue", "--array", "--states=all", "--format=%i|%T")
        if shutil.which("squeue"):
            known = {element.partition("_")[0] for element in found}
            found |= {job: "gone" for job in jobs if job.partition("_")[0] not in known}
    return found


def _state_of(job: str | None, known: dict[str, str]) -> str | None:
    """The state of a job; of an array, that of its elements: a live one if there is one."""
    if job is None or job in known:
        return known.get(job or "")
    elements = sorted({state for element, state in known.items() if element.partition("_")[0] == job})
    return next((state for state in _LIVE if state in elements), elements[0] if elements else None)


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
        state = _state_of(job, of_slurm)
        if state == "gone" and starts:  # long ended: the history knows more
            state = None
        if state not in _LIVE:
            ended = starts[-1].how if starts else None
            noted = "running" if history.is_running(run) else ended or ("killed" if starts else state or "submitted")
            said = not state or noted.startswith(state) or (noted == "finished" and state == "completed")
            state = noted if said else f"{noted} (SLURM: {state})"
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
