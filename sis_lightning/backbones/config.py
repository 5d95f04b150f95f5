"""The configuration of a backbone, and the named configurations in `configs/backbones/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from sis_lightning.config_files import config_names, find_config, read_yaml
from sis_lightning.errors import UsageError, nearest
from sis_lightning.operators import operator_class

# Depth → number of bottlenecks in each stage. A bottleneck has three layers; the stem and the classifier are two more.
BLOCKS: dict[int, tuple[int, ...]] = {
    11: (1, 1, 1),
    14: (1, 1, 1, 1),
    20: (2, 2, 2),
    26: (2, 2, 2, 2),
    29: (3, 3, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@dataclass(frozen=True)
class BackboneConfig:
    """The configuration of a backbone: how its bottlenecks split channels, and their operator for 3×3 convolutions.

    The backbone maps an image to feature maps `c2` … `c5` (`c2` … `c4` if it has three stages). The map of stage i has
    4 · channels · 2^(i-1) channels. Source: section 3.4 of the paper.

    Args:
        family: Kind of bottleneck: `resnet` (one path), `resnext` (groups), `res2net` (hierarchical splits) or
            `res2next` (both). Splits need `scale` above 1, and groups need `cardinality` above 1; otherwise each of
            them must be 1.
        depth: Number of layers: 50, 101 or 152 (four stages); 29 (three stages of three bottlenecks); 11 or 20 (three
            stages of one or two bottlenecks); 14 or 26 (four stages of one or two bottlenecks).
        operator: Operator in place of each 3×3 convolution: `conv`, `basic`, `interactive1`, `interactive2`,
            `recurrent1`, `recurrent2`, or a registered one. All but `conv` need a split width that is divisible by 4; a
            stage with another split width keeps plain convolutions (section 4.1 of the paper).
        steps: Number of time steps T of the recurrent operators (Table 1-1 of the paper). It must be 2 for all other
            operators.
        width: Number of channels of one split of one group in stage 1. It doubles with each stage.
        scale: Number of hierarchical splits of a bottleneck (s of Res2Net); 1 for no splits.
        cardinality: Number of groups of each 3×3 convolution (C of ResNeXt); 1 for no groups.
        channels: Number of channels of the stem.
        stem: First layers: `imagenet` (7×7 convolution and max pooling, both with stride 2) or `cifar` (3×3 convolution
            with stride 1).
        last_split: Operation on the last split in the first block of a stage: `pool` applies average pooling
            (Res2Net for ImageNet), `conv` convolves it like the others (Res2Net for CIFAR).
        norm: Norm layers: `bn` (batch norm), `syncbn` (batch norm over all devices) or `gn` (group norm with up to 32
            groups).
        groups: How operators in place of grouped convolutions are read, on which the paper is silent: `inside` makes
            each group an operator of its own, as the groups of a convolution are; `across` divides Y1 into halves over
            all groups, so that outputs see other groups. Parameters and MACs are the same.

    Raises:
        UsageError: If a value is invalid, or values do not fit each other. It is also a ValueError.
    """

    family: Literal["resnet", "resnext", "res2net", "res2next"]
    depth: Literal[11, 14, 20, 26, 29, 50, 101, 152]
    operator: str = "conv"
    steps: int = 2
    width: int = 64
    scale: int = 1
    cardinality: int = 1
    channels: int = 64
    stem: Literal["imagenet", "cifar"] = "imagenet"
    last_split: Literal["pool", "conv"] = "pool"
    norm: Literal["bn", "syncbn", "gn"] = "bn"
    groups: Literal["inside", "across"] = "inside"

    def __post_init__(self) -> None:
        for key, known in _LITERALS.items():
            value = getattr(self, key)
            if value not in known and key == "norm" and "froz" in str(value):
                raise UsageError(
                    f"backbone: norm is {value!r}: frozen norm layers on random weights would not normalise anything.\n"
                    "  Take bn, syncbn or gn; the detector's freeze_norm keeps the statistics of pretrained weights."
                )
            if value not in known:
                choices = ", ".join(str(item) for item in known)
                hint = f" ({nearest(value, known)})" if isinstance(value, str) else ""
                raise UsageError(f"backbone: {key} is {value!r}, must be one of {choices}{hint}")
        for key in ("steps", "width", "scale", "cardinality", "channels"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"backbone: {key} is {value!r}, must be an integer of at least 1")
        operator = operator_class(self.operator)
        if self.steps != 2 and not operator.recurrent:
            raise UsageError(
                f"backbone: steps is {self.steps}, but operator '{self.operator}' has no recurrence: leave steps at 2"
            )
        if self.groups == "across" and self.cardinality == 1:
            raise UsageError(
                "backbone: groups is 'across', but with cardinality 1 there are no groups: leave it inside"
            )
        hierarchical, grouped = self.family.startswith("res2"), self.family.endswith("next")
        if (self.scale > 1) != hierarchical or (self.cardinality > 1) != grouped:
            raise UsageError(
                f"backbone: family '{self.family}' has scale {'> 1' if hierarchical else '= 1'} and cardinality "
                f"{'> 1' if grouped else '= 1'}, but scale is {self.scale} and cardinality {self.cardinality}"
            )

    @property
    def blocks(self) -> tuple[int, ...]:
        """The number of bottlenecks in each stage."""
        return BLOCKS[self.depth]

    def split_width(self, stage: int) -> int:
        """Returns the number of channels of one split in a stage (1, 2, …), all groups together."""
        return self.width * self.cardinality << (stage - 1)

    def fits(self, stage: int) -> bool:
        """Returns whether the operator suits the split width of a stage (section 4.1)."""
        width = self.split_width(stage)
        return operator_class(self.operator).unsuitable(width, width, 3, groups=self.cardinality) is None

    @property
    def slug(self) -> str:
        """A short name that differs for different configurations, such as `res2net50-26w4s-basic`."""
        split = f"{self.cardinality}c" * (self.cardinality > 1) + f"{self.width}w" + f"{self.scale}s" * (self.scale > 1)
        operator = self.operator + (f"-T{self.steps}" if self.steps != 2 else "")
        operator += "-across" if self.groups == "across" else ""
        parts = [f"{self.family}{self.depth}", split, operator]
        usual = {"channels": 64, "norm": "bn", "stem": "cifar" if len(self.blocks) == 3 else "imagenet"}
        usual["last_split"] = "conv" if self.stem == "cifar" else "pool"
        parts += [
            f"{getattr(self, key)}" + "ch" * (key == "channels") for key in usual if getattr(self, key) != usual[key]
        ]
        return "-".join(parts)


_LITERALS = {
    name: get_args(annotation) for name, annotation in get_type_hints(BackboneConfig).items() if get_args(annotation)
}


def list_backbones() -> list[str]:
    """Lists the names of all backbones: the YAML files in `configs/backbones/`, the user's own included.

    Files are found in the current directory, in the folders of `$SIS_CONFIG_PATH` and in the package.
    """
    return config_names("configs/backbones")


def backbone_config(
    backbone: str | BackboneConfig | Mapping[str, Any], operator: str | None = None, **overrides: Any
) -> BackboneConfig:
    """Returns the configuration of a backbone that is given by name, by its fields, or as a configuration.

    Args:
        backbone: Name of a file in `configs/backbones/` such as `"sis50"`, path of a YAML file, mapping of the fields
            of `BackboneConfig`, or a `BackboneConfig`.
        operator: Operator that replaces the configuration's own; None keeps it.
        overrides: Other fields to change, such as `norm="gn"`.

    Raises:
        UsageError: If a name, field or value is invalid. It is also a ValueError.
    """
    if isinstance(backbone, BackboneConfig):
        values = dataclasses.asdict(backbone)
    elif isinstance(backbone, str):
        values = read_yaml(find_config(backbone, "configs/backbones"))
    elif isinstance(backbone, Mapping):
        values = dict(backbone)
    else:
        raise UsageError(f"a backbone is a name, a mapping or a BackboneConfig, not {type(backbone).__name__}")
    values |= overrides
    if operator is not None:
        values["operator"] = operator
    fields = [field.name for field in dataclasses.fields(BackboneConfig)]
    for key in values:
        if key not in fields:
            raise UsageError(f"a backbone has no '{key}': {nearest(str(key), fields)}")
    for key in ("family", "depth"):
        if key not in values:
            raise UsageError(f"a backbone needs '{key}', or a name: {', '.join(list_backbones())}")
    return BackboneConfig(**values)
