"""Keypoint detection: heatmaps from deconvolutions on a backbone (Simple Baselines, Xiao et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sis_lightning.backbones import BackboneConfig, create_backbone
from sis_lightning.backbones.resnet import norm_layer
from sis_lightning.errors import UsageError
from sis_lightning.models.export import Exportable


class PoseNet(nn.Module):
    """Maps crops of persons (N, in_channels, H, W) to heatmaps (N, num_keypoints, H/stride, W/stride).

    Deconvolutions (4×4, stride 2, each followed by the backbone's kind of norm and ReLU) double the resolution of the
    backbone's last map, and a 1×1 convolution computes the heatmaps. Three deconvolutions reduce a stride of 32 to 4.

    Attributes:
        stride: Stride of the heatmaps.
        divisor: Number of which H and W must be multiples.

    Args:
        backbone: Name such as `"sis50"`, mapping of fields, or `BackboneConfig`, as for `create_backbone`.
        num_keypoints: Number of keypoints of a person, 17 for COCO.
        deconv_channels: Number of output channels of each deconvolution.
        in_channels: Number of channels of the image.
        operator: Operator that replaces the backbone's own; None keeps it.

    Raises:
        UsageError: If an argument is invalid. It is also a ValueError.
    """

    #: Modules whose weights depend on the keypoints.
    head: ClassVar[tuple[str, ...]] = ("heatmaps",)

    def __init__(
        self,
        backbone: str | BackboneConfig | Mapping[str, Any],
        num_keypoints: int = 17,
        deconv_channels: Sequence[int] = (256, 256, 256),
        *,
        in_channels: int = 3,
        operator: str | None = None,
    ) -> None:
        super().__init__()
        if num_keypoints < 1:
            raise UsageError(f"num_keypoints is {num_keypoints}, must be at least 1")
        self.backbone = create_backbone(backbone, in_channels, operator=operator)
        last = list(self.backbone.feature_info.values())[-1]
        self.divisor, self.stride = last.stride, last.stride >> len(deconv_channels)
        if not deconv_channels or self.stride < 1 or min(deconv_channels) < 1:
            raise UsageError(
                f"deconv_channels is {list(deconv_channels)}: it needs at least one number, all of at least 1, and at "
                f"most {last.stride.bit_length() - 1}, since each halves the stride {last.stride} of the backbone"
            )
        layers: list[nn.Module] = []
        inputs = last.channels
        for outputs in deconv_channels:
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False),
                norm_layer(self.backbone.config.norm, outputs),
                nn.ReLU(inplace=True),
            ]
            inputs = outputs
        self.deconvs = nn.Sequential(*layers)
        self.heatmaps = nn.Conv2d(inputs, num_keypoints, 1)
        for module in (*self.deconvs, self.heatmaps):
            if isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)  # as in the code of Simple Baselines
        nn.init.zeros_(self.heatmaps.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W), with H and W multiples of `divisor`, to the heatmaps."""
        last = list(self.backbone(x).values())[-1]
        maps: Tensor = self.heatmaps(self.deconvs(last))
        return maps

    def exportable(self, height: int, width: int) -> Exportable:
        """Describes the network for `export`; files take any number of crops, with sides that are multiples."""
        channels, divisor, stride = self.backbone.in_channels, self.divisor, self.stride
        return Exportable(
            module=self,
            shape=(2, channels, height, width),
            multiples={0: 1, 2: divisor, 3: divisor},
            input=f"(N, {channels}, H, W), H and W multiples of {divisor}; {height}×{width} in training",
            preprocessing=f"the box of a person, extended to W : H = {width} : {height}, 1.25 times as large, and "
            "resampled to the input size",
            outputs={
                "heatmaps": f"(N, keypoints, H/{stride}, W/{stride}); a keypoint is at the maximum, moved by a quarter "
                f"of a pixel towards the larger neighbours, times {stride}"
            },
        )
