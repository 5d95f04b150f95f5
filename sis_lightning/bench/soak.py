"""Kills runs at random moments and file operations, and compares their results with those of uninterrupted runs.

    python -m sis_lightning.bench.soak --kills 200 --out results/resume

Lightning is imported once; every start of a run is a fork of this process, so that a kill costs no imports.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

from sis_lightning.config.compose import resolve
from sis_lightning.datasets.synthetic import write_synthetic
from sis_lightning.errors import UserError
from sis_lightning.run.start import start as start_run

TASKS = ("seg_voc", "cls_cifar100", "det_voc", "kpt_coco")
#: Options that make a run of each task short.
SMALLER = {
    "seg_voc": ["--data.crop_size", "32"],
    "cls_cifar100": [],
    "det_voc": ["--model.min_size", "64", "--model.max_size", "64"],
    "kpt_coco": ["--data.input_size", "[64,32]"],
}
#: Validation in the middle of an epoch, and an epoch that the batch size does not divide.
HARDER = {
    "cls_cifar100": ["--trainer.limit_val_batches=3", "--trainer.val_check_interval=7"],
    "det_voc": ["--data.limit=20"],
}


def options(task: str, root: Path, run: Path, steps: int = 16) -> list[str]:
    """Options of a short run with all that makes resuming hard: workers, augmentation, validation, accumulation."""
    return [
        *(f"--config=tasks/{task}.yaml", "--config=configs/demo.yaml", "--config=configs/cluster.yaml"),
        *(f"--data.root={root}", f"--run_dir={run}", "--data.batch_size=3", "--data.num_workers=1", *SMALLER[task]),
        *HARDER.get(task, []),
        *("--model.backbone.channels=8", "--model.backbone.width=4", "--checkpoint_every=1"),
        *(f"--model.lr_scheduler.init_args.total_steps={steps}", f"--trainer.max_steps={steps}"),
        *("--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=1"),
        *("--trainer.check_val_every_n_epoch=1", "--trainer.callbacks=sis_lightning.bench.soak.Probe"),
    ]


class Probe(Callback):
    """Counts hooks, draws random numbers that change the weights, and logs: all of it must be as without a kill."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return dict(self.counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts."""
        self.counts = dict(state_dict)

    def _count(self, name: str, module: LightningModule) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        parameter = next(module.parameters())
        with torch.no_grad():
            parameter.add_(1e-4 * torch.randn_like(parameter))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts."""
        self._count("epoch", pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Counts."""
        self._count("batch", pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Logs the mean of an epoch."""
        pl_module.log("probe/random", torch.rand(()), on_step=False, on_epoch=True, batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts."""
        if not trainer.sanity_checking:
            self._count("validation", pl_module)


def kill_at(operation: int, folder: Path) -> None:
    """Kills this process and its workers before one of its changes to the files below a folder, counted from 1."""
    left, inside = itertools.count(operation - 1, -1), str(folder)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir")
        changes |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(arguments[0]).startswith(inside) and next(left) == 0:
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(audit)


def start(arguments: Sequence[str], log: Path, operation: int = 0, run: Path | None = None) -> int:
    """Forks a run; returns its process id.

    Args:
        arguments: Options of the run.
        log: File for its output.
        operation: File operation in `run` at which it is killed; 0 for none.
        run: The run's directory.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()  # so that its workers die with it
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        if operation and run:
            kill_at(operation, run)
        start_run("fit", *resolve(list(arguments)))
        code = 0
    except UserError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def wait(child: int, seconds: float | None = None) -> int | None:
    """The exit status of a run, negative for a signal; None if it still runs after so many seconds."""
    end = time.monotonic() + (seconds if seconds is not None else float("inf"))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def kill(child: int) -> None:
    """SIGKILL, for the run and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def digest(value: Any) -> str:
    """A hash of nested data with tensors in it, to the bit."""
    hasher = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            hasher.update(f"{item.dtype}{tuple(item.shape)}".encode())
            hasher.update(item.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                hasher.update(str(key).encode())
                feed(item[key])
        elif isinstance(item, list | tuple):
            for part in item:
                feed(part)
        else:
            hasher.update(repr(item).encode())

    feed(value)
    return hasher.hexdigest()


def outcome(run: Path) -> dict[str, str]:
    """Hashes of what must be the same: weights, optimizer, schedulers, loops, callbacks, logged metrics."""
    events = EventAccumulator(str(run / "tensorboard" / "fit"), {SCALARS: 0, IMAGES: 0}).Reload()
    tags = events.Tags()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    images = {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    rows = list(csv.DictReader((run / "csv" / "fit" / "metrics.csv").open()))
    return {
        "step": str(content["global_step"]),
        "weights": digest(content["state_dict"]),
        "optimizer": digest(content["optimizer_states"]),
        "schedulers": digest(content["lr_schedulers"]),
        "loops": digest(content["run"]["progress"]),
        "metrics.csv": hashlib.sha256((run / "csv" / "fit" / "metrics.csv").read_bytes()).hexdigest(),
        "rows": str(len(rows)),
        "tensorboard": digest([curves, images]),
        "callbacks": digest({key: state for key, state in content["callbacks"].items() if "Checkpoint" not in key}),
        "best": digest(torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]),
    }


def undisturbed(task: str, root: Path, folder: Path, steps: int = 16) -> tuple[dict[str, str], float]:
    """The outcome of a run that is not killed, and the seconds that it takes."""
    run, began = folder / f"{task}-undisturbed", time.monotonic()
    code = wait(start(options(task, root, run, steps), folder / f"{task}.log"))
    if code != 0:
        raise RuntimeError((folder / f"{task}.log").read_text()[-3000:])
    return outcome(run), time.monotonic() - began


def tormented(
    task: str,
    root: Path,
    folder: Path,
    kills: int,
    usual: float,
    rng: random.Random,
    signals: Sequence[int] = (signal.SIGKILL,),
    steps: int = 16,
) -> tuple[dict[str, str], dict[str, int]]:
    """The outcome of a run that is killed several times and then left to finish, and how often each thing happened."""
    run, log = folder / f"{task}-{rng.randrange(10**9)}", folder / f"{task}-killed.log"
    counts = {"kills": 0, "starts": 0, "finished early": 0}
    while True:
        counts["starts"] += 1
        last = counts["kills"] >= kills
        # Two thirds of the kills are aimed at a file operation; a step has about twelve of them.
        operation = 0 if last or rng.random() < 1 / 3 else rng.randint(1, 6 * steps)
        child = start(options(task, root, run, steps), log, operation, run)
        if last:
            code = wait(child)
            if code != 0:
                raise RuntimeError(log.read_text()[-3000:])
            break
        code = wait(child, None if operation else rng.uniform(0.1, 0.7) * usual)
        if code == -signal.SIGKILL:
            counts["kills"] += 1
            continue
        if code is None:
            number = rng.choice(signals)
            if number == signal.SIGKILL:
                kill(child)
            else:
                os.kill(child, number)
                if wait(child) not in (128 + number, 0, -number):
                    raise RuntimeError(log.read_text()[-3000:])
            counts["kills"] += 1
        elif code != 0:
            raise RuntimeError(log.read_text()[-3000:])
        else:
            counts["finished early"] += 1
            break
    result = outcome(run)
    shutil.rmtree(run)
    return result, counts


def main() -> int:
    """Runs the test, and writes a report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=5, help="Kills of one run.")
    parser.add_argument("--steps", type=int, default=16, help="Optimizer steps of one run.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/resume"))
    chosen = parser.parse_args()
    rng = random.Random(chosen.seed)
    total = {"kills": 0, "starts": 0, "runs": 0, "finished early": 0, "differences": 0}
    differing: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with contextlib.redirect_stdout(io.StringIO()):
            write_synthetic(folder / "data", images=24, size=64, min_object=12)
        usual = {task: undisturbed(task, folder / "data", folder, chosen.steps) for task in TASKS}
        for task in itertools.cycle(TASKS):
            if total["kills"] >= chosen.kills and total["runs"] >= len(TASKS):
                break
            want, seconds = usual[task]
            got, counts = tormented(task, folder / "data", folder, chosen.each, seconds, rng, steps=chosen.steps)
            for key, count in counts.items():
                total[key] += count
            total["runs"] += 1
            different = sorted(key for key in want if want[key] != got[key])
            total["differences"] += bool(different)
            differing += [f"{task}: {', '.join(different)}"] if different else []
            print(f"{task}: {total}", flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    report = {**total, "differing": differing, "seed": chosen.seed, "torch": torch.__version__}
    (chosen.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    return bool(total["differences"])


if __name__ == "__main__":
    sys.exit(main())
