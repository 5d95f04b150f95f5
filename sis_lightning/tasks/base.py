"""The base of all tasks: the backbone, training and evaluation steps, metrics over whole splits, and `meta`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, Self

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric

from sis_lightning.backbones import Backbone, backbone_config
from sis_lightning.backbones.weights import load_backbone_weights, load_model_weights
from sis_lightning.datasets.base import Batch
from sis_lightning.datasets.images import denormalize, normalize
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.errors import DataError, UsageError
from sis_lightning.late_values import LateValue
from sis_lightning.lightning_internals import attached_trainer, replace_hparams
from sis_lightning.models.export import Exportable
from sis_lightning.option_effects import Effect
from sis_lightning.tasks.arguments import BackboneLike, LRSchedulerLike, MetaLike, OptimizerLike, as_callable, as_plain
from sis_lightning.tasks.inference import Inference, Outputs
from sis_lightning.tasks.names import NAMED_FIELDS, require_same_names
from sis_lightning.tasks.optimization import Optimization

#: Key of a checkpoint under which the class of its task stands.
TASK_CLASS = "task_class"

_deferred: ContextVar[bool] = ContextVar("deferred", default=False)


@contextlib.contextmanager
def weights_deferred() -> Iterator[None]:
    """Tasks that are built inside load `weights` and `backbone_weights` only when a fit begins without a checkpoint.

    A run that is resumed or tested needs neither, and the files may be gone by then.
    """
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


@dataclasses.dataclass(frozen=True)
class _Watched:
    """The loss of a step that is still to be checked: its parts and their sum, and where it comes from."""

    values: LateValue
    parts: tuple[str, ...]
    names: list[str]
    step: int
    epoch: int


class BaseTask(Optimization, Inference, ABC):
    """A network on one of the backbones, with its loss, its metrics and its predictions.

    A task works with any `lightning.Trainer` and any loader whose batches are mappings of this format:

    - `image`: uint8 (N, C, H, W), or a list of (C, H, W) if the sizes differ. The task normalises it by the mean and
      standard deviation in `meta`. Floating-point images are taken as normalised already.
    - `name`: names of the images, a list of str; optional.
    - the targets, which each task describes.

    A DataModule of this package hands the task a `DatasetMeta` (`set_meta`). The task keeps it in its hyperparameters,
    so that checkpoints hold it, and never asks the DataModule for anything else.

    Args:
        backbone: The backbone, given as the name of a file in `configs/backbones/` such as `"sis50"`, a mapping of
            `BackboneConfig`'s fields, or a `BackboneConfig`.
        num_classes: Number of classes.
        operator: Operator that replaces the backbone's own, such as `"interactive1"`; None keeps it.
        in_channels: Number of channels of the images. If it is not 3, the `mean` and `std` of ImageNet are repeated
            over the channels (averaged for one channel), unless the `meta` of the data set has others.
        optimizer: Function of the parameters that returns an optimizer, such as
            `functools.partial(torch.optim.AdamW, lr=1e-3)`, or a mapping with `class_path` and `init_args`. None: SGD
            with learning rate 0.01, momentum 0.9 and weight decay 1e-4, the optimizer of the paper's recipes at a
            learning rate that is safe for small batches.
        lr_scheduler: Function of the optimizer that returns a scheduler, or a mapping as for `optimizer`. None keeps
            the learning rate constant. `ReduceLROnPlateau` takes a step after each validation, on the metric that its
            `monitor` names (by default the primary metric of the task).
        lr_interval: When the scheduler takes a step: after each `epoch` or after each training `step`.
        lr_batch_size: Number of images per step for which the learning rate is meant. With any other number, the rate
            is scaled in proportion (the linear rule, Goyal et al. 2017). None: the rate is used as it is.
        norm_weight_decay: Whether the optimizer's weight decay also acts on the scales and shifts of norm layers.
        warmup_steps: Number of steps over which the learning rate rises linearly from `warmup_start` times its value to
            its full value.
        warmup_start: Factor of the learning rate at the first step of the warm-up; above 0 and at most 1.
        backbone_weights: Initial weights of the backbone: `timm:NAME`, `torchvision:WEIGHTS`, a file with a state dict,
            or a checkpoint or run directory of any task of this package. In a configuration also `run:TASK`, such as
            `run:cls_imagenet`: the finished run of that task with the same backbone and seed 0, in
            `runs/TASK/BACKBONE/seed0`. None: random weights.
        weights: Checkpoint or run directory of the same kind of task, whose weights initialise the whole network. If
            its number of classes differs, the layers that depend on this number keep their random weights.
        freeze_backbone: Whether the backbone is frozen: neither its parameters nor its norm statistics change.
        compile_mode: Mode of `torch.compile` for the backbone: `default`, `reduce-overhead` (CUDA graphs) or
            `max-autotune`. None: not compiled.
        meta: Names, numbers and conventions of the data set (`DatasetMeta`, or the mapping of its `to_dict`). None:
            classes are numbered, and images are normalised by ImageNet's statistics.

    Attributes:
        meta: The `DatasetMeta` in use.
        monitor: Metric that selects the best checkpoint, such as `val/miou`. The maximum is the best.
        notes: Remarks for the reader of the run, by a short label.

    Raises:
        UsageError: If an argument is invalid, or data and task do not fit each other. It is also a ValueError.
        DataError: If weights are missing or of another network, or the loss is not finite.
    """

    #: Effect of each option; see `sis_lightning.option_effects`.
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "backbone": Effect.NETWORK,
        "num_classes": Effect.NETWORK,
        "operator": Effect.NETWORK,
        "in_channels": Effect.NETWORK,
        "optimizer": Effect.RESULT,
        "lr_scheduler": Effect.RESULT,
        "lr_interval": Effect.RESULT,
        "lr_batch_size": Effect.RESULT,
        "norm_weight_decay": Effect.RESULT,
        "warmup_steps": Effect.RESULT,
        "warmup_start": Effect.RESULT,
        "backbone_weights": Effect.RESULT,
        "weights": Effect.RESULT,
        "freeze_backbone": Effect.RESULT,
        "compile_mode": Effect.NUMERICS,
        "meta": Effect.NOTHING,
    }
    #: Metric that selects the best checkpoint, unless the data set has a primary metric of its own.
    primary_metric: ClassVar[str]
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    #: Keys of a training batch besides `image`.
    target_keys: ClassVar[tuple[str, ...]] = ()
    model: nn.Module
    meta: DatasetMeta

    def __init__(
        self,
        backbone: BackboneLike,
        num_classes: int,
        *,
        operator: str | None = None,
        in_channels: int = 3,
        optimizer: OptimizerLike | None = None,
        lr_scheduler: LRSchedulerLike | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        lr_batch_size: int | None = None,
        norm_weight_decay: bool = True,
        warmup_steps: int = 0,
        warmup_start: float = 0.001,
        backbone_weights: str | None = None,
        weights: str | None = None,
        freeze_backbone: bool = False,
        compile_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = None,
        meta: MetaLike | None = None,
    ) -> None:
        super().__init__()
        overrides = {"operator": operator} if operator else {}
        self.backbone_config = backbone_config(backbone, **overrides)
        if num_classes < 1:
            raise UsageError(f"num_classes is {num_classes}, must be at least 1")
        if in_channels < 1:
            raise UsageError(f"in_channels is {in_channels}, must be at least 1")
        if warmup_steps < 0 or not 0 < warmup_start <= 1:
            raise UsageError(
                f"warmup_steps is {warmup_steps} (at least 0), warmup_start {warmup_start} (above 0, at most 1)"
            )
        if lr_batch_size is not None and lr_batch_size < 1:
            raise UsageError(f"lr_batch_size is {lr_batch_size}, must be at least 1, or None")
        if weights and backbone_weights:
            raise UsageError("weights and backbone_weights are both given, but weights holds a backbone: give one")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.make_optimizer = None if optimizer is None else as_callable("optimizer", optimizer)
        self.make_lr_scheduler = None if lr_scheduler is None else as_callable("lr_scheduler", lr_scheduler)
        self.lr_interval, self.lr_batch_size = lr_interval, lr_batch_size
        self.norm_weight_decay = norm_weight_decay
        self.warmup_steps, self.warmup_start = warmup_steps, warmup_start
        self.backbone_weights, self.weights = backbone_weights, weights
        self.freeze_backbone, self.compile_mode = freeze_backbone, compile_mode
        self._given_meta = meta
        self._base_options = {
            **{"in_channels": in_channels, "lr_interval": lr_interval, "lr_batch_size": lr_batch_size},
            **{"warmup_steps": warmup_steps, "warmup_start": warmup_start, "backbone_weights": backbone_weights},
            **{"norm_weight_decay": norm_weight_decay},
            **{"weights": weights, "freeze_backbone": freeze_backbone, "compile_mode": compile_mode},
            **{"optimizer": optimizer, "lr_scheduler": lr_scheduler},
        }
        self._found_rate: float | None = None
        self._rate_is_new = False
        self._compiled = False
        self._watched: _Watched | None = None
        self.notes: dict[str, str] = {}
        self.monitor = f"val/{self.primary_metric}"

    def finish(self, model: nn.Module) -> None:
        """Takes the network; the last call of a subclass's `__init__`.

        Args:
            model: Network with one `Backbone` in it.
        """
        # Convolutions are faster in this layout, on CPUs and GPUs alike; images are brought to it as well.
        self.model = model.to(memory_format=torch.channels_last)
        if self.freeze_backbone:
            self.backbone.requires_grad_(False)
        self.tested = SumMetric()
        self.save_hyperparameters()
        plain = {**self._base_options, **self.hparams}
        plain["backbone"], plain["operator"] = dataclasses.asdict(self.backbone_config), None
        for key in ("optimizer", "lr_scheduler"):
            plain[key] = as_plain(plain.get(key))
        plain["meta"] = None
        # Keys with an underscore are of LightningCLI, which would build the task again from files.
        plain = {key: value for key, value in plain.items() if not key.startswith("_") and not callable(value)}
        replace_hparams(self, plain)
        self._given_names: set[str] = set()
        self._trained_meta: DatasetMeta | None = None
        self._take_meta(self._default_meta())
        if self._given_meta is not None:
            self.set_meta(self._given_meta)
        self._weights_pending = bool(self.weights or self.backbone_weights)
        if not _deferred.get():
            self.load_start_weights()
        self.train(self.training)

    def _default_meta(self) -> DatasetMeta:
        mean, std = DatasetMeta.mean, DatasetMeta.std
        if self.in_channels == 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        else:
            mean, std = (tuple(itertools.islice(itertools.cycle(v), self.in_channels)) for v in (mean, std))
        return DatasetMeta(class_names=tuple(map(str, range(self.num_classes))), mean=mean, std=std)

    # For subclasses to define.

    @abstractmethod
    def build_evaluator(self) -> Metric:
        """A new metric over one split, as `meta` asks for: `compute` returns values by name."""

    @abstractmethod
    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the parts of the loss.

        Args:
            batch: A training batch with normalised images.

        Returns:
            Scalars by name; their sum is minimised.
        """

    @abstractmethod
    def evaluate(self, batch: Batch, metrics: Metric) -> Outputs:
        """Predicts an evaluation batch with normalised images, and updates metrics with it.

        Returns:
            What `infer` returns.
        """

    @abstractmethod
    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Draws the first images of an evaluation batch, with ground truth and prediction.

        Args:
            batch: The batch as the loader gave it.
            outputs: What `infer` returned for it.
        """

    def exportable(self, height: int, width: int) -> Exportable:
        """Describes the network for `sis_lightning.export`, with images of this size as an example."""
        network: Exportable = self.model.exportable(height, width)  # type: ignore[operator]
        mean, std = list(self.meta.mean), list(self.meta.std)
        low, high = self.meta.value_range or (0, 1)
        values = f"values minus {low:g}, divided by {high - low:g}" if self.meta.value_range else "values from 0 to 1"
        return dataclasses.replace(
            network,
            preprocessing=f"{self._resizing() or network.preprocessing}; then {values}, minus mean {mean}, "
            f"divided by standard deviation {std}",
            metadata={"task": type(self).__name__, "classes": list(self.class_names), "meta": self.meta.to_dict()},
        )

    def _resizing(self) -> str:
        """Describes the resizing in `predict`; empty if there is none."""
        return ""

    # Data.

    def set_meta(self, meta: DatasetMeta | Mapping[str, Any]) -> None:
        """Takes what the task must know of a data set, and keeps it in `hparams["meta"]`.

        Args:
            meta: Names, numbers and conventions. If it has no class names (as of a folder of images), the names that
                the task knows already are kept; likewise for keypoints.

        Raises:
            UsageError: If the number of classes or channels is not that of the network, or the names are not those, in
                the same order, on which the weights of a loaded checkpoint were trained.
        """
        meta = self._as_meta(meta)
        given = {names for names in NAMED_FIELDS if getattr(meta, names)}
        for names, fields in NAMED_FIELDS.items():
            if names not in given:
                meta = dataclasses.replace(meta, **{key: getattr(self.meta, key) for key in fields})
        if len(meta.class_names) != self.num_classes:
            raise UsageError(
                f"the data has {len(meta.class_names)} classes, but the network {self.num_classes}: "
                f"set num_classes to {len(meta.class_names)}"
            )
        if len(meta.mean) != self.in_channels or len(meta.std) != self.in_channels:
            raise UsageError(
                f"the data has images of {len(meta.mean)} channels, but the network takes {self.in_channels}: "
                f"set in_channels to {len(meta.mean)}, or mean and std of meta to {self.in_channels} values"
            )
        if self._trained_meta is not None:
            require_same_names(self._trained_meta, meta, given)
        self._given_names |= given
        self._take_meta(meta)

    def _as_meta(self, meta: DatasetMeta | Mapping[str, Any]) -> DatasetMeta:
        if isinstance(meta, DatasetMeta):
            return meta
        return DatasetMeta.from_dict({"mean": self.meta.mean, "std": self.meta.std, **meta})

    def _take_meta(self, meta: DatasetMeta) -> None:
        """Keeps a complete description; default names stay out of the hyperparameters, to be told from given ones."""
        unnamed: dict[str, Any] = {
            key: [] for names, fields in NAMED_FIELDS.items() if names not in self._given_names for key in fields
        }
        self.hparams["meta"] = {**meta.to_dict(), **unnamed}
        if meta == self.__dict__.get("meta"):
            return
        self.meta = meta
        self.monitor = f"val/{meta.primary_metric or self.primary_metric}"
        self.val_metrics = self.build_evaluator().to(self.device)
        self.test_metrics = self.build_evaluator().to(self.device)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.meta.class_names

    def normalize(self, images: Tensor) -> Tensor:
        """Normalises images by mean and standard deviation of the data set.

        Args:
            images: Images (..., C, H, W), uint8; floating-point images are taken as normalised already.

        Returns:
            Images of the same shape in the network's floating-point type.

        Raises:
            UsageError: If they have another number of channels than the network takes.
        """
        if images.ndim < 3 or images.shape[-3] != self.in_channels:
            raise UsageError(
                f"an image has the shape {tuple(images.shape)}, but the network takes {self.in_channels} channels: "
                f"(…, {self.in_channels}, H, W)"
            )
        if not images.is_floating_point():
            images = normalize(images, self.meta.mean, self.meta.std)
        return images.to(self.dtype)

    def normalized(self, batch: Batch) -> Batch:
        """A batch with normalised images; stacked ones in the memory layout `channels_last`."""
        images = self._require(batch, "image")
        if isinstance(images, Tensor):
            # The layout first: bytes are moved faster than floats, and take a quarter of their memory.
            return {**batch, "image": self.normalize(images.contiguous(memory_format=torch.channels_last))}
        return {**batch, "image": [self.normalize(image) for image in images]}

    def displayable(self, image: Tensor) -> Tensor:
        """An image (C, H, W), normalised or not, as uint8 on the CPU."""
        if image.dtype == torch.uint8:
            return image.detach().cpu()
        scaled = denormalize(image.detach(), self.meta.mean, self.meta.std)
        return (255 * scaled).round().to(torch.uint8).cpu()

    def _require(self, batch: Any, *keys: str) -> Any:
        """The value of the first key, after a check that all are there."""
        if not isinstance(batch, Mapping) or any(key not in batch for key in keys):
            kind = (
                f"has {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
            )
            wanted = " and ".join(f"'{key}'" for key in dict.fromkeys((*keys, *self.target_keys)))
            raise UsageError(
                f"the batch {kind}, but {type(self).__name__} needs a mapping with {wanted}\n"
                f"  help(sis_lightning.{type(self).__name__}) describes the format."
            )
        return batch[keys[0]]

    @staticmethod
    def names_of(batch: Batch) -> list[str]:
        """Names of the images of a batch; running numbers if the loader gives none."""
        names = batch.get("name")
        return [str(name) for name in (names if names is not None else range(len(batch["image"])))]

    # Weights.

    @property
    def backbone(self) -> Backbone:
        """The one backbone inside `model`, with the same keys and shapes in every task."""
        return next(module for module in self.model.modules() if isinstance(module, Backbone))

    def load_start_weights(self) -> None:
        """Loads `weights` or `backbone_weights`, unless that was done already, and keeps a note of it.

        Raises:
            UsageError: If timm or torchvision does not have such weights.
            DataError: If they are missing, damaged or of another network.
        """
        if not self._weights_pending:
            return
        self._weights_pending = False
        if self.weights:
            self.note("weights", str(load_model_weights(self.model, self.weights)))
        elif self.backbone_weights:
            self.note("backbone weights", str(load_backbone_weights(self.backbone, self.backbone_weights)))

    def keep_own_weights(self) -> None:
        """Leaves `weights` and `backbone_weights` unread: a checkpoint brings the weights."""
        self._weights_pending = False

    def start_from(self, state_dict: Mapping[str, Tensor], name: str) -> None:
        """Loads the weights of a whole task of the same kind, all but the last layers if the classes differ.

        Args:
            state_dict: The state dict of the task.
            name: Where it comes from, for errors and notes.

        Raises:
            DataError: If the weights are of another network.
        """
        self._weights_pending = False
        try:
            self.note("weights", str(load_model_weights(self.model, state_dict)).replace("the state dict", name))
        except DataError as error:
            reason, _, hint = str(error).replace("the state dict", "it").partition("\n  Only the operators differ")
            if hint:
                reason += (
                    "\n  Only the operators differ, which a trained network cannot exchange. A new task takes all "
                    "other\n  weights of the backbone by "
                    "sis_lightning.load_backbone_weights(task.backbone, path, strict=False)"
                )
            raise DataError(f"{name}: {reason}") from None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **options: Any) -> Self:
        """Builds the task that a checkpoint holds, with its weights and its `meta`.

        `sis_lightning.load` finds the class by itself and also takes a run's folder.

        Args:
            checkpoint_path: File that a Trainer or `sis-lightning fit` wrote.
            arguments: Further positional arguments of `LightningModule.load_from_checkpoint`, such as `map_location`.
            options: Further arguments of `LightningModule.load_from_checkpoint`, and constructor arguments to change.
        """
        options.setdefault("weights_only", True)
        with weights_deferred():
            task: Self = super().load_from_checkpoint(checkpoint_path, *arguments, **options)
        task._weights_pending = False
        return task

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the checkpoint's `meta` if the data has no class names of its own.

        Raises:
            UsageError: If the data has other names of classes or keypoints than the checkpoint, or in another order.
        """
        self._weights_pending = False
        saved = checkpoint.get("hyper_parameters", {}).get("meta")
        if not saved:
            return
        trained = DatasetMeta.from_dict(saved)
        if "class_names" in self._given_names:
            require_same_names(trained, self.meta, self._given_names)
        else:
            self.set_meta(trained)
        self._trained_meta = trained

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the class of the task; refuses weights that are not finite, so that the last good ones stay."""
        self._require_finite_loss()
        checkpoint[TASK_CLASS] = f"{type(self).__module__}.{type(self).__qualname__}"
        # With the statistics of batch norm: one that overflows leaves the loss of training finite.
        broken = [name for name, value in self.state_dict().items() if not torch.isfinite(value).all()]
        if broken:
            raise self._not_finite(f"{len(broken)} weights, such as {broken[0]}")

    # Training.

    def check_targets(self, batch: Batch) -> None:
        """Checks the targets of a training batch, as far as that takes no time: shapes, and values on the CPU.

        Args:
            batch: A training batch as the loader gave it, with all keys.

        Raises:
            UsageError: If a target does not fit the images or the number of classes.
        """

    def setup(self, stage: str) -> None:
        """Compiles the backbone if asked to; loads deferred weights, unless a checkpoint brings them."""
        if self.compile_mode and not self._compiled:
            self.backbone.compile(mode=self.compile_mode)
            self._compiled = True
        if stage == "fit":
            self.load_start_weights()

    def train(self, mode: bool = True) -> Self:
        """Sets training or evaluation mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.training = False
        return self

    def _frozen(self) -> list[nn.Module]:
        """Modules that stay in evaluation mode."""
        if not hasattr(self, "model"):
            return []
        return [*getattr(self.model, "frozen", []), *(self.backbone.modules() if self.freeze_backbone else [])]

    def on_fit_start(self) -> None:
        """Switches to training mode, since `sis_lightning.load` returns tasks in evaluation mode."""
        if not self.training:
            self.train()
        for module in self._frozen():  # until on_train_start, so that Lightning does not warn about them
            module.training = True

    def on_train_start(self) -> None:
        """Checks the schedule that a checkpoint brought; takes over a learning rate that was found."""
        for module in self._frozen():
            module.training = False
        self._settle_schedule()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the summed loss, and checks that it is finite."""
        self._require(batch, "image", *self.target_keys)
        self.check_targets(batch)
        size = len(batch["image"])
        try:
            parts = self.training_loss(self.normalized(batch))
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"batch norm needs more than one value per channel, but a device has {size} image(s) per step:\n"
                f"  set batch_size to at least {2 * self.trainer.world_size}, or the norm of the backbone to gn"
            ) from None
        loss = torch.stack(list(parts.values())).sum()
        self._watch(loss, parts, self.names_of(batch)[:3])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        if len(parts) > 1:
            self.log_dict({f"train/{key}": value.detach() for key, value in parts.items()}, batch_size=size)
        return loss

    def _watch(self, loss: Tensor, parts: Mapping[str, Tensor], names: list[str]) -> None:
        """Checks the loss of the step before, and, where that needs no waiting, of this step."""
        self._require_finite_loss()
        values = LateValue(torch.stack([*parts.values(), loss]).detach().float())
        self._watched = _Watched(values, tuple(parts), names, self.global_step, self.current_epoch)
        if not self._reads_late:
            self._require_finite_loss()

    @property
    def _reads_late(self) -> bool:
        """Whether reading a value would wait for an accelerator that has more steps to do."""
        return self.device.type != "cpu"

    def _require_finite_loss(self) -> None:
        """Raises DataError if the loss that was watched last is not finite."""
        watched, self._watched = self._watched, None
        if watched is None:
            return
        values = watched.values.read()
        if not torch.isfinite(values).all():
            parts = ", ".join(f"{key} {value}" for key, value in zip(watched.parts, values.tolist(), strict=False))
            what = f"the loss ({parts}) on {', '.join(watched.names)}, …"
            raise self._not_finite(what, watched.step, watched.epoch)

    def on_train_epoch_end(self) -> None:
        """Checks the loss of the last step."""
        self._require_finite_loss()

    def _not_finite(self, what: str, step: int | None = None, epoch: int | None = None) -> DataError:
        step, epoch = (self.global_step if step is None else step), (self.current_epoch if epoch is None else epoch)
        trainer = attached_trainer(self)
        callbacks: Any = getattr(trainer, "callbacks", [])
        saved = next((path for callback in callbacks if (path := getattr(callback, "last_good", None))), None)
        remedy = "Try a lower learning rate, or gradient clipping (gradient_clip_val 10 of the Trainer)."
        if trainer is not None and trainer.precision == "16-true":
            remedy = "Half precision rounds small numbers, such as the eps of Adam, to 0: use 16-mixed or bf16-true."
        return DataError(
            f"not finite at step {step} (epoch {epoch}): {what}\n"
            f"  last good checkpoint: {saved or 'none was written yet'}\n  {remedy}"
        )

    # Evaluation.

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Outputs]:
        """Predicts a batch, and updates the validation metrics."""
        return {"outputs": self.evaluate(self.normalized(batch), self.val_metrics)}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Outputs]:
        """Predicts a batch, and updates the test metrics."""
        normalized = self.normalized(batch)
        self.tested.update(len(batch["image"]))
        return {"outputs": self.evaluate(normalized, self.test_metrics)}

    def on_validation_epoch_start(self) -> None:
        """Resets the metrics: an interrupted epoch leaves them half filled."""
        self.val_metrics.reset()

    def on_test_epoch_start(self) -> None:
        """Resets the metrics and the number of tested images: an interrupted epoch leaves them half filled."""
        self.test_metrics.reset()
        self.tested.reset()

    def on_validation_epoch_end(self) -> None:
        """Computes and logs the validation metrics once over the split."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Computes and logs the test metrics once over the split; counts its images in `tested_images`."""
        self.tested_images = int(self.tested.compute())
        self.tested.reset()
        self._log_metrics("test", self.test_metrics)

    def _log_metrics(self, split: str, metrics: Metric) -> None:
        values = {f"{split}/{key}": value for key, value in metrics.compute().items()}
        metrics.reset()
        displayed = self.monitor.partition("/")[2]
        for key, value in values.items():
            # Every rank computed the same from all ranks' counts.
            value = torch.as_tensor(value, dtype=torch.float32)
            self.log(key, value, prog_bar=key == f"{split}/{displayed}", sync_dist=True)

    # Prediction.

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[Any]:
        """Predicts a batch.

        Returns:
            One `Prediction` for each image, in order.
        """
        return self.predictions(batch, self.infer(self.normalized(batch)))
