"""Parameters and multiply-accumulates (MACs), from the operations that really run.

A forward pass on the meta device shows every operation; convolutions and matrix products are counted by torch's own
formulas, what multiplies no weights (norms, activations, pooling, resizing, sums) counts as 0, and an operation that is
neither raises: a figure without it would be wrong.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sis_lightning.backbones import backbone_config
from sis_lightning.errors import UsageError
from sis_lightning.models import create_classifier

# Operations without multiply-accumulates of weights. Their cost is memory traffic, which MACs do not measure.
_FREE = frozenset((
    "_adaptive_avg_pool2d", "add", "add_", "alias", "as_strided", "as_strided_", "avg_pool2d", "bernoulli_",
    "cat", "clone", "constant_pad_nd", "contiguous", "copy_", "cudnn_batch_norm", "detach", "div", "empty",
    "empty_like", "empty_strided", "expand", "eye", "fill_", "gelu", "hardtanh", "max_pool2d_with_indices",
    "mean", "mul", "native_batch_norm", "_native_batch_norm_legit", "native_dropout", "native_group_norm",
    "native_layer_norm", "new_empty", "new_zeros", "ones", "permute", "relu", "relu_", "repeat", "reshape",
    "roll", "select", "sigmoid", "silu", "slice", "_softmax", "softmax", "split", "split_with_sizes", "squeeze",
    "stack", "sub", "sum", "t", "_to_copy", "transpose", "_unsafe_view", "unsqueeze", "upsample_bilinear2d",
    "upsample_nearest2d", "view", "zeros", "zeros_like",
))  # fmt: skip


class UncountableError(UsageError):
    """An operation that is known neither to count nor to be free."""


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up, in `total`, what `count` makes of each operation under it: (operation, arguments, keywords, result)."""

    def __init__(self, count: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.total = count, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs and counts one operation."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.total += self.count(func, args, kwargs, out)
        return out


def _macs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        # torch counts a multiply-accumulate as two operations.
        return int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
    if packet.__name__ not in _FREE:
        raise UncountableError(f"cannot count the operation {func}: neither among torch's formulas nor known as free")
    return 0


def count_macs(model: nn.Module, *inputs: Tensor, forward: Callable[..., Any] | None = None) -> int:
    """MACs of `model(*inputs)`, or of `forward(*inputs)`, in evaluation mode.

    Raises:
        UncountableError: For an operation that it does not know.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), OperationCounter(_macs) as counter:
            (forward or model)(*inputs)
    finally:
        model.train(training)
    return int(counter.total)


def count_parameters(model: nn.Module) -> int:
    """All parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Complexity:
    """One row: a backbone alone, and the model around it, for one image of (3, height, width)."""

    name: str
    config: str
    height: int
    width: int
    backbone_parameters: int
    backbone_macs: int
    model: str
    model_parameters: int
    model_macs: int


def measure(
    name: str, kind: str, model: nn.Module, backbone: nn.Module, slug: str, size: tuple[int, int]
) -> Complexity:
    """Counts a model and the backbone in it; both are moved to the meta device."""
    image = torch.empty(1, 3, *size, device="meta")
    model.to("meta")
    return Complexity(
        name,
        slug,
        *size,
        count_parameters(backbone),
        count_macs(backbone, image),
        kind,
        count_parameters(model),
        count_macs(model, image, forward=getattr(model, "countable", None)),
    )


def of_backbones(
    names: Iterable[str], operator: str | None = None, size: int | None = None, num_classes: int | None = None
) -> list[Complexity]:
    """Counts named backbones, alone and as classifiers.

    Args:
        names: Files in `configs/backbones/`.
        operator: In place of the one that each file names.
        size: Side of the image in px; 32 with the cifar stem, 224 with the imagenet stem.
        num_classes: 100 with the cifar stem, 1000 with the imagenet stem.
    """
    rows = []
    for name in names:
        config = backbone_config(name, **({"operator": operator} if operator else {}))
        cifar = config.stem == "cifar"
        side, classes = size or (32 if cifar else 224), num_classes or (100 if cifar else 1000)
        with torch.device("meta"):
            model = create_classifier(config, classes)
        rows.append(measure(name, f"classifier, {classes}", model, model.backbone, config.slug, (side, side)))
    return rows


def image_shape(cli: Any) -> tuple[int, int]:
    """Height and width of the images that a run trains on; of boxes, the largest."""
    arguments = {**cli.config["model"]["init_args"], **cli.config["data"]["init_args"]}
    if "input_size" in arguments:
        height, width = arguments["input_size"]
        return height, width
    if "min_size" in arguments:
        # Images are padded to a multiple of 32.
        return -(-arguments["min_size"] // 32) * 32, -(-arguments["max_size"] // 32) * 32
    side = arguments.get("crop_size") or arguments.get("image_size") or 32
    return side, side


def of_run(layers: dict[str, Any], options: list[str], size: int | None = None) -> list[Complexity]:
    """Counts the model of a run, at the size that it trains on (boxes: the largest) unless `size` is given."""
    from sis_lightning.run.lightning_cli import run

    return [of_cli(run(None, layers, options), layers.get("task", "run"), size)]


def of_cli(cli: Any, name: str, size: int | None = None) -> Complexity:
    """Counts the model that a command line built."""
    task = cli.model
    shape = (size, size) if size else image_shape(cli)
    kind = type(task).__name__.removesuffix("Task").lower()
    return measure(name, kind, task, task.backbone, task.backbone_config.slug, shape)


def to_json(rows: list[Complexity]) -> str:
    """A list of objects; MACs and parameters as whole numbers."""
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"


def to_table(rows: list[Complexity]) -> str:
    """A table for people, in millions and billions."""
    table = Table(title="Parameters and multiply-accumulates (MACs, not FLOPs) of one image")
    for heading in ("name", "config"):
        table.add_column(heading, no_wrap=True)
    for heading in ("image", "backbone M", "backbone GMAC", "whole model", "model M", "model GMAC"):
        table.add_column(heading, justify="left" if heading == "whole model" else "right")
    for row in rows:
        table.add_row(
            row.name,
            row.config,
            f"{row.height}×{row.width}",
            f"{row.backbone_parameters / 1e6:.3f}",
            f"{row.backbone_macs / 1e9:.3f}",
            row.model,
            f"{row.model_parameters / 1e6:.3f}",
            f"{row.model_macs / 1e9:.3f}",
        )
    text = io.StringIO()
    Console(file=text, width=140).print(table)
    return text.getvalue()
