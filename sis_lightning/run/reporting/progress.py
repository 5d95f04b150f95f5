"""Progress of a run: one line in a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from math import isfinite
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from sis_lightning.lightning_internals import total_steps
from sis_lightning.text_tables import plain_console

console = plain_console(soft_wrap=True)
#: About so many lines are printed by a run whose output is not a terminal.
_LINES = 20
#: Seconds between two lines of `predict`.
_SECONDS = 10
#: Width of the bar in columns.
_BAR = 10


def first_rank() -> bool:
    """Whether this process prints and writes for all devices."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def say(text: str) -> None:
    """Prints a text once for all devices."""
    if first_rank():
        console.print(text)


class Pace:
    """Images per second over the last steps, including the wait for data, without validations and checkpoints."""

    def __init__(self) -> None:
        self.durations: deque[float] = deque(maxlen=50)
        self.last: float | None = None

    def step(self) -> None:
        """Ends a step."""
        now = time.perf_counter()
        if self.last is not None:
            self.durations.append(now - self.last)
        self.last = now

    def pause(self) -> None:
        """Leaves out the time until the next step."""
        self.last = None

    def rate(self, images: int) -> float:
        """Images per second for so many images per step; NaN before the second step."""
        return images * len(self.durations) / sum(self.durations) if self.durations else float("nan")


def _steps(trainer: Trainer) -> int | None:
    """Steps of the whole run; None if they are not limited, or not known yet."""
    try:
        steps = total_steps(trainer)
    except Exception:  # such as before the loaders are set up
        return None
    return int(steps) if isfinite(steps) and steps > 0 else None


def _numbers(trainer: Trainer, pace: Pace) -> dict[str, str]:
    """Loss, learning rate and speed of the newest step, as text."""
    loss = trainer.callback_metrics.get("train/loss")
    rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else float("nan")
    speed = pace.rate(getattr(trainer.datamodule, "batch_size", 1))  # type: ignore[attr-defined]
    numbers = {"loss": f"{float('nan') if loss is None else float(loss):.4f}", "lr": f"{float(rate):.2g}"}
    return {**numbers, "images/s": f"{speed:.1f}"} if isfinite(speed) else numbers


def _clock(seconds: float | None) -> str:
    if seconds is None or not isfinite(seconds):
        return "-:--"
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}" if minutes >= 60 else f"{minutes}:{second:02d}"


class _Numbers(ProgressColumn):
    """The numbers behind the bar, and the time left; numbers that do not fit on the line are left out."""

    def __init__(self, width: int) -> None:
        super().__init__(Column(no_wrap=True))
        self.width = width

    def render(self, task: Task) -> Text:
        parts = [*task.fields["numbers"], f"{_clock(task.time_remaining)} left"]
        width = self.width - len(task.description) - _BAR - 2  # a space on each side of the bar
        while len(parts) > 2 and len("  ".join(parts)) > width:
            del parts[-2]
        return Text("  ".join(parts))


class ProgressLine(ProgressBar):
    """One line in a terminal: step or batch, a bar, loss, learning rate, images/s, newest metric and time."""

    def __init__(self) -> None:
        super().__init__()
        self.pace = Pace()
        self.enabled = True
        self.metric = ""
        self.line: Progress | None = None
        self.images, self.began = 0, time.perf_counter()

    def disable(self) -> None:
        """Displays nothing, as on ranks other than the first."""
        self.enabled = False

    def enable(self) -> None:
        """Displays the line."""
        self.enabled = True

    def _show(self, what: str, done: int, total: float | None, numbers: list[str]) -> None:
        if not self.enabled:
            return
        if self.line is None:
            self.line = Progress(
                "{task.description}",
                BarColumn(bar_width=_BAR),
                _Numbers(console.width),
                console=console,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.line.add_task(what, total=total, numbers=numbers)
            self.line.start()
        known = total is not None and isfinite(total)
        text = f"{what} {done:,}" + (f"/{int(total):,}" if known and total is not None else "")
        task = self.line.tasks[0]
        self.line.update(task.id, description=text, completed=done, total=total if known else None, numbers=numbers)

    def _close(self) -> None:
        if self.line is not None:
            self.line.stop()
            self.line = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the number of steps; a collective call."""
        self.steps = _steps(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step."""
        self.pace.step()
        if self.enabled:
            numbers = [f"{name} {text}" for name, text in _numbers(trainer, self.pace).items()]
            self._show("step", trainer.global_step, self.steps, [*numbers, *([self.metric] if self.metric else [])])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves out the validation, which is not a step."""
        self.pace.pause()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the batch."""
        if not trainer.sanity_checking:
            total = trainer.num_val_batches[dataloader_idx]
            self._show("validation", batch_idx + 1, total, [self.metric] if self.metric else [])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the metric that chooses checkpoints."""
        self.pace.pause()
        name = getattr(pl_module, "monitor", "")
        value = trainer.callback_metrics.get(name)
        if value is not None and not trainer.sanity_checking:
            self.metric = f"{name.partition('/')[2]} {float(value):.4f}"
        if trainer.state.fn != "fit":
            self._close()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the batch."""
        self._show("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx], [])

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.images, self.began = 0, time.perf_counter()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the batch, and its images a second."""
        self.images += len(batch["image"])
        speed = f"{self.images / max(1e-9, time.perf_counter() - self.began):.3g} images/s"
        self._show("predict", batch_idx + 1, trainer.num_predict_batches[dataloader_idx], [speed])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the line."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the line."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the line."""
        console.print(*args)


class ProgressLines(Callback):
    """The same as separate lines, for output that goes into a file: about 20 per run, and one for each validation.

    Attributes:
        tested_step: Steps of the checkpoint that is validated; None in `fit`.
    """

    def __init__(self) -> None:
        self.tested_step: int | None = None
        self.pace = Pace()
        self.shown = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes after how many steps a line is printed; a collective call."""
        self.steps = _steps(trainer)
        logged = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self.every = max(1, min(logged, self.steps // _LINES)) if self.steps else logged
        self.shown = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves out what was between the epochs."""
        self.pace.pause()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints loss, learning rate and images/s."""
        self.pace.step()
        step = trainer.global_step
        # One line for all batches that accumulate to a step.
        if trainer.is_global_zero and step > self.shown and (step % self.every == 0 or step == self.steps):
            self.shown = step
            total = f"/{self.steps}" if self.steps else ""
            numbers = _numbers(trainer, self.pace)
            speed = numbers.pop("images/s", None)
            texts = [f"{name} {text}" for name, text in numbers.items()] + ([f"{speed} images/s"] if speed else [])
            console.print(f"step {step:>6}{total}  epoch {trainer.current_epoch:>3}  {'  '.join(texts)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the metric that chooses checkpoints."""
        self.pace.pause()
        value = trainer.callback_metrics.get(getattr(pl_module, "monitor", ""))
        if trainer.is_global_zero and not trainer.sanity_checking and value is not None:
            boxes = getattr(trainer.datamodule, "notes", {}).get("person boxes")  # type: ignore[attr-defined]
            note = f" (person boxes: {boxes})" if boxes else ""
            step = trainer.global_step if self.tested_step is None else self.tested_step
            console.print(f"validation at step {step}: {pl_module.monitor} {float(value):.4f}{note}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.images, self.began, self.told = 0, time.perf_counter(), time.perf_counter()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints the number of images and their speed every ten seconds."""
        self.images += len(batch["image"])
        now = time.perf_counter()
        if trainer.is_global_zero and now - self.told >= _SECONDS:
            self.told = now
            batches = trainer.num_predict_batches[dataloader_idx]
            speed = self.images / (now - self.began)
            console.print(f"predict: batch {batch_idx + 1:,}/{batches:,}, {self.images:,} images, {speed:.3g} images/s")


def progress() -> Callback:
    """A line in a terminal, lines elsewhere."""
    return ProgressLine() if console.is_terminal else ProgressLines()
