"""Our backbones in torchvision's Faster R-CNN."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sis_lightning.backbones.config import BackboneConfig
from sis_lightning.backbones.resnet import create_backbone, group_norm
from sis_lightning.errors import UsageError, nearest

Norm = Literal["bn", "syncbn", "gn", "none"]

_NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "bn": nn.BatchNorm2d,
    "syncbn": nn.SyncBatchNorm,
    "gn": group_norm,
    "none": None,
}
# What create_detector settles itself, from arguments of its own.
_SETTLED = {"self", "backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "kwargs"}
_SETTLED |= {"rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor"}


# In mixed precision the heads put out bfloat16, whose step is 8 px from 1024 px on: what boxes are made of is float32.


class _FloatAnchors(AnchorGenerator):  # type: ignore[misc]
    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        shapes = [torch.empty(1, device=maps.device).expand(maps.shape) for maps in feature_maps]
        anchors: list[Tensor] = super().forward(image_list, shapes)
        return anchors


class _FloatRPNHead(RPNHead):  # type: ignore[misc]
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [item.float() for item in logits], [item.float() for item in deltas]


class _FloatPredictor(FastRCNNPredictor):  # type: ignore[misc]
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class PyramidBackbone(nn.Module):
    """A backbone with a feature pyramid (Lin et al. 2017) on some of its maps.

    Args:
        backbone: Its config.
        levels: Names of maps, such as c2 … c5, finest first.
        channels: Of every level of the pyramid.
        norm: After each of the pyramid's convolutions.

    Raises:
        UsageError: For a map that the backbone does not have.
    """

    def __init__(self, backbone: BackboneConfig, levels: Sequence[str], channels: int, norm: Norm) -> None:
        super().__init__()
        self.backbone = create_backbone(backbone)
        info = self.backbone.feature_info
        for level in levels:
            if level not in info:
                raise UsageError(f"model.levels: {backbone.slug} has no map '{level}', but {', '.join(info)}")
        self.levels, self.out_channels = list(levels), channels
        # Stages above the last level are neither run nor trained, but keep their place among the weights.
        self.last = max(levels)
        for name, stage in zip(info, self.backbone.stages, strict=True):
            stage.requires_grad_(name <= self.last)
        inputs = [info[level].channels for level in levels]
        self.fpn = FeaturePyramidNetwork(inputs, channels, LastLevelMaxPool(), _NORMS[norm])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) → the levels, each (N, channels, …), and `pool`, the last one at half the resolution."""
        maps = self.backbone.pyramid(x.contiguous(memory_format=torch.channels_last), self.last)
        pyramid: dict[str, Tensor] = self.fpn({level: maps[level] for level in self.levels})
        return pyramid


def create_detector(
    backbone: BackboneConfig,
    num_classes: int,
    *,
    min_size: int,
    max_size: int,
    levels: Sequence[str],
    fpn_channels: int,
    fpn_norm: Norm,
    head_channels: int,
    head_norm: Norm,
    anchor_sizes: Sequence[int],
    canonical_scale: int,
    **detector: Any,
) -> FasterRCNN:
    """Builds Faster R-CNN with a feature pyramid (Ren et al. 2015, Lin et al. 2017) on one of our backbones.

    It takes normalised images of any size as a list; resizing is its own, normalising is not.

    Args:
        backbone: Four stages for c2 … c5.
        num_classes: Without background.
        min_size: Shorter side that images are resized to, in px …
        max_size: … but the longer one at most this.
        levels: The backbone's maps that the pyramid stands on.
        fpn_channels: Of the pyramid.
        fpn_norm: `bn`, `syncbn`, `gn` or `none`, in the pyramid.
        head_channels: Of the box head's fully connected layers.
        head_norm: `none` for a head of two fully connected layers; with a norm, four convolutions with it and one
            fully connected layer (He et al. 2019, "Rethinking ImageNet Pre-training").
        anchor_sizes: Side of the anchors in px, one for each level and one for `pool`.
        canonical_scale: Side of the box, in px, that is pooled at stride 16 (224: Lin et al. 2017).
        detector: torchvision's further arguments of `FasterRCNN`.

    Raises:
        UsageError: For arguments that torchvision does not have or that do not fit each other.
    """
    known = set(inspect.signature(FasterRCNN.__init__).parameters) - _SETTLED
    for key in detector:
        if key not in known:
            raise UsageError(f"model.detector: torchvision's FasterRCNN has no '{key}': {nearest(key, known)}")
    if len(anchor_sizes) != len(levels) + 1:
        raise UsageError(
            f"model.anchor_sizes has {len(anchor_sizes)} sizes, but there are {len(levels)} levels and 'pool'"
        )
    if not 0 < min_size <= max_size:
        raise UsageError(f"model.min_size is {min_size}, max_size {max_size}: wanted 0 < min_size <= max_size")
    body = PyramidBackbone(backbone, levels, fpn_channels, fpn_norm)
    resolution = 7
    if head_norm == "none":
        head: nn.Module = TwoMLPHead(fpn_channels * resolution**2, head_channels)
    else:
        shape = (fpn_channels, resolution, resolution)
        head = FastRCNNConvFCHead(shape, [fpn_channels] * 4, [head_channels], _NORMS[head_norm])
    ratios = (0.5, 1.0, 2.0)
    anchors = _FloatAnchors(tuple((size,) for size in anchor_sizes), (ratios,) * len(anchor_sizes))
    return FasterRCNN(
        body,
        min_size=min_size,
        max_size=max_size,
        # The DataModule has normalised already.
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
        rpn_anchor_generator=anchors,
        rpn_head=_FloatRPNHead(fpn_channels, len(ratios)),
        box_roi_pool=MultiScaleRoIAlign(list(levels), resolution, 2, canonical_scale=canonical_scale),
        box_head=head,
        box_predictor=_FloatPredictor(head_channels, num_classes + 1),
        **detector,
    )
