"""Semantic segmentation: a `Backbone` with the decoders of segmentation-models-pytorch (SMP)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, get_args

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.encoders import encoders
from torch import Tensor, nn
from torch.nn import functional as F

from sis_lightning.backbones import BackboneConfig, backbone_config, create_backbone
from sis_lightning.errors import UsageError, nearest
from sis_lightning.models.export import Exportable

# DPT needs a vision transformer.
_ARCHITECTURES = {name: model for name, model in smp.MODEL_ARCHITECTURES_MAPPING.items() if name != "dpt"}


class SMPEncoder(nn.Module):
    """A backbone with the interface of SMP's encoders: maps [x, c1, c2, c3, c4, c5] at strides 1, 2, 4, 8, 16, 32.

    Args:
        backbone: Fields of a `BackboneConfig` with the `imagenet` stem and four stages.
        depth: Number of maps after x.
        output_stride: Upper limit of the strides: 8, 16 or 32.

    Raises:
        UsageError: If the backbone has three stages or the `cifar` stem, whose strides no decoder of SMP expects.
    """

    def __init__(self, backbone: dict[str, Any], depth: int = 5, output_stride: int = 32) -> None:
        super().__init__()
        config = backbone_config(backbone)
        if config.stem != "imagenet" or len(config.blocks) != 4:
            raise UsageError(
                f"segmentation needs a four-stage backbone with the imagenet stem (strides 4, 8, 16, 32); "
                f"{config.slug} has {len(config.blocks)} stages and the {config.stem} stem"
            )
        self.depth = depth
        self.backbone = create_backbone(config, output_stride=output_stride)

    @property
    def out_channels(self) -> list[int]:
        """Number of channels of each map."""
        maps = (info.channels for info in self.backbone.feature_info.values())
        return [self.backbone.in_channels, self.backbone.config.channels, *maps][: self.depth + 1]

    @property
    def output_stride(self) -> int:
        """Stride of the last map."""
        return min(self.backbone.output_stride, 1 << self.depth)

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Creates the backbone again if images have another number of channels than 3; SMP calls this once.

        SMP's own method would draw the first convolution from another distribution.
        """
        old = self.backbone
        if in_channels != old.in_channels:
            self.backbone = create_backbone(old.config, in_channels, output_stride=old.output_stride)

    def make_dilated(self, output_stride: int) -> None:
        """Does nothing: the backbone was created with this output stride.

        SMP's own method would leave the strides of the average pooling as they are.
        """

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (N, in_channels, H, W) to the first `depth` + 1 maps."""
        return [x, *self.backbone.pyramid(x).values()][: self.depth + 1]


def _entry(config: BackboneConfig) -> dict[str, Any]:
    return {"encoder": SMPEncoder, "params": {"backbone": dataclasses.asdict(config)}, "pretrained_settings": {}}


def register_encoder(
    backbone: str | BackboneConfig | Mapping[str, Any], name: str | None = None, *, operator: str | None = None
) -> str:
    """Adds a backbone to the encoders of SMP, so that `smp.Unet("sis50", encoder_weights=None)` works.

    Args:
        backbone: Name such as `"sis50"`, mapping of fields, or `BackboneConfig`, as for `create_backbone`.
        name: Name of the encoder; by default the name of the backbone, or else its `slug`.
        operator: Operator that replaces the backbone's own; None keeps it.

    Returns:
        The name of the encoder.

    Raises:
        UsageError: If the backbone is invalid, or another encoder has this name.
    """
    config = backbone_config(backbone, operator)
    name = name or (backbone if isinstance(backbone, str) and operator is None else config.slug)
    entry = _entry(config)
    if encoders.setdefault(name, entry) != entry:
        raise UsageError(
            f"segmentation-models-pytorch has another encoder '{name}': register_encoder(…, name=…) takes a free name"
        )
    return name


@contextmanager
def _registered(config: BackboneConfig) -> Iterator[str]:
    """Adds a backbone to SMP's encoders for as long as a network with it is created."""
    name = f"sis-lightning:{config.slug}"
    encoders[name] = _entry(config)
    try:
        yield name
    finally:
        encoders.pop(name, None)


class RegisteredUpsample(nn.Module):
    """Upsamples maps bilinearly: (N, C, h, w) → (N, C, factor · (h - 1) + 1, factor · (w - 1) + 1).

    Cell i goes to position factor · i, as is right for a backbone, whose cell i at stride s is centred at pixel s · i.
    An image of 513 px has maps of 129 and 33 px, which become 129 and 513 px again (Chen et al. 2018).

    Args:
        factor: The factor.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, maps: Tensor) -> Tensor:
        """Upsamples maps."""
        size = [self.factor * (side - 1) + 1 for side in maps.shape[-2:]]
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _register_upsampling(network: nn.Module) -> None:
    """Replaces upsampling by a factor with aligned corners, which moves cells by up to a cell."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Upsample) and child.mode == "bilinear" and child.align_corners:
                assert isinstance(child.scale_factor, float)
                setattr(module, name, RegisteredUpsample(int(child.scale_factor)))


def _upsampled_rows(maps: Tensor, rows: range, height: int, width: int) -> Tensor:
    """Some rows of maps (N, C, h, w) that are resized to (height, width), bilinearly and with aligned corners."""
    last = maps.shape[-2] - 1
    position = torch.arange(rows.start, rows.stop, device=maps.device, dtype=torch.float32)
    position = position * (last / max(1, height - 1))
    above = position.floor().long().clamp(max=last)
    share = (position - above)[:, None].to(torch.promote_types(maps.dtype, torch.float32))
    mixed = maps[:, :, above] * (1 - share) + maps[:, :, (above + 1).clamp(max=last)] * share
    return F.interpolate(mixed, size=(len(rows), width), mode="bilinear", align_corners=True)


class Segmenter(nn.Module):
    """Maps images (N, in_channels, H, W) of any size to logits (N, num_classes, H, W).

    Encoder, decoder and segmentation head are those of a network of SMP. Images are padded at the bottom and on the
    right with 0 (the mean colour of normalised images), and the logits are cropped to the size of the image: most
    decoders of SMP need sides that are multiples of `divisor`. Those of DeepLab get sides that are 1 more, such as 513,
    and upsample so that features stay at their places (`RegisteredUpsample`; SMP's own upsampling moves those at the
    right and at the bottom of 513 px by 14.6 px).

    Other decoders are SMP's as they are. They take cell i of a map of stride s to the middle of s pixels, s · i +
    (s - 1) / 2, but a backbone sees it centred at s · i: features of stride 32 come out 15.5 px too far right and low,
    those of stride 4 1.5 px. This is so for every ResNet in SMP; training makes up for some of it.

    Args:
        backbone: Name such as `"sis50"`, mapping of fields, or `BackboneConfig`, as for `create_backbone`. It needs
            four stages and the `imagenet` stem.
        num_classes: Number of classes, with background.
        architecture: SMP's name of the network: `deeplabv3plus`, `unet`, `fpn`, `upernet`, ….
        output_stride: Output stride of the backbone: 8 or 16 for DeepLab, 32 for decoders that do not let one choose.
        in_channels: Number of channels of the image.
        operator: Operator that replaces the backbone's own; None keeps it.
        decoder: Further arguments of SMP's network, such as `{"decoder_channels": 256}`.

    Raises:
        UsageError: If an argument is invalid, or SMP does not have the architecture or argument. It is also a
            ValueError.
    """

    #: Modules whose weights depend on the classes.
    head: ClassVar[tuple[str, ...]] = ("segmentation_head",)

    def __init__(
        self,
        backbone: str | BackboneConfig | Mapping[str, Any],
        num_classes: int,
        architecture: str = "deeplabv3plus",
        *,
        output_stride: int = 16,
        in_channels: int = 3,
        operator: str | None = None,
        decoder: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UsageError(f"num_classes is {num_classes}, must be at least 1")
        model = _ARCHITECTURES.get(architecture.lower())
        if model is None:
            close = nearest(architecture.lower(), _ARCHITECTURES)
            raise UsageError(f"segmentation-models-pytorch has no architecture '{architecture}': {close}")
        options = dict(decoder or {})
        parameters = inspect.signature(model.__init__).parameters
        settled = {"self", "kwargs", "encoder_name", "encoder_weights", "encoder_output_stride", "in_channels"}
        accepted = set(parameters) - settled - {"classes", "aux_params"}
        for key in options:
            # SMP ignores unknown arguments without a word.
            if key not in accepted:
                raise UsageError(f"decoder: {architecture} has no argument '{key}': {nearest(key, accepted)}")
        if "encoder_output_stride" in parameters:
            choices = get_args(parameters["encoder_output_stride"].annotation)
            if output_stride not in choices:
                expected = " or ".join(map(str, choices))
                raise UsageError(f"output_stride is {output_stride}, {architecture} takes {expected}")
            options["encoder_output_stride"] = output_stride
        elif output_stride != 32:
            raise UsageError(f"output_stride is {output_stride}, but {architecture} works with 32 only")
        # The backbone checks its channels before SMP, whose message would not name the argument.
        config = backbone_config(backbone, operator)
        if in_channels < 1:
            raise UsageError(f"in_channels is {in_channels}, must be at least 1")
        try:
            with _registered(config) as name:
                network = model(name, encoder_weights=None, classes=num_classes, in_channels=in_channels, **options)
        except (ValueError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{architecture}: {error}") from error
        self.architecture, self.num_classes = architecture.lower(), num_classes
        self.encoder: SMPEncoder = network.encoder
        self.decoder: nn.Module = network.decoder
        self.segmentation_head: nn.Sequential = network.segmentation_head
        self.remainder = 1 if self.architecture.startswith("deeplabv3") else 0
        if self.remainder:
            _register_upsampling(self)

    @property
    def divisor(self) -> int:
        """The number of which both sides of a padded image, less `remainder`, are multiples."""
        return self.encoder.output_stride

    def _padding(self, x: Tensor) -> tuple[int, int]:
        """Columns on the right and rows at the bottom."""
        height, width = x.shape[-2:]
        return (self.remainder - width) % self.divisor, (self.remainder - height) % self.divisor

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, num_classes, H, W)."""
        height, width = x.shape[-2:]
        right, below = self._padding(x)
        if not right and not below:
            return self.logits(x)
        return self.logits(F.pad(x, (0, right, 0, below)))[..., :height, :width]

    def class_map(self, x: Tensor, at_once: int = 64 * 2**20) -> Tensor:
        """Maps (N, in_channels, H, W) to the class of each pixel (N, H, W), uint8: the argmax of the logits.

        Where the head upsamples its logits, those of large images are upsampled in strips of rows, since at full size
        the logits of 21 classes take 28 times the memory of the image.

        Args:
            x: Normalised images.
            at_once: Maximum number of logits that are held at once; by default 256 MB of float32.
        """
        convolution, upsampling = self.segmentation_head[0], self.segmentation_head[1]
        height, width = x.shape[-2:]
        rows = max(1, at_once // (len(x) * self.num_classes * width))
        if height <= rows or not isinstance(upsampling, RegisteredUpsample):
            whole: Tensor = self(x)
            return whole.argmax(dim=1).to(torch.uint8)
        right, below = self._padding(x)
        padded = F.pad(x, (0, right, 0, below)) if right or below else x
        low: Tensor = convolution(self.decoder(self.encoder(padded)))
        found = torch.empty(len(x), height, width, dtype=torch.uint8, device=x.device)
        for start in range(0, height, rows):
            strip = range(start, min(start + rows, height))
            logits = _upsampled_rows(low, strip, height + below, width + right)[..., :width]
            found[:, strip.start : strip.stop] = logits.argmax(dim=1)
        return found

    def logits(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W), with sides of a padded image, to (N, num_classes, H, W)."""
        logits: Tensor = self.segmentation_head(self.decoder(self.encoder(x)))
        return logits

    def exportable(self, height: int, width: int) -> Exportable:
        """Describes the network for `export`; files take any number of images, with sides that are multiples."""
        channels, divisor = self.encoder.backbone.in_channels, self.divisor
        return Exportable(
            module=self,
            shape=(2, channels, -(-height // divisor) * divisor, -(-width // divisor) * divisor),
            multiples={0: 1, 2: divisor, 3: divisor},
            input=f"(N, {channels}, H, W), H and W multiples of {divisor}",
            preprocessing="the image at its own size, padded at the bottom and on the right with 0",
            outputs={"logits": "(N, classes, H, W); the largest is the class of a pixel; crop the padding"},
        )
