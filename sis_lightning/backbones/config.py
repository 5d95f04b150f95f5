"""What a backbone is, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from sis_lightning.config_files import config_names, find_config, read_yaml
from sis_lightning.errors import UsageError, nearest
from sis_lightning.operators import operator_class

# depth → bottlenecks in each stage; a bottleneck is three layers, stem and classifier make two more.
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
    """A backbone on two orthogonal axes: how a bottleneck splits its channels, and what each 3×3 is (eqs. 1-24).

    Built, it maps an image (N, 3, H, W) to maps `c2` … `c5` (three-stage bodies: `c4`), stage i with
    4 · channels · 2^(i-1) channels. Source: section 3.4 of the paper.

    Raises:
        UsageError: (a ValueError) for values that cannot be, or do not fit each other.

    Args:
        family: `resnet` (one path), `resnext` (groups), `res2net` (hierarchical split), `res2next` (both). Must agree
            with `scale` and `cardinality`.
        depth: Layers: 29 (three stages of three bottlenecks), 50, 101, 152, or small ones: 11 and 20 (three stages of
            one and two), 14 and 26 (four stages).
        operator: What each 3×3 is: `conv`, `basic`, `interactive1`, `interactive2`, `recurrent1`, `recurrent2`, or a
            registered one. It goes in where it fits a split's width, else a plain conv stays (section 4.1).
        steps: T of the recurrent operators (Table 1-1); 2 for all others.
        width: Channels of one split of one group in stage 1; doubles with each stage.
        scale: Hierarchical splits of a bottleneck, s of Res2Net; 1 for none.
        cardinality: Groups of each 3×3, c of ResNeXt; 1 for none.
        channels: Of the stem. Stage i puts out 4 · channels · 2^(i-1).
        stem: `imagenet` (7×7 of stride 2, max-pool of stride 2) or `cifar` (3×3 of stride 1).
        last_split: In a stage's first block, the last of several splits is average-pooled (`pool`, Res2Net's ImageNet
            form) or convolved like the others (`conv`, its CIFAR form).
        norm: `bn`, `syncbn` (batch norm over all devices) or `gn` (group norm, up to 32 groups).
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

    def __post_init__(self) -> None:
        for key, known in _LITERALS.items():
            value = getattr(self, key)
            if value not in known and key == "norm" and "froz" in str(value):
                raise UsageError(
                    f"backbone.norm is {value!r}: a frozen norm on weights drawn at random would leave the network "
                    "without any.\n  Take bn, syncbn or gn; --model.freeze_norm true keeps the statistics of "
                    "--model.backbone_weights (detection)."
                )
            if value not in known:
                choices = ", ".join(str(item) for item in known)
                hint = f" ({nearest(value, known)})" if isinstance(value, str) else ""
                raise UsageError(f"backbone.{key} is {value!r}, must be one of {choices}{hint}")
        for key in ("steps", "width", "scale", "cardinality", "channels"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"backbone.{key} is {value!r}, must be a whole number of at least 1")
        operator = operator_class(self.operator)
        if self.steps != 2 and not operator.recurrent:
            raise UsageError(
                f"backbone.steps is {self.steps}, but operator '{self.operator}' has no recurrence: leave steps at 2"
            )
        hierarchical, grouped = self.family.startswith("res2"), self.family.endswith("next")
        if (self.scale > 1) != hierarchical or (self.cardinality > 1) != grouped:
            raise UsageError(
                f"backbone.family '{self.family}' has scale {'> 1' if hierarchical else '= 1'} and cardinality "
                f"{'> 1' if grouped else '= 1'}, but scale is {self.scale} and cardinality {self.cardinality}"
            )

    @property
    def blocks(self) -> tuple[int, ...]:
        """Bottlenecks in each stage."""
        return BLOCKS[self.depth]

    def split_width(self, stage: int) -> int:
        """Channels of one split in stage 1, 2, …, all groups together."""
        return self.width * self.cardinality << (stage - 1)

    def fits(self, stage: int) -> bool:
        """Whether the operator goes into a stage: its width must divide (section 4.1)."""
        width = self.split_width(stage)
        return operator_class(self.operator).unsuitable(width, width, 3, groups=self.cardinality) is None

    @property
    def slug(self) -> str:
        """A short name that tells configs apart, such as `res2net50-26w4s-basic`."""
        split = f"{self.cardinality}c" * (self.cardinality > 1) + f"{self.width}w" + f"{self.scale}s" * (self.scale > 1)
        operator = self.operator + (f"-T{self.steps}" if self.steps != 2 else "")
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


def backbone_config(name_or_config: str | BackboneConfig | dict[str, Any], **overrides: Any) -> BackboneConfig:
    """Resolves a name, a mapping or a config, with fields changed.

    Args:
        name_or_config: A file in `configs/backbones/` (`"sis50"`, or a path), a mapping of fields, or a config.
        overrides: Fields to change, such as `operator="recurrent2"`.

    Raises:
        UsageError: (a ValueError) for an unknown name or field, or values that cannot be.
    """
    if isinstance(name_or_config, BackboneConfig):
        values = dataclasses.asdict(name_or_config)
    elif isinstance(name_or_config, str):
        values = read_yaml(find_config(name_or_config, "configs/backbones"))
    else:
        values = dict(name_or_config)
    values |= overrides
    fields = [field.name for field in dataclasses.fields(BackboneConfig)]
    for key in values:
        if key not in fields:
            raise UsageError(f"a backbone has no '{key}': {nearest(key, fields)}")
    for key in ("family", "depth"):
        if key not in values:
            raise UsageError(f"a backbone needs '{key}', or a name: {', '.join(config_names('configs/backbones'))}")
    return BackboneConfig(**values)
