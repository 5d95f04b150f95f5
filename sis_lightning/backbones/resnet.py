"""The one body behind every backbone: stem, stages of bottlenecks, named feature maps.

He et al. 2016 (ResNet), Xie et al. 2017 (ResNeXt), Gao et al. 2019 (Res2Net, Res2NeXt), and section 3.4 of the SIS
paper, which puts an operator in place of each 3×3 of the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sis_lightning.backbones.config import BackboneConfig, backbone_config
from sis_lightning.errors import UsageError
from sis_lightning.operators import create_operator


@dataclass(frozen=True)
class FeatureInfo:
    """A feature map is (N, channels, ⌈H/stride⌉, ⌈W/stride⌉) for an image of (N, 3, H, W)."""

    channels: int
    stride: int


@dataclass(frozen=True)
class Placement:
    """What the 3×3 of a stage are: the operator asked for, or a plain conv and why."""

    stage: int
    split_width: int
    operator: str
    reason: str = ""


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with up to 32 groups (Wu and He 2018)."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def norm_layer(kind: str, channels: int) -> nn.Module:
    """Batch norm (`bn`), batch norm over all devices (`syncbn`) or group norm (`gn`)."""
    if kind == "gn":
        return group_norm(channels)
    return nn.SyncBatchNorm(channels) if kind == "syncbn" else nn.BatchNorm2d(channels)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler, an exporter or a transform of torch.func reads along: these need plain operations."""
    graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    # torch.fx passes a stand-in.
    return graph or torch._C._are_functorch_transforms_active() or not isinstance(x, Tensor)


def _conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class Stem(nn.Module):
    """conv → norm → ReLU: 7×7 of stride 2 (`imagenet`) or 3×3 of stride 1 (`cifar`)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        imagenet = config.stem == "imagenet"
        self.stride = 2 if imagenet else 1
        k = 7 if imagenet else 3
        self.conv = nn.Conv2d(3, config.channels, k, self.stride, k // 2, bias=False)
        self.norm = norm_layer(config.norm, config.channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y: Tensor = self.relu(self.norm(self.conv(x)))
        return y


class Split(nn.Module):
    """The middle of a bottleneck: Res2Net's hierarchical split, of which ResNet's single 3×3 is the case scale = 1.

    x is cut into `scale` splits; each goes through operator → norm → ReLU, from the second on with the previous
    split's output added (Gao et al. 2019, eq. 1). In a stage's first block the splits do not add up, as their
    resolution changes. The last split passes unchanged, or in a first block is pooled or convolved (`last_split`).
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
            )
            for _ in range(convolved)
        )
        self.norms = nn.ModuleList(norm_layer(config.norm, self.width) for _ in range(convolved))
        self.relu = nn.ReLU(inplace=True)
        pooled = first and convolved < config.scale
        self.pool = nn.AvgPool2d(3, stride, padding=1) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, scale · width, H, W) → (N, scale · width, ⌈H/stride⌉, ⌈W/stride⌉)."""
        if self.scale == 1:
            single: Tensor = self.relu(self.norms[0](self.convs[0](x)))
            return single
        splits = torch.split(x, self.width, dim=1)
        outputs: list[Tensor] = []
        kept: list[list[Tensor]] = []

        def keep(output: Tensor) -> list[Tensor]:
            kept.append([output])
            return kept[-1]

        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = splits[index] if index == 0 or self.first else outputs[-1] + splits[index]
            y = norm(conv(y))
            with nullcontext() if is_traced(y) else saved_tensors_hooks(keep, lambda place: place[0]):
                outputs.append(self.relu(y))
        if len(outputs) < self.scale:
            outputs.append(self.pool(splits[-1]))
        joined = torch.cat(outputs, dim=1)
        if kept:
            # ReLU keeps its output for the backward pass, and so does what follows: once is enough.
            for place, piece in zip(kept, torch.split(joined.detach(), self.width, dim=1), strict=False):
                place[0] = piece
        return joined


class Bottleneck(nn.Module):
    """1×1 reduce → split → 1×1 expand, plus the shortcut."""

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
        """(N, inputs, H, W) → (N, 4 · channels · 2^(stage-1), ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.relu(self.reduce_norm(self.reduce(x)))
        y = self.expand_norm(self.expand(self.split(y)))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class Backbone(nn.Module):
    """Maps an image (N, 3, H, W) to named feature maps `c2` … `c5` (three-stage bodies: … `c4`).

    Attributes:
        config: What it was built from.
        output_stride: The largest stride asked for.
        feature_info: Channels and stride of each map.
        placements: What the 3×3 of each stage are, and why.

    Args:
        config: The backbone.
        output_stride: 8, 16 or 32: no map's stride exceeds it; later stages dilate instead of striding, their first
            block still at the previous dilation (as torchvision's `replace_stride_with_dilation`).

    Raises:
        UsageError: (a ValueError) for another output stride.
    """

    def __init__(self, config: BackboneConfig, output_stride: int = 32) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise UsageError(f"output_stride is {output_stride}, must be 8, 16 or 32")
        self.config, self.output_stride = config, output_stride
        self._compiled: Callable[..., dict[str, Tensor]] | None = None
        self.stem = Stem(config)
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
        """Draws the 1×1 and stem convolutions from He et al.'s normal distribution (fan-out), as torchvision does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self) -> list[nn.Module]:
        """Stage 1, 2, … in order."""
        return [self.get_submodule(f"stage{stage}") for stage in range(1, len(self.config.blocks) + 1)]

    def pyramid(self, x: Tensor, last: str = "") -> dict[str, Tensor]:
        """As `forward`, with the stem's map before pooling as `c1`; stages behind map `last` are not run."""
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
        """(N, 3, H, W) → {"c2": (N, C2, ⌈H/s2⌉, ⌈W/s2⌉), …} by `feature_info`."""
        maps = self.pyramid(x)
        del maps["c1"]
        return maps

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles what all else calls, `pyramid`, by `torch.compile` with its arguments; the keys stay as they are."""
        # Of the class, not of this object: a copy must not run the original's weights.
        self._compiled = torch.compile(type(self)._pyramid, *args, **kwargs)

    def describe(self) -> str:
        """One line for people: which stages hold the operator, which a plain conv and why."""
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
    return Placement(stage, width, "conv", f"{share} is not divisible by 4")


def create_backbone(
    name_or_config: str | BackboneConfig | dict[str, Any], *, output_stride: int = 32, **overrides: Any
) -> Backbone:
    """Builds a backbone: an image (N, 3, H, W) in, named maps `c2` … `c5` out, as `feature_info` states.

    Section 3.4: Res2Net and its relatives with an operator (eqs. 1-24) in each 3×3 where it fits.

    Args:
        name_or_config: A file in `configs/backbones/` such as `"sis50"`, a mapping of `BackboneConfig`'s fields, or a
            `BackboneConfig`.
        output_stride: 8, 16 or 32, the largest stride of a map.
        overrides: Fields to change: `create_backbone("sis50", operator="interactive1")` (paper: eqs. 8-12).

    Raises:
        UsageError: (a ValueError) for an unknown name or field, or values that cannot be.
    """
    return Backbone(backbone_config(name_or_config, **overrides), output_stride)
