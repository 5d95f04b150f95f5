"""Semantic segmentation: DeepLabv3+ or any other decoder of segmentation-models-pytorch on our backbones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import segmentation_models_pytorch as smp
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from sis_lightning.datasets.base import Batch
from sis_lightning.datasets.constants import VOID
from sis_lightning.errors import DataError, UsageError, nearest
from sis_lightning.evaluation import IoUEvaluator
from sis_lightning.machine import free_memory
from sis_lightning.models import Segmenter
from sis_lightning.models.complexity import peak_activations
from sis_lightning.option_effects import Effect
from sis_lightning.tasks.arguments import BackboneLike
from sis_lightning.tasks.base import BaseTask
from sis_lightning.tasks.inference import Outputs
from sis_lightning.tasks.predictions import SegmentationPrediction, captioned
from sis_lightning.tasks.targets import class_weight_tensor, require_labels, stacked_images

#: Number of pixels above which `infer` predicts an image in tiles, and metrics require that the memory suffices.
_TILED = 16_000_000
#: Side of a tile, and the margin of each of its sides that is predicted with the neighbouring tile, in px.
_TILE, _MARGIN = 2048, 256


_focal = smp.losses.FocalLoss(mode="multiclass", ignore_index=VOID, reduction="sum")


def _focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """SMP's focal loss; its own mean is not a number if there are only void pixels."""
    loss: Tensor = _focal(logits, target) / (target != VOID).sum().clamp_min(1)
    return loss


#: Losses by name.
_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "dice": smp.losses.DiceLoss(mode="multiclass", ignore_index=VOID),
    "focal": _focal_loss,
}


def _pixels(image: Tensor) -> int:
    return image.shape[-2] * image.shape[-1]


class SegmentationTask(BaseTask):
    """Semantic segmentation, scored by the mIoU over the whole split.

    Batches are those of `BaseTask`, with the target `mask`: class ids (N, H, W), uint8, 255 where nothing is annotated
    (void), or a list of (H, W) if the sizes differ. Evaluation takes one image at a time at its own size, so that the
    metrics do not depend on the batch size. `predict` returns `SegmentationPrediction`.

    Args:
        backbone: The backbone, given as the name of a file in `configs/backbones/` such as `"sis50"`, a mapping of
            `BackboneConfig`'s fields, or a `BackboneConfig`. It must have four stages and the `imagenet` stem.
        num_classes: Number of classes K including background, in 2…255.
        architecture: Name of the network in segmentation-models-pytorch: `deeplabv3plus`, `unet`, `fpn`, `upernet`, ….
        output_stride: Output stride of the backbone: 8 or 16 for DeepLab, 32 for decoders that support no other.
        decoder: Further arguments of the architecture's class in segmentation-models-pytorch, such as
            `{"decoder_channels": 256}`.
        background_weight: Weight of class 0 (background) in the loss, at least 0. All other classes have weight 1.
        class_weights: Weight of each class in the loss (K values), in place of `background_weight`.
        losses: Weight of each part of the loss: `cross_entropy`, `dice` (Milletari et al. 2016) and `focal` (Lin et al.
            2017, gamma 2), the latter two as in segmentation-models-pytorch, such as `{"cross_entropy": 1, "dice": 1}`.
            Class weights apply to the cross-entropy alone. None: the cross-entropy.
        training: Further arguments of `BaseTask`: `operator`, `in_channels`, `optimizer`, `lr_scheduler`,
            `lr_interval`, `lr_batch_size`, `warmup_steps`, `warmup_start`, `backbone_weights`, `weights`,
            `freeze_backbone`, `compile_mode` and `meta`.

    Raises:
        UsageError: If an argument is invalid. It is also a ValueError.
    """

    primary_metric = "miou"
    target_keys = ("mask",)
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "architecture": Effect.NETWORK,
        "output_stride": Effect.NETWORK,
        "decoder": Effect.NETWORK,
        "background_weight": Effect.RESULT,
        "class_weights": Effect.RESULT,
        "losses": Effect.RESULT,
    }
    model: Segmenter
    class_weight: Tensor
    _bytes_per_pixel: float | None = None

    def __init__(
        self,
        backbone: BackboneLike,
        num_classes: int,
        architecture: str = "deeplabv3plus",
        output_stride: int = 16,
        decoder: dict[str, Any] | None = None,
        background_weight: float = 1.0,
        class_weights: Sequence[float] | None = None,
        losses: dict[str, float] | None = None,
        **training: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **training)
        if not 2 <= num_classes <= VOID or background_weight < 0:
            raise UsageError(
                f"num_classes is {num_classes} (2 to {VOID}: mask ids are bytes, and {VOID} is void), "
                f"background_weight {background_weight} (at least 0)"
            )
        if class_weights is not None and background_weight != 1:
            raise UsageError("background_weight and class_weights both set the weight of class 0: give one of them")
        weight = class_weight_tensor(class_weights or [background_weight] + [1.0] * (num_classes - 1), num_classes)
        self.register_buffer("class_weight", weight, persistent=False)
        self.losses = {"cross_entropy": 1.0} if losses is None else dict(losses)
        for name, share in self.losses.items():
            if name not in _LOSSES:
                raise UsageError(f"losses: there is no '{name}': {nearest(name, _LOSSES)}")
            if not share > 0:
                raise UsageError(f"losses: the weight of {name} is {share}, must be above 0")
        if not self.losses:
            raise UsageError("losses is empty: give at least one, such as {cross_entropy: 1}")
        model = Segmenter(
            self.backbone_config,
            num_classes,
            architecture,
            output_stride=output_stride,
            in_channels=self.in_channels,
            decoder=decoder,
        )
        self.finish(model)

    def build_evaluator(self) -> Metric:
        """IoU of each class and their mean over a split."""
        return IoUEvaluator(self.class_names, VOID)

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images (N, C, H, W) of any size to logits (N, num_classes, H, W)."""
        logits: Tensor = self.model(images)
        return logits

    def check_targets(self, batch: Batch) -> None:
        """Checks that the images are of one size, and the masks of the same.

        Args:
            batch: A training batch.

        Raises:
            UsageError: If they are not.
        """
        images, masks = stacked_images(batch), batch["mask"]
        want = (len(images), *images.shape[-2:])
        if not isinstance(masks, Tensor) or masks.shape != want:
            shape = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
            raise UsageError(f"mask is {shape}, must be a tensor {want}, a class id for each pixel of the images")

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the parts of the loss over all pixels that are not void; 0 if all are.

        Args:
            batch: `image` (N, C, H, W), normalised, and `mask` (N, H, W).
        """
        # Pixels as rows, the order in memory of channels_last: half the time of the image-shaped form on a CPU.
        logits = self(batch["image"]).permute(0, 2, 3, 1).reshape(-1, self.num_classes)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target, weight = batch["mask"].long().reshape(-1), self.class_weight.to(logits.dtype)
        try:
            total = F.cross_entropy(logits, target, weight, ignore_index=VOID, reduction="sum")
        except IndexError:
            require_labels(target[target != VOID], 0, self.num_classes - 1)
            raise
        weights = weight[target.where(target != VOID, 0)] * (target != VOID)
        parts = {"cross_entropy": total / weights.sum().clamp_min(1e-6)}
        shape = (len(batch["image"]), -1, self.num_classes)
        for name in self.losses.keys() - parts.keys():
            # Softmax and reshaping are SMP's: it takes (N, K, pixels) and (N, pixels).
            parts[name] = _LOSSES[name](logits.view(shape).transpose(1, 2), target.view(shape[:2]))
        return {name: share * parts[name] for name, share in self.losses.items()}

    def infer(self, batch: Batch) -> Outputs:
        """Predicts `mask` (H, W), uint8, of each image: the most probable class of every pixel.

        Images of more than 16 megapixels are predicted in tiles of at most 2048×2048 px that overlap by 512 px, since
        as a whole they would fill the memory.
        """
        return [
            {"mask": self._tiled(image) if _pixels(image) > _TILED else self._whole(image)} for image in batch["image"]
        ]

    def _whole(self, image: Tensor) -> Tensor:
        return self.model.class_map(image[None])[0]

    def _tiled(self, image: Tensor) -> Tensor:
        """The mask of a large image, in tiles; each pixel has at least 256 px of the image around it in its tile."""
        height, width = image.shape[-2:]
        mask = torch.empty(height, width, dtype=torch.uint8, device=image.device)
        step = _TILE - 2 * _MARGIN
        for top, left in itertools.product(range(0, height, step), range(0, width, step)):
            y, x = (max(0, min(start - _MARGIN, side - _TILE)) for start, side in ((top, height), (left, width)))
            found = self._whole(image[:, y : y + _TILE, x : x + _TILE])
            part = found[top - y : top - y + step, left - x : left - x + step]
            mask[top : top + step, left : left + step] = part
        return mask

    def _require_memory(self, image: Tensor, name: str) -> None:
        """Raises DataError if an image needs more memory than is free; the system would kill the process."""
        if _pixels(image) < _TILED:
            return
        if self._bytes_per_pixel is None:
            probe = torch.zeros(1, *image.shape[:1], 512, 512, dtype=image.dtype, device=image.device)
            self._bytes_per_pixel = peak_activations(lambda: self.model.class_map(probe, at_once=1)) / 512**2
        needed, free = self._bytes_per_pixel * _pixels(image), free_memory(image.device)
        if free is not None and needed > free:
            height, width = image.shape[-2:]
            raise DataError(
                f"{name}: {width}×{height} px need some {needed / 1e9:.1f} GB with this network, but "
                f"{free / 1e9:.1f} GB are free\n  Metrics are computed on whole images: scale them down, or use a "
                "machine with more memory."
            )

    def evaluate(self, batch: Batch, metrics: Metric) -> Outputs:
        """Predicts a batch with `mask`, and adds each image's pixels to the confusion matrix.

        Images of any size are predicted as a whole.

        Raises:
            DataError: If an image is so large that the free memory does not suffice.
        """
        self._require(batch, "image", "mask")
        for image, name in zip(batch["image"], self.names_of(batch), strict=True):
            self._require_memory(image, name)
        outputs: Outputs = [{"mask": self._whole(image)} for image in batch["image"]]
        metrics.update([output["mask"] for output in outputs], list(batch["mask"]))
        return outputs

    def predictions(self, batch: Batch, outputs: Outputs) -> list[SegmentationPrediction]:
        """Makes a `SegmentationPrediction` of each image's mask."""
        return [
            SegmentationPrediction(self.displayable(image), name, output["mask"].cpu(), self.class_names)
            for image, name, output in zip(batch["image"], self.names_of(batch), outputs, strict=True)
        ]

    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Draws up to four rows of image, ground truth and prediction, with the names of the classes in it."""
        rows = []
        for prediction, mask in list(zip(self.predictions(batch, outputs), batch["mask"], strict=True))[:4]:
            truth = dataclasses.replace(prediction, mask=mask.to(torch.uint8).cpu())
            row = [("image", prediction.rgb)]
            for kind, shown in (("ground truth", truth), ("prediction", prediction)):
                present = [i for i in torch.unique(shown.mask).tolist() if 0 < i < self.num_classes]
                names = ", ".join(self.class_names[i] for i in present[:4])
                colors = torch.from_numpy(np.array(shown.colored().convert("RGB"))).permute(2, 0, 1)
                row.append((f"{kind}: {names}" if names else kind, colors))
            rows.append(row)
        return captioned(rows)
