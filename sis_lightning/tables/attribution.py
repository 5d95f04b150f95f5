"""Effective receptive fields of operators and networks, and class activation maps of trained classifiers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from sis_lightning.backbones import create_backbone
from sis_lightning.datamodules import SISDataModule
from sis_lightning.datasets.images import normalize
from sis_lightning.errors import UsageError
from sis_lightning.models import Classifier
from sis_lightning.operators import list_operators, operator_class
from sis_lightning.run.run import Run
from sis_lightning.tables.plotting import styled
from sis_lightning.tasks import ClassificationTask

#: A small network that takes every operator.
_BODY = "sis_demo"


def gradient_map(
    network: Callable[[], Callable[[Tensor], Tensor]], channels: int, size: int, draws: int, seed: int = 0
) -> np.ndarray:
    """The effective receptive field of the centre of a network's output (Luo et al. 2016).

    Each draw has new weights and a new image of normal noise. The gradient of the output's centre, summed over its
    channels, is taken with respect to the image; its absolute value is summed over the image's channels and divided by
    the sum over all pixels.

    Args:
        network: Builds a network with new weights that maps (1, channels, size, size) to (1, C, H, W).
        channels: Number of channels of the image.
        size: Side of the image in px; odd, so that it has a centre.
        draws: Number of draws that are averaged.
        seed: Random seed of weights and images; the global random state is not changed.

    Returns:
        Map of shape (size, size), float64 in [0, 1], scaled to a maximum of 1; exactly 0 where the output does not
        depend on the image.
    """
    total = np.zeros((size, size))
    with torch.random.fork_rng(devices=[]):
        for draw_number in range(draws):
            torch.manual_seed(seed + draw_number)
            made = network()
            if isinstance(made, nn.Module):
                # In float32, fast convolution algorithms leave rounding errors where the gradient is 0.
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
    """Height and width in px of the smallest box that contains all nonzero pixels of a map of shape (H, W)."""
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
        """The backbone with one feature map as its output."""

        def __init__(self) -> None:
            super().__init__()
            self.body = create_backbone(_BODY, operator=name)

        def forward(self, x: Tensor) -> Tensor:
            return self.body.pyramid(x, feature)[feature]

    return _OneMap


@styled
def receptive_fields(names: Sequence[str] | None = None) -> Figure:
    """Plots the effective receptive field of operators, alone and in a small network (see `gradient_map`).

    Args:
        names: Names of operators; None for all that are registered.

    Returns:
        A column for each operator: above, the operator with 16 channels on 15×15 px; below, the map `c3` (stride 8) of
        the demo's backbone on 97×97 px. The titles give the size of the box around nonzero gradients.

    Raises:
        UsageError: If there is no such operator.
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
        "Effective receptive fields with random weights; titles: box around nonzero gradients",
        x=0.01,
        horizontalalignment="left",
    )
    return figure


def class_activation_map(network: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class activation maps of the most probable class (Zhou et al. 2016, "CAM").

    They are exact for global average pooling with a linear layer: the mean of a map is the logit without the bias.

    Args:
        network: Classifier in evaluation mode.
        images: Normalised images of shape (N, 3, H, W).

    Returns:
        Maps of shape (N, h, w) at the resolution of the last features, and probabilities of shape (N, classes).
    """
    with torch.no_grad():
        features = list(network.backbone(images).values())[-1]
        probabilities = network.fc(features.mean(dim=(2, 3))).softmax(dim=1)
        weights = network.fc.weight[probabilities.argmax(dim=1)]
        return torch.einsum("nc,nchw->nhw", weights, features), probabilities


@dataclass(frozen=True)
class _Trained:
    """A trained classification run with its data."""

    path: Path
    name: str
    network: Classifier
    classes: tuple[str, ...]
    data: SISDataModule


def _trained(path: Path) -> _Trained:
    run = Run.from_folder(path)
    if not isinstance(run.task, ClassificationTask):
        raise UsageError(f"{path} is a run of {type(run.task).__name__}: activation-maps needs classification runs")
    task, data = run.load("last"), run.datamodule
    assert isinstance(task.model, Classifier)
    data.setup("validate")
    return _Trained(path, run.slug, task.model, tuple(task.class_names), data)


@styled
def activation_maps(runs: Sequence[Path], images: int = 4) -> Figure:
    """Plots the class activation maps of several runs on the same validation images (see `class_activation_map`).

    Args:
        runs: Directories of classification runs on the same data, each with `config.yaml` and `checkpoints/last.ckpt`;
            a relative `data.root` is relative to the current directory.
        images: Number of images, spread evenly over the split.

    Returns:
        A line for each image: the image, and the map of each run, from 0 to its own maximum, with a contour at half.

    Raises:
        UsageError: If a run is not a classification run, or the runs are on different data.
        DataError: If a run, its checkpoint or its data is missing.
    """
    if not runs or images < 1:
        raise UsageError("activation maps need at least one run and one image")
    trained = [_trained(path) for path in runs]
    first = trained[0]
    for other in trained[1:]:
        same = other.data.listing("val") == first.data.listing("val") and other.classes == first.classes
        if not same:
            raise UsageError(f"{first.path} and {other.path} are on different data, so they share no images")
    source = first.data.datasets["val"]
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
            pixels = image.permute(1, 2, 0).numpy() / 255
            if axis is line[0]:
                axis.imshow(pixels)
                continue
            seen = normalize(image, one.data.meta.mean, one.data.meta.std)[None]
            maps, probabilities = class_activation_map(one.network, seen)
            large = F.interpolate(maps[None], image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
            field = (large / large.max().clamp_min(1e-12)).clamp_min(0).numpy()
            axis.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=1)
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
    bar.set_label("class activation / maximum")
    said = "Title of each map: the predicted class and its probability; contour: half of the maximum. "
    said += f"Validation images, {first.data.identity()} data."
    lines = ["Class activation maps", *textwrap.wrap(said, int(13 * width))]
    figure.suptitle("\n".join(lines), x=0.01, horizontalalignment="left")
    return figure
