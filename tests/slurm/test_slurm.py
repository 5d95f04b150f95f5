"""Jobs: the script that `submit` writes, and a real SLURM of one node that kills, requeues and cancels them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sis_lightning.errors import UsageError
from sis_lightning.run.history import begin, end, read_history
from sis_lightning.slurm.jobs import seeds_of

SUBMIT = ["submit", "--config", "tasks/seg_voc.yaml", "--config", "configs/demo.yaml"]


def test_the_script(command, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "partition: gpu\naccount: vision\nmodules: [cuda/12.4]\nsetup: ['source venv/bin/activate']\n"
        "container: apptainer exec --nv image.sif\n"
    )
    options = ["--nodes", 2, "--gpus-per-node", 4, "--time", "4:00:00", "--cluster", "mine.yaml", "--dry-run"]
    result = command(*SUBMIT, *options, "--array", "seeds=0..2", "--model.backbone", "res2net50")
    assert result.code == 0, result.err
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=4:00:00",
        "#SBATCH --array=0,1,2",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=vision",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        "module load cuda/12.4",
        "source venv/bin/activate",
    ):
        assert f"{line}\n" in result.out, line
    for part in (
        "apptainer exec --nv image.sif python -m sis_lightning fit",
        "--config=tasks/seg_voc.yaml --config=configs/demo.yaml --config=configs/cluster.yaml",
        "--trainer=cluster --trainer.num_nodes=2 --trainer.devices=4",
        "--model.backbone res2net50",
        "--seed_everything=$SLURM_ARRAY_TASK_ID",
    ):
        assert part in result.out, part
    assert "runs/seg_voc/res2net50-26w4s-conv/slurm-%A_%a.out" in result.out
    assert not Path("runs").exists()
    checked = subprocess.run(["bash", "-n"], input=result.out, text=True, check=False, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--array", "seeds=4..1"], "seeds=FIRST..LAST"),
        (["--array", "0-4"], "seeds=FIRST..LAST"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--cluster", "nowhere"], "no configuration file 'nowhere'"),
        (["--model.backbone.operator", "basik"], "basik"),
        (["--overwrite", "true"], "submit takes no --overwrite"),
        (["--resume=never"], "submit takes no --resume"),
        (["--array", "seeds=0,1", "--run_dir", "here"], "leave out --run_dir"),
        (["--array", "seeds=0..999999999"], "an array has at most 10,000"),
        (["--time", "1:00 --uid=0"], "--time is '1:00 --uid=0', must be a time limit of sbatch"),
        (["--time", "1:00\n#SBATCH --uid=0"], "--time has a control character, '\\n'"),
        (["--time", "tomorrow"], "--time is 'tomorrow'"),
        (["--run_dir", "runs/a\n#SBATCH --uid=0\ntouch owned"], "--run_dir has a control character, '\\n'"),
        (["--data.root=/data\rrm"], "--data.root has a control character, '\\r'"),
        (["--run_dir", "runs/a\\b"], "has a backslash"),
    ],
)
def test_mistakes_are_reported_before_the_job_starts(command, arguments, words):
    result = command(*SUBMIT, "--dry-run", *arguments)
    assert result.code == 2
    assert words in result.err


def test_unknown_keys_of_a_cluster_are_refused(command, tmp_path):
    (tmp_path / "mine.yaml").write_text("partitoin: gpu\n")
    result = command(*SUBMIT, "--dry-run", "--cluster", "mine.yaml")
    assert result.code == 2
    assert "did you mean 'partition'" in result.err
    (tmp_path / "mine.yaml").write_text("modules: cuda/12.4\n")  # each letter would be one
    result = command(*SUBMIT, "--dry-run", "--cluster", "mine.yaml")
    assert result.code == 2
    assert "modules" in result.err
    assert "'cuda/12.4'" in result.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("partition: 'gpu --uid=0'", "partition is 'gpu --uid=0', must be names of partitions"),
        ("mem: 64G,9", "mem is '64G,9', must be a size of sbatch"),
        ("account: a b", "account is 'a b'"),
        ('qos: "high\\n#SBATCH --uid=0"', "qos has a control character, '\\n'"),
        ("constraint: a100 # fast\nmodules: [cuda; rm]", "modules is 'cuda; rm'"),
        ('setup: ["a\\nb"]', "setup has a control character"),
        ('container: "apptainer \'exec"', "no closing quotation"),
        ("cpus_per_task: 0", "cpus_per_task is 0, must be at least 1"),
    ],
)
def test_values_of_a_cluster_that_would_change_the_script_are_refused(command, tmp_path, content, words):
    (tmp_path / "mine.yaml").write_text(f"{content}\n")
    result = command(*SUBMIT, "--dry-run", "--cluster", "mine.yaml")
    assert result.code == 2
    assert "mine.yaml" in result.err
    assert words in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("limit", ["90", "30:00", "4:00:00", "2-12", "2-12:30", "2-12:30:15", "UNLIMITED"])
def test_time_limits_of_sbatch_are_accepted(command, limit):
    assert f"#SBATCH --time={limit}\n" in command(*SUBMIT, "--dry-run", "--time", limit).out


@pytest.mark.parametrize(
    "folder", ["runs/a b", "runs/it's 50%j", 'runs/$(touch owned) "x"', "runs/#;&|*[v2]", "runs/ü"]
)
def test_any_directory_is_quoted(command, tmp_path, folder):
    result = command(*SUBMIT, "--dry-run", "--test", "--run_dir", folder)
    assert result.code == 0, result.err
    directives = [line for line in result.out.splitlines() if line.startswith("#SBATCH")]
    # sbatch splits a directive as a shell does, and reads %% as a percent sign.
    words = {line: shlex.split(line[len("#SBATCH ") :]) for line in directives}
    assert all(len(found) == 1 for found in words.values()), words
    assert [f"--output={folder.replace('%', '%%')}/slurm-%j.out"] in words.values()
    # The shell passes the directory on as it is: srun is replaced by a function that prints what it gets.
    text, job = 'srun() { printf "%s\\n" "$@"; }\n' + result.out, {**os.environ, "SLURM_JOB_ID": "7"}
    shown = subprocess.run(["bash"], input=text, text=True, check=True, capture_output=True, cwd=tmp_path, env=job)
    assert shown.stdout.splitlines().count(f"--run_dir={folder}") == 2
    assert not list(tmp_path.iterdir())


def run_script(folder: Path, text: str, fit: str, test: str, **environment: str) -> tuple[int, list[str]]:
    """Runs a job's script with a shell line in place of fit and of test; returns its code, and the jobs it requeues."""
    (folder / "srun").write_text(f'#!/bin/bash\ncase "$*" in *" sis_lightning fit "*) {fit};; *) {test};; esac\n')
    (folder / "scontrol").write_text('#!/bin/bash\necho "$@" >> "$(dirname "$0")/asked"\n')
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    (folder / "asked").write_text("")
    given = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environment}
    code = subprocess.run(["bash", "-s"], input=text, text=True, check=False, capture_output=True, env=given).returncode
    return code, (folder / "asked").read_text().splitlines()


def test_the_test_is_not_lost_at_the_time_limit(command, tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    text = command(*SUBMIT, "--dry-run", "--test").out
    usual = {"fit": "sleep 1", "test": "exit 138"}
    assert run_script(bin, text, "sleep 1", "exit 0") == (0, [])
    assert run_script(bin, text, "sleep 1", "exit 1") == (1, [])
    assert run_script(bin, text, **usual) == (138, ["requeue 7"])
    # The signal came between fit and test, or while fit ended: too little time is left to begin the test.
    assert run_script(bin, text, "sleep 1", "touch begun", SLURM_JOB_END_TIME=str(int(time.time()) + 60)) == (
        1,
        ["requeue 7"],
    )
    assert not Path("begun").exists()
    # A job that is stopped during fit is requeued if fit asks for it, and does not test what is not finished.
    asks = 'mkdir -p "$(dirname "$SIS_REQUEUE_FILE")"; touch "$SIS_REQUEUE_FILE"; exit 138'
    assert run_script(bin, text, "exit 138", "touch begun") == (138, [])
    assert run_script(bin, text, asks, "touch begun") == (138, ["requeue 7"])
    assert run_script(bin, text, "exit 1", "touch begun") == (1, [])  # the file of the earlier start is gone
    assert not Path("begun").exists()
    without_test = command(*SUBMIT, "--dry-run").out
    assert run_script(bin, without_test, "exit 3", "") == (3, [])
    assert run_script(bin, without_test, asks, "") == (138, ["requeue 7"])
    # It ends: a test that had the whole time would not get more of it in another start.
    assert run_script(bin, text, "exit 0", "sleep 1; exit 138") == (138, [])
    assert run_script(bin, text, **usual, SLURM_RESTART_COUNT="100") == (138, [])
    array = command(*SUBMIT, "--dry-run", "--test", "--array", "seeds=0..1").out
    element = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}
    assert run_script(bin, array, **usual, **element) == (138, ["requeue 6_1"])


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Callable[..., None]:
    """A function that sets what the commands of SLURM answer, line by line; those without an answer do not exist."""
    bin = tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setenv("PATH", f"{bin}:/bin")
    for name in ("sbatch", "squeue", "sacct"):
        if shutil.which(name):
            monkeypatch.setenv("PATH", str(bin))

    def answer(**commands: str) -> None:
        for path in bin.iterdir():
            path.unlink()
        for name, text in commands.items():
            # Without --states=all, squeue tells of jobs only that have not ended.
            live = text if name != "squeue" else "\n".join(re.findall(r".*(?:PENDING|RUNNING).*", text))
            lines = [f'case "$*" in *--states=all*|*parsable*) printf %s {shlex.quote(text)};;']
            lines += [f"*) printf %s {shlex.quote(live)};; esac"]
            (bin / name).write_text("#!/bin/bash\n" + " ".join(lines) + "\n")
            (bin / name).chmod(0o755)

    return answer


def test_a_second_job_in_the_directory_of_a_live_one_is_refused(command, queue):
    queue(sbatch="41", squeue="")
    line = [*SUBMIT, "--run_dir", "runs/a"]
    assert command(*line).code == 0
    queue(sbatch="42", squeue="41|PENDING\n")
    second = command(*line, "--test")
    assert second.code == 2
    assert "runs/a has a job already, 41" in second.err
    assert Path("runs/a/jobs.txt").read_text() == "41\n"
    assert "sis_lightning test" not in Path("runs/a/job.sh").read_text()
    queue(sbatch="42", squeue="41|FAILED\n")
    assert command(*line, "--test").code == 0
    assert Path("runs/a/jobs.txt").read_text() == "41\n42\n"
    # An array in the queue bars its own seeds only.
    queue(sbatch="50", squeue="")
    assert command(*SUBMIT, "--array", "seeds=0..2").code == 0
    queue(sbatch="51", squeue="50_0|RUNNING\n50_1|FAILED\n50_2|PENDING\n")
    third = command(*SUBMIT, "--array", "seeds=1,2")
    assert third.code == 2
    assert "seed2 has a job already, 50_2" in third.err
    assert command(*SUBMIT, "--array", "seeds=1,3").code == 0
    assert "50_0" in command(*SUBMIT).err


def test_a_directory_into_which_a_fit_writes_is_refused(command, queue):
    queue(sbatch="41", squeue="")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib; from sis_lightning.run import directory; directory.lock(pathlib.Path('runs/a')); "
            "print('held', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        result = command(*SUBMIT, "--run_dir", "runs/a")
        holder.communicate(b"\n")
    assert result.code == 2
    assert "a fit is writing into runs/a" in result.err


def states_of(command: Callable[..., Any]) -> dict[str, str]:
    return {Path(row["run"]).name: row["state"] for row in json.loads(command("status", "--json").out)}


def test_status_of_jobs_that_never_started_the_run(command, queue, tmp_path):
    for number, name in enumerate(("failed", "forgotten", "waiting")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "jobs.txt").write_text(f"{number}\n")
    for number, name in ((5, "array"), (6, "live_array")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "jobs.txt").write_text(f"{number}\n")
    begin(tmp_path / "runs" / "trained", 0)
    (tmp_path / "runs" / "trained" / "jobs.txt").write_text("9\n")
    end(tmp_path / "runs" / "trained", "finished")
    asked = "0|FAILED\n2|PENDING\n5_0|FAILED\n5_1|FAILED\n6_0|FAILED\n6_1|RUNNING\n"
    expected = {
        "failed": "failed",
        "forgotten": "gone",
        "waiting": "pending",
        "array": "failed",
        "live_array": "running",
        "trained": "finished",
    }
    queue(squeue=asked)  # there is no sacct
    assert states_of(command) == expected
    queue(squeue="2|PENDING\n6_1|RUNNING\n", sacct="0|FAILED\n5_0|FAILED\n5_1|FAILED\n6_0|FAILED\n2|PENDING\n")
    assert states_of(command) == expected
    queue()  # not a machine of the cluster
    assert states_of(command) == dict.fromkeys(expected, "submitted") | {"trained": "finished"}


def test_seeds():
    assert seeds_of("seeds=0..3") == [0, 1, 2, 3]
    assert seeds_of("seeds=7,2,2") == [2, 7]
    with pytest.raises(UsageError):
        seeds_of("seeds=")


def test_without_slurm_the_script_is_written_all_the_same(command, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = command(*SUBMIT)
    assert result.code == 1
    assert "no sbatch here" in result.err
    assert list(Path("runs").rglob("job.sh"))


def test_status_of_runs(command, small, tmp_path):
    assert command("fit", *small("seg_voc", steps=5), "--run_dir", "runs/done").code == 0
    for name, how in {"killed": None, "stopped": "SIGTERM"}.items():
        begin(tmp_path / "runs" / name, 0)
        if how:
            end(tmp_path / "runs" / name, how)
    begin(tmp_path / "runs" / "killed", 5)
    (tmp_path / "runs" / "jobs.txt").write_text("123\n")  # of an array, whose elements are listed instead
    result = command("status", "--json")
    assert result.code == 0, result.err
    rows = {Path(row["run"]).name: row for row in json.loads(result.out)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "done": "finished",
        "killed": "killed",
        "stopped": "SIGTERM",
    }
    assert (rows["done"]["step"], rows["killed"]["step"], rows["killed"]["restarts"]) == (5, 5, 1)
    assert rows["done"]["metric"].startswith("val/miou 0.")
    table = command("status", "runs")
    assert "finished" in table.out
    assert command("status", "nowhere").code == 1


# A real SLURM: the controller, two nodes and munge, as an ordinary cluster, all on this machine. The nodes' names are
# those by which the ranks find one another.

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={host},localhost Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[None]:
    lacking = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=PATH)]
    if lacking or os.geteuid():
        pytest.skip(f"no SLURM to start here: {', '.join(lacking)} not installed" if lacking else "not root")
    folder = Path("/tmp") / f"sis-slurm-{os.getpid()}"  # a socket's path must be short
    host = socket.gethostname().partition(".")[0]
    for name in ("state", f"spool.{host}", "spool.localhost"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    ports = dict(zip(("port", "first", "second"), free_ports(3), strict=True))
    conf.write_text(CONF.format(host=host, folder=folder, **ports))
    environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": PATH}
    files = [f"--{name}={folder}/munge.{ending}" for name, ending in (("socket", "sock"), ("pid-file", "pid"))]
    files += [f"--key-file={key}", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    daemons = [["munged", "--force", *files], ["slurmctld", "-f", str(conf)]]
    for line in (*daemons, *(["slurmd", "-N", name, "-f", str(conf)] for name in (host, "localhost"))):
        subprocess.run(line, check=True, env=environment, capture_output=True)
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(conf))
    patch.setenv("PATH", PATH)
    try:
        wait_for(
            lambda: output("sinfo", "--noheader", "--Node").count("idle") == 2,
            lambda: (folder / "slurmctld.pid").is_file(),
        )
        yield
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], check=False, capture_output=True)
        for name in (f"slurmd.{host}", "slurmd.localhost", "slurmctld", "munge"):
            pid = folder / f"{name}.pid"
            if pid.is_file():
                os.kill(int(pid.read_text()), signal.SIGTERM)
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin"


def output(*line: str) -> str:
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout


def wait_for(condition: Callable[[], object], possible: Callable[[], object], why: Callable[[], str] = str) -> None:
    """Waits for a condition as long as it may still come about: on a busy machine for as long as it takes."""
    while not condition():
        if not possible():
            assert condition(), why()  # it may have come about in between
            return
        time.sleep(0.3)


def in_queue() -> list[str]:
    return output("squeue", "--noheader", "--array", "--format=%i").split()


def waits_or_runs(job: str) -> bool:
    """Whether a job, or any element of an array, is in the queue, at work, or about to be requeued."""
    for _ in range(5):  # between its end and the next start a job may be neither, and squeue may give no answer
        if re.search("pending|running|completing|requeue|configuring|suspended", state(job)):
            return True
        time.sleep(1)
    return False


def state(job: str) -> str:
    return output("squeue", "--noheader", "--array", "--states=all", "--format=%T", f"--jobs={job}").strip().lower()


@pytest.fixture
def submitted(slurm, command, small, tmp_path) -> Callable[..., tuple[str, Path]]:
    """Submits a short segmentation run; returns the job and its directory."""
    (tmp_path / "here.yaml").write_text(
        f"python: {sys.executable}\ncpus_per_task: 1\nsignal_seconds: 45\n"
        f"setup: ['export OMP_NUM_THREADS=1', 'export PYTHONPATH={Path(__file__).parents[2]}']\n"
    )

    def submit(*options: object, steps: int, run: str | None = "run") -> tuple[str, Path]:
        given = [*small("seg_voc", steps=steps), "--cluster", "here.yaml", "--checkpoint_every", 5]
        given += ["--trainer.check_val_every_n_epoch", 50]  # each draws a figure
        given += ["--run_dir", tmp_path / run] if run else []
        result = command("submit", *given, *options)
        assert result.code == 0, result.err
        return result.out.split()[1].rstrip(":"), tmp_path / (run or "runs")

    return submit


def log(folder: Path) -> Callable[[], str]:
    return lambda: "\n".join(path.read_text()[-3000:] for path in folder.rglob("slurm-*.out"))


def steps_done(folder: Path) -> int:
    path = folder / "csv" / "fit" / "metrics.csv"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def finished(folder: Path) -> bool:
    starts = read_history(folder)
    return bool(starts) and starts[-1].how == "finished"


def processes(run: Path) -> list[int]:
    """The processes of a job that train into a directory."""
    return list(
        map(int, output("pgrep", "--full", f"^{sys.executable} -m sis_lightning fit .*--run_dir={run}").split())
    )


def has_pending(process: int, number: signal.Signals) -> bool:
    """Whether a stopped process has a signal to come, or is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"^S[hi][dg]Pnd:\s*(\w+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


@pytest.mark.slurm
def test_a_requeued_job_ends_like_an_uninterrupted_run(submitted, small, tmp_path, command):
    steps = 150
    job, run = submitted("--time", "1", steps=steps)
    options = [*small("seg_voc", steps=steps), "--checkpoint_every", 5, "--trainer.check_val_every_n_epoch", 50]
    line = [sys.executable, "-m", "sis_lightning", "fit", *map(str, options), "--run_dir", "uninterrupted"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as uninterrupted:
        # It is stopped halfway, as a machine that swaps, until SLURM's USR1 comes, some time before the minute is over:
        # so the run is saved, the job requeued and the run resumed, however fast this machine is. Under load a start
        # may be over before its first step: then the job is requeued all the same.
        wait_for(lambda: steps_done(run) > 20, lambda: waits_or_runs(job), log(run))
        for process in processes(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
                wait_for(lambda process=process: has_pending(process, signal.SIGUSR1), lambda: True)
                os.kill(process, signal.SIGCONT)
        wait_for(lambda: finished(run), lambda: waits_or_runs(job), log(run))
    assert uninterrupted.returncode == 0
    wait_for(lambda: "completed" in state(job), lambda: True)
    starts = read_history(run)
    assert {start.job for start in starts} == {job}
    assert [start.how for start in starts] == ["requeued"] * (len(starts) - 1) + ["finished"]
    assert len(starts) > 1
    assert [start.from_step for start in starts[1:]] == [start.step for start in starts[:-1]]
    assert starts[-1].from_step > 0
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "uninterrupted")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert (run / "csv/fit/metrics.csv").read_text() == (tmp_path / "uninterrupted/csv/fit/metrics.csv").read_text()
    rows = json.loads(command("status", "--json", run).out)
    assert (rows[0]["state"], rows[0]["restarts"], rows[0]["step"]) == ("finished", len(starts) - 1, steps)


@pytest.mark.slurm
def test_a_job_whose_process_was_killed_resumes_when_submitted_again(submitted, tmp_path):
    job, run = submitted(steps=100)
    wait_for(lambda: steps_done(run) > 40, lambda: waits_or_runs(job), log(run))
    assert processes(run)
    for process in processes(run):
        os.kill(process, signal.SIGKILL)
    wait_for(lambda: not waits_or_runs(job), lambda: True, log(run))
    again, _ = submitted(steps=100)
    wait_for(lambda: finished(run), lambda: waits_or_runs(again), log(run))
    starts = read_history(run)
    assert [start.how for start in starts] == [None, "finished"]
    assert starts[1].from_step >= 5


@pytest.mark.slurm
def test_an_array_of_which_one_element_is_requeued(submitted, tmp_path):
    job, runs = submitted("--array", "seeds=3,4", steps=400, run=None)
    folders = {seed: tmp_path / "runs" / "seg_voc" / "res2net14-4w4s-basic-8ch" / f"seed{seed}" for seed in (3, 4)}
    wait_for(lambda: all(steps_done(folder) > 20 for folder in folders.values()), lambda: waits_or_runs(job), log(runs))
    output("scontrol", "requeue", f"{job}_4")
    wait_for(lambda: all(finished(folder) for folder in folders.values()), lambda: waits_or_runs(job), log(runs))
    assert len(read_history(folders[3])) == 1
    assert len(read_history(folders[4])) == 2
    assert {start.job for start in read_history(folders[4])} == {f"{job}_4"}


@pytest.mark.slurm
@pytest.mark.parametrize("where", [["--tasks-per-node", 2], ["--nodes", 2]])
def test_two_tasks_of_one_job_are_two_ranks(submitted, tmp_path, where):
    job, run = submitted(*where, steps=12, run="it's 50%j")
    wait_for(lambda: finished(run), lambda: waits_or_runs(job), log(run))
    assert "4 images per step = 2 on each of 2 device(s)" in log(run)()
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["run"]["world_size"] == 2


@pytest.mark.slurm
def test_a_cancelled_job_is_saved_and_not_requeued(submitted, tmp_path):
    job, run = submitted(steps=5000)
    wait_for(lambda: steps_done(run) > 20, lambda: waits_or_runs(job), log(run))
    output("scancel", job)
    wait_for(lambda: read_history(run)[-1].how, lambda: waits_or_runs(job), log(run))
    assert read_history(run)[-1].how == "SIGTERM"
    wait_for(lambda: "cancelled" in state(job), lambda: waits_or_runs(job))
    assert list((run / "checkpoints").glob("step-*.ckpt"))
    assert "requeue" not in output("scontrol", "show", "job", job).lower().replace("requeue=1", "")
    assert len(read_history(run)) == 1


@pytest.mark.slurm
def test_a_job_that_fails_for_its_own_reason_is_not_requeued(submitted, tmp_path):
    job, run = submitted("--data.root", tmp_path / "gone", "--data.synthetic", "null", steps=50)
    wait_for(lambda: "failed" in state(job), lambda: waits_or_runs(job), log(run))
    assert "does not exist" in log(run)()
    assert read_history(run) == []


@pytest.mark.slurm
def test_runs_in_the_queue_are_not_submitted_again(slurm, command, tmp_path, monkeypatch):
    (tmp_path / "here.yaml").write_text(f"python: {sys.executable}\ncpus_per_task: 1\n")
    rows = ["--table", 3, "--rows", "basic"]
    there = ["run", *rows, "--launcher", "slurm", "--", "--cluster", "here.yaml"]
    output("scontrol", "update", "PartitionName=all", "State=DOWN")
    try:
        first = command("tables", *there)
        assert first.code == 0, first.err
        jobs = re.findall(r"^job (\d+): ", first.out, re.MULTILINE)
        assert len(jobs) == 2  # of 50 layers and of 101, an array over the seeds each
        # One of the seeds is cancelled.
        wait_for(lambda: "pending" in state(jobs[0]), lambda: True)
        output("scancel", f"{jobs[0]}_2")
        wait_for(
            lambda: f"{jobs[0]}_2" not in output("squeue", "--noheader", "--array", "--format=%i").split(), lambda: True
        )
        plan = command("tables", "plan", *rows).out
        assert len(re.findall(rf"queued \(SLURM's job (?:{'|'.join(jobs)})_\d\)", plan)) == 5
        assert plan.count("not begun") == 1
        second = command("tables", *there)
        assert second.code == 0, second.err
        assert second.out.count("queued") == 5
        assert len(re.findall(r"^job \d+: ", second.out, re.MULTILINE)) == 1
        assert "#SBATCH --array=2\n" in Path("runs/seg_voc/res2net50-26w4s-basic/job.sh").read_text()
        # A job of one seed, submitted by hand.
        output("scancel", f"{jobs[0]}_1")
        one = command("submit", *there[8:], "--config", "tasks/seg_voc.yaml", "--seed_everything", 1)
        assert one.code == 0, one.err
        wait_for(
            lambda: f"{jobs[0]}_1" not in output("squeue", "--noheader", "--array", "--format=%i").split(), lambda: True
        )
        (single,) = re.findall(r"^job (\d+): ", one.out, re.MULTILINE)
        assert f"queued (SLURM's job {single})" in command("tables", "plan", *rows).out
        # Nothing is submitted if the queue cannot be asked.
        squeue = tmp_path / "bin" / "squeue"
        squeue.parent.mkdir()
        squeue.write_text("#!/bin/sh\necho 'Unable to contact slurm controller (connect failure)' >&2; exit 1\n")
        squeue.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{squeue.parent}:{PATH}")
            blind = command("tables", *there)
        assert blind.code == 1
        assert "squeue fails, try again when SLURM answers: Unable to contact" in blind.err
        assert "job" not in blind.out
    finally:
        output("scancel", "--user=root")
        output("scontrol", "update", "PartitionName=all", "State=UP")


@pytest.mark.slurm
@pytest.mark.parametrize("fails", [False, True])
def test_slurm_starts_a_run_when_its_weights_are_there(slurm, start_tables, tmp_path, fails):
    (tmp_path / "mine.yaml").write_text(f"python: {sys.executable}\ncpus_per_task: 1\n")
    options = ["--time", "0:10:00", "--cluster", "mine.yaml"]
    if fails:
        options += ["--data.root", "nowhere", "--data.synthetic", "null"]
    code, out, err = start_tables("run", "--rows", "basic", "--seeds", "1", "--launcher", "slurm", "--", *options)
    assert code == 0, err
    jobs = re.findall(r"^job (\d+): runs/(\w+)", out, re.MULTILINE)
    assert [name for _, name in jobs] == ["toy_first", "toy_later"]
    asked = output("scontrol", "show", "job", jobs[1][0])
    assert f"Dependency=afterok:{jobs[0][0]}" in asked
    until = time.monotonic() + 120
    while output("squeue", "--noheader", "--jobs", ",".join(job for job, _ in jobs)).strip():
        assert time.monotonic() < until
        time.sleep(0.5)
    done = list(Path("runs").glob("toy_later/*/seed0/test.json"))
    assert len(done) == (0 if fails else 1), subprocess.run(
        "tail -n 20 runs/*/*/slurm*", shell=True, capture_output=True, text=True
    ).stdout
