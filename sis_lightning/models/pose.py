"""Keypoints: heatmaps from deconvolutions on a backbone (Simple Baselines, Xiao et al. 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from sis_lightning.backbones.config import BackboneConfig
from sis_lightning.backbones.resnet import create_backbone, norm_layer
from sis_lightning.datasets.constants import COCO_JOINTS


class PoseNet(nn.Module):
    """A backbone, deconvolutions on its last map, and a 1×1: (N, 3, H, W) → heatmaps (N, 17, H/s, W/s).

    Each deconvolution (4×4, stride 2, the backbone's kind of norm, ReLU) halves the stride: three make 4 of 32.

    Args:
        backbone: Its config.
        deconv_channels: Of each deconvolution.
    """

    def __init__(self, backbone: BackboneConfig, deconv_channels: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = create_backbone(backbone)
        last = list(self.backbone.feature_info.values())[-1]
        self.stride = last.stride >> len(deconv_channels)
        layers: list[nn.Module] = []
        inputs = last.channels
        for outputs in deconv_channels:
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False),
                norm_layer(backbone.norm, outputs),
                nn.ReLU(inplace=True),
            ]
            inputs = outputs
        self.deconvs = nn.Sequential(*layers)
        self.heatmaps = nn.Conv2d(inputs, len(COCO_JOINTS), 1)
        for module in (*self.deconvs, self.heatmaps):
            if isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)  # Simple Baselines' own
        nn.init.zeros_(self.heatmaps.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), H and W divisible by the backbone's stride → (N, 17, H/s, W/s)."""
        last = list(self.backbone(x).values())[-1]
        maps: Tensor = self.heatmaps(self.deconvs(last))
        return maps
