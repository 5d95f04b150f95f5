"""A trained network as a file that runs without this package: ONNX, or torch.export's pt2."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from sis_lightning import __version__
from sis_lightning.datamodules import SISDataModule
from sis_lightning.errors import DataError, UsageError
from sis_lightning.models.complexity import image_shape
from sis_lightning.models.deploy import deploy
from sis_lightning.run.lightning_cli import run
from sis_lightning.tasks import BaseTask
from sis_lightning.tasks.base import Exportable

Format = Literal["onnx", "pt2"]
#: Of the largest output: by so much a file's outputs may differ from the network's.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        shapes: Of the images that it was verified with.
        difference: The largest from the network's outputs, as a share of the largest output; None where these were
            empty, as a detector's that found nothing.
    """

    path: Path
    shapes: list[tuple[int, ...]]
    difference: float | None


def export(layers: dict[str, Any], options: list[str], checkpoint: str, kind: Format, out: Path | None) -> Exported:
    """Writes a run's network in its inference form (`deploy`), and verifies the file by running it.

    It takes `image`, normalised float32 (N, 3, H, W) in RGB, of any N, and of any H and W that the network takes (a
    detector: one image (3, H, W)). How to normalise, what the outputs mean and what the classes are called stands in
    the file: ONNX's `metadata_props["sis_lightning"]`, or `metadata.json` among pt2's extra files.

    Args:
        layers: The composed YAML of the run.
        options: What the command line lays over it.
        checkpoint: `last`, `best` or a file.
        kind: `onnx`, for onnxruntime and others, or `pt2`, for `torch.export.load`.
        out: The file; by default `model.onnx` or `model.pt2` in the run's directory.

    Raises:
        UsageError: For a network that cannot be written so, or where a package is missing.
        DataError: Where the checkpoint does not fit, or the file does not do what the network does.
    """
    if kind == "onnx":
        _need("onnx", "onnxscript", "onnxruntime")
    cli = run(None, layers, options)
    task, data = cli.model, cli.datamodule
    assert isinstance(task, BaseTask)
    assert isinstance(data, SISDataModule)
    path = cli.checkpoint(checkpoint)
    content = torch.load(path, map_location="cpu", weights_only=True)
    task.load_state_dict(content["state_dict"])
    task.name_classes(content["class_names"])
    task.eval().requires_grad_(False)
    network = task.exportable(*image_shape(cli))
    if kind == "pt2" and network.traced:
        raise UsageError(f"{type(task).__name__} cannot be written as pt2: {network.traced}\n  Take --format onnx.")
    examples = _examples(network)
    wanted = [_run(network.module, example) for example in examples]  # before deploying, which changes the module
    deploy(network.module, inplace=True)
    own = Path(path).parent
    target = out or (own.parent if own.name == "checkpoints" else cli.directory()) / f"model.{kind}"
    # Of photographs sorted into folders, the run's settings say how they are brought to the network's size.
    seen = [" ".join(str(transform).split()) for transform in [getattr(data, "preparation", None)] if transform]
    metadata = {
        "task": type(task).__name__,
        "backbone": task.backbone_config.slug,
        "classes": task.class_names,
        "input": {"name": "image", "type": "float32", "colour": "RGB", **network.input},
        "preprocessing": f"pixels of 0…1, less mean {list(data.mean)}, by standard deviation {list(data.std)}; "
        + (f"before that {seen[0]} of torchvision" if seen else network.preprocessing),
        "outputs": network.outputs,
        "checkpoint": {"file": Path(path).name, "step": content["global_step"]},
        "sis_lightning": __version__,
        "torch": version("torch"),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters themselves, of what does not concern the file
            write = _write_onnx if kind == "onnx" else _write_pt2
            again = write(network, examples[0], partial, json.dumps(metadata, ensure_ascii=False))
        found = [_difference(want, again(example)) for example, want in zip(examples, wanted, strict=True)]
        differences = [difference for difference in found if difference is not None]
        if not all(difference <= TOLERANCE for difference in differences):  # NaN neither
            raise DataError(f"{target} was not written: its outputs differ from the network's, by {differences}")
        partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return Exported(target, [tuple(example.shape) for example in examples], max(differences, default=None))


def _need(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise UsageError(f'{package} is not installed: pip install "sis-lightning[export]"') from None


def _examples(network: Exportable) -> list[Tensor]:
    """Images of the example's shape, and of others as far as these may differ."""
    generator = torch.Generator().manual_seed(0)
    # The exporter takes a size of one multiple for fixed.
    shape = [max(size, 2 * network.multiples.get(axis, 0)) for axis, size in enumerate(network.shape)]
    other = [size + network.multiples.get(axis, 0) for axis, size in enumerate(shape)]
    return [torch.randn(size, generator=generator) for size in (shape, other)]


def _run(module: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result: Any = module(image)
    return list(result) if isinstance(result, tuple | list) else [result]


def _difference(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float | None:
    """As a share of the largest output; infinite for other shapes, NaN where there is one, None where all is empty."""
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in got]:
        return float("inf")
    shares = [
        (one - other).abs().max() / one.abs().max().clamp_min(1e-12)
        for one, other in zip(wanted, got, strict=True)
        if one.numel()
    ]
    return float(torch.stack(shares).max()) if shares else None


def _write_pt2(network: Exportable, image: Tensor, path: Path, metadata: str) -> Callable[[Tensor], list[Tensor]]:
    dims = {axis: _dimension(axis, multiple) for axis, multiple in network.multiples.items()}
    program = torch.export.export(network.module, (image,), dynamic_shapes=(dims,))
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"metadata.json": metadata})
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda example: _run(module, example)


def _dimension(axis: int, multiple: int) -> Any:
    # The exporter finds the bounds of what may have any size; that it took nothing for fixed, the verification shows.
    return Dim.AUTO if multiple == 1 else multiple * Dim({2: "rows", 3: "columns"}[axis], min=1, max=4096)


def _write_onnx(network: Exportable, image: Tensor, path: Path, metadata: str) -> Callable[[Tensor], list[Tensor]]:
    import onnx
    import onnxruntime

    if network.traced:
        torch.onnx.export(
            network.module,
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
            network.module,
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
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def again(example: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.array(array)) for array in session.run(None, {"image": example.numpy()})]

    return again
