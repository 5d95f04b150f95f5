"""Times what surrounds the network: data loading, and what the Trainer adds to a plain loop."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sis_lightning.bench.paired import Timing
from sis_lightning.bench.report import Benchmark, benchmark
from sis_lightning.config.compose import resolve
from sis_lightning.config_files import config_names
from sis_lightning.datamodules import Batch, SISDataModule
from sis_lightning.datasets.synthetic import write_synthetic
from sis_lightning.errors import MissingDataError, UsageError
from sis_lightning.run.run import Run
from sis_lightning.run.start import start
from sis_lightning.tasks import BaseTask

_PACKAGES = ("torch", "torchvision", "lightning")


def _parts(options: list[str]) -> tuple[BaseTask, SISDataModule]:
    """Task and data of a run, ready to train."""
    run = Run.from_arguments(options)
    task, data = run.task, run.datamodule
    data.setup("fit")
    return task.train(), data


def _parts_of(task: str, roots: Sequence[Path]) -> tuple[BaseTask, SISDataModule] | None:
    """Task and data of a recipe with the first root that holds its data; None if there is none."""
    options = [f"--config=tasks/{task}.yaml", "--data.num_workers=0", "--data.batch_size=16", "--trainer.logger=false"]
    options += ["--data.synthetic=null", "--data.download=false", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    for root in roots:
        try:
            return _parts([*options, f"--data.root={root}"])
        except MissingDataError:
            continue
    return None


def _batches(data: SISDataModule) -> Iterator[Batch]:
    while True:
        yield from data.train_dataloader()


def time_data(photographs: Sequence[Path] = (), *, seconds: float = 5.0, steps: int = 3) -> Benchmark:
    """Times data loading of every task's recipe on one core, and training steps of its network on this machine.

    Batches have 16 images for loading and 2 for training.

    Args:
        photographs: Roots of data sets in their published layouts; tasks whose data none of them holds are left out.
            Empty: synthetic images, 500 px wide (32 px for CIFAR), in the real formats.
        seconds: Duration of loading for each task.
        steps: Number of training steps for each task.

    Raises:
        UsageError: If `photographs` holds the data of no task.
    """
    rows: list[dict[str, str | float]] = []
    with tempfile.TemporaryDirectory() as folder:
        if not photographs:
            with contextlib.redirect_stdout(io.StringIO()):
                write_synthetic(Path(folder), images=64, size=500)
        for task_name in config_names("tasks"):
            found = _parts_of(task_name, photographs or [Path(folder)])
            if found is None:
                continue
            task, data = found
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            loader, images = _batches(data), 0
            next(loader)
            begun = time.perf_counter()
            while time.perf_counter() - begun < seconds:
                images += len(next(loader)["name"])
            loading = images / (time.perf_counter() - begun)
            torch.set_num_threads(threads)
            data.batch_size = 2
            step = _bare_step(task, data)
            step()
            begun = time.perf_counter()
            for _ in range(steps):
                step()
            training = 2 * steps / (time.perf_counter() - begun)
            rows.append(
                {
                    "task": task_name,
                    "data": data.identity() if not photographs else f"{data.identity()}: {data.root.name}",
                    "backbone": task.backbone_config.slug,
                    "images/s a core": loading,
                    f"training images/s on {threads} threads": training,
                    "cores that feed 100 images/s": 100 / loading,
                }
            )
    if not rows:
        raise UsageError(f"{', '.join(map(str, photographs))}: the data of no task, in the published layouts")
    images_are = "Photographs" if photographs else "Synthetic images of 500 px (CIFAR: 32 px)"
    return benchmark(
        name="data-photographs" if photographs else "data",
        title="Data loading on one core, and the training that it feeds" + (", on photographs" if photographs else ""),
        command="sis-lightning bench --data" + "".join(f" {path.name}" for path in photographs),
        rows=rows,
        note=f"{images_are} in the published layouts; recipes of tasks/*.yaml.",
        packages=_PACKAGES,
    )


def _bare_step(task: BaseTask, data: SISDataModule) -> Any:
    """A training step as plain PyTorch would write it."""
    assert task.make_optimizer is not None  # every recipe names an optimizer
    optimizer = task.make_optimizer(task.parameters())
    batches = _batches(data)

    def step() -> None:
        batch = task.normalized(next(batches))
        loss = torch.stack(list(task.training_loss(batch).values())).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


class StepClock(Callback):
    """Measures the steps of a fit between two batches."""

    #: Elapsed seconds and processor seconds of the newest fit.
    newest: tuple[float, float] = (0.0, 0.0)

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock at batch `first`, and stops it at batch `last`."""
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        if done == self.first:
            self.began = time.perf_counter(), time.process_time()
        if done == self.last:
            wall, cpu = self.began
            StepClock.newest = time.perf_counter() - wall, time.process_time() - cpu


def time_loop(rounds: int = 6, steps: int = 60, warmup: int = 10) -> Benchmark:
    """Times `fit` on the segmentation demo, with all callbacks and logs, against the same steps in a plain loop.

    Validation and checkpoints are left out, since the plain loop has none.

    Args:
        rounds: Number of rounds.
        steps: Number of timed steps in a round.
        warmup: Number of steps before them.
    """
    fit, bare = Timing([], []), Timing([], [])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        write_synthetic(Path(folder, "data"), images=1000, size=96, kinds=["voc"], min_object=16)
        options = ["--config=tasks/seg_voc.yaml", "--config=configs/demo.yaml", f"--data.root={folder}/data"]
        options += ["--data.num_workers=0", f"--trainer.max_steps={warmup + steps + 1}"]
        options += [f"--model.lr_scheduler.init_args.total_steps={warmup + steps + 1}"]
        task, data = _parts(options)
        step = _bare_step(task, data)
        for number in range(rounds):
            for _ in range(warmup):
                step()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            bare.wall.append(time.perf_counter() - wall)
            bare.cpu.append(time.process_time() - cpu)
            clock = '[{"class_path": "sis_lightning.bench.pipeline.StepClock", "init_args": '
            clock += f'{{"first": {warmup}, "last": {warmup + steps}}}}}]'
            own = [f"--run_dir={folder}/run{number}", f"--trainer.callbacks={clock}"]
            start("fit", *resolve([*options, *own, "--trainer.limit_val_batches=0"]))
            fit.wall.append(StepClock.newest[0])
            fit.cpu.append(StepClock.newest[1])
    images = steps * data.batch_size
    rows: list[dict[str, str | float]] = [
        {"loop": name, "images/s": images / sorted(t.wall)[len(t.wall) // 2], "time / bare loop": str(ratio)}
        for name, t, ratio in (
            ("bare", bare, bare.faster_than(bare)),
            ("sis-lightning fit", fit, bare.faster_than(fit)),
        )
    ]
    return benchmark(
        name="loop",
        title="A step of the segmentation demo, without validations and checkpoints",
        command=f"sis-lightning bench --loop --rounds {rounds}",
        rows=rows,
        note="Ratios of times, paired by round: median (95 % interval).",
        packages=_PACKAGES,
    )
