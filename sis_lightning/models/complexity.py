"""Parameters and multiply-accumulates (MACs) of networks, counted from the operations that really run.

A forward pass on the meta device shows every operation. Convolutions and matrix products are counted by torch's own
formulas. Operations that multiply no weights, such as norm layers, activations, pooling, resizing and sums, count as 0.
Any other operation is an error, because a number without it would be wrong.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from sis_lightning.backbones import Backbone, backbone_config
from sis_lightning.backbones.torch_internals import TorchDispatchMode, operation
from sis_lightning.errors import UsageError
from sis_lightning.models.classifier import Classifier
from sis_lightning.text_tables import table_to_text

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


def peak_activations(function: Callable[[], object]) -> int:
    """Runs a function, and returns the bytes that its own tensors take at most at one time.

    Work space inside of operations, as convolutions need it, is not counted.
    """
    held: dict[int, int] = {}
    peak = 0

    def watch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        nonlocal peak
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors([args, kwargs])}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place not in held and place not in given:
                held[place] = storage.nbytes()
                weakref.finalize(storage, held.pop, place, None)
        peak = max(peak, sum(held.values()))
        return 0

    with OperationCounter(watch):
        function()
    return peak


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class UncountableError(UsageError):
    """An operation that is known neither to multiply weights nor to multiply none."""


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which a function is called for each operation of torch, and its results are summed.

    Attributes:
        total: Sum of the results.

    Args:
        count: Function of an operation, its arguments, its keyword arguments and its result.
    """

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
    packet = operation(func)
    if packet in flop_registry:
        # torch counts a multiply-accumulate as two operations.
        return int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
    if packet.__name__ not in _FREE:
        raise UncountableError(
            f"cannot count the operation {func}: torch has no formula for it, and it may multiply weights"
        )
    return 0


def count_macs(model: nn.Module, *inputs: Tensor, forward: Callable[..., Any] | None = None) -> int:
    """Counts the multiply-accumulates (MACs) of a forward pass in evaluation mode.

    Args:
        model: Network; its mode (training or evaluation) is restored afterwards.
        inputs: Arguments of the forward pass; on the meta device nothing is computed.
        forward: Function to call instead of `model`.

    Raises:
        UncountableError: If an operation is not known. It is also a ValueError.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), OperationCounter(_macs) as counter:
            (forward or model)(*inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    return int(counter.total)


def count_parameters(model: nn.Module) -> int:
    """Counts all parameters of a network, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Complexity:
    """Parameters and MACs of a network and of the backbone in it, for one image.

    Attributes:
        name: Name given to the network.
        config: Short name of the backbone's configuration, as `BackboneConfig.slug`.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        backbone_parameters: Number of parameters of the backbone.
        backbone_macs: Number of multiply-accumulates of the backbone.
        model: Kind of the whole network.
        model_parameters: Number of parameters of the whole network.
        model_macs: Number of multiply-accumulates of the whole network.
    """

    name: str
    config: str
    height: int
    width: int
    backbone_parameters: int
    backbone_macs: int
    model: str
    model_parameters: int
    model_macs: int

    def __str__(self) -> str:
        """Formats the numbers as a table."""
        return to_table([self])


def measure(model: nn.Module, image_size: tuple[int, int], *, name: str = "", kind: str = "") -> Complexity:
    """Counts the parameters and MACs of a network on a `Backbone`, and of the backbone alone.

    Args:
        model: One of the four networks, or any network that contains a `Backbone` and maps one image tensor. It is
            copied unless it is on the meta device.
        image_size: Height and width of the image in pixels.
        name: Name for the result; by default the name of the backbone's configuration.
        kind: Kind of the network for the result; by default the name of its class.

    Raises:
        UsageError: If the network has no `Backbone`, or the image size is invalid.
        UncountableError: If an operation of the network is not known.
    """
    height, width = image_size
    if min(height, width) < 1:
        raise UsageError(f"image_size is {tuple(image_size)}, must be height and width of at least 1")
    if not all(parameter.is_meta for parameter in model.parameters()):
        model = copy.deepcopy(model).to("meta")
    backbone = next((module for module in model.modules() if isinstance(module, Backbone)), None)
    if backbone is None:
        raise UsageError(f"{type(model).__name__} contains no backbone of sis_lightning")
    image = torch.empty(1, backbone.in_channels, height, width, device="meta")
    return Complexity(
        name=name or backbone.config.slug,
        config=backbone.config.slug,
        height=height,
        width=width,
        backbone_parameters=count_parameters(backbone),
        backbone_macs=count_macs(backbone, image),
        model=kind or type(model).__name__.lower(),
        model_parameters=count_parameters(model),
        model_macs=count_macs(model, image, forward=getattr(model, "countable", None)),
    )


def measure_backbones(
    names: Iterable[str],
    operator: str | None = None,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> list[Complexity]:
    """Counts the parameters and MACs of named backbones, alone and as classifiers.

    Args:
        names: Names of backbones, see `list_backbones`.
        operator: Operator that replaces each backbone's own; None keeps it.
        image_size: Height and width of the image in pixels; by default those of CIFAR, (32, 32), for backbones with
            the `cifar` stem, and those of ImageNet, (224, 224), for all others.
        num_classes: Number of classes; by default 100 for backbones with the `cifar` stem, 1000 for all others.

    Raises:
        UsageError: If a name or number is invalid.
    """
    rows = []
    for name in names:
        config = backbone_config(name, operator)
        cifar = config.stem == "cifar"
        classes = num_classes or (100 if cifar else 1000)
        with torch.device("meta"):
            model = Classifier(config, classes)
        size = image_size or ((32, 32) if cifar else (224, 224))
        rows.append(measure(model, size, name=name, kind=f"classifier, {classes}"))
    return rows


def to_json(rows: list[Complexity]) -> str:
    """Formats results as a JSON list of objects, with all numbers as integers."""
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"


def to_table(rows: list[Complexity]) -> str:
    """Formats results as a text table, with parameters in millions and MACs in billions."""
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
    return table_to_text(table, width=140)
