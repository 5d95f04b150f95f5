"""The network behind every backbone: a stem, stages of bottlenecks, and named feature maps.

Sources: He et al. 2016 (ResNet), Xie et al. 2017 (ResNeXt), Gao et al. 2019 (Res2Net, Res2NeXt), and section 3.4 of the
SIS paper, which replaces each 3×3 convolution of the bottleneck by an operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sis_lightning.backbones.config import BackboneConfig, backbone_config
from sis_lightning.backbones.shared_outputs import SharedOutputs
from sis_lightning.errors import UsageError
from sis_lightning.operators import create_operator, operator_class


@dataclass(frozen=True)
class FeatureInfo:
    """The shape of a feature map: (N, channels, ⌈H/stride⌉, ⌈W/stride⌉) for an image (N, in_channels, H, W)."""

    channels: int
    stride: int


@dataclass(frozen=True)
class Placement:
    """The operator of a stage: the configured one, or a plain convolution and the reason for it."""

    stage: int
    split_width: int
    operator: str
    reason: str = ""


def group_norm(channels: int) -> nn.GroupNorm:
    """Creates group norm with up to 32 groups (Wu and He 2018)."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def norm_layer(kind: str, channels: int) -> nn.Module:
    """Creates batch norm (`bn`), batch norm over all devices (`syncbn`) or group norm (`gn`)."""
    if kind == "gn":
        return group_norm(channels)
    return nn.SyncBatchNorm(channels) if kind == "syncbn" else nn.BatchNorm2d(channels)


def hierarchical_split(
    splits: Sequence[Tensor], branches: Sequence[Callable[[Tensor], Tensor]], *, hierarchical: bool = True
) -> list[Tensor]:
    """Applies the recursion of Res2Net: y_1 = K_1(x_1), y_i = K_i(x_i + y_{i-1}) (Gao et al. 2019, eq. 1).

    The paper numbers the splits such that x_1 passes unchanged. Published code, and this function, lets the last split
    pass instead, which is the same up to the order of the channels.

    Args:
        splits: The splits x_1, x_2, …, each (N, width, H, W).
        branches: The functions K_1, K_2, …, at most as many as there are splits.
        hierarchical: Whether the output of each split is added to the next one. It is not in the first block of a
            stage, where the resolution changes.

    Returns:
        The outputs y_1, y_2, … of the branches.
    """
    outputs: list[Tensor] = []
    for x, branch in zip(splits, branches, strict=False):
        outputs.append(branch(outputs[-1] + x if hierarchical and outputs else x))
    return outputs


def _conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class Stem(nn.Module):
    """Convolution, norm and ReLU: 7×7 with stride 2 (`imagenet`) or 3×3 with stride 1 (`cifar`).

    Args:
        config: The configuration of the backbone.
        in_channels: Number of channels of the image.
    """

    def __init__(self, config: BackboneConfig, in_channels: int = 3) -> None:
        super().__init__()
        imagenet = config.stem == "imagenet"
        self.stride = 2 if imagenet else 1
        k = 7 if imagenet else 3
        self.conv = nn.Conv2d(in_channels, config.channels, k, self.stride, k // 2, bias=False)
        self.norm = norm_layer(config.norm, config.channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y: Tensor = self.relu(self.norm(self.conv(x)))
        return y


class Split(nn.Module):
    """The middle of a bottleneck: the hierarchical split of Res2Net, or the single 3×3 of ResNet if `scale` is 1.

    The channels are cut into `scale` splits. A branch of operator, norm and ReLU convolves each split, and the output
    of each branch is added to the next split (`hierarchical_split`). The last split passes unchanged. In the first
    block of a stage the splits are independent, and the last one is pooled or convolved (`last_split`).

    Args:
        config: The configuration of the backbone.
        stage: Number of the stage, from 1.
        first: Whether this is the first block of the stage.
        stride: Stride of all operators.
        dilation: Dilation of all operators.
    """

    def __init__(self, config: BackboneConfig, stage: int, *, first: bool, stride: int, dilation: int) -> None:
        super().__init__()
        self.width, self.scale, self.first = config.split_width(stage), config.scale, first
        convolved = 1 if config.scale == 1 else config.scale - (not (first and config.last_split == "conv"))
        operator = config.operator if config.fits(stage) else "conv"
        self.convs = nn.ModuleList(
            create_operator(
                operator,
                self.width,
                self.width,
                stride=stride,
                dilation=dilation,
                groups=config.cardinality,
                steps=config.steps,
                across_groups=config.groups == "across",
            )
            for _ in range(convolved)
        )
        self.norms = nn.ModuleList(norm_layer(config.norm, self.width) for _ in range(convolved))
        self.relu = nn.ReLU(inplace=True)
        pooled = first and convolved < config.scale
        self.pool = nn.AvgPool2d(3, stride, padding=1) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, scale · width, H, W) to (N, scale · width, ⌈H/stride⌉, ⌈W/stride⌉)."""
        if self.scale == 1:
            single: Tensor = self.relu(self.norms[0](self.convs[0](x)))
            return single
        shared = SharedOutputs()
        splits = torch.split(x, self.width, dim=1)
        branches = [_branch(conv, norm, shared.relu) for conv, norm in zip(self.convs, self.norms, strict=True)]
        outputs = hierarchical_split(splits, branches, hierarchical=not self.first)
        if len(outputs) < self.scale:
            outputs.append(self.pool(splits[-1]))
        return shared.concatenate(outputs)


def _branch(conv: nn.Module, norm: nn.Module, relu: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: relu(norm(conv(x)))


class Bottleneck(nn.Module):
    """A residual block: 1×1 convolution that reduces the channels, `Split`, 1×1 that expands them, and the shortcut.

    Args:
        config: The configuration of the backbone.
        stage: Number of the stage, from 1.
        inputs: Number of input channels.
        first: Whether this is the first block of the stage, whose shortcut is a 1×1 convolution.
        stride: Stride of the 3×3 operators and of the shortcut.
        dilation: Dilation of the 3×3 operators.
    """

    def __init__(
        self, config: BackboneConfig, stage: int, inputs: int, *, first: bool, stride: int, dilation: int
    ) -> None:
        super().__init__()
        inner, outputs = config.scale * config.split_width(stage), 4 * config.channels * 2 ** (stage - 1)
        self.reduce = _conv1x1(inputs, inner)
        self.reduce_norm = norm_layer(config.norm, inner)
        self.split = Split(config, stage, first=first, stride=stride, dilation=dilation)
        self.expand = _conv1x1(inner, outputs)
        self.expand_norm = norm_layer(config.norm, outputs)
        shortcut = [_conv1x1(inputs, outputs, stride), norm_layer(config.norm, outputs)] if first else []
        self.shortcut = nn.Sequential(*shortcut)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, 4 · channels · 2^(stage-1), ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.relu(self.reduce_norm(self.reduce(x)))
        y = self.expand_norm(self.expand(self.split(y)))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class Backbone(nn.Module):
    """A network that maps an image (N, in_channels, H, W) to named feature maps `c2` … `c5` (or `c2` … `c4`).

    Attributes:
        config: The configuration that the backbone was created from.
        in_channels: Number of channels of the image.
        output_stride: Upper limit of the strides of the feature maps.
        feature_info: Number of channels and stride of each feature map, by name.
        placements: The operator of each stage.

    Args:
        config: The configuration.
        output_stride: Upper limit of the strides of the feature maps: 8, 16 or 32. Beyond it, stages use dilation
            instead of stride; the first block of such a stage keeps the previous dilation, as with
            `replace_stride_with_dilation` of torchvision.
        in_channels: Number of channels of the image, at least 1.

    Raises:
        UsageError: If `output_stride` or `in_channels` is invalid. It is also a ValueError.
    """

    def __init__(self, config: BackboneConfig, output_stride: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise UsageError(f"output_stride is {output_stride}, must be 8, 16 or 32")
        if not isinstance(in_channels, int) or in_channels < 1:
            raise UsageError(f"in_channels is {in_channels!r}, must be an integer of at least 1")
        self.config, self.output_stride, self.in_channels = config, output_stride, in_channels
        self._compiled: Callable[..., dict[str, Tensor]] | None = None
        self.stem = Stem(config, in_channels)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if config.stem == "imagenet" else nn.Identity()
        stride, dilation = (4, 1) if config.stem == "imagenet" else (1, 1)
        inputs = config.channels
        self.feature_info: dict[str, FeatureInfo] = {}
        self.placements: list[Placement] = []
        for stage, blocks in enumerate(config.blocks, start=1):
            wanted = 1 if stage == 1 else 2
            step = wanted if stride * wanted <= output_stride else 1
            first_dilation, dilation = dilation, dilation * wanted // step
            layers = []
            for index in range(blocks):
                first = index == 0
                layers.append(
                    Bottleneck(
                        config,
                        stage,
                        inputs,
                        first=first,
                        stride=step if first else 1,
                        dilation=first_dilation if first else dilation,
                    )
                )
                inputs = 4 * config.channels * 2 ** (stage - 1)
            stride *= step
            self.add_module(f"stage{stage}", nn.Sequential(*layers))
            self.feature_info[f"c{stage + 1}"] = FeatureInfo(inputs, stride)
            self.placements.append(_placement(config, stage))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the stem and the 1×1 convolutions from the normal distribution of He et al. 2015 (fan-out).

        torchvision initialises its ResNets in the same way.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self) -> list[nn.Module]:
        """The stages in order."""
        return [self.get_submodule(f"stage{stage}") for stage in range(1, len(self.config.blocks) + 1)]

    def pyramid(self, x: Tensor, last: str = "") -> dict[str, Tensor]:
        """Computes the feature maps, and before them the stem's output as `c1`.

        Args:
            x: Image (N, in_channels, H, W).
            last: Name of the last map to compute; later stages do not run. By default all run.
        """
        maps: dict[str, Tensor] = self._compiled(self, x, last) if self._compiled else self._pyramid(x, last)
        return maps

    def _pyramid(self, x: Tensor, last: str) -> dict[str, Tensor]:
        y = self.stem(x)
        maps = {"c1": y}
        y = self.pool(y)
        for name, stage in zip(self.feature_info, self.stages, strict=True):
            y = stage(y)
            maps[name] = y
            if name == last:
                break
        return maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (N, in_channels, H, W) to {"c2": (N, C2, ⌈H/s2⌉, ⌈W/s2⌉), …}, as `feature_info` states."""
        maps = self.pyramid(x)
        del maps["c1"]
        return maps

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles `pyramid`, which `forward` calls, with `torch.compile`. The keys of the state dict do not change.

        Args:
            args: Positional arguments of `torch.compile`.
            kwargs: Keyword arguments of `torch.compile`, such as `mode`.
        """
        # The method of the class, not of this object: a copy of this object must not run with the original's weights.
        self._compiled = torch.compile(type(self)._pyramid, *args, **kwargs)

    def describe(self) -> str:
        """Returns a line that says which stages use the operator, and which use a plain convolution and why."""
        parts = []
        for placement in self.placements:
            note = f" ({placement.reason})" if placement.reason else ""
            parts.append(f"stage {placement.stage} {placement.operator}{note}")
        return f"{self.config.slug}: " + ", ".join(parts)


def _placement(config: BackboneConfig, stage: int) -> Placement:
    width = config.split_width(stage)
    if config.fits(stage):
        return Placement(stage, width, config.operator)
    share = f"split width {width}" + f" / {config.cardinality} groups" * (config.cardinality > 1)
    multiple = operator_class(config.operator).channel_multiple
    return Placement(stage, width, "conv", f"{share} is not divisible by {multiple}")


def create_backbone(
    backbone: str | BackboneConfig | Mapping[str, Any],
    in_channels: int = 3,
    *,
    output_stride: int = 32,
    operator: str | None = None,
    **overrides: Any,
) -> Backbone:
    """Creates a backbone: an image goes in, and named feature maps `c2` … `c5` come out, as `feature_info` states.

    Section 3.4 of the paper: Res2Net and its relatives with an operator (eqs. 1-24) in place of each 3×3 convolution.

    Args:
        backbone: Name of a file in `configs/backbones/` such as `"sis50"` (see `list_backbones`), path of a YAML file,
            mapping of the fields of `BackboneConfig`, or a `BackboneConfig`.
        in_channels: Number of channels of the image, at least 1.
        output_stride: Upper limit of the strides of the feature maps: 8, 16 or 32.
        operator: Operator that replaces the configuration's own, such as `"interactive1"`; None keeps it.
        overrides: Other fields of `BackboneConfig` to change, such as `norm="gn"`.

    Raises:
        UsageError: If a name, field or value is invalid. It is also a ValueError.
    """
    return Backbone(backbone_config(backbone, operator, **overrides), output_stride, in_channels)
