"""The operators against the paper: equations, parameter counts, receptive fields, shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sis_lightning import create_operator, replace_convs
from sis_lightning.operators.base import (
    _OPERATORS,
    SISOperator,
    list_operators,
    operator_class,
    register_operator,
)

SIS = [name for name in list_operators() if name != "conv"]


def equations(name: str, x: torch.Tensor, K: dict[str, torch.Tensor], stride: int, dilation: int, groups: int, T: int):
    """Section 3 of the paper, written a second time from its text, with explicit padding."""

    def star(kernel: torch.Tensor, y: torch.Tensor, s: int = 1) -> torch.Tensor:
        p = dilation * (kernel.shape[-1] // 2)
        return F.conv2d(F.pad(y, (p, p, p, p)), kernel, stride=s, dilation=dilation, groups=groups)

    if name == "conv":
        return star(K["K"], x, stride)
    K1, K2, K3 = K["K1"], K["K2"], K["K3"]
    Y1 = star(K1, x, stride)
    if name == "basic":
        Y2 = star(K2, Y1)
        return torch.cat([Y1, Y2, star(K3, Y2)], 1)
    c = Y1.shape[1] // 2
    Y11, Y12 = Y1[:, :c], Y1[:, c:]
    A, B = star(K2, Y11), star(K3, Y12)
    if name == "interactive1":
        return torch.cat([Y1, star(K2, A + B), star(K3, A + B)], 1)
    if name == "interactive2":
        return torch.cat([Y1, star(K2, A + Y12), star(K3, Y11 + B)], 1)
    hs, gs = [A], [B]
    for _ in range(T - 1):
        hs.append(star(K2, hs[-1] + Y11))
        gs.append(star(K3, gs[-1] + Y12))
    if name == "recurrent1":
        return torch.cat([Y1, hs[-1], gs[-1]], 1)
    assert name == "recurrent2"
    return torch.cat([Y1, sum(hs), sum(gs)], 1)


def each_group_alone(name, x, K, stride, dilation, groups, T):
    """The same with one operator for each group: their inputs, kernels and outputs are next to each other."""
    parts = zip(x.chunk(groups, 1), *(kernel.chunk(groups) for kernel in K.values()), strict=True)
    return torch.cat(
        [equations(name, y, dict(zip(K, own, strict=True)), stride, dilation, 1, T) for y, *own in parts], 1
    )


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("name", list_operators())
@settings(max_examples=25, deadline=None)
@given(
    k=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    steps=st.integers(1, 4),
    inputs=st.integers(1, 3),
    quarter=st.integers(1, 2),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    seed=st.integers(0, 99),
)
def test_both_forms_equal_the_equations_of_the_paper(
    name, across, k, stride, dilation, groups, steps, inputs, quarter, height, width, seed
):
    torch.manual_seed(seed)
    operator = create_operator(
        name,
        inputs * groups,
        4 * quarter * groups,
        k,
        stride=stride,
        dilation=dilation,
        groups=groups,
        steps=steps,
        across_groups=across,
    ).double()
    x = torch.randn(2, inputs * groups, height, width, dtype=torch.float64, requires_grad=True)
    kernels = operator.kernels()
    oracle = equations if across else each_group_alone
    expected = oracle(name, x, kernels, stride, dilation, groups, steps)
    assert expected.shape == (2, 4 * quarter * groups, -(-height // stride), -(-width // stride))
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), [x, *kernels.values()])
    for form in (operator.fast, operator.equations, operator):
        output = form(x)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())
        gradients = torch.autograd.grad((output * direction).sum(), [x, *kernels.values()])
        for gradient, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-12 * want.abs().max().item() + 1e-300)


@pytest.mark.parametrize("name", list_operators())
def test_no_output_sees_another_group_unless_it_is_asked_for(name):
    torch.manual_seed(0)
    for across in (False, True):
        operator = create_operator(name, 8, 16, groups=2, across_groups=across).double()
        x = torch.randn(1, 8, 9, 9, dtype=torch.float64, requires_grad=True)
        seen = set()
        for channel in range(16):
            (gradient,) = torch.autograd.grad(operator(x)[0, channel].sum(), x)
            touched = gradient.abs().sum(dim=(0, 2, 3)).view(2, 4).sum(dim=1) > 0
            seen |= {(channel // 8, group) for group in touched.nonzero().flatten().tolist()}
        assert ({(0, 1), (1, 0)} <= seen) == (across and name != "conv")
        assert {(0, 0), (1, 1)} <= seen
    kinds = [create_operator(name, 8, 16, groups=2, across_groups=across) for across in (False, True)]
    shapes = [{key: kernel.shape for key, kernel in operator.kernels().items()} for operator in kinds]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", list_operators())
def test_shapes_and_names_of_kernels(name):
    kernels = create_operator(name, 24, 32, 5, groups=2).kernels()
    shapes = {key: tuple(value.shape) for key, value in kernels.items()}
    if name == "conv":
        assert shapes == {"K": (32, 12, 5, 5)}
    else:
        second = (8, 8, 5, 5) if name == "basic" else (8, 4, 5, 5)
        assert shapes == {"K1": (16, 12, 5, 5), "K2": second, "K3": (8, 4, 5, 5)}


@pytest.mark.parametrize("name", SIS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("k", [3, 5])
def test_parameters_as_a_share_of_the_convolution(name, groups, k):
    def count(operator: str) -> int:
        return sum(p.numel() for p in create_operator(operator, 64, 64, k, groups=groups).parameters())

    sixteenths = 11 if name == "basic" else 10
    assert count(name) * 16 == count("conv") * sixteenths


@pytest.mark.parametrize(
    ("name", "steps", "extent"),
    [
        ("conv", 2, 3),
        *[(name, 2, 7) for name in SIS],
        ("recurrent1", 1, 5),
        ("recurrent1", 3, 9),
        ("recurrent2", 4, 11),
    ],
)
def test_receptive_field_from_the_support_of_the_gradient(name, steps, extent):
    torch.manual_seed(0)
    operator = create_operator(name, 4, 8, steps=steps).double()
    x = torch.zeros(1, 4, 15, 15, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(operator(x)[..., 7, 7].sum(), x)
    rows, columns = torch.nonzero(gradient.abs().sum(1)[0], as_tuple=True)
    assert rows.max() - rows.min() + 1 == extent
    assert columns.max() - columns.min() + 1 == extent


@pytest.mark.parametrize("name", list_operators())
def test_both_forms_share_one_state_dict_and_bfloat16_stays_close(name):
    torch.manual_seed(0)
    operator = create_operator(name, 32, 32, steps=3)
    assert set(operator.state_dict()) == set(operator.kernels())
    x = torch.randn(1, 32, 12, 12)
    exact = operator.equations(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = operator(x)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("name", list_operators())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_true_half_precision_runs_and_stays_close(name, dtype):
    torch.manual_seed(0)
    operator = create_operator(name, 32, 32, groups=2)
    x = torch.randn(1, 32, 12, 12)
    exact = operator.equations(x)
    rough = operator.to(dtype)(x.to(dtype))
    assert rough.dtype == dtype
    assert (rough.float() - exact).norm() / exact.norm() < 0.02


def test_outputs_keep_the_scale_of_a_convolution():
    # Otherwise activations explode or vanish in a network of fifty layers.
    torch.manual_seed(0)
    x = torch.randn(2, 64, 16, 16)
    for name in list_operators():
        assert 0.5 < create_operator(name, 64, 64)(x).std() < 8


@pytest.mark.parametrize("name", SIS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"in_channels": 8, "out_channels": 26}, ["26", "4"]),
        ({"in_channels": 8, "out_channels": 24, "groups": 4}, ["24", "4 groups", "6"]),
        ({"in_channels": 9, "out_channels": 24, "groups": 2}, ["9", "24", "2"]),
        ({"in_channels": 8, "out_channels": 8, "kernel_size": 4}, ["4", "odd"]),
        ({"in_channels": 8, "out_channels": 8, "steps": 0}, ["steps", "0"]),
        ({"in_channels": 8, "out_channels": 8, "stride": 0}, ["stride", "0"]),
        ({"in_channels": 0, "out_channels": 8}, ["0"]),
    ],
)
def test_errors_name_the_invalid_argument(name, arguments, words):
    with pytest.raises(ValueError, match=name) as caught:
        create_operator(name, **arguments)
    assert all(word in str(caught.value) for word in [name, *words])


def test_an_unknown_operator_lists_the_nearest_names():
    with pytest.raises(ValueError, match="recurrent1"):
        operator_class("recurent1")


def test_a_new_operator_needs_one_class():
    try:

        @register_operator("halved")
        class Halved(SISOperator):
            """Half a convolution."""

            def kernel_shapes(self):
                return {"K": (self.out_channels, self.in_channels)}

            def literal(self, x):
                return self.convolve(x, self.K, stride=self.stride) / 2

        operator = create_operator("halved", 3, 8, stride=2)
        x = torch.randn(1, 3, 9, 9)
        torch.testing.assert_close(operator(x), F.conv2d(x, operator.K, stride=2, padding=1) / 2)
        assert "halved" in list_operators()
        with pytest.raises(ValueError, match="Halved"):
            register_operator("halved")(Halved)
    finally:
        _OPERATORS.pop("halved", None)


def large_convs(module: nn.Module) -> set[str]:
    return {name for name, m in module.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}


def test_replace_convs_in_resnet50():
    from torchvision.models import resnet50

    model = resnet50()
    before = sum(p.numel() for p in model.parameters())
    convs = large_convs(model)
    report = replace_convs(model, "basic")
    assert set(report.replaced) == convs
    assert not report.left
    assert report.parameters_before == before
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert not large_convs(model)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_replace_convs_keeps_the_biases_of_vgg16():
    from torchvision.models import vgg16

    with torch.device("meta"):  # names and shapes need no values of the 138 M parameters
        model = vgg16()
    biases = {name: m.bias for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    report = replace_convs(model, "recurrent2")
    assert len(report.replaced) == 13
    assert all(model.get_submodule(name).bias is bias for name, bias in biases.items())
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_replace_convs_leaves_depthwise_convs_of_convnext():
    from torchvision.models import convnext_tiny

    with torch.device("meta"):
        model = convnext_tiny()
    report = replace_convs(model, "basic")
    depthwise = {name: reason for name, reason in report.left.items() if "depthwise" in reason}
    assert len(depthwise) == 18
    # The patch stem 4×4 and the 2×2 downsampling have even kernels.
    assert {reason.split(" is ")[0] for name, reason in report.left.items() if name not in depthwise} == {
        "kernel_size 4",
        "kernel_size 2",
    }
    assert not report.replaced
    assert "depthwise" in str(report)


def test_replace_convs_in_timm_res2net_leaves_the_width_of_26():
    timm = pytest.importorskip("timm")
    model = timm.create_model("res2net50_26w_4s")
    report = replace_convs(model, "interactive1")
    assert {name.split(".")[0] for name in report.left} == {"layer1"}
    assert all("26" in reason and "4" in reason for reason in report.left.values())
    assert report.parameters_after < report.parameters_before
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_replace_convs_respects_padding_shared_weights_and_mode():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict(
        {
            "valid": nn.Conv2d(4, 8, 3),
            "reflect": nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
            "tall": nn.Conv2d(4, 8, (3, 1), padding=(1, 0)),
            "point": nn.Conv2d(4, 8, 1),
            "a": shared,
            "b": shared,
        }
    )
    model.double().eval()
    report = replace_convs(model, "basic")
    assert report.replaced == ("a", "b")
    assert model["a"] is model["b"]
    assert not model["a"].training
    assert model["a"].K1.dtype == torch.float64
    assert set(report.left) == {"valid", "reflect", "tall"}
    with pytest.raises(ValueError, match="create_operator"):
        replace_convs(nn.Conv2d(4, 4, 3), "basic")


@pytest.mark.parametrize("name", list_operators())
def test_kernels_are_drawn_as_torchvision_draws_convolutions(name):
    """He et al. with the fan-out of all channels, also of groups: std = sqrt(2 / (C k^2)) for a kernel of C outputs."""
    torch.manual_seed(0)
    operator = create_operator(name, 512, 512, groups=8)
    for kernel in operator.kernels().values():
        assert kernel.std().item() == pytest.approx((2 / (kernel.shape[0] * 9)) ** 0.5, rel=0.03)
