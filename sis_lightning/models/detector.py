"""Object detection: a `Backbone` in torchvision's Faster R-CNN with a feature pyramid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sis_lightning.backbones import BackboneConfig, create_backbone
from sis_lightning.backbones.resnet import group_norm
from sis_lightning.errors import UsageError, nearest
from sis_lightning.models.export import Exportable

Norm = Literal["bn", "syncbn", "gn", "none"]

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
# Side of the pooled features of a box, and number of sampling points in each bin along each side.
_RESOLUTION, _SAMPLING_RATIO = 7, 2


# The network may compute in bfloat16 or float16, but boxes must not: from 1024 px on, the step of bfloat16 is 8 px.


def _full(x: Tensor) -> Tensor:
    """Converts half precision to float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _FullAnchors(AnchorGenerator):  # type: ignore[misc]
    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        # torchvision takes the shapes, the device and the type of the anchors from the feature maps.
        empty = [_full(maps.new_empty(1)).expand(maps.shape) for maps in feature_maps]
        anchors: list[Tensor] = super().forward(image_list, empty)
        return anchors


class _FullRPNHead(RPNHead):  # type: ignore[misc]
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [_full(item) for item in logits], [_full(item) for item in deltas]


class _FullRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        dtype = next(iter(x.values())).dtype
        pooled: Tensor = super().forward({name: _full(maps) for name, maps in x.items()}, boxes, image_shapes)
        return pooled.to(dtype)


class _FullPredictor(FastRCNNPredictor):  # type: ignore[misc]
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return _full(scores), _full(deltas)


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

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (N, in_channels, H, W) to the levels (N, channels, …), and `pool`, the last level at half resolution."""
        maps = self.backbone.pyramid(x.contiguous(memory_format=torch.channels_last), self.last)
        pyramid: dict[str, Tensor] = self.fpn({level: maps[level] for level in self.levels})
        return pyramid


class Detector(FasterRCNN):  # type: ignore[misc]
    """Faster R-CNN with a feature pyramid (Ren et al. 2015, Lin et al. 2017) on a `Backbone`.

    Images are a list of normalised tensors (in_channels, H, W) of any sizes. The network resizes them itself.

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
        freeze_norm: Whether the batch norm of the backbone keeps its statistics and weights in training. Only sensible
            with pretrained weights.
        in_channels: Number of channels of the image.
        operator: Operator that replaces the backbone's own; None keeps it.
        detector: Further arguments of torchvision's `FasterRCNN`, such as `{"box_batch_size_per_image": 512}`.

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
        freeze_norm: bool = False,
        in_channels: int = 3,
        operator: str | None = None,
        detector: Mapping[str, Any] | None = None,
    ) -> None:
        options = dict(detector or {})
        parameters = inspect.signature(FasterRCNN.__init__).parameters
        known = set(parameters) - _SETTLED
        for key in options:
            if key not in known:
                raise UsageError(f"detector: torchvision's FasterRCNN has no argument '{key}': {nearest(key, known)}")
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
        for argument, norm in {"fpn_norm": fpn_norm, "head_norm": head_norm}.items():
            if norm not in _NORMS:
                raise UsageError(f"{argument} is {norm!r}, must be one of {', '.join(_NORMS)}")
        body = PyramidBackbone(backbone, levels, fpn_channels, fpn_norm, in_channels=in_channels, operator=operator)
        if head_norm == "none":
            head: nn.Module = TwoMLPHead(fpn_channels * _RESOLUTION**2, head_channels)
        else:
            shape = (fpn_channels, _RESOLUTION, _RESOLUTION)
            head = FastRCNNConvFCHead(shape, [fpn_channels] * 4, [head_channels], _NORMS[head_norm])
        ratios = (0.5, 1.0, 2.0)
        super().__init__(
            body,
            min_size=sizes,
            max_size=max_size,
            # Images arrive normalised.
            image_mean=[0.0] * in_channels,
            image_std=[1.0] * in_channels,
            rpn_anchor_generator=_FullAnchors(tuple((size,) for size in anchor_sizes), (ratios,) * len(anchor_sizes)),
            rpn_head=_FullRPNHead(fpn_channels, len(ratios)),
            box_roi_pool=_FullRoIAlign(list(levels), _RESOLUTION, _SAMPLING_RATIO, canonical_scale=canonical_scale),
            box_head=head,
            box_predictor=_FullPredictor(head_channels, num_classes + 1),
            **options,
        )
        self.max_size = max_size
        proposals = "rpn_post_nms_top_n_test"
        self.proposals = int(options.get(proposals, parameters[proposals].default))
        parts = body.backbone.modules() if freeze_norm else ()
        self.frozen = [part for part in parts if isinstance(part, _BATCH_NORMS)]
        for part in self.frozen:
            part.requires_grad_(False)

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
