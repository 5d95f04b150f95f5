"""Writes a trained network as a file that runs without this package: ONNX, or a program of torch.export (pt2)."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from sis_lightning.backbones import Backbone
from sis_lightning.errors import DataError, UsageError
from sis_lightning.models.deploy import deploy
from sis_lightning.version import __version__

Format = Literal["onnx", "pt2"]
#: Largest accepted difference between the outputs of a file and of the network, as a share of the largest output.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exportable:
    """A network and everything that a file with it has to say.

    Attributes:
        module: Network that maps one tensor to a tensor or a tuple of tensors.
        shape: Shape of an example of its input.
        multiples: Axes of the input that may have any size which is a multiple of the given number.
        input: Shape of the input, for the reader.
        preprocessing: How an image becomes an input, beyond normalising, for the reader.
        outputs: Name and meaning of each output, in order.
        traced: Reason why `torch.export` cannot follow the computation, if it cannot. Such a network is written as
            ONNX by tracing it.
        metadata: Further plain data to store in the file, such as the names of the classes.
    """

    module: nn.Module
    shape: tuple[int, ...]
    multiples: dict[int, int]
    input: str
    preprocessing: str
    outputs: dict[str, str]
    traced: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class _HasExportable(Protocol):
    def exportable(self, height: int, width: int) -> Exportable: ...


@dataclass(frozen=True)
class Exported:
    """A file that `export` has written and verified.

    Attributes:
        path: Path of the file.
        shapes: Shapes of the inputs on which the file was verified.
        difference: Largest difference from the outputs of the network, as a share of the largest output; None if all
            outputs were empty, as when a detector detects nothing.
    """

    path: Path
    shapes: list[tuple[int, ...]]
    difference: float | None


def export(
    network: Exportable | nn.Module,
    path: str | Path,
    image_size: tuple[int, int] | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Writes the deployed form of a network as a file, and verifies the file by running it.

    The file takes float32 inputs on any number of images, and images of any size that the network takes. The inputs,
    their preprocessing and the outputs are described in the file: in `metadata_props["sis_lightning"]` of ONNX, or in
    the extra file `metadata.json` of pt2, both as JSON. The network itself does not change.

    Args:
        network: One of the four networks, a task with one of them, or an `Exportable`.
        path: File to write; its ending chooses the format, `.onnx` or `.pt2`.
        image_size: Height and width in pixels of an image as in training; not needed for an `Exportable`.
        metadata: Further plain data to store in the file.

    Raises:
        UsageError: If the network cannot be written in this format, an argument is missing, or a package is.
        DataError: If the file cannot be written, or its outputs differ from those of the network.
    """
    target = Path(path)
    kind = target.suffix.removeprefix(".")
    if kind not in get_args(Format):
        raise UsageError(f"path is '{path}', must end with .onnx or .pt2")
    if not isinstance(network, Exportable):
        network = _exportable(network, image_size)
    if kind == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    if kind == "pt2" and network.traced:
        raise UsageError(f"this network cannot be written as pt2: {network.traced}\n  Write ONNX instead.")
    module = copy.deepcopy(network.module).to("cpu", torch.float32).eval().requires_grad_(False)
    backbone = next((part.config.slug for part in module.modules() if isinstance(part, Backbone)), None)
    description = {
        "backbone": backbone,
        "input": {"name": "image", "type": "float32", "shape": network.input},
        "preprocessing": network.preprocessing,
        "outputs": network.outputs,
        "sis_lightning": __version__,
        "torch": version("torch"),
        **network.metadata,
        **(metadata or {}),
    }
    examples = _examples(network)
    expected = [_run(module, example) for example in examples]
    module = deploy(module, inplace=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own code
            write = _write_onnx if kind == "onnx" else _write_pt2
            run = write(network, module, examples[0], partial, json.dumps(description, ensure_ascii=False))
        found = [_difference(want, run(example)) for example, want in zip(examples, expected, strict=True)]
        differences = [difference for difference in found if difference is not None]
        # This form of the comparison fails for NaN too.
        if not all(difference <= TOLERANCE for difference in differences):
            raise DataError(f"{target} was not written: its outputs differ from the network's, by {differences}")
        partial.replace(target)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return Exported(target, [tuple(example.shape) for example in examples], max(differences, default=None))


def _exportable(network: nn.Module, image_size: tuple[int, int] | None) -> Exportable:
    if not callable(getattr(network, "exportable", None)):
        raise UsageError(
            "export takes a Classifier, Segmenter, Detector or PoseNet, a task or an Exportable, "
            f"not {type(network).__name__}"
        )
    if image_size is None:
        raise UsageError("export needs image_size=(height, width), the size of images in training")
    return cast(_HasExportable, network).exportable(*image_size)


def _require(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise UsageError(f'{package} is not installed: pip install "sis-lightning[export]"') from None


def _examples(network: Exportable) -> list[Tensor]:
    """Returns two random inputs: one of the example's shape, and one that differs in all axes that may differ."""
    generator = torch.Generator().manual_seed(0)
    # The exporter takes the size of an axis as constant if it is one multiple.
    shape = [max(size, 2 * network.multiples.get(axis, 0)) for axis, size in enumerate(network.shape)]
    other = [size + network.multiples.get(axis, 0) for axis, size in enumerate(shape)]
    return [torch.randn(size, generator=generator) for size in (shape, other)]


def _run(module: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result: Any = module(image)
    return list(result) if isinstance(result, tuple | list) else [result]


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float | None:
    """Returns the largest difference of two lists of outputs, as a share of the largest output.

    It is infinite for different shapes, NaN if an output has NaN, and None if all outputs are empty.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    shares = [
        (one - other).abs().max() / one.abs().max().clamp_min(1e-12)
        for one, other in zip(expected, found, strict=True)
        if one.numel()
    ]
    return float(torch.stack(shares).max()) if shares else None


def _write_pt2(
    network: Exportable, module: nn.Module, image: Tensor, path: Path, metadata: str
) -> Callable[[Tensor], list[Tensor]]:
    dims = {axis: _dimension(axis, multiple) for axis, multiple in network.multiples.items()}
    program = torch.export.export(module, (image,), dynamic_shapes=(dims,))
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"metadata.json": metadata})
    with path.open("rb") as file:
        loaded = torch.export.load(file).module()
    return lambda example: _run(loaded, example)


def _dimension(axis: int, multiple: int) -> Any:
    # The exporter derives the bounds of an axis of any size. The verification shows whether it took one as constant.
    return Dim.AUTO if multiple == 1 else multiple * Dim({2: "rows", 3: "columns"}[axis], min=1, max=4096)


def _write_onnx(
    network: Exportable, module: nn.Module, image: Tensor, path: Path, metadata: str
) -> Callable[[Tensor], list[Tensor]]:
    import onnx
    import onnxruntime

    if network.traced:
        torch.onnx.export(
            module,
            (image,),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=list(network.outputs),
            dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "objects"} for name in network.outputs}},
        )
    else:
        dims = {axis: _dimension(axis, multiple) for axis, multiple in network.multiples.items()}
        program = torch.onnx.export(
            module,
            (image,),
            dynamo=True,
            dynamic_shapes=(dims,),
            input_names=["image"],
            output_names=list(network.outputs),
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"sis_lightning": metadata})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(example: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.array(array)) for array in session.run(None, {"image": example.numpy()})]

    return run
