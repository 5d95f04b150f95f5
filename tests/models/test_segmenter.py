"""Our backbones in the networks of segmentation-models-pytorch."""

from __future__ import annotations

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from segmentation_models_pytorch.encoders import encoders
from torch import nn

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


class Ramp(nn.Module):
    """In the place of the encoder: two maps of the pixel at which each cell of its backbone is centred, x and y."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.output_stride, self.backbone = encoder.output_stride, encoder.backbone

    def forward(self, x):
        def positions(stride):
            height, width = (-(-side // stride) for side in x.shape[-2:])
            y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            return stride * torch.stack([x_, y])[None].double()

        return [positions(stride) for stride in (1, 2, 4, 8, 16, 16)]


class LowOnly(nn.Module):
    """In the place of DeepLab's last convolutions: the upsampled maps of the deepest features, without those of c2."""

    def forward(self, maps):
        return maps[:, :2]


@pytest.mark.parametrize("size", [(513, 513), (512, 500), (375, 500), (33, 18), (17, 200), (16, 1)])
@pytest.mark.parametrize("architecture", ["deeplabv3plus", "deeplabv3"])
def test_features_stay_at_their_places(architecture, size):
    """A ramp of coordinates comes out as it is, at every size; SMP's own upsampling is 14.6 px off at 513 px."""
    model = Segmenter("sis_demo", 2, architecture, decoder={"decoder_channels": 2}).double().eval()
    cells = model.encoder.backbone(torch.zeros(1, 3, 129, 97, dtype=torch.float64))
    assert [tuple(maps.shape[-2:]) for maps in cells.values()] == [(33, 25), (17, 13), (9, 7), (9, 7)]
    model.encoder = Ramp(model.encoder)
    if architecture == "deeplabv3plus":
        model.decoder.aspp, model.decoder.block1, model.decoder.block2 = nn.Identity(), nn.Identity(), LowOnly()
    else:
        model.decoder = Last()
    model.segmentation_head[0] = nn.Identity()
    got = model(torch.zeros(1, 3, *size, dtype=torch.float64))[0]
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    assert torch.allclose(got, torch.stack([x, y]).double(), rtol=0, atol=1e-9)


class Impulse(nn.Module):
    """In the place of the encoder: maps of 0, with a 1 in the middle of one of them."""

    def __init__(self, encoder: nn.Module, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = encoder.out_channels, stride
        self.output_stride, self.backbone = encoder.output_stride, encoder.backbone

    def forward(self, x):
        side = x.shape[-1]
        maps = [torch.zeros(1, count, side >> k, side >> k).to(x) for k, count in enumerate(self.channels)]
        if self.stride:
            map_ = maps[self.stride.bit_length() - 1]
            map_[..., side // self.stride // 2, side // self.stride // 2] = 1
        return maps


@pytest.mark.parametrize("stride", [4, 32])
@pytest.mark.parametrize("architecture", ["fpn", "linknet", "manet", "segformer", "unet", "unetplusplus"])
def test_other_decoders_move_features_by_half_a_cell(architecture, stride):
    """The centre of gravity of what one cell becomes in a decoder that averages: `Segmenter` states where it is.

    A decoder that comes out elsewhere has changed in SMP, and the statement with it.
    """
    model = Segmenter("sis_demo", 2, architecture, output_stride=32).double().eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1 / parameter[0].numel() if parameter.ndim > 1 else 0)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.BatchNorm2d, nn.GroupNorm)):
                setattr(module, name, nn.Identity())
    seen, encoder, image = [], model.encoder, torch.zeros(1, 3, 256, 256).double()
    for wanted in (stride, 0):
        model.encoder = Impulse(encoder, wanted)
        with torch.no_grad():
            seen.append(model(image)[0, 0])
    heat = seen[0] - seen[1]
    for sums in (heat.sum(0), heat.sum(1)):
        centre = float((sums * torch.arange(256)).sum() / sums.sum())
        assert centre - 128 == pytest.approx((stride - 1) / 2, abs=0.1 * stride)


class Last(nn.Module):
    def forward(self, features):
        return features[-1]


def test_cells_of_a_backbone_are_centred_at_multiples_of_their_stride():
    """What they see of an image is, on average, centred there: by the gradient of a linear form of the network."""
    backbone = create_backbone("resnet50", output_stride=16).double().eval()
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.BatchNorm2d)):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, 2, 1))
    for parameter in backbone.parameters():
        nn.init.constant_(parameter, 1 / parameter[0].numel())
    image = torch.zeros(1, 3, 513, 513, dtype=torch.float64, requires_grad=True)
    for name, stride in (("c2", 4), ("c5", 16)):
        maps = backbone(image)[name]
        middle = maps.shape[-1] // 2
        (seen,) = torch.autograd.grad(maps[0, 0, middle, middle], image, retain_graph=True)
        weight = seen.sum(dim=(0, 1, 2))
        centre = (weight * torch.arange(513)).sum() / weight.sum()
        assert centre.item() == pytest.approx(stride * middle, abs=0.6)


@pytest.mark.parametrize("size", [513, 512, 500])
def test_perfect_features_give_nearly_perfect_masks(shared, size):
    """Real masks, sampled where the cells of c2 lie, come out as they are up to what lies between these cells."""
    model = Segmenter("sis_demo", 21).eval()
    confusion = torch.zeros(21, 21, dtype=torch.long)
    for path in sorted((shared / "voc2012_mini/VOCdevkit/VOC2012/SegmentationClass").glob("*.png"))[:20]:
        with Image.open(path) as mask:
            truth = torch.from_numpy(np.array(mask)).long()
        truth = nn.functional.pad(truth, (0, size, 0, size), value=255)[:size, :size]
        right = (1 - size) % 16
        cells = nn.functional.pad(truth, (0, right, 0, right), value=0)[::4, ::4]
        features = nn.functional.one_hot(cells.clamp(max=21) * (cells < 21), 21).permute(2, 0, 1)[None].float()
        found = model.segmentation_head[1](features)[0, :, :size, :size].argmax(0)
        known = truth < 21
        confusion += torch.bincount(21 * truth[known] + found[known], minlength=441).view(21, 21)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    assert (confusion.diagonal()[union > 0] / union[union > 0]).mean() > 0.9


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
    padded = torch.zeros(1, 3, 33, 49)
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
