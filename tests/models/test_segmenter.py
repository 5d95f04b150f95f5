"""Our backbones in the networks of segmentation-models-pytorch."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.encoders import encoders

from sis_lightning.backbones import create_backbone
from sis_lightning.errors import UsageError
from sis_lightning.models import Segmenter, register_encoder
from sis_lightning.models.complexity import peak_activations

ARCHITECTURES = [name for name in smp.MODEL_ARCHITECTURES_MAPPING if name != "dpt"]


@pytest.fixture(autouse=True)
def registry():
    """Leaves SMP's registry as it was."""
    before = dict(encoders)
    yield
    encoders.clear()
    encoders.update(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_decoders_of_smp_take_our_encoder(architecture):
    stride = 16 if architecture in ("deeplabv3", "deeplabv3plus", "pan") else 32
    model = Segmenter("sis_demo", 5, architecture, output_stride=stride, in_channels=2).eval()
    assert model(torch.randn(1, 2, 128, 160)).shape == (1, 5, 128, 160)
    assert model(torch.randn(1, 2, 129, 150)).shape == (1, 5, 129, 150)
    assert model.encoder.backbone.output_stride == stride
    assert model.divisor == (8 if architecture == "pspnet" else stride)


def test_networks_leave_the_registry_of_smp_as_it_is():
    before = set(encoders)
    for classes in (2, 3, 4):
        Segmenter("sis_demo", classes)
    with pytest.raises(UsageError):
        Segmenter("sis29", 4)
    assert set(encoders) == before


def test_a_padded_image_is_cropped_again():
    torch.manual_seed(0)
    model = Segmenter("sis_demo", 3).eval()
    image = torch.randn(1, 3, 33, 47)
    padded = torch.zeros(1, 3, 48, 48)
    padded[..., :33, :47] = image
    assert torch.equal(model(image), model(padded)[..., :33, :47])


@pytest.mark.parametrize("architecture", ["deeplabv3plus", "deeplabv3", "fpn", "unet"])
@pytest.mark.parametrize("size", [(65, 97), (48, 64), (1, 1)])
def test_classes_in_strips_are_those_of_the_logits(architecture, size):
    torch.manual_seed(0)
    stride = 16 if architecture.startswith("deeplab") else 32
    model = Segmenter("sis_demo", 5, architecture, output_stride=stride).eval().double()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image).argmax(dim=1)
        assert len(expected.unique()) > 1 or size == (1, 1)
        for at_once in (1, 2 * 5 * size[1] * 7, 10**9):  # rows: 1, 7, all
            assert torch.equal(model.class_map(image, at_once), expected.to(torch.uint8))


def test_strips_take_less_memory_than_the_logits():
    model = Segmenter("sis_demo", 200, decoder={"decoder_channels": 32}).eval()
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        whole = peak_activations(lambda: model.class_map(image, 10**9))
        strips = peak_activations(lambda: model.class_map(image, 1))
    assert whole > 200 * 256 * 256 * 4  # the logits alone
    assert strips < whole / 3


def test_the_encoder_is_our_backbone_under_its_own_name():
    torch.manual_seed(0)
    assert register_encoder("sis50") == register_encoder("sis50") == "sis50"
    model = smp.Unet("sis50", encoder_weights=None, in_channels=4, classes=2).eval()
    x = torch.randn(1, 4, 64, 64)
    assert model(x).shape == (1, 2, 64, 64)
    maps = model.encoder(x)
    assert [feature.shape[1] for feature in maps] == model.encoder.out_channels == [4, 64, 256, 512, 1024, 2048]
    assert [64 // feature.shape[2] for feature in maps] == [1, 2, 4, 8, 16, 32]
    for got, want in zip(maps[2:], model.encoder.backbone(x).values(), strict=True):
        torch.testing.assert_close(got, want)
    # Not from the distribution of nn.Conv2d, from which SMP would draw it.
    expected = create_backbone("sis50", in_channels=4).stem.conv.weight.std().item()
    assert model.encoder.backbone.stem.conv.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_names_of_encoders():
    assert register_encoder("sis50", operator="interactive1") == "res2net50-26w4s-interactive1"
    assert register_encoder("resnet50", "our-resnet50") == "our-resnet50"
    with pytest.raises(UsageError, match="another encoder 'resnet50'"):
        register_encoder("resnet50")


@pytest.mark.parametrize(
    ("architecture", "backbone", "stride", "decoder", "words"),
    [
        ("deeplabv3pluss", "sis_demo", 16, {}, ["deeplabv3plus"]),
        ("unet", "sis_demo", 16, {}, ["output_stride", "32"]),
        ("deeplabv3plus", "sis_demo", 32, {}, ["8 or 16"]),
        ("deeplabv3plus", "sis_demo", 16, {"decoder_chanels": 3}, ["decoder_channels"]),
        ("deeplabv3plus", "sis_demo", 16, {"decoder_channels": "many"}, ["deeplabv3plus"]),
        ("deeplabv3plus", "sis29", 16, {}, ["four-stage"]),
    ],
)
def test_invalid_segmenters(architecture, backbone, stride, decoder, words):
    with pytest.raises(UsageError) as caught:
        Segmenter(backbone, 5, architecture, output_stride=stride, decoder=decoder)
    assert all(word in str(caught.value) for word in words)
