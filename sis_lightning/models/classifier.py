"""Image classification: a backbone, global average pooling and a fully connected layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from sis_lightning.backbones import BackboneConfig, create_backbone
from sis_lightning.errors import UsageError
from sis_lightning.models.export import Exportable


class Classifier(nn.Module):
    """Maps images (N, in_channels, H, W) to logits (N, num_classes).

    These are the networks of Table 1: a backbone, global average pooling of its last map, and a fully connected layer.

    Args:
        backbone: Name such as `"sis29"`, mapping of fields, or `BackboneConfig`, as for `create_backbone`.
        num_classes: Number of classes, at least 1.
        in_channels: Number of channels of the image.
        output_stride: Upper limit of the strides of the feature maps: 8, 16 or 32.
        operator: Operator that replaces the backbone's own; None keeps it.

    Raises:
        UsageError: If an argument is invalid. It is also a ValueError.
    """

    #: Modules whose weights depend on the classes.
    head: ClassVar[tuple[str, ...]] = ("fc",)

    def __init__(
        self,
        backbone: str | BackboneConfig | Mapping[str, Any],
        num_classes: int,
        *,
        in_channels: int = 3,
        output_stride: int = 32,
        operator: str | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UsageError(f"num_classes is {num_classes}, must be at least 1")
        self.backbone = create_backbone(backbone, in_channels, output_stride=output_stride, operator=operator)
        self.fc = nn.Linear(list(self.backbone.feature_info.values())[-1].channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, num_classes)."""
        last = list(self.backbone(x).values())[-1]
        logits: Tensor = self.fc(last.mean(dim=(2, 3)))
        return logits

    def exportable(self, height: int, width: int) -> Exportable:
        """Describes the network for `export`; files take any number of images of any size."""
        # An exporter takes the size of an axis as constant if it is 1, as in the last map of a very small image.
        minimum = 2 * max(info.stride for info in self.backbone.feature_info.values())
        return Exportable(
            module=self,
            shape=(2, self.backbone.in_channels, max(height, minimum), max(width, minimum)),
            multiples={0: 1, 2: 1, 3: 1},
            input=f"(N, {self.backbone.in_channels}, H, W)",
            preprocessing=f"{height}×{width} px as in training",
            outputs={"logits": "(N, classes); softmax gives probabilities"},
        )
