"""Jobs: the script that `submit` writes, and a real SLURM of one node that kills, requeues and cancels them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


# A real SLURM: the controller, one node and munge, as an ordinary cluster on localhost.

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={other}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
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
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[None]:
    lacking = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=PATH)]
    if lacking or os.geteuid():
        pytest.skip(f"no SLURM to start here: {', '.join(lacking)} not installed" if lacking else "not root")
    folder = Path("/tmp") / f"sis-slurm-{os.getpid()}"  # a socket's path must be short
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(host=host, folder=folder, port=free_port(), other=free_port()))
    environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": PATH}
    files = [f"--{name}={folder}/munge.{ending}" for name, ending in (("socket", "sock"), ("pid-file", "pid"))]
    files += [f"--key-file={key}", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    for line in (["munged", "--force", *files], ["slurmctld", "-f", str(conf)], ["slurmd", "-f", str(conf)]):
        subprocess.run(line, check=True, env=environment, capture_output=True)
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(conf))
    patch.setenv("PATH", PATH)
    try:
        wait_for(lambda: "idle" in output("sinfo", "--noheader"), lambda: (folder / "slurmctld.pid").is_file())
        yield
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], check=False, capture_output=True)
        for name in ("slurmd", "slurmctld", "munge"):
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
    return bool(re.search("pending|running|completing|requeue|configuring|suspended", state(job)))


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


@pytest.mark.slurm
def test_a_requeued_job_ends_like_an_uninterrupted_run(submitted, command, small, tmp_path):
    steps = 1200
    job, run = submitted("--time", "1", steps=steps)
    # SLURM sends USR1 some time before the minute is over: the run is saved, the job requeued, and the run resumed.
    # Under load a start may be over before its first step: then the job is requeued all the same.
    wait_for(lambda: finished(run), lambda: waits_or_runs(job), log(run))
    starts = read_history(run)
    assert {start.job for start in starts} == {job}
    assert [start.how for start in starts] == ["requeued"] * (len(starts) - 1) + ["finished"]
    assert len(starts) > 1
    assert [start.from_step for start in starts[1:]] == [start.step for start in starts[:-1]]
    assert starts[-1].from_step > 0
    options = [*small("seg_voc", steps=steps), "--checkpoint_every", 5, "--trainer.check_val_every_n_epoch", 50]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "sis_lightning", "fit", *map(str, options), "--run_dir", "uninterrupted"]
    subprocess.run(line, check=True, cwd=tmp_path, env=environment, capture_output=True)
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
    job, run = submitted(steps=1500)
    wait_for(lambda: steps_done(run) > 40, lambda: waits_or_runs(job), log(run))
    processes = output("pgrep", "--full", f"^{sys.executable} -m sis_lightning fit .*--run_dir={run}").split()
    assert processes
    for process in processes:
        os.kill(int(process), signal.SIGKILL)
    wait_for(lambda: not waits_or_runs(job), lambda: True, log(run))
    again, _ = submitted(steps=1500)
    wait_for(lambda: finished(run), lambda: waits_or_runs(again), log(run))
    starts = read_history(run)
    assert [start.how for start in starts] == [None, "finished"]
    assert starts[1].from_step >= 5


@pytest.mark.slurm
def test_an_array_of_which_one_element_is_requeued(submitted, tmp_path):
    job, runs = submitted("--array", "seeds=3,4", steps=800, run=None)
    folders = {seed: tmp_path / "runs" / "seg_voc" / "res2net14-4w4s-basic-8ch" / f"seed{seed}" for seed in (3, 4)}
    wait_for(lambda: all(steps_done(folder) > 20 for folder in folders.values()), lambda: waits_or_runs(job), log(runs))
    output("scontrol", "requeue", f"{job}_4")
    wait_for(lambda: all(finished(folder) for folder in folders.values()), lambda: waits_or_runs(job), log(runs))
    assert len(read_history(folders[3])) == 1
    assert len(read_history(folders[4])) == 2
    assert {start.job for start in read_history(folders[4])} == {f"{job}_4"}


@pytest.mark.slurm
def test_two_tasks_of_one_job_are_two_ranks(submitted, tmp_path):
    job, run = submitted("--tasks-per-node", 2, steps=12)
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
