"""Image classification: a backbone, a global average pool and a fully connected layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sis_lightning.backbones.config import BackboneConfig
from sis_lightning.backbones.resnet import Backbone, create_backbone
from sis_lightning.errors import UsageError


class Classifier(nn.Module):
    """Backbone, global average pool, fully connected layer: (N, 3, H, W) → logits (N, num_classes)."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(list(backbone.feature_info.values())[-1].channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, num_classes)."""
        last = list(self.backbone(x).values())[-1]
        logits: Tensor = self.fc(last.mean(dim=(2, 3)))
        return logits


def create_classifier(
    name_or_config: str | BackboneConfig | dict[str, Any], num_classes: int, **overrides: Any
) -> Classifier:
    """Builds a backbone with global average pool and fully connected layer: (N, 3, H, W) → logits (N, num_classes).

    The networks of Table 1; what their 3×3 are, eqs. 1-24, is the config's `operator`.

    Args:
        name_or_config: As in `create_backbone`.
        num_classes: At least 1.
        overrides: Fields of the config to change.

    Raises:
        UsageError: (a ValueError) as `create_backbone`, or for `num_classes` below 1.
    """
    if num_classes < 1:
        raise UsageError(f"num_classes is {num_classes}, must be at least 1")
    return Classifier(create_backbone(name_or_config, **overrides), num_classes)
