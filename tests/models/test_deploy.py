"""Deployed (fused) networks have the same outputs, whatever they consist of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from sis_lightning import create_backbone, create_operator, replace_convs
from sis_lightning.models import Segmenter
from sis_lightning.models.deploy import DeployedOperator, deploy
from sis_lightning.operators import SISOperator, list_operators

SHAPES = {
    "sis_demo": {"channels": 8, "width": 8},
    "resnet50": {"channels": 8, "width": 8, "depth": 14},
    "res2net50": {"channels": 8, "width": 8, "depth": 14},
    "sis29": {"channels": 8, "width": 4, "cardinality": 2},
}


def trained(model: nn.Module) -> nn.Module:
    """Draws statistics and weights of batch norm as after training, with negative and zero scales among them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(-0.5, 1.5, generator=generator)
            module.weight.data[0] = 0
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def assert_same(model: nn.Module, other: nn.Module, x: torch.Tensor, tolerance: float) -> None:
    with torch.no_grad():
        want, got = model(x), other(x.clone())
    for one, two in zip(want.values(), got.values(), strict=True) if isinstance(want, dict) else [(want, got)]:
        assert torch.linalg.vector_norm(one - two, torch.inf) <= tolerance * one.abs().max()


@pytest.mark.parametrize("operator", list_operators())
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("norm", ["bn", "syncbn", "gn"])
def test_backbones_give_the_same_maps(name, operator, norm):
    torch.manual_seed(0)
    model = trained(create_backbone(name, operator=operator, norm=norm, **SHAPES[name]))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    deployed = deploy(model)
    x = torch.randn(2, 3, 64, 48).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        eager, fused = model(x), deployed(x.clone())
    assert_same(model.double(), deploy(model.double()), x.double(), 1e-12)
    with torch.no_grad():
        exact = model(x.double())
    for key, maps in exact.items():
        # Two float32 forms may differ by the errors of both (1.06e-5 after 29 layers of two steps without AVX-512), so
        # each is compared with the exact maps: the fused form may be 1e-5 further away.
        own, error = (torch.linalg.vector_norm(found[key] - maps, torch.inf) for found in (eager, fused))
        assert error <= own + 1e-5 * maps.abs().max(), key
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in model.state_dict().items())
    if norm != "gn":
        assert not any(isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in deployed.modules())


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list_operators()),
    groups=st.sampled_from([1, 2]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 3]),
    steps=st.integers(1, 4),
    bias=st.booleans(),
    normed=st.booleans(),
    across=st.booleans(),
)
def test_operators_followed_by_a_norm(name, groups, stride, dilation, steps, bias, normed, across):
    torch.manual_seed(steps)
    options = {"stride": stride, "dilation": dilation, "groups": groups, "steps": steps, "bias": bias}
    operator = create_operator(name, 16, 16, **options, across_groups=across).double()
    if bias:
        nn.init.normal_(operator.bias)
    norm = trained(nn.BatchNorm2d(16)).double() if normed else nn.Identity()
    x = torch.randn(2, 16, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        y = operator.equations(x)
        want = norm(y + operator.bias[:, None, None] if bias else y)
        torch.testing.assert_close(DeployedOperator(operator, norm)(x), want)


@pytest.mark.parametrize("name", list_operators())
def test_outputs_under_autocast_have_half_precision(name):
    torch.manual_seed(0)
    operator, norm = create_operator(name, 16, 16, bias=True), trained(nn.BatchNorm2d(16))
    nn.init.normal_(operator.bias)
    x = torch.randn(2, 16, 8, 8)
    want = norm(operator(x))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs = [norm(operator(x)), DeployedOperator(operator, norm)(x)]
        assert operator(x).dtype == nn.Conv2d(16, 16, 3)(x).dtype == torch.bfloat16
    for output in outputs:
        assert output.dtype == torch.bfloat16
        assert torch.linalg.vector_norm(output - want) < 0.02 * torch.linalg.vector_norm(want)


class Doubled(SISOperator):
    """An operator of a user, with the equations only."""

    name = "doubled"

    def literal(self, x):
        y = self.transform(x)
        return torch.cat([y, 2 * y], dim=1)

    def kernel_shapes(self):
        return {"K1": (self.out_channels // 2, self.in_channels)}


def test_any_network_with_operators_in_it():
    torch.manual_seed(0)
    model = resnet18(weights=None)
    replace_convs(model, "interactive1")
    model.layer1[0].conv1 = Doubled(64, 64)
    trained(model)
    assert_same(model, deploy(model), torch.randn(2, 3, 64, 64), 1e-5)


@pytest.mark.parametrize("architecture", ["deeplabv3plus", "unet", "fpn"])
def test_decoders_are_folded(architecture):
    torch.manual_seed(0)
    stride = 16 if architecture == "deeplabv3plus" else 32
    model = trained(Segmenter("sis_demo", 5, architecture, output_stride=stride))
    deployed = deploy(model)
    assert_same(model, deployed, torch.randn(2, 3, 64, 64), 1e-5)
    left = [name for name, module in deployed.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == []


def test_a_deployed_network_under_autocast_and_with_gradients():
    torch.manual_seed(0)
    model = trained(create_backbone("sis_demo", **SHAPES["sis_demo"]))
    deployed, x = deploy(model), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        one, two = model(x)["c5"], deployed(x)["c5"]
    assert torch.linalg.vector_norm(one - two) < 0.1 * torch.linalg.vector_norm(one)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for net, leaf in zip((model, deployed), leaves, strict=True):
        net(leaf)["c5"].sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-3, atol=1e-4)


def test_deploying_a_deployed_network_or_a_single_operator():
    torch.manual_seed(0)
    model = trained(create_backbone("sis_demo", **SHAPES["sis_demo"]))
    assert_same(model, deploy(deploy(model)), torch.randn(1, 3, 64, 64), 1e-5)
    operator = create_operator("interactive2", 8, 8)
    deployed = deploy(operator)
    assert isinstance(deployed, DeployedOperator)
    assert_same(operator, deployed, torch.randn(1, 8, 9, 9), 1e-5)


def test_returned_maps_do_not_change_later():
    # Blocks overwrite tensors, but neither the map of a stage nor that of the stem.
    for stem in ("imagenet", "cifar"):
        model = trained(create_backbone("sis_demo", **SHAPES["sis_demo"], stem=stem))
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            for name, value in deploy(model).pyramid(x).items():
                torch.testing.assert_close(value, model.pyramid(x)[name], rtol=1e-4, atol=1e-4)


def test_later_changes_of_weights_are_noticed():
    model = deploy(trained(create_backbone("sis_demo", **SHAPES["sis_demo"])))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)["c2"].clone()
        for weight in model.state_dict().values():
            weight.mul_(0.5)
        assert not torch.allclose(model(x)["c2"], before)
        model.load_state_dict({key: 2 * value for key, value in model.state_dict().items()})
        torch.testing.assert_close(model(x)["c2"], before)


@pytest.mark.parametrize("name", list_operators())
def test_operators_compile(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    operator = create_operator(name, 8, 8)
    compiled = torch.compile(operator, fullgraph=True)
    x = torch.randn(2, 8, 6, 6)
    want, got = operator(x), compiled(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(want.square().sum(), operator.parameters())
    found = torch.autograd.grad(got.square().sum(), operator.parameters())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("how", ["trained", "deployed"])
def test_backbones_compile_into_one_graph(name, how):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = trained(create_backbone(name, **SHAPES[name]))
    model = model if how == "trained" else deploy(model)
    x = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(model, compiled, x, 1e-4)


def test_a_copy_of_a_compiled_backbone_runs_its_own_weights():
    model = trained(create_backbone("sis_demo", **SHAPES["sis_demo"]))
    model.compile(backend="eager")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        copied = deploy(model)
        want = copied(x)["c2"].clone()
        for weight in model.parameters():
            weight.zero_()
        torch.testing.assert_close(copied(x)["c2"], want)
        assert not torch.allclose(model(x)["c2"], want)
