"""The four networks as plain modules: channels, operators, precisions, and what the detector does with images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sis_lightning import BackboneConfig, Classifier, Detector, PoseNet, Segmenter
from sis_lightning.backbones import Backbone, backbone_config
from sis_lightning.errors import UsageError

SMALL = backbone_config("sis_demo", channels=8, width=4)
DETECTOR = {"min_size": 64, "max_size": 96, "fpn_channels": 16, "head_channels": 32}

BUILD = {
    "classifier": lambda **options: Classifier(SMALL, 3, **options),
    "segmenter": lambda **options: Segmenter(SMALL, 3, decoder={"decoder_channels": 16}, **options),
    "pose": lambda **options: PoseNet(SMALL, 5, (8, 8, 8), **options),
    "detector": lambda **options: Detector(SMALL, 3, **DETECTOR, **options),
}


def backbone_of(network: nn.Module) -> Backbone:
    return next(module for module in network.modules() if isinstance(module, Backbone))


def loss_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A training step's loss, the detector's own or the mean square of the output."""
    if isinstance(network, Detector):
        boxes = torch.tensor([[3.0, 3, 40, 50]], dtype=torch.float32)
        targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images]
        return torch.stack(list(network.train()(list(images), targets).values())).sum()
    return network.train()(images).float().square().mean()


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("in_channels", [1, 4])
def test_images_may_have_any_number_of_channels(name, in_channels):
    torch.manual_seed(0)
    network = BUILD[name](in_channels=in_channels, operator="interactive1")
    assert backbone_of(network).config.operator == "interactive1"
    loss_of(network, torch.randn(2, in_channels, 64, 64)).backward()
    assert backbone_of(network).stem.conv.weight.grad.abs().sum() > 0
    assert backbone_of(network).in_channels == in_channels


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("built", ["built in it", "converted to it"])
def test_true_precisions(name, dtype, built):
    torch.manual_seed(0)
    if built == "built in it":
        torch.set_default_dtype(dtype)
    try:
        network = BUILD[name]().to(dtype)
        images = torch.randn(2, 3, 64, 64, dtype=dtype)
        loss = loss_of(network, images)
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.isfinite()
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    if name == "detector":
        with torch.no_grad():
            found = network.eval()(list(images))
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        assert {output[key].dtype for output in found for key in ("boxes", "scores")} == {exact}
        assert all(output["boxes"].isfinite().all() for output in found)


def test_backbones_are_given_by_name_fields_or_configuration():
    fields = {"family": "resnet", "depth": 11, "width": 4, "channels": 8, "stem": "cifar"}
    for backbone in (fields, BackboneConfig(**fields)):
        assert backbone_of(Classifier(backbone, 2)).config == BackboneConfig(**fields)
    assert backbone_of(Classifier("sis_demo", 2)).config == backbone_config("sis_demo")
    with pytest.raises(UsageError, match="not int"):
        Classifier(50, 2)


def test_thin_images_are_padded_and_boxes_stay_inside():
    torch.manual_seed(0)
    network = Detector(SMALL, 3, **DETECTOR, detector={"box_score_thresh": 0.0}).eval()
    images = [torch.randn(3, 3, 90), torch.randn(3, 70, 2)]
    with torch.no_grad():
        found = network(images)
    for image, output in zip(images, found, strict=True):
        height, width = image.shape[1:]
        assert len(output["boxes"]) > 0
        assert output["boxes"].min() >= 0
        assert (output["boxes"][:, [0, 2]] <= width).all()
        assert (output["boxes"][:, [1, 3]] <= height).all()


def test_frozen_norm_layers_keep_their_statistics_in_training():
    torch.manual_seed(0)
    network = Detector(SMALL, 3, **DETECTOR, freeze_norm=True)
    norms = [module for module in backbone_of(network).modules() if isinstance(module, nn.BatchNorm2d)]
    others = [module for module in network.backbone.fpn.modules() if isinstance(module, nn.BatchNorm2d)]
    loss_of(network, torch.randn(2, 3, 64, 64)).backward()
    assert all(torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean)) for norm in norms)
    assert all(norm.weight.grad is None for norm in norms)
    assert all(norm.running_mean.abs().sum() > 0 for norm in others)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 0}, ["num_classes", "0"]),
        ({"levels": ("c2", "c9")}, ["anchor_sizes", "3"]),
        ({"levels": ("c2", "c9"), "anchor_sizes": (8, 16, 32)}, ["levels", "c9", "c5"]),
        ({"min_size": 100, "max_size": 50}, ["min_size", "100", "50"]),
        ({"detector": {"box_score_tresh": 0.1}}, ["box_score_thresh"]),
        ({"fpn_norm": "ln"}, ["fpn_norm", "ln", "gn"]),
        ({"in_channels": 0}, ["in_channels", "0"]),
    ],
)
def test_invalid_detectors(arguments, words):
    with pytest.raises(UsageError) as caught:
        Detector(SMALL, **{"num_classes": 3, **arguments})
    assert all(word in str(caught.value) for word in words)
    assert not any(text in str(caught.value) for text in ("--", "model.", "data."))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_keypoints": 0}, ["num_keypoints", "0"]),
        ({"deconv_channels": ()}, ["deconv_channels", "at least one"]),
        ({"deconv_channels": (8,) * 6}, ["deconv_channels", "at most 5", "32"]),
    ],
)
def test_invalid_pose_networks(arguments, words):
    with pytest.raises(UsageError) as caught:
        PoseNet(SMALL, **arguments)
    assert all(word in str(caught.value) for word in words)
