"""Parameters and MACs against closed forms and published numbers."""

from __future__ import annotations

import json

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from sis_lightning import create_operator
from sis_lightning.errors import UsageError
from sis_lightning.models import Detector, Segmenter
from sis_lightning.models.complexity import (
    UncountableError,
    count_macs,
    count_parameters,
    measure,
    measure_backbones,
    peak_activations,
    to_json,
    to_table,
)
from sis_lightning.operators import list_operators


@pytest.mark.parametrize("name", list_operators())
@pytest.mark.parametrize("groups", [1, 2])
def test_macs_of_operators_as_in_the_paper(name, groups):
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
def test_published_macs(name, gmac):
    (row,) = measure_backbones([name])
    assert row.model_macs / 1e9 == pytest.approx(gmac, abs=0.006)
    assert row.model_parameters > row.backbone_parameters


def test_results_are_a_table_and_json():
    rows = measure_backbones(["sis50"], "recurrent2", (64, 48))
    assert json.loads(to_json(rows))[0]["config"] == "res2net50-26w4s-recurrent2"
    assert "MACs, not FLOPs" in str(rows[0])
    assert "64×48" in to_table(rows)


def test_the_cost_of_the_detector_is_that_of_fvcore():
    # torchvision documents 134.38 GFLOPs (multiply-accumulates, by fvcore) for fasterrcnn_resnet50_fpn at 800×800.
    with torch.device("meta"):
        model = Detector("resnet50", 90, fpn_norm="none")
    assert measure(model, (800, 800)).model_macs / 1e9 == pytest.approx(134.38, rel=0.01)


def test_a_network_is_measured_with_its_backbone():
    model = Segmenter("sis_demo", 5, in_channels=4).train()
    weight = model.encoder.backbone.stem.conv.weight
    row = measure(model, (64, 96), name="mine", kind="segmentation")
    assert (row.name, row.model, row.height, row.width) == ("mine", "segmentation", 64, 96)
    assert row.model_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < row.backbone_macs < row.model_macs
    assert model.training
    assert not weight.is_meta
    with pytest.raises(UsageError, match="contains no backbone"):
        measure(nn.Conv2d(3, 3, 1), (8, 8))
    with pytest.raises(UsageError, match="image_size"):
        measure(model, (0, 8))


@pytest.mark.parametrize("architecture", [name for name in smp.MODEL_ARCHITECTURES_MAPPING if name != "dpt"])
def test_every_decoder_is_countable(architecture):
    stride = 16 if architecture in ("deeplabv3", "deeplabv3plus", "pan") else 32
    with torch.device("meta"):
        model = Segmenter("sis_demo", 5, architecture, output_stride=stride)
        image = torch.empty(1, 3, 128, 128)
    assert count_macs(model, image) > count_macs(model.encoder, image) > 0


def test_an_operation_that_cannot_be_counted_fails():
    class Spectral(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x).real

    with pytest.raises(UncountableError, match="fft"):
        count_macs(Spectral(), torch.empty(1, 1, 4, 4))


def test_counting_does_not_change_the_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).train()
    assert count_macs(model, torch.ones(1, 3, 5, 5)) == 4 * 3 * 9 * 25
    assert model.training
    assert count_parameters(model) == 4 * 3 * 9 + 4 + 8
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_peak_memory_of_tensors():
    x = torch.zeros(1000)  # given: not counted

    def work() -> torch.Tensor:
        a = x + 1  # 4,000 bytes
        b = torch.cat([a, a])  # 12,000 in all
        del a
        c = b[:1000] * 2  # a view and a product: 12,000
        del b
        return c.view(10, 100)  # 4,000

    assert peak_activations(work) == 12_000
    assert peak_activations(lambda: None) == 0
