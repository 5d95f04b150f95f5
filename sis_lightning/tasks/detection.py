"""Object detection: Faster R-CNN with a feature pyramid on our backbones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric

from sis_lightning.datasets.base import Batch
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.errors import UsageError
from sis_lightning.evaluation import COCOEvaluator, VOCEvaluator
from sis_lightning.models import Detector
from sis_lightning.models.detector import AnchorStrides, BoxLoss, InitialWeights, Norm
from sis_lightning.option_effects import Effect
from sis_lightning.tasks.arguments import BackboneLike
from sis_lightning.tasks.base import BaseTask
from sis_lightning.tasks.inference import Outputs
from sis_lightning.tasks.predictions import DetectionPrediction, captioned
from sis_lightning.tasks.targets import require_labels


class DetectionTask(BaseTask):
    """Object detection with Faster R-CNN, scored by COCO's 12 metrics or, on Pascal VOC, by VOC's average precision.

    Batches are those of `BaseTask`, with the targets `boxes`, a list of (n, 4): x1, y1, x2, y2 in px of the image, and
    `labels`, a list of (n,), 1…K. Evaluation batches may carry `truth`, a list with one mapping per image (see
    `sis_lightning.evaluation`), which knows crowds, difficult objects and image ids; without it the boxes and labels
    are the ground truth. `predict` returns `DetectionPrediction`.

    Args:
        backbone: The backbone, given as the name of a file in `configs/backbones/` such as `"sis50"`, a mapping of
            `BackboneConfig`'s fields, or a `BackboneConfig`. The default `levels` need four stages.
        num_classes: Number of classes K, without background.
        min_size: Length in px to which the shorter side of an image is resized, unless `max_size` limits it. If several
            are given, such as `[640, 672, 704, 736, 768, 800]`, one is drawn for each training image, and evaluation
            takes the last.
        max_size: Upper limit in px of the longer side of a resized image.
        levels: Names of the backbone's feature maps that the feature pyramid takes, finest first.
        fpn_channels: Number of channels of the feature pyramid.
        fpn_norm: Norm layer after each convolution of the pyramid: `bn`, `syncbn`, `gn` or `none`.
        head_channels: Number of channels of the fully connected layers of the box head.
        head_norm: Norm of the box head. With `none`, the head has two fully connected layers; with any other, it has
            four convolutions with this norm and one fully connected layer.
        anchor_sizes: Sides of the anchors in px: one for each of `levels`, and one for the pyramid's additional
            coarsest level.
        canonical_scale: Side in px of the boxes whose features are pooled at stride 16; larger boxes use coarser
            levels, and smaller ones finer levels (Lin et al. 2017).
        anchor_strides: `exact`: anchors are at multiples of the levels' strides, and their sides are not rounded.
            `rounded`: as torchvision, at multiples of the image's side divided by the map's, without remainder, and
            with sides rounded to whole pixels.
        low_quality_iou: Minimum IoU of an object with the anchors that overlap with it most, for them to be trained for
            it even if another object overlaps more, or none by `detector.rpn_fg_iou_thresh`. None, as in torchvision:
            such anchors are trained at any IoU, for the object that overlaps with them most.
        padding_anchors: Whether anchors beyond an image, in the part of the batch where only larger images are, are
            trained as background.
        roi_aligned: Whether RoIAlign takes pixel centres to be at half coordinates.
        roi_sampling_ratio: Number of sampling points along each side of each of the 7 × 7 bins of a box. 0: as many as
            pixels of the feature map.
        box_loss: `l1`, or `smooth_l1` with a quadratic part up to 1/9, of the boxes of both stages.
        initial_weights: How the pyramid and the heads are initialised, as in `mmdetection` or in `torchvision`; see
            `sis_lightning.models.Detector`.
        detector: Further arguments of torchvision's `FasterRCNN`, such as `{"box_batch_size_per_image": 512}`. Without
            `rpn_post_nms_top_n_train` it is 1000, as in mmdetection; the others have torchvision's defaults.
        freeze_norm: Whether the backbone's batch norm is frozen: it keeps the statistics, scales and shifts of
            `backbone_weights` or `weights`. `statistics`: it keeps the statistics alone, as in mmdetection.
        frozen_stages: Number of the backbone's stages, with the stem before them, that do not train at all.
        shown_score: Minimum score, in 0…1, of the objects that are drawn and that `sis-lightning predict` lists.
        training: Further arguments of `BaseTask`: `operator`, `in_channels`, `optimizer`, `lr_scheduler`,
            `lr_interval`, `lr_batch_size`, `norm_weight_decay`, `warmup_steps`, `warmup_start`,
            `backbone_weights`, `weights`, `freeze_backbone`, `compile_mode` and `meta`.

    Raises:
        UsageError: If an argument is invalid, or norms with random weights were to be frozen. It is also a ValueError.
    """

    primary_metric = "AP"
    target_keys = ("boxes", "labels")
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "min_size": Effect.RESULT,
        "max_size": Effect.RESULT,
        "levels": Effect.NETWORK,
        "fpn_channels": Effect.NETWORK,
        "fpn_norm": Effect.NETWORK,
        "head_channels": Effect.NETWORK,
        "head_norm": Effect.NETWORK,
        "anchor_sizes": Effect.NETWORK,
        "canonical_scale": Effect.NETWORK,
        "anchor_strides": Effect.NETWORK,
        "low_quality_iou": Effect.RESULT,
        "padding_anchors": Effect.RESULT,
        "roi_aligned": Effect.NETWORK,
        "roi_sampling_ratio": Effect.NETWORK,
        "box_loss": Effect.RESULT,
        "initial_weights": Effect.RESULT,
        # Thresholds and numbers of boxes: of all entries, only the coding of boxes changes the meaning of the weights.
        "detector": Effect.RESULT,
        "detector.bbox_reg_weights": Effect.NETWORK,
        "freeze_norm": Effect.RESULT,
        "frozen_stages": Effect.RESULT,
        "shown_score": Effect.NOTHING,
    }
    model: Detector

    def __init__(
        self,
        backbone: BackboneLike,
        num_classes: int,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        levels: Sequence[str] = ("c2", "c3", "c4", "c5"),
        fpn_channels: int = 256,
        fpn_norm: Norm = "bn",
        head_channels: int = 1024,
        head_norm: Norm = "none",
        anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
        canonical_scale: int = 224,
        anchor_strides: AnchorStrides = "exact",
        low_quality_iou: float | None = 0.3,
        padding_anchors: bool = False,
        roi_aligned: bool = True,
        roi_sampling_ratio: int = 0,
        box_loss: BoxLoss = "l1",
        initial_weights: InitialWeights = "mmdetection",
        detector: dict[str, Any] | None = None,
        freeze_norm: bool | Literal["statistics"] = False,
        frozen_stages: int = 0,
        shown_score: float = 0.5,
        **training: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **training)
        for name, frozen in {"freeze_norm": freeze_norm, "frozen_stages": frozen_stages}.items():
            if frozen and not self.backbone_weights and not self.weights:
                raise UsageError(
                    f"{name} keeps what is in backbone_weights or weights, but neither is given:\n"
                    "  random weights would leave the backbone without any norm, or with stages that never train."
                )
        self.shown_score, self.min_size, self.max_size = shown_score, min_size, max_size
        model = Detector(
            self.backbone_config,
            num_classes,
            min_size=min_size,
            max_size=max_size,
            levels=levels,
            fpn_channels=fpn_channels,
            fpn_norm=fpn_norm,
            head_channels=head_channels,
            head_norm=head_norm,
            anchor_sizes=anchor_sizes,
            canonical_scale=canonical_scale,
            anchor_strides=anchor_strides,
            low_quality_iou=low_quality_iou,
            padding_anchors=padding_anchors,
            roi_aligned=roi_aligned,
            roi_sampling_ratio=roi_sampling_ratio,
            box_loss=box_loss,
            initial_weights=initial_weights,
            freeze_norm=freeze_norm,
            frozen_stages=frozen_stages,
            in_channels=self.in_channels,
            detector=detector,
        )
        self.finish(model)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in px of the largest images of the network: detectors pad them to multiples of 32."""
        shorter = self.min_size if isinstance(self.min_size, int) else max(self.min_size)
        height, width = (-(-side // 32) * 32 for side in (shorter, self.max_size))
        return height, width

    def _default_meta(self) -> DatasetMeta:
        names = tuple(str(label) for label in range(1, self.num_classes + 1))
        return dataclasses.replace(super()._default_meta(), class_names=names)

    def build_evaluator(self) -> Metric:
        """VOC's average precision if `meta.protocol` is `voc`, else COCO's 12 metrics and the AP of each class."""
        if self.meta.protocol == "voc":
            return VOCEvaluator(self.class_names)
        ids = self.meta.category_ids or tuple(range(1, self.num_classes + 1))
        limit = self.meta.max_detections
        return COCOEvaluator("bbox", ids, self.meta.backend, class_names=self.class_names, max_detections=limit)

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detects objects in normalised images (C, H, W) of any sizes; in evaluation mode.

        Returns:
            For each image `boxes` (n, 4) in px of the image, `labels` (n,), 1…K, and `scores` (n,), descending.
        """
        found: list[dict[str, Tensor]] = self.model(images)
        return found

    def check_targets(self, batch: Batch) -> None:
        """Checks that each box has a label, 1…K.

        Args:
            batch: A batch with `image`, `boxes` and `labels`.

        Raises:
            UsageError: If boxes or labels have another shape or range.
        """
        for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True):
            if boxes.shape != (len(labels), 4) or labels.ndim != 1:
                raise UsageError(
                    f"boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)} of an image must be (n, 4) and (n,)"
                )
            require_labels(labels, 1, self.num_classes)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the losses of the region proposals (objectness, boxes) and of the box head (classes, boxes)."""
        # With true bfloat16, Lightning has rounded the boxes to it, but torchvision takes no such boxes.
        targets = [
            {"boxes": boxes.to(torch.promote_types(boxes.dtype, torch.float32)), "labels": labels}
            for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True)
        ]
        losses: dict[str, Tensor] = self.model(list(batch["image"]), targets)
        return losses

    def infer(self, batch: Batch) -> Outputs:
        """Predicts `boxes`, `labels` and `scores` of each image, as `forward`, in float32 or float64."""
        return [
            {
                key: value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value
                for key, value in output.items()
            }
            for output in self(list(batch["image"]))
        ]

    def evaluate(self, batch: Batch, metrics: Metric) -> Outputs:
        """Predicts a batch with `truth`, or `boxes` and `labels`, and updates the metrics with it."""
        truth = batch.get("truth")
        if truth is None:
            self._require(batch, "image", "boxes", "labels")
            self.check_targets(batch)
            truth = [
                {"boxes": boxes.cpu().double().numpy(), "labels": labels.cpu().numpy()}
                for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True)
            ]
        outputs = self.infer(batch)
        metrics.update(outputs, truth)
        return outputs

    def predictions(self, batch: Batch, outputs: Outputs) -> list[DetectionPrediction]:
        """Makes a `DetectionPrediction` of each image's boxes."""
        return [
            DetectionPrediction(
                self.displayable(image),
                name,
                **{key: output[key].detach().cpu() for key in ("boxes", "labels", "scores")},
                classes=self.class_names,
                min_score=self.shown_score,
            )
            for image, name, output in zip(batch["image"], self.names_of(batch), outputs, strict=True)
        ]

    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Draws up to four rows of annotated and detected objects, with classes and scores."""
        rows = []
        for index, prediction in enumerate(self.predictions(batch, outputs)[:4]):
            boxes, labels = batch["boxes"][index].cpu().float(), batch["labels"][index].cpu()
            scores = torch.full((len(labels),), torch.nan)
            truth = dataclasses.replace(prediction, boxes=boxes, labels=labels, scores=scores)
            found = prediction.above(self.shown_score)
            rows.append(
                [
                    (f"ground truth: {len(truth.boxes)}", truth.draw()),
                    (f"prediction: {len(found.boxes)}", found.draw()),
                ]
            )
        return captioned(rows, height=4)
