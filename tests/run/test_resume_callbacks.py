"""Runs with users' callbacks that are interrupted and resumed: all that they do and log is as without interruption."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

HERE = __name__
HOOKS = (
    *("on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_train_batch_end"),
    *("on_train_epoch_end", "on_validation_start", "on_validation_batch_start", "on_validation_batch_end"),
    *("on_validation_epoch_end", "on_validation_end"),
)


class Stateful(Callback):
    """Counts every hook of a step, an epoch and a validation, and keeps a random number that it drew in the newest."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.seen)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = dict(state_dict)


def counted(name: str) -> Callable[..., None]:
    def hook(self: Stateful, trainer: Trainer, *_: Any, **__: Any) -> None:
        if not trainer.sanity_checking:
            self.seen[name] = self.seen.get(name, (0, 0.0))[0] + 1, torch.rand(()).item()

    return hook


for name in HOOKS:
    setattr(Stateful, name, counted(name))


class Logging(Callback):
    """Logs in every hook: values of a step, and means, sums and maxima of an epoch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log("mine/step", float(trainer.global_step))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for reduce in ("mean", "sum", "max"):
            both = {"on_step": reduce == "mean", "on_epoch": True}
            pl_module.log(f"mine/{reduce}", torch.rand(()), reduce_fx=reduce, batch_size=1, **both)
        pl_module.log("mine/known", trainer.callback_metrics.get("val/miou", torch.tensor(-1.0)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("mine/metrics", float(len(trainer.callback_metrics)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("mine/validation", float(trainer.global_step))


class Noise(Callback):
    """Adds noise from torch's generator to the weights."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))

    on_train_batch_end = on_train_epoch_start = on_train_epoch_end = on_train_batch_start
    on_validation_batch_end = on_validation_end = on_train_batch_start


class StopEarly(Callback):
    """Stops the training in the middle of an epoch, which brings a validation out of turn."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.fit_loop.total_batch_idx == 5


class Interrupt(Callback):
    """Fails at a batch or at the end of a validation, or is sent a signal there."""

    at: tuple[str, int, int] = ("", 0, 0)

    def happen(self, where: str, count: int) -> None:
        if (where, count) == self.at[:2]:
            if self.at[2]:
                os.kill(os.getpid(), self.at[2])
            else:
                raise RuntimeError("failed on purpose")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.happen("batch", trainer.fit_loop.total_batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.happen("validation", trainer.fit_loop.total_batch_idx + 1)


def named(callback: str) -> list[str]:
    """The options of a callback, given as `Class` or `Class argument=value …`."""
    kind, *arguments = callback.split()
    kind = f"{HERE}.{kind}" if kind in globals() else kind
    return [f"--trainer.callbacks+={kind}", *(f"--trainer.callbacks.{argument}" for argument in arguments)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def left(run: Path) -> dict[str, Any]:
    """What a run leaves, without the names of its own folder."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state")
    kept = {name: content.get(name) for name in names}
    callbacks = {key: value for key, value in content["callbacks"].items() if "Checkpoint" not in key}
    csv = (run / "csv" / "fit" / "metrics.csv").read_text()
    return {**kept, "callbacks": callbacks, "csv": csv, "tensorboard": displayed(run / "tensorboard" / "fit")}


def displayed(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """What TensorBoard displays: step and value of the points of each curve, and steps of the images."""
    events = EventAccumulator(str(folder), {SCALARS: 0, IMAGES: 0}).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    images = {tag: [(event.step, 0.0) for event in events.Images(tag)] for tag in events.Tags()["images"]}
    # As text, since nan is not equal to nan.
    return {tag: [(step, repr(value)) for step, value in points] for tag, points in {**curves, **images}.items()}


STOPPING = "EarlyStopping monitor=val/miou mode=min min_delta=10"


@pytest.mark.parametrize(
    ("callbacks", "options", "interrupts"),
    [
        (["Stateful", "Logging"], [], [("batch", 3, 0), ("validation", 8, 0), ("batch", 10, signal.SIGTERM)]),
        (["Noise", "EMAWeightAveraging decay=0.9"], [], [("batch", 7, 0), ("validation", 8, 0)]),
        (["WeightAveraging", "Logging"], ["--trainer.val_check_interval=3"], [("validation", 3, 0), ("batch", 8, 0)]),
        # It asks to stop after the first validations, and the run goes on until it has made 7 steps.
        ([f"{STOPPING} patience=1", "Logging"], ["--trainer.min_steps=7"], [("batch", 11, 0)]),
        ([f"{STOPPING} patience=1", "Noise"], [], [("validation", 8, 0)]),
        (["StopEarly", "Noise"], [], [("validation", 6, 0)]),
        (["LearningRateFinder num_training_steps=3"], [], [("batch", 5, 0)]),
    ],
)
def test_callbacks_do_and_log_the_same_after_a_resume(
    command, small, tmp_path, monkeypatch, callbacks, options, interrupts
):
    line = [*small("seg_voc", steps=8), "--resume", "auto", "--checkpoint_every", "1", *options]
    line += ["--trainer.accumulate_grad_batches", "2"]
    for callback in [*callbacks, "Interrupt"]:
        line += named(callback)
    undisturbed = command("fit", *line, "--run_dir", "undisturbed")
    assert undisturbed.code == 0, undisturbed.err
    for at in interrupts:
        monkeypatch.setattr(Interrupt, "at", at)
        with contextlib.nullcontext() if at[2] else pytest.raises(RuntimeError, match="failed on purpose"):
            assert command("fit", *line, "--run_dir", "run").code == 128 + at[2]
    monkeypatch.setattr(Interrupt, "at", ("", 0, 0))
    resumed = command("fit", *line, "--run_dir", "run")
    assert resumed.code == 0, resumed.err
    got, want = left(tmp_path / "run"), left(tmp_path / "undisturbed")
    assert got["csv"] == want["csv"]
    assert {"train/loss", "val/miou", "predictions"} <= want["tensorboard"].keys()
    assert [key for key in want if not same(got[key], want[key])] == []


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        ("StochasticWeightAveraging swa_lrs=0.1 device=null", "replaces the learning rate schedule"),
        ('GradientAccumulationScheduler scheduling={"0":2}', "trainer.accumulate_grad_batches"),
        ("BatchSizeFinder", "data.batch_size"),
        ("ModelPruning pruning_fn=l1_unstructured amount=0.5", "masks"),
    ],
)
def test_callbacks_that_cannot_resume_exactly_are_refused(command, tiny, tmp_path, callback, reason):
    result = command("fit", *tiny, *named(callback), "--run_dir", "run")
    assert result.code == 2, result.err
    assert f"trainer.callbacks has {callback.split()[0]}" in result.err
    assert reason in result.err
    assert not (tmp_path / "run").exists()


def test_a_validation_by_the_clock_is_refused(command, tiny):
    result = command("fit", *tiny, "--trainer.val_check_interval", "00:00:01:00")
    assert result.code == 2
    assert "trainer.val_check_interval is '00:00:01:00', a time" in result.err


def test_a_run_that_a_limit_of_time_stopped_within_an_epoch_resumes(command, small, tmp_path):
    """Lightning validates when it stops, out of turn: no checkpoint may tell the resumed run to do so."""
    options = [*small("seg_voc", steps=300), "--run_dir", "run", "--resume", "auto", "--checkpoint_every", "1"]
    stopped = command("fit", *options, "--trainer.max_time", "00:00:00:01")
    assert stopped.code == 0, stopped.err
    assert "stopped before its end" in stopped.out
    again = command("fit", *options, "--trainer.max_time", "00:00:00:01", "--resume_changed", "true")
    assert again.code == 0, again.err
