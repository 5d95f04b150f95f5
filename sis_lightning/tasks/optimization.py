"""Optimizers and learning rates of all tasks: the linear rule, the warm-up, schedules, and rates that were found."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)

from sis_lightning.errors import UsageError
from sis_lightning.lightning_internals import restart_optimizers, train_loader

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


class Optimization(LightningModule):
    """The part of `BaseTask` that builds optimizers and schedulers; `BaseTask` describes its options."""

    monitor: str
    notes: dict[str, str]
    make_optimizer: Any
    make_lr_scheduler: Any
    lr_interval: str
    lr_batch_size: int | None
    norm_weight_decay: bool
    warmup_steps: int
    warmup_start: float
    _found_rate: float | None
    _rate_is_new: bool

    def note(self, label: str, text: str) -> None:
        """Keeps a note for the reader of the run, and logs it."""
        if self.notes.get(label) != text:
            rank_zero_info(f"{label}: {text}")
        self.notes[label] = text

    @property
    def images_per_step(self) -> int:
        """Number of images that one optimizer step sees, over all devices and accumulated batches.

        An epoch ends with a step, so that no more batches accumulate than an epoch has.

        Raises:
            UsageError: If the training loader does not say how many images a batch has.
        """
        loader = train_loader(self.trainer)
        size = getattr(loader, "batch_size", None) or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
        if not isinstance(size, int):
            raise UsageError(
                f"the training loader ({type(loader).__name__}) has no batch_size, which the linear learning rate rule "
                "needs:\n  set lr_batch_size to None, or give the loader an attribute batch_size"
            )
        batches = min(self.trainer.accumulate_grad_batches, self.trainer.num_training_batches)
        return size * self.trainer.world_size * max(1, int(batches))

    @property
    def learning_rate(self) -> float | None:
        """The learning rate that replaces the optimizer's (and the maximum of OneCycleLR), as LearningRateFinder sets.

        None, as usual, if the optimizer's and the scheduler's own are used.
        """
        return self._found_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self._found_rate, self._rate_is_new = float(rate), True

    def configure_optimizers(self) -> Any:
        """Builds optimizer and schedulers, with the linear rule and the warm-up."""
        trained: Any = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not self.norm_weight_decay:
            norms = {id(weight) for part in self.modules() if isinstance(part, _NORMS) for weight in part.parameters()}
            without = [parameter for parameter in trained if id(parameter) in norms]
            others = [parameter for parameter in trained if id(parameter) not in norms]
            trained = [{"params": others}, {"params": without, "weight_decay": 0.0}]
        try:
            if self.make_optimizer is None:
                optimizer: Optimizer = SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)
            else:
                optimizer = self.make_optimizer(trained)
        except (ValueError, TypeError) as error:
            raise UsageError(f"optimizer: {error}") from error
        factor = self.images_per_step / self.lr_batch_size if self.lr_batch_size else 1.0
        given = [float(group["lr"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor if self._found_rate is None else self._found_rate
        schedulers: list[dict[str, Any]] = []
        if self.make_lr_scheduler is not None:
            schedulers.append(self._scheduler(optimizer, given, factor))
        if self.warmup_steps:
            for entry in schedulers:
                if isinstance(entry["scheduler"], OneCycleLR):
                    raise UsageError("warmup_steps: OneCycleLR has a warm-up of its own (pct_start): set it to 0")
                # Others multiply the rate that they find, as the warm-up does, so that they go together.
                if isinstance(entry["scheduler"], LambdaLR | CyclicLR | CosineAnnealingWarmRestarts):
                    kind = type(entry["scheduler"]).__name__
                    raise UsageError(f"warmup_steps: {kind} replaces the learning rate at each step: set it to 0")
            warmup = LinearLR(optimizer, self.warmup_start, total_iters=self.warmup_steps)
            schedulers.append({"scheduler": warmup, "interval": "step"})
        return [optimizer], schedulers

    def _scheduler(self, optimizer: Optimizer, given: list[float], factor: float) -> dict[str, Any]:
        """The scheduler as Lightning wants it described."""
        assert self.make_lr_scheduler is not None
        try:
            scheduler: LRScheduler = self.make_lr_scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise UsageError(f"lr_scheduler: {error}") from error
        if isinstance(scheduler, ReduceLROnPlateau):
            return self._plateau(scheduler)
        if isinstance(scheduler, OneCycleLR):
            # It has replaced the optimizer's learning rate by its own.
            highest = [float(group["max_lr"]) for group in optimizer.param_groups]
            for group, top in zip(optimizer.param_groups, highest, strict=True):
                wanted = top * factor if self._found_rate is None else self._found_rate
                if wanted != top:
                    for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                        group[key] *= wanted / top
            scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
            if self.make_optimizer is not None and given != highest:
                self.note("learning rate", f"max_lr {highest[0]:g} of OneCycleLR; the optimizer's lr has no effect")
        self._check_horizon(scheduler)
        return {"scheduler": scheduler, "interval": self.lr_interval}

    def _plateau(self, scheduler: ReduceLROnPlateau) -> dict[str, Any]:
        """Has ReduceLROnPlateau follow a metric of the validation, in the direction that is better."""
        monitor = str(getattr(scheduler, "monitor", None) or self.monitor)
        # These metrics grow with quality, where the scheduler's default is to follow a loss.
        grows = monitor.startswith("val/") and not monitor.endswith("error_percent")
        if grows and scheduler.mode == "min":
            scheduler.mode, scheduler.mode_worse, scheduler.best = "max", -torch.inf, -torch.inf
        self.note("learning rate", f"falls when {monitor} no longer {'rises' if scheduler.mode == 'max' else 'falls'}")
        # on_validation_end steps it. Lightning would do so at the end of each epoch, with or without a new value.
        never = 2**62 if self.trainer.enable_validation else 1
        return {"scheduler": scheduler, "interval": "epoch", "monitor": monitor, "frequency": never}

    def on_validation_end(self) -> None:
        """Steps ReduceLROnPlateau by its metric."""
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                known = self.trainer.callback_metrics
                if config.monitor not in known:
                    raise UsageError(
                        f"lr_scheduler: there is no metric '{config.monitor}' to follow; known: {', '.join(known)}"
                    )
                config.scheduler.step(float(known[config.monitor]))

    def _settle_schedule(self) -> None:
        """Checks a checkpoint's schedule, or takes over a learning rate that was found, when training starts."""
        if self._rate_is_new:  # optimizer and schedulers, warm-up included, start from the rate that was found
            self._rate_is_new = False
            restart_optimizers(self.trainer)
        elif self.make_lr_scheduler is not None and self.trainer.ckpt_path:
            self._check_horizon(self.trainer.lr_scheduler_configs[0].scheduler)

    def _check_horizon(self, scheduler: Any) -> None:
        names = ("total_iters", "total_steps", "T_max")
        horizon = next((int(getattr(scheduler, name)) for name in names if hasattr(scheduler, name)), None)
        if horizon is None:
            return
        length = self.trainer.estimated_stepping_batches if self.lr_interval == "step" else self.trainer.max_epochs
        if length in (None, -1, float("inf")) or int(length or 0) == horizon:
            return
        kind = type(scheduler).__name__
        text = f"the learning rate's schedule ({kind}) ends at {self.lr_interval} {horizon}, the run at {length}"
        if int(length or 0) > horizon and kind == "OneCycleLR":
            remedy = f"set total_steps of lr_scheduler to {length}"
            if self.trainer.ckpt_path:
                remedy += ", and start again without the checkpoint, which brings its own schedule"
            raise UsageError(f"{text}, and it cannot continue beyond its end: {remedy}")
        self.note("schedule", text)
