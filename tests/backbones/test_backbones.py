"""Backbones against torchvision, timm, the published numbers of parameters, and their own feature_info."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sis_lightning import BackboneConfig, Classifier, create_backbone, list_backbones, load_model_weights
from sis_lightning.backbones import backbone_config
from sis_lightning.config_files import PACKAGED, config_names
from sis_lightning.errors import UsageError
from sis_lightning.operators import SISOperator, list_operators

NAMES = config_names("configs/backbones")


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_complete(name):
    # Another file overrides the first one key by key: a missing key would keep the value of the first file.
    content = yaml.safe_load((PACKAGED / "configs" / "backbones" / f"{name}.yaml").read_text())
    assert set(content) == {field.name for field in dataclasses.fields(BackboneConfig)}
    assert backbone_config(name) == BackboneConfig(**content)


@pytest.mark.parametrize(
    ("name", "overrides", "classes", "millions"),
    [
        ("resnext29_8x64d", {}, 10, 34.43),
        ("res2next29_8c25w4s", {}, 10, 33.813),
        ("res2next29_6c24w4s", {}, 10, 24.269),
        ("res2next29_6c24w4s", {"scale": 6}, 10, 36.709),
        ("sis29", {"operator": "conv"}, 10, 32.126),
        ("sis29", {}, 10, 29.404),
        *[("sis29", {"operator": o}, 10, 28.860) for o in list_operators() if o not in ("conv", "basic")],
        ("resnext29_8x64d", {"operator": "basic"}, 10, 28.621),
        *[("resnext29_8x64d", {"operator": o}, 10, 27.459) for o in list_operators() if o not in ("conv", "basic")],
    ],
)
def test_parameter_counts_of_the_papers(name, overrides, classes, millions):
    with torch.device("meta"):
        count = parameters(Classifier(backbone_config(name, **overrides), classes))
    digits = len(str(millions).partition(".")[2])
    assert round(count / 1e6, digits) == millions


def randomise_norms(model: nn.Module) -> None:
    """Draws all statistics and weights of batch norm, since a fresh one is nearly the identity and hides mistakes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


@torch.no_grad()
def assert_same(ours: nn.Module, theirs: nn.Module, size: int = 65) -> None:
    x = torch.randn(1, 3, size, size)
    want = theirs.eval()(x)
    got = ours.eval()(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_equals_torchvision(name):
    import torchvision

    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    randomise_norms(theirs)
    ours = Classifier(name, 1000)
    assert load_model_weights(ours, theirs.state_dict()).fresh == ()
    assert parameters(ours) == parameters(theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["res2net50", "res2net101"])
def test_equals_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(f"{name}_26w_4s")
    randomise_norms(theirs)
    ours = Classifier(name, 1000)
    assert load_model_weights(ours, theirs.state_dict()).fresh == ()
    assert parameters(ours) == parameters(theirs)
    assert_same(ours, theirs)


def test_a_training_step_equals_that_of_timm_with_less_memory():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("res2net50_26w_4s").double()
    ours = Classifier("res2net50", 1000).double()
    load_model_weights(ours, theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients, memory = [], []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            logits = model.train()(leaf)
        memory.append(sum(event.self_cpu_memory_usage for event in profiled.key_averages()))
        logits.square().mean().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
    assert memory[0] < 0.95 * memory[1]


def test_transforms_of_torch_func_work():
    torch.manual_seed(0)
    net = Classifier("sis_demo", 5).double().eval()
    weights = dict(net.named_parameters())
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)

    def loss(weights, image):
        return torch.func.functional_call(net, weights, (image[None],)).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    loss(weights, x[1]).backward()
    for name, weight in weights.items():
        torch.testing.assert_close(per_image[name][1], weight.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("resnext50_32x4d", {"family": "resnext", "depth": 50, "width": 4, "cardinality": 32}),
        ("res2next50", {"family": "res2next", "depth": 50, "width": 4, "scale": 4, "cardinality": 8}),
    ],
)
def test_grouped_backbones_equal_timm(name, config):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name)
    randomise_norms(theirs)
    ours = Classifier(config, 1000)
    load_model_weights(ours, theirs.state_dict())
    assert_same(ours, theirs, size=64)


@pytest.mark.parametrize(("output_stride", "dilate"), [(16, [False, False, True]), (8, [False, True, True])])
def test_dilated_backbones_equal_torchvision(output_stride, dilate):
    from torchvision.models import resnet50

    torch.manual_seed(0)
    theirs = resnet50(replace_stride_with_dilation=dilate)
    randomise_norms(theirs)
    ours = Classifier("resnet50", 1000, output_stride=output_stride)
    load_model_weights(ours, theirs.state_dict())
    assert_same(ours, theirs, size=49)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_feature_info_is_right(name, output_stride):
    with torch.device("meta"):
        net = create_backbone(name, output_stride=output_stride)
        for height, width in [(64, 64), (97, 75), (33, 127)]:
            maps = net(torch.empty(2, 3, height, width))
            assert list(maps) == list(net.feature_info)
            for key, info in net.feature_info.items():
                assert info.stride <= output_stride
                assert maps[key].shape == (2, info.channels, -(-height // info.stride), -(-width // info.stride))
    natural = [4, 8, 16, 32] if net.config.stem == "imagenet" else [1, 2, 4]
    assert [info.stride for info in net.feature_info.values()] == [min(s, output_stride) for s in natural]


@pytest.mark.parametrize("operator", list_operators())
@pytest.mark.parametrize(
    "family", [("resnet", 1, 1), ("resnext", 1, 2), ("res2net", 4, 1), ("res2next", 4, 2)], ids=lambda f: f[0]
)
@pytest.mark.parametrize(("depth", "stem"), [(11, "cifar"), (14, "imagenet")])
def test_every_family_and_operator_has_gradients(family, operator, depth, stem):
    torch.manual_seed(0)
    name, scale, cardinality = family
    config = BackboneConfig(name, depth, operator, 2, 4, scale, cardinality, 8, stem)
    model = Classifier(config, 5)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    expected = {operator} if operator != "conv" else {"conv"}
    assert {m.name for m in model.modules() if isinstance(m, SISOperator)} == expected


@pytest.mark.parametrize("depth", [29, 50, 101])
@pytest.mark.parametrize("operator", list_operators())
def test_published_depths_build_with_every_operator(depth, operator):
    with torch.device("meta"):
        for name in ["resnet50", "resnext29_8x64d", "res2net50", "sis29"]:
            config = backbone_config(name, depth=depth, operator=operator)
            maps = create_backbone(config)(torch.empty(1, 3, 64, 64))
            assert len(maps) == len(config.blocks)


def test_sis50_has_the_operator_in_stages_two_to_four():
    with torch.device("meta"):
        net = create_backbone("sis50")
    for stage in range(1, 5):
        kinds = {m.name for m in net.get_submodule(f"stage{stage}").modules() if isinstance(m, SISOperator)}
        assert kinds == ({"conv"} if stage == 1 else {"basic"})
    assert [p.operator for p in net.placements] == ["conv", "basic", "basic", "basic"]
    assert "stage 1 conv (split width 26 is not divisible by 4)" in net.describe()


@pytest.mark.parametrize("norm", ["bn", "syncbn", "gn"])
def test_norms(norm):
    net = create_backbone("sis_demo", norm=norm)
    kinds = {type(m) for m in net.modules() if "Norm" in type(m).__name__}
    assert kinds == {{"bn": nn.BatchNorm2d, "syncbn": nn.SyncBatchNorm, "gn": nn.GroupNorm}[norm]}
    assert net(torch.randn(2, 3, 32, 32))["c5"].shape == (2, 512, 1, 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"operator": "recurent1"}, ["recurrent1"]),
        ({"family": "res2nett"}, ["res2net"]),
        ({"depth": 34}, ["34", "50"]),
        ({"widht": 3}, ["widht", "width"]),
        ({"width": 0}, ["width", "0"]),
        ({"steps": 3}, ["steps", "basic"]),
        ({"scale": 1}, ["res2net", "scale"]),
        ({"cardinality": 8}, ["res2net", "cardinality"]),
        ({"output_stride": 12}, ["12", "8, 16 or 32"]),
    ],
)
def test_invalid_configurations(overrides, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        create_backbone("sis50", **overrides)
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_name_lists_the_nearest_names():
    with pytest.raises(ValueError, match="sis50"):
        create_backbone("sis5O")


def test_different_configurations_have_different_slugs():
    configs = {
        backbone_config(name, **extra) for name in NAMES for extra in ({}, {"operator": "recurrent2", "steps": 3})
    }
    configs |= {backbone_config("sis50", **{key: value}) for key, value in {"norm": "gn", "channels": 32}.items()}
    assert len({config.slug for config in configs}) == len(configs)
    assert backbone_config("sis50").slug == "res2net50-26w4s-basic"


@pytest.mark.parametrize("in_channels", [1, 3, 5])
def test_images_may_have_any_number_of_channels(in_channels):
    net = create_backbone("sis_demo", in_channels, operator="interactive1", norm="gn")
    assert (net.in_channels, net.config.operator, net.config.norm) == (in_channels, "interactive1", "gn")
    assert net(torch.randn(1, in_channels, 32, 32))["c5"].shape == (1, 512, 1, 1)
    assert create_backbone("sis_demo", operator=None).config == backbone_config("sis_demo")


@pytest.mark.parametrize("in_channels", [0, -1, 2.5])
def test_invalid_numbers_of_channels(in_channels):
    with pytest.raises(UsageError, match="in_channels"):
        create_backbone("sis_demo", in_channels)


def test_backbones_of_the_user_are_listed(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "backbones"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("family: resnet\ndepth: 14\n")
    monkeypatch.setenv("SIS_CONFIG_PATH", str(tmp_path))
    assert "mine" in list_backbones()
    assert backbone_config("mine") == BackboneConfig("resnet", 14)


def test_backbones_of_the_package_are_listed():
    assert Path(PACKAGED, "configs", "backbones", "sis50.yaml").is_file()
    assert {"sis29", "sis50", "sis101", "res2net50", "resnet101"} <= set(list_backbones())
