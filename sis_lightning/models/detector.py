"""Object detection: a `Backbone` in Faster R-CNN with a feature pyramid, as in mmdetection or as in torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou, clip_boxes_to_image, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from sis_lightning.backbones import BackboneConfig, create_backbone
from sis_lightning.backbones.resnet import group_norm
from sis_lightning.errors import UsageError, nearest
from sis_lightning.models.export import Exportable

Norm = Literal["bn", "syncbn", "gn", "none"]
AnchorStrides = Literal["exact", "rounded"]
BoxLoss = Literal["l1", "smooth_l1"]
InitialWeights = Literal["mmdetection", "torchvision"]

_NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "bn": nn.BatchNorm2d,
    "syncbn": nn.SyncBatchNorm,
    "gn": group_norm,
    "none": None,
}
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# Arguments of FasterRCNN that Detector sets itself, from arguments of its own.
_SETTLED = {"self", "backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "kwargs"}
_SETTLED |= {"rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor"}
#: Arguments of FasterRCNN, with mmdetection's values where they are not torchvision's.
_OPTIONS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(FasterRCNN.__init__).parameters.items()
    if name not in _SETTLED
} | {"rpn_post_nms_top_n_train": 1000}
# Side of the pooled features of a box.
_RESOLUTION = 7
_RATIOS = (0.5, 1.0, 2.0)
# Images of a batch are padded to sides that are multiples of this.
_DIVISOR = 32

# In torchvision and in mmdetection, both losses of boxes are sums over the boxes with objects, divided by the number of
# all that were sampled.
_BOX_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda found, wanted: F.l1_loss(found, wanted, reduction="sum"),
    "smooth_l1": lambda found, wanted: F.smooth_l1_loss(found, wanted, beta=1 / 9, reduction="sum"),
}


# The network may compute in bfloat16 or float16, but boxes must not: from 1024 px on, the step of bfloat16 is 8 px.


def _full(x: Tensor) -> Tensor:
    """Converts half precision to float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors in full precision, at `strides` with sides that are not rounded, or rounded as torchvision's (None)."""

    def __init__(self, sizes: Sequence[int], strides: Sequence[int] | None) -> None:
        self.strides = strides
        super().__init__(tuple((size,) for size in sizes), (_RATIOS,) * len(sizes))

    def generate_anchors(self, scales: Any, aspect_ratios: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.strides is None:
            rounded: Tensor = super().generate_anchors(scales, aspect_ratios, *args, **kwargs)
            return rounded
        # In double precision, of which `set_cell_anchors` makes the network's.
        heights = torch.tensor(aspect_ratios, dtype=torch.float64).sqrt()[:, None] * torch.tensor(scales)
        widths = torch.tensor(scales) ** 2 / heights
        return torch.stack([-widths, -heights, widths, heights], dim=-1).reshape(-1, 4) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        # torchvision takes the shapes, the device and the type of the anchors from the feature maps.
        empty = [_full(maps.new_empty(1)).expand(maps.shape) for maps in feature_maps]
        if self.strides is None:
            rounded: list[Tensor] = super().forward(image_list, empty)
            return rounded
        self.set_cell_anchors(empty[0].dtype, empty[0].device)
        strides = [(stride, stride) for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([maps.shape[-2:] for maps in empty], strides))
        return [anchors for _ in image_list.image_sizes]


class _RPNHead(RPNHead):  # type: ignore[misc]
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [_full(item) for item in logits], [_full(item) for item in deltas]


class _RegionProposals(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's, with a choice of the loss and of the anchors that are trained.

    Args:
        anchors: Makes the anchors.
        head: Scores and shifts them.
        options: Arguments of FasterRCNN.
        box_loss: Loss of boxes, summed.
        low_quality_iou: See `Detector`.
        padding_anchors: See `Detector`.
    """

    def __init__(
        self,
        anchors: _Anchors,
        head: _RPNHead,
        options: Mapping[str, Any],
        box_loss: Callable[[Tensor, Tensor], Tensor],
        low_quality_iou: float | None,
        padding_anchors: bool,
    ) -> None:
        super().__init__(
            anchors,
            head,
            options["rpn_fg_iou_thresh"],
            options["rpn_bg_iou_thresh"],
            options["rpn_batch_size_per_image"],
            options["rpn_positive_fraction"],
            {"training": options["rpn_pre_nms_top_n_train"], "testing": options["rpn_pre_nms_top_n_test"]},
            {"training": options["rpn_post_nms_top_n_train"], "testing": options["rpn_post_nms_top_n_test"]},
            options["rpn_nms_thresh"],
            options["rpn_score_thresh"],
        )
        self.box_loss, self.low_quality_iou, self.padding_anchors = box_loss, low_quality_iou, padding_anchors
        # Our own rule follows the thresholds.
        self.proposal_matcher.allow_low_quality_matches = low_quality_iou is None

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        if targets is not None:
            sized: Any = [{**one, "size": size} for one, size in zip(targets, images.image_sizes, strict=True)]
            targets = sized
        found: tuple[list[Tensor], dict[str, Tensor]] = super().forward(images, features, targets)
        return found

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels anchors (1 object, 0 background, -1 not trained), and gives each the box that it is trained for."""
        labels, matched = [], []
        for boxes, target in zip(anchors, targets, strict=True):
            trained = torch.arange(len(boxes), device=boxes.device)
            if not self.padding_anchors:
                height, width = (-(-int(side) // _DIVISOR) * _DIVISOR for side in target["size"])
                x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2
                # Centres are whole multiples of the stride, but for rounding.
                trained = torch.where((x < width - 0.5) & (y < height - 0.5))[0]
            label, box = boxes.new_full((len(boxes),), -1), torch.zeros_like(boxes)
            label[trained] = 0
            if len(target["boxes"]):
                overlaps = box_iou(target["boxes"], boxes[trained])
                found = self.proposal_matcher(overlaps)
                if self.low_quality_iou is not None:
                    _match_low_quality(found, overlaps, self.low_quality_iou)
                label[trained] = torch.where(found >= 0, 1, torch.where(found == -1, 0, -1)).to(label)
                box[trained] = target["boxes"][found.clamp(min=0)].to(box)
            labels.append(label)
            matched.append(box)
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The losses of the objectness and of the boxes."""
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        box_loss = self.box_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive]) / len(sampled)
        wanted = torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted), box_loss


def _match_low_quality(found: Tensor, overlaps: Tensor, least: float) -> None:
    """Gives each object the anchors that overlap with it most, if they do so by at least `least`.

    An anchor that is the best of several objects gets the last of them, as in mmdetection's MaxIoUAssigner.

    Args:
        found: Object of each anchor, or -1 or -2; changed in place.
        overlaps: IoU (objects, anchors).
        least: Minimum IoU.
    """
    best = overlaps.max(dim=1, keepdim=True).values
    chosen = (overlaps == best) & (best >= least)
    numbers = torch.arange(len(overlaps), device=overlaps.device)[:, None].expand_as(chosen)
    last = torch.where(chosen, numbers, -1).max(dim=0).values
    found.copy_(torch.where(last >= 0, last, found))


class _RoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """Pools each box from the level of its size (Lin et al. 2017, eq. 1), in full precision.

    Args:
        strides: Stride of each level, by its name, finest first.
        sampling_ratio: See `Detector`.
        aligned: See `Detector`.
        canonical_scale: See `Detector`.
    """

    def __init__(self, strides: Mapping[str, int], sampling_ratio: int, aligned: bool, canonical_scale: int) -> None:
        super().__init__(list(strides), _RESOLUTION, sampling_ratio, canonical_scale=canonical_scale)
        self.strides, self.aligned = strides, aligned
        self.exponents = [stride.bit_length() - 1 for stride in strides.values()]
        least, largest = min(self.exponents), max(self.exponents)
        self.level_of = LevelMapper(least, largest, canonical_scale, self.canonical_level)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        images = torch.cat([torch.full_like(item[:, :1], index) for index, item in enumerate(boxes)])
        regions = torch.cat([images, torch.cat(boxes)], dim=1)
        wanted = self.level_of(boxes) + min(self.exponents)
        pooled, order = [], []
        # A box whose level is not in the pyramid takes the next finer one.
        limits = [*self.exponents[1:], max(self.exponents) + 1]
        for (level, stride), least, limit in zip(self.strides.items(), self.exponents, limits, strict=True):
            of_level = torch.where((wanted >= least) & (wanted < limit))[0]
            maps = _full(x[level])
            pooled.append(
                roi_align(maps, regions[of_level].to(maps), _RESOLUTION, 1 / stride, self.sampling_ratio, self.aligned)
            )
            order.append(of_level)
        return torch.cat(pooled)[torch.cat(order).argsort()].to(next(iter(x.values())).dtype)


class _Predictor(FastRCNNPredictor):  # type: ignore[misc]
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return _full(scores), _full(deltas)


class _BoxHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's, with a choice of the loss of boxes."""

    def __init__(
        self,
        pool: _RoIAlign,
        head: nn.Module,
        predictor: _Predictor,
        options: Mapping[str, Any],
        box_loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__(
            pool,
            head,
            predictor,
            options["box_fg_iou_thresh"],
            options["box_bg_iou_thresh"],
            options["box_batch_size_per_image"],
            options["box_positive_fraction"],
            options["bbox_reg_weights"],
            options["box_score_thresh"],
            options["box_nms_thresh"],
            options["box_detections_per_img"],
        )
        self.box_loss = box_loss

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            found: tuple[list[dict[str, Tensor]], dict[str, Tensor]] = super().forward(
                features, proposals, image_shapes
            )
            return found
        proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        classes = torch.cat(labels)
        objects = torch.where(classes > 0)[0]
        of_class = deltas.reshape(len(classes), -1, 4)[objects, classes[objects]]
        box_loss = self.box_loss(of_class, torch.cat(wanted)[objects]) / len(classes)
        return [], {"loss_classifier": F.cross_entropy(logits, classes), "loss_box_reg": box_loss}


class PyramidBackbone(nn.Module):
    """A backbone with a feature pyramid (Lin et al. 2017) on some of its maps.

    Args:
        backbone: Name, mapping of fields, or `BackboneConfig`, as for `create_backbone`.
        levels: Names of the maps under the pyramid, finest first, such as `("c2", "c3", "c4", "c5")`.
        channels: Number of channels of every level of the pyramid.
        norm: Norm layer behind each convolution of the pyramid.
        in_channels: Number of channels of the image.
        operator: Operator that replaces the backbone's own; None keeps it.

    Raises:
        UsageError: If the backbone does not have one of the maps.
    """

    def __init__(
        self,
        backbone: str | BackboneConfig | Mapping[str, Any],
        levels: Sequence[str],
        channels: int,
        norm: Norm,
        *,
        in_channels: int = 3,
        operator: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = create_backbone(backbone, in_channels, operator=operator)
        info = self.backbone.feature_info
        for level in levels:
            if level not in info:
                known = ", ".join(info)
                raise UsageError(f"levels: {self.backbone.config.slug} has no feature map '{level}', but {known}")
        self.levels, self.out_channels = list(levels), channels
        # Stages after the last level neither run nor train, but their weights stay in the state dict.
        self.last = max(levels)
        for name, stage in zip(info, self.backbone.stages, strict=True):
            stage.requires_grad_(name <= self.last)
        inputs = [info[level].channels for level in levels]
        self.fpn = FeaturePyramidNetwork(inputs, channels, LastLevelMaxPool(), _NORMS[norm])
        #: Stride of each level, by its name, finest first.
        self.strides = {level: info[level].stride for level in levels}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (N, in_channels, H, W) to the levels (N, channels, …), and `pool`, the last level at half resolution."""
        maps = self.backbone.pyramid(x.contiguous(memory_format=torch.channels_last), self.last)
        pyramid: dict[str, Tensor] = self.fpn({level: maps[level] for level in self.levels})
        return pyramid


class Detector(GeneralizedRCNN):  # type: ignore[misc]
    """Faster R-CNN with a feature pyramid (Ren et al. 2015, Lin et al. 2017) on a `Backbone`.

    Images are a list of normalised tensors (in_channels, H, W) of any sizes. The network resizes them itself.

    The parts are torchvision's, the defaults those of mmdetection 3 (`faster-rcnn_r50_fpn.py`), on which the paper's
    detectors were trained. The arguments from `anchor_strides` to `initial_weights` are what mmdetection and
    torchvision do differently; the values of torchvision are in `configs/torchvision_detector.yaml`.

    Attributes:
        proposals: Number of boxes in an image that the second stage classifies at test time.

    Args:
        backbone: Name such as `"sis50"`, mapping of fields, or `BackboneConfig`, as for `create_backbone`. It needs
            four stages for the levels c2 … c5.
        num_classes: Number of classes, without background.
        min_size: Length in pixels to which the shorter side of an image is resized, unless `max_size` limits it. Of
            several, one is drawn for each training image, and evaluation takes the last.
        max_size: Upper limit in pixels of the longer side of a resized image.
        levels: Names of the backbone's maps under the feature pyramid, finest first.
        fpn_channels: Number of channels of the feature pyramid.
        fpn_norm: Norm layer behind each convolution of the pyramid: `bn`, `syncbn`, `gn` or `none`.
        head_channels: Number of channels of the fully connected layers of the box head.
        head_norm: `none` for a box head of two fully connected layers. With a norm, the head has four convolutions with
            this norm and one fully connected layer (He et al. 2019, "Rethinking ImageNet Pre-training").
        anchor_sizes: Sides of the anchors in pixels: one for each level, and one for the pyramid's additional coarsest
            level.
        canonical_scale: Side in pixels of a box whose features come from stride 16 (224: Lin et al. 2017).
        anchor_strides: `exact`: anchors are at multiples of the levels' strides, and their sides are not rounded.
            `rounded`: as torchvision, at multiples of the image's side divided by the map's, without remainder, and
            with sides rounded to whole pixels.
        low_quality_iou: Minimum IoU of an object with the anchors that overlap with it most, for them to be trained for
            it even if another object overlaps more, or none by `rpn_fg_iou_thresh`. None, as in torchvision: such
            anchors are trained at any IoU, for the object that overlaps with them most.
        padding_anchors: Whether anchors beyond an image, in the part of the batch where only larger images are, are
            trained as background.
        roi_aligned: Whether RoIAlign takes pixel centres to be at half coordinates.
        roi_sampling_ratio: Number of sampling points along each side of each of the 7 × 7 bins of a box. 0: as many as
            pixels of the feature map.
        box_loss: `l1`, or `smooth_l1` with a quadratic part up to 1/9, of the boxes of both stages.
        initial_weights: `mmdetection`: the pyramid and the fully connected layers of the box head from Xavier's uniform
            distribution, the last layers from normal distributions with a standard deviation of 0.01 (classes) and
            0.001 (boxes). `torchvision`: from uniform distributions by the number of inputs (He, and PyTorch's for
            linear layers).
        freeze_norm: Whether the batch norm of the backbone keeps its statistics, scales and shifts in training;
            `statistics`: it keeps its statistics alone, as in mmdetection. Only sensible with pretrained weights.
        frozen_stages: Number of stages, with the stem before them, that do not train at all.
        in_channels: Number of channels of the image.
        operator: Operator that replaces the backbone's own; None keeps it.
        detector: Further arguments of torchvision's `FasterRCNN`, such as `{"box_batch_size_per_image": 512}`. All have
            torchvision's defaults, but for `rpn_post_nms_top_n_train`: 1000, as in mmdetection (torchvision: 2000).

    Raises:
        UsageError: If an argument is invalid, or torchvision does not have it. It is also a ValueError.
    """

    #: Modules whose weights depend on the classes.
    head: ClassVar[tuple[str, ...]] = ("roi_heads.box_predictor",)

    def __init__(
        self,
        backbone: str | BackboneConfig | Mapping[str, Any],
        num_classes: int,
        *,
        min_size: int | Sequence[int] = 800,
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
        freeze_norm: bool | Literal["statistics"] = False,
        frozen_stages: int = 0,
        in_channels: int = 3,
        operator: str | None = None,
        detector: Mapping[str, Any] | None = None,
    ) -> None:
        for key in detector or {}:
            if key not in _OPTIONS:
                raise UsageError(
                    f"detector: torchvision's FasterRCNN has no argument '{key}': {nearest(key, _OPTIONS)}"
                )
        options = {**_OPTIONS, **(detector or {})}
        if num_classes < 1:
            raise UsageError(f"num_classes is {num_classes}, must be at least 1")
        if len(anchor_sizes) != len(levels) + 1:
            raise UsageError(
                f"anchor_sizes has {len(anchor_sizes)} entries, must have {len(levels) + 1}: one for each of the "
                f"{len(levels)} levels, and one for the level above them"
            )
        sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        if not sizes or not all(0 < size <= max_size for size in sizes):
            raise UsageError(f"min_size is {min_size} and max_size {max_size}, must be 0 < min_size <= max_size")
        choices: dict[str, tuple[str, Any]] = {
            "fpn_norm": (fpn_norm, Norm),
            "head_norm": (head_norm, Norm),
            "anchor_strides": (anchor_strides, AnchorStrides),
            "box_loss": (box_loss, BoxLoss),
            "initial_weights": (initial_weights, InitialWeights),
        }
        for argument, (value, kinds) in choices.items():
            if value not in get_args(kinds):
                raise UsageError(f"{argument} is {value!r}, must be one of {', '.join(get_args(kinds))}")
        if low_quality_iou is not None and not 0 <= low_quality_iou <= 1:
            raise UsageError(f"low_quality_iou is {low_quality_iou}, must be in 0…1, or None")
        if roi_sampling_ratio < 0:
            raise UsageError(f"roi_sampling_ratio is {roi_sampling_ratio}, must be at least 0")
        body = PyramidBackbone(backbone, levels, fpn_channels, fpn_norm, in_channels=in_channels, operator=operator)
        if head_norm == "none":
            head: nn.Module = TwoMLPHead(fpn_channels * _RESOLUTION**2, head_channels)
        else:
            shape = (fpn_channels, _RESOLUTION, _RESOLUTION)
            head = FastRCNNConvFCHead(shape, [fpn_channels] * 4, [head_channels], _NORMS[head_norm])
        strides = [*body.strides.values(), 2 * max(body.strides.values())]
        anchors = _Anchors(anchor_sizes, strides if anchor_strides == "exact" else None)
        loss = _BOX_LOSSES[box_loss]
        pool = _RoIAlign(body.strides, roi_sampling_ratio, roi_aligned, canonical_scale)
        predictor = _Predictor(head_channels, num_classes + 1)
        super().__init__(
            body,
            _RegionProposals(
                anchors, _RPNHead(fpn_channels, len(_RATIOS)), options, loss, low_quality_iou, padding_anchors
            ),
            _BoxHeads(pool, head, predictor, options, loss),
            # Images arrive normalised.
            GeneralizedRCNNTransform(
                sizes, max_size, [0.0] * in_channels, [1.0] * in_channels, size_divisible=_DIVISOR
            ),
        )
        if initial_weights == "mmdetection":
            self._initialise()
        self.max_size = max_size
        self.proposals = int(options["rpn_post_nms_top_n_test"])
        parts = body.backbone.modules() if freeze_norm else ()
        self.frozen = [part for part in parts if isinstance(part, _BATCH_NORMS)]
        for part in self.frozen:
            part.requires_grad_(freeze_norm == "statistics")
        if not 0 <= frozen_stages <= len(body.backbone.stages):
            raise UsageError(f"frozen_stages is {frozen_stages}, must be 0…{len(body.backbone.stages)}")
        first = [body.backbone.stem, *body.backbone.stages[:frozen_stages]] if frozen_stages else []
        for stage in first:
            stage.requires_grad_(requires_grad=False)
            self.frozen += [part for part in stage.modules() if isinstance(part, _BATCH_NORMS)]

    def _initialise(self) -> None:
        """Draws the weights as mmdetection does, where torchvision does not: its RPN and the head's convolutions agree.

        mmdetection: FPN "init_cfg=dict(type='Xavier', layer='Conv2d', distribution='uniform')"; Shared2FCBBoxHead
        "Xavier, distribution='uniform'", for fc_cls "Normal, std=0.01", for fc_reg "Normal, std=0.001".
        """
        convolutions = [part for part in self.backbone.fpn.modules() if isinstance(part, nn.Conv2d)]
        linear = [part for part in self.roi_heads.box_head.modules() if isinstance(part, nn.Linear)]
        layers: list[nn.Conv2d | nn.Linear] = [*convolutions, *linear]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        predictor = self.roi_heads.box_predictor
        for last, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
            nn.init.normal_(last.weight, std=deviation)
            nn.init.zeros_(last.bias)

    def train(self, mode: bool = True) -> Detector:
        """Switches to training or evaluation mode; frozen norm layers stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(
        self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Computes the losses in training mode, and detects objects in evaluation mode.

        Args:
            images: Normalised images, each (in_channels, H, W).
            targets: In training mode, `boxes` (n, 4) as x1, y1, x2, y2 in pixels and `labels` (n,) from 1 to
                num_classes for each image.

        Returns:
            In training mode the losses, which are scalars. In evaluation mode `boxes` (n, 4) in pixels of the image,
            `labels` (n,) from 1 to num_classes and `scores` (n,) from 0 to 1, falling, for each image.
        """
        output: Any = super().forward([self._padded(image) for image in images], targets)
        if not self.training:
            for image, found in zip(images, output, strict=True):
                found["boxes"] = clip_boxes_to_image(found["boxes"], image.shape[1:])
        return output  # type: ignore[no-any-return]

    def _padded(self, image: Tensor) -> Tensor:
        """Pads a very thin image with 0, of which resizing to `max_size` would leave less than 32 px."""
        height, width = image.shape[1:]
        minimum = -(-32 * max(height, width) // self.max_size)
        return F.pad(image, (0, max(0, minimum - width), 0, max(0, minimum - height)))

    def countable(self, image: Tensor) -> None:
        """Runs all layers with weights for one image (1, in_channels, H, W), with `proposals` boxes.

        How many boxes the second stage really classifies depends on the values in the image, which the meta device,
        where `sis_lightning.models.complexity` counts operations, does not have.
        """
        maps = self.backbone(image)
        self.rpn.head(list(maps.values()))
        channels = next(iter(maps.values())).shape[1]
        pooled = image.new_empty(self.proposals, channels, _RESOLUTION, _RESOLUTION)
        self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))

    def exportable(self, height: int, width: int) -> Exportable:
        """Describes the network for `export`; files take one image of any size."""
        channels = self.backbone.backbone.in_channels
        return Exportable(
            module=_OneImage(self),
            shape=(channels, height, width),
            multiples={1: 1, 2: 1},
            # Tracing records that an image was not padded, see `_padded`.
            input=f"({channels}, H, W), one image, the longer side at most {self.max_size // 32} times the shorter one",
            preprocessing="the image at its own size",
            outputs={
                "boxes": "(objects, 4), x1, y1, x2, y2 in pixels of the image",
                "labels": "(objects,), 1 is the first class",
                "scores": "(objects,), from 0 to 1, falling",
            },
            traced="the number of boxes that torchvision's detector keeps depends on the image",
        )


class _OneImage(nn.Module):
    """A detector of one image, which returns tensors instead of lists and mappings."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: Any = self.detector([image])
        return found[0]["boxes"], found[0]["labels"], found[0]["scores"]
