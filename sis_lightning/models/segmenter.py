"""Our backbones as encoders of segmentation-models-pytorch."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_args

import segmentation_models_pytorch as smp
from segmentation_models_pytorch.encoders import encoders
from segmentation_models_pytorch.encoders._base import EncoderMixin
from torch import Tensor, nn

from sis_lightning.backbones.config import BackboneConfig, backbone_config
from sis_lightning.backbones.resnet import create_backbone
from sis_lightning.errors import UsageError, nearest


class SMPEncoder(nn.Module, EncoderMixin):  # type: ignore[misc]
    """A backbone that answers as SMP's encoders do: [x, c1, c2, c3, c4, c5] at strides 1, 2, 4, 8, 16, 32.

    Args:
        backbone: Fields of a `BackboneConfig` with the `imagenet` stem and four stages.
        depth: How many maps after x.
        output_stride: 8, 16 or 32; the body is built dilated.

    Raises:
        UsageError: For a three-stage or `cifar` body, whose strides no decoder of SMP expects.
    """

    def __init__(self, backbone: dict[str, Any], depth: int = 5, output_stride: int = 32) -> None:
        super().__init__()
        self.backbone = create_backbone(backbone, output_stride=output_stride)
        config = self.backbone.config
        if config.stem != "imagenet" or len(config.blocks) != 4:
            raise UsageError(
                f"segmentation needs a four-stage backbone with the imagenet stem (strides 4, 8, 16, 32); "
                f"{config.slug} has {len(config.blocks)} stages and the {config.stem} stem"
            )
        self._depth, self._in_channels, self._output_stride = depth, 3, output_stride
        self._out_channels = [3, config.channels, *(info.channels for info in self.backbone.feature_info.values())]

    def make_dilated(self, output_stride: int) -> None:
        """Nothing to do: the body was built at this output stride (SMP's own rewriting would harm its pools)."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) → the first `depth` + 1 maps."""
        return [x, *self.backbone.pyramid(x).values()][: self._depth + 1]


def register_encoder(name_or_config: str | BackboneConfig | dict[str, Any]) -> str:
    """Makes a backbone known to SMP, so that `smp.Unet(register_encoder("sis50"), encoder_weights=None)` works.

    Returns:
        The `encoder_name`.
    """
    config = backbone_config(name_or_config)
    name = f"sis-lightning:{config.slug}"
    encoders[name] = {
        "encoder": SMPEncoder,
        "params": {"backbone": dataclasses.asdict(config)},
        "pretrained_settings": {},
    }
    return name


def create_segmenter(
    architecture: str, backbone: BackboneConfig, num_classes: int, output_stride: int, **decoder: Any
) -> nn.Module:
    """Builds any of SMP's networks on one of our backbones.

    Args:
        architecture: SMP's name: `deeplabv3plus`, `unet`, `fpn`, `upernet`, ….
        backbone: The encoder.
        num_classes: Channels of the logits.
        output_stride: Of the backbone; DeepLab's decoders know 8 and 16, most others 32 alone.
        decoder: SMP's further arguments, such as `decoder_channels`.

    Returns:
        The network: (N, 3, H, W) → logits (N, num_classes, H, W), with H and W divisible by its encoder's stride.

    Raises:
        UsageError: (a ValueError) for an architecture, argument or output stride that SMP does not have.
    """
    # DPT wants a vision transformer.
    known = {name: model for name, model in smp.MODEL_ARCHITECTURES_MAPPING.items() if name != "dpt"}
    if architecture.lower() not in known:
        raise UsageError(f"segmentation-models-pytorch has no '{architecture}': {nearest(architecture.lower(), known)}")
    model = known[architecture.lower()]
    accepted = set(inspect.signature(model.__init__).parameters) - {"self", "kwargs"}
    for key in decoder:
        # SMP swallows what it does not know.
        if key not in accepted - {"encoder_name", "encoder_weights", "encoder_output_stride", "classes"}:
            raise UsageError(f"{architecture} has no argument '{key}': {nearest(key, accepted)}")
    if "encoder_output_stride" in accepted:
        choices = get_args(inspect.signature(model.__init__).parameters["encoder_output_stride"].annotation)
        if output_stride not in choices:
            raise UsageError(f"output_stride is {output_stride}, {architecture} takes {' or '.join(map(str, choices))}")
        decoder["encoder_output_stride"] = output_stride
    elif output_stride != 32:
        raise UsageError(f"output_stride is {output_stride}, but {architecture} has none to choose: set it to 32")
    try:
        segmenter: nn.Module = model(register_encoder(backbone), encoder_weights=None, classes=num_classes, **decoder)
    except ValueError as error:
        raise UsageError(f"{architecture}: {error}") from error
    return segmenter
