"""What operators and networks see: effective receptive fields, and class activation maps of trained classifiers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from sis_lightning.backbones import create_backbone
from sis_lightning.datamodules import SISDataModule
from sis_lightning.errors import DataError, UsageError
from sis_lightning.models import Classifier
from sis_lightning.operators import operator_class, list_operators
from sis_lightning.run.lightning_cli import run
from sis_lightning.tables.figures import styled
from sis_lightning.tasks import ClassificationTask

#: A small network that takes every operator.
_BODY = "sis_demo"


def gradient_map(
    network: Callable[[], Callable[[Tensor], Tensor]], channels: int, size: int, draws: int, seed: int = 0
) -> np.ndarray:
    """The effective receptive field of the centre of a network's output (Luo et al. 2016).

    For each draw, new weights and a new image of normal noise: the gradient of the output's centre, summed over its
    channels, with respect to the image; its absolute value, summed over the image's channels, as a share of its sum.

    Args:
        network: Makes one with new weights, that maps (1, channels, size, size) to (1, C, H, W).
        channels: Of the image.
        size: Side of the image in px; odd, so that it has a centre.
        draws: How many are averaged.
        seed: Of weights and images; the global random state is left as it was.

    Returns:
        (size, size), float64, at most 1 by division by the largest; 0 where the output does not depend on the image.
    """
    total = np.zeros((size, size))
    with torch.random.fork_rng(devices=[]):
        for draw_number in range(draws):
            torch.manual_seed(seed + draw_number)
            made = network()
            if isinstance(made, nn.Module):
                # In float32, quick algorithms of convolutions leave rounding errors where the gradient is 0.
                made = made.eval().double()
            image = torch.randn(1, channels, size, size, dtype=torch.float64, requires_grad=True)
            output = made(image)
            centre = output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()
            (gradient,) = torch.autograd.grad(centre, image)
            share = gradient[0].abs().sum(dim=0).numpy()
            total += share / max(share.sum(), np.finfo(float).tiny)
    total /= max(total.max(), np.finfo(float).tiny)
    return total


def support(field: np.ndarray) -> tuple[int, int]:
    """Height and width in px of the smallest box that holds all of a map (H, W) that is not 0."""
    places = np.argwhere(field)
    if not len(places):
        return 0, 0
    height, width = places.max(axis=0) - places.min(axis=0) + 1
    return int(height), int(width)


def _of_operator(name: str) -> Callable[[], nn.Module]:
    kind = operator_class(name)
    width = math.ceil(16 / kind.channel_multiple) * kind.channel_multiple
    return lambda: kind(16, width)


def _of_backbone(name: str, feature: str) -> Callable[[], nn.Module]:
    class _OneMap(nn.Module):
        """The map alone."""

        def __init__(self) -> None:
            super().__init__()
            self.body = create_backbone(_BODY, operator=name)

        def forward(self, x: Tensor) -> Tensor:
            return self.body.pyramid(x, feature)[feature]

    return _OneMap


@styled
def receptive_fields(names: Sequence[str] | None = None) -> Figure:
    """What an operator sees, alone and in a small network: `gradient_map` of each.

    Args:
        names: Of operators; None for all that are registered.

    Returns:
        A column for each: above, one operator of 16 channels on 15×15; below, `c3` (stride 8) of the demo's backbone
        with it, on 97×97. The box around what is not 0 is stated.

    Raises:
        UsageError: For an operator that there is not.
    """
    names = tuple(names) if names is not None else tuple(list_operators())
    # By strides of 8, px 48 of 97 is the centre of the map's middle.
    rows: list[tuple[str, list[np.ndarray]]] = [
        ("one operator", [gradient_map(_of_operator(name), 16, 15, 32) for name in names]),
        (f"{_BODY}, c3", [gradient_map(_of_backbone(name, "c3"), 3, 97, 12) for name in names]),
    ]
    figure = Figure(figsize=(max(4.8, 1.15 * len(names) + 0.9), 3.3))
    panels = figure.subplots(2, len(names), squeeze=False)
    norm = PowerNorm(0.5, 0, 1)
    for number, (what, fields) in enumerate(rows):
        for axis, name, field in zip(panels[number], names, fields, strict=True):
            image = axis.imshow(field, norm=norm, interpolation="nearest")
            height, width = support(field)
            cut = "≥ " if max(height, width) >= len(field) else ""
            title = f"{cut}{height}×{width}"
            axis.set_title(title if number else f"{name}\n{title}")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            axis.spines[:].set_visible(False)
        size = len(fields[0])
        panels[number][0].set_ylabel(f"{what}\n{size}×{size} px")
    bar = figure.colorbar(image, ax=panels, shrink=0.8, aspect=30, ticks=[0, 0.05, 0.25, 0.5, 1])
    bar.set_label("|gradient| / largest, square-root scale")
    figure.suptitle(
        "Effective receptive fields at random weights; above each, the box of gradients that are not 0",
        x=0.01,
        horizontalalignment="left",
    )
    return figure


def class_activation_map(network: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Where a classifier sees the class that it finds likeliest (Zhou et al. 2016, "CAM").

    Exact for a global average pool with a fully connected layer: the mean of a map is its class's logit less the bias.

    Args:
        network: In evaluation mode.
        images: Normalised, (N, 3, H, W).

    Returns:
        Maps (N, h, w) at the resolution of the last features, and probabilities (N, classes).
    """
    with torch.no_grad():
        features = list(network.backbone(images).values())[-1]
        probabilities = network.fc(features.mean(dim=(2, 3))).softmax(dim=1)
        weights = network.fc.weight[probabilities.argmax(dim=1)]
        return torch.einsum("nc,nchw->nhw", weights, features), probabilities


@dataclass(frozen=True)
class _Trained:
    """A classification run, ready to look at pictures."""

    path: Path
    name: str
    network: Classifier
    classes: tuple[str, ...]
    data: SISDataModule


def _trained(path: Path) -> _Trained:
    config = path / "config.yaml"
    if not config.is_file():
        raise DataError(f"{path}: no run in it (no config.yaml)")
    cli = run(None, yaml.safe_load(config.read_text(encoding="utf-8")), [])
    task, data = cli.model, cli.datamodule
    if not isinstance(task, ClassificationTask):
        raise UsageError(f"{path} is a run of {type(task).__name__}: activation-maps takes classification runs alone")
    assert isinstance(data, SISDataModule)
    content = torch.load(cli.checkpoint(str(path / "checkpoints" / "last.ckpt")), map_location="cpu", weights_only=True)
    task.load_state_dict(content["state_dict"])
    task.name_classes(content["class_names"])
    task.eval().requires_grad_(False)
    assert isinstance(task.model, Classifier)
    data.setup("validate")
    return _Trained(path, task.backbone_config.slug, task.model, tuple(task.class_names), data)


@styled
def activation_maps(runs: Sequence[Path], images: int = 4) -> Figure:
    """What trained classifiers look at: `class_activation_map` of several runs over the same validation images.

    Args:
        runs: Directories of classification runs on the same data, each with `config.yaml` and `checkpoints/last.ckpt`;
            their `data.root` counts from the current directory.
        images: How many, spread evenly over the split.

    Returns:
        A line for each image: the image, and the map of each run from 0 to its own largest value, a contour at half.

    Raises:
        UsageError: For a run that is no classification, or runs on different data.
        DataError: Where a run, its checkpoint or its data is missing.
    """
    if not runs or images < 1:
        raise UsageError("activation maps need at least one run and one image")
    with isolate_rng():  # building a run seeds everything
        trained = [_trained(path) for path in runs]
    first = trained[0]
    for other in trained[1:]:
        same = other.data.listing("val") == first.data.listing("val") and other.classes == first.classes
        if not same:
            raise UsageError(f"{first.path} and {other.path} are of different data: they can share no images")
    source = first.data.sources["val"]
    indices = np.unique(np.linspace(0, len(source) - 1, min(images, len(source))).round().astype(int))
    shown = [source[int(index)] for index in indices]
    names = [one.name for one in trained]
    heads = names if len({*names}) == len(names) else [str(one.path) for one in trained]
    width = max(4.8, 1.75 * (1 + len(trained)) + 0.8)
    figure = Figure(figsize=(width, 1.75 * len(shown) + 1.0))
    panels = figure.subplots(len(shown), 1 + len(trained), squeeze=False)
    for line, sample in zip(panels, shown, strict=True):
        line[0].set_ylabel(f"true: {first.classes[sample['label']]}")
        for axis, one in zip(line, (first, *trained), strict=True):
            image = one.data.eval_transform(sample)["image"].as_subclass(torch.Tensor)
            picture = image.permute(1, 2, 0).numpy() / 255
            if axis is line[0]:
                axis.imshow(picture)
                continue
            maps, probabilities = class_activation_map(one.network, one.data.normalize(image)[None])
            large = F.interpolate(maps[None], image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
            field = (large / large.max().clamp_min(1e-12)).clamp_min(0).numpy()
            axis.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=1)
            overlay = axis.imshow(field, vmin=0, vmax=1, alpha=0.6)
            if field.min() < 0.5 < field.max():
                for colour, thickness in (("black", 2.4), ("white", 1.2)):
                    axis.contour(field, levels=[0.5], colors=colour, linewidths=thickness)
            best = int(probabilities[0].argmax())
            axis.set_title(f"{one.classes[best]} {float(probabilities[0, best]):.2f}")
    for axis in panels.reshape(-1):
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    for axis, head in zip(panels[-1], ("image", *heads), strict=True):
        axis.set_xlabel("\n".join(textwrap.wrap(head, 22)))
    bar = figure.colorbar(overlay, ax=panels, shrink=0.5, aspect=30)
    bar.set_label("activation of the class above / largest")
    said = "Above each map the class that it is of and its probability; contour: half of the largest. "
    said += f"Validation images, {first.data.identity()}"
    lines = ["Class activation maps", *textwrap.wrap(said, int(13 * width))]
    figure.suptitle("\n".join(lines), x=0.01, horizontalalignment="left")
    return figure
