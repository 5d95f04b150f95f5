"""Everything of Lightning that its documentation does not promise, in one place.

`tests/test_lightning_internals.py` fails with a clear message if another release of Lightning has it otherwise.
"""

from __future__ import annotations

import dataclasses
import signal
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

#: State of a logged value beside its sums, and the newest logged values.
_STATE = ("_forward_cache", "_computed", "_update_count", "has_reset")
_NEWEST = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
#: The limits of steps that `lift_max_steps` has lifted.
_lifted: WeakKeyDictionary[Trainer, int] = WeakKeyDictionary()


def loops(trainer: Trainer) -> list[Any]:
    """The loops of `fit`, the outer ones first."""
    fit = trainer.fit_loop
    epoch = fit.epoch_loop
    return [fit, epoch, epoch.automatic_optimization, epoch.manual_optimization, epoch.val_loop]


def batch_progress(trainer: Trainer) -> Any:
    """Counts of training batches: `.total` over the run, `.current` in the epoch, each `.ready` and `.completed`."""
    return trainer.fit_loop.epoch_loop.batch_progress


def epochs_completed(trainer: Trainer) -> int:
    """Number of training epochs that were completed."""
    return int(trainer.fit_loop.epoch_progress.current.completed)


def accumulates(trainer: Trainer) -> bool:
    """Whether the newest batch made no optimizer step yet: its gradients wait for those of further batches."""
    done = batch_progress(trainer).current.ready
    last = done >= trainer.num_training_batches and not trainer.strategy.handles_gradient_accumulation
    return bool(done % trainer.accumulate_grad_batches) and not last


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the schedule asks for a validation after the newest batch, and not only that the training stops there."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    stop, trainer.should_stop = trainer.should_stop, False
    try:
        return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = stop


def restore_progress(trainer: Trainer, state: dict[str, Any]) -> None:
    """Sets the counts of all loops of `fit`, without the restart that Lightning makes of it.

    Args:
        trainer: A Trainer in the middle of `fit`.
        state: State returned by `trainer.fit_loop.state_dict()`.
    """
    flags = [loop.restarting for loop in loops(trainer)]
    trainer.fit_loop.load_state_dict(state)
    for loop, restarting in zip(loops(trainer), flags, strict=True):  # the outer ones first: they set the inner ones
        loop.restarting = restarting


def keep_saved_position(checkpoint: dict[str, Any], point: Literal["batch", "validation", "end"]) -> None:
    """Changes a checkpoint's loop state so that Lightning restarts there without skipping or repeating a batch."""
    state = checkpoint["loops"]["fit_loop"]
    batches = state["epoch_loop.batch_progress"]
    if point == "batch":
        for part in ("total", "current"):
            batches[part] = dict.fromkeys(batches[part], batches[part]["completed"])
        # Otherwise the epoch would count as completed before its last batch.
        batches["is_last_batch"] = False
    if point == "validation":
        # As Lightning writes it at the first batch of a validation, from which it starts the validation again.
        validation = state["epoch_loop.val_loop.batch_progress"]
        count = validation["total"]["completed"]
        validation["total"] = {"ready": count + 1, "started": count + 1, "processed": count, "completed": count}
        validation["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def lift_max_steps(trainer: Trainer) -> None:
    """Lets `fit` go on when all of its steps are done, until `restore_max_steps`."""
    loop = trainer.fit_loop.epoch_loop
    _lifted[trainer], loop.max_steps = loop.max_steps, -1


def restore_max_steps(trainer: Trainer) -> None:
    """Sets the number of steps at which `fit` ends as it was before `lift_max_steps`."""
    if trainer in _lifted:
        trainer.fit_loop.epoch_loop.max_steps = _lifted.pop(trainer)


def logged_values(trainer: Trainer) -> dict[str, Any]:
    """What Lightning has logged and still holds in memory, as plain data: newest values, and sums of an epoch.

    A logged `torchmetrics.Metric` keeps its state by itself, and is left out.
    """
    connector = trainer._logger_connector
    sums = []
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        meta = metric.meta
        if metric.is_tensor and meta.sync.group is None:
            options = {field.name: getattr(meta, field.name) for field in dataclasses.fields(meta)}
            del options["_sync"]
            options["reduce_fx"] = meta.reduce_fx.__name__
            sync = {"_should": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only}
            state = {name: getattr(metric, name) for name in (*metric._defaults, *_STATE)}
            sums.append({"key": key, "options": options, "sync": sync, "state": state})
    newest = {name: {**getattr(connector, name)} for name in _NEWEST}
    values: dict[str, Any] = _detached({"sums": sums, "newest": newest, "should_stop": trainer.should_stop})
    return values


def restore_logged_values(trainer: Trainer, values: dict[str, Any]) -> None:
    """Restores what `logged_values` returned.

    Args:
        trainer: A Trainer in the middle of `fit`.
        values: Result of `logged_values`.
    """
    results, device = trainer.fit_loop.epoch_loop._results, trainer.strategy.root_device
    for entry in values["sums"]:
        meta = _Metadata(**entry["options"])
        meta.sync = _Sync(fn=trainer.strategy.reduce, **entry["sync"])
        metric = _ResultMetric(meta, is_tensor=True)
        for name, value in entry["state"].items():
            setattr(metric, name, value.clone() if isinstance(value, torch.Tensor) else value)
        results[entry["key"]] = metric.to(device)
    for name, content in values["newest"].items():
        setattr(trainer._logger_connector, name, content)
    trainer.should_stop = values["should_stop"]


def keep_sums(trainer: Trainer) -> None:
    """Keeps what was logged for the mean of an epoch, in a batch that is not the epoch's first.

    Lightning resets it at the first batch after a start, which may be in the middle of an epoch.
    """
    if batch_progress(trainer).current.ready > 1:
        trainer._logger_connector._first_loop_iter = False


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return [_detached(item) for item in value] if isinstance(value, list) else value


def total_steps(trainer: Trainer) -> float:
    """Number of optimizer steps of the whole `fit`, infinite if it has no end; a collective call."""
    loop, now = trainer.fit_loop.epoch_loop, trainer.max_steps
    loop.max_steps = _lifted.get(trainer, now)
    try:
        return trainer.estimated_stepping_batches
    finally:
        loop.max_steps = now


def kill_other_ranks(trainer: Trainer) -> None:
    """Kills the processes that this one launched for the other devices, if it launched any."""
    kill = getattr(trainer.strategy.launcher, "kill", None)
    if kill is not None:
        kill(signal.SIGKILL)


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The Trainer that a module is attached to; None without one, where `module.trainer` would raise an error."""
    trainer: Trainer | None = module._trainer
    return trainer


def replace_hparams(module: LightningModule, values: dict[str, Any]) -> None:
    """Replaces what `save_hyperparameters` has kept, both for checkpoints and for loggers."""
    module.hparams.clear()
    module.hparams.update(values)
    module._hparams_initial = dict(values)  # type: ignore[assignment]


def train_loader(trainer: Trainer) -> Any:
    """The training loader, built if it is not there yet, as in `configure_optimizers`."""
    trainer.fit_loop.setup_data()
    return trainer.train_dataloader


def restart_optimizers(trainer: Trainer) -> None:
    """Calls `configure_optimizers` again in the middle of `fit`, such as after the learning rate was changed."""
    trainer.strategy.setup_optimizers(trainer)
