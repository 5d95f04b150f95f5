"""Parameters and MACs against closed forms and published figures."""

from __future__ import annotations

import json

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from sis_lightning import create_operator
from sis_lightning.backbones import backbone_config
from sis_lightning.config_files import config_names
from sis_lightning.models import create_segmenter
from sis_lightning.models.complexity import UncountableError, count_macs, count_parameters
from sis_lightning.operators import operator_names


@pytest.mark.parametrize("name", operator_names())
@pytest.mark.parametrize("groups", [1, 2])
def test_operators_cost_what_the_paper_says(name, groups):
    channels, size = 32, 16
    operator = create_operator(name, channels, channels, groups=groups)
    conv = channels * channels // groups * 9 * size * size
    sixteenths = {"conv": 16, "basic": 11}.get(name, 12)
    assert count_macs(operator, torch.empty(1, channels, size, size)) * 16 == conv * sixteenths


@pytest.mark.parametrize(("steps", "sixteenths"), [(1, 10), (2, 12), (3, 14), (4, 16)])
def test_each_step_of_a_recurrence_costs_two_sixteenths(steps, sixteenths):
    operator = create_operator("recurrent1", 32, 32, steps=steps)
    assert count_macs(operator, torch.empty(1, 32, 8, 8)) * 16 == 32 * 32 * 9 * 64 * sixteenths


@pytest.mark.parametrize(
    ("name", "gmac"),
    [("resnet50", 4.09), ("resnext29_8x64d", 5.39), ("res2next29_8c25w4s", 5.51), ("res2net50", 4.26)],
)
def test_published_macs(command, name, gmac):
    result = command("complexity", name, "--json")
    assert result.code == 0, result.err
    (row,) = json.loads(result.out)
    assert row["model_macs"] / 1e9 == pytest.approx(gmac, abs=0.006)
    assert row["model_parameters"] > row["backbone_parameters"]


def test_the_table_labels_macs_and_takes_an_operator(command):
    result = command("complexity", "sis50", "--operator", "recurrent2", "--size", "64")
    assert result.code == 0
    assert "MACs, not FLOPs" in result.out
    assert "recurrent2" in result.out
    assert "64×64" in result.out


SIZES = {"cls": (32, 32), "seg": (96, 96), "det": (96, 96), "kpt": (128, 96)}


@pytest.mark.parametrize("task", config_names("tasks"))
def test_the_model_of_a_run_is_counted_whole(command, task):
    result = command("complexity", "--config", f"tasks/{task}.yaml", "--config", "configs/demo.yaml", "--json")
    assert result.code == 0, result.err
    (row,) = json.loads(result.out)
    assert (row["name"], row["height"], row["width"]) == (task, *SIZES[task[:3]])
    assert 0 < row["backbone_macs"] < row["model_macs"]


def test_the_detectors_cost_is_fvcores(command):
    # torchvision documents 134.38 GFLOPs (multiply-accumulates, fvcore) for fasterrcnn_resnet50_fpn at 800×800.
    options = ["--config", "tasks/det_coco.yaml", "--model.backbone", "resnet50", "--model.num_classes", 90]
    result = command("complexity", *options, "--size", 800, "--json")
    assert result.code == 0, result.err
    (row,) = json.loads(result.out)
    assert row["model_macs"] / 1e9 == pytest.approx(134.38, rel=0.01)


@pytest.mark.parametrize("architecture", [name for name in smp.MODEL_ARCHITECTURES_MAPPING if name != "dpt"])
def test_every_decoder_is_countable(architecture):
    stride = 16 if architecture in ("deeplabv3", "deeplabv3plus", "pan") else 32
    with torch.device("meta"):
        model = create_segmenter(architecture, backbone_config("sis_demo"), 5, stride)
        image = torch.empty(1, 3, 128, 128)
    assert count_macs(model, image) > count_macs(model.encoder, image) > 0


def test_options_of_a_run_are_heeded(command):
    options = ["--config", "tasks/cls_cifar100.yaml", "--model.backbone", "resnet29", "--json"]
    (row,) = json.loads(command("complexity", *options).out)
    assert row["config"].startswith("resnet29")
    result = command("complexity", *options, "--operator", "basic")
    assert result.code == 2
    assert "--model.backbone.operator" in result.err


def test_an_operation_that_cannot_be_counted_fails():
    class Spectral(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x).real

    with pytest.raises(UncountableError, match="fft"):
        count_macs(Spectral(), torch.empty(1, 1, 4, 4))


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).train()
    assert count_macs(model, torch.ones(1, 3, 5, 5)) == 4 * 3 * 9 * 25
    assert model.training
    assert count_parameters(model) == 4 * 3 * 9 + 4 + 8
    assert torch.equal(model[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["sis5O"], ["sis50"]), (["--operater", "basic"], ["--operater"]), (["sis50", "--operator", "basik"], ["basic"])],
)
def test_bad_arguments(command, arguments, words):
    result = command("complexity", *arguments)
    assert result.code == 2
    assert all(word in result.err for word in words)
    assert len(result.err.splitlines()) <= 5
