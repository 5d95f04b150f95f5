"""The contract with torch's private interfaces: a test here fails if a release of torch changes one of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sis_lightning
from sis_lightning.backbones import torch_internals
from sis_lightning.backbones.torch_internals import (
    TorchDispatchMode,
    fused_convolution,
    fuses_convolutions,
    is_traced,
    operation,
)


def test_a_transform_of_torch_func_is_noticed():
    seen = []

    def function(x):
        seen.append(is_traced(x))
        return x.sum()

    x = torch.ones(2, 3)
    function(x)
    torch.func.grad(function)(x)
    torch.func.vmap(function)(x)
    assert seen == [False, True, True]


def test_tracers_compilers_and_exporters_are_noticed():
    class Noticing(nn.Module):
        def forward(self, x):
            return x + (1 if is_traced(x) else 0)

    x = torch.zeros(2)
    assert Noticing()(x).sum() == 0
    with pytest.warns(FutureWarning, match="deprecated"):  # the exporter of ONNX still traces
        assert torch.jit.trace(Noticing(), x, check_trace=False)(x).sum() == 2
    assert torch.compile(Noticing(), backend="eager", fullgraph=True)(x).sum() == 2
    assert torch.export.export(Noticing(), (x,)).module()(x).sum() == 2
    assert torch.fx.symbolic_trace(Noticing())(x).sum() == 2


def test_dispatch_modes_see_operations():
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(operation(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.ones(2) + 1
    assert torch.ops.aten.add in seen


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_fused_convolutions_compute_what_plain_ones_do(groups, relu, add):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, 9, 7), torch.randn(6, 8 // groups, 3, 3), torch.randn(6)
    other = torch.randn(2, 6, 5, 4) if add else None
    for _ in range(2):  # the second time with a weight that changed in place
        expected = F.conv2d(x, weight, bias, 2, 1, 1, groups)
        expected = expected if other is None else expected + other
        expected = expected.relu() if relu else expected
        with torch.no_grad():
            assert fuses_convolutions(x)
            place = ([1, 1], [2, 2], [1, 1], groups)
            got = fused_convolution(x, weight, bias, place, add=None if other is None else other.clone(), relu=relu)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        weight.mul_(2)


def test_fused_convolutions_are_left_out_where_they_do_not_work():
    x = torch.randn(1, 1, 2, 2)
    assert not fuses_convolutions(x.double())
    assert not fuses_convolutions(x.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fuses_convolutions(x.detach())


def test_no_other_module_of_the_library_uses_private_names_of_torch():
    package = Path(sis_lightning.__file__).parent
    found = []
    for folder in ("operators", "backbones", "models"):
        for path in (package / folder).glob("*.py"):
            if path.name == Path(torch_internals.__file__).name:
                continue
            text = path.read_text()
            found += [f"{path.name}: {name}" for name in re.findall(r"\btorch(?:\.\w+)*\._\w+|\bops\.mkldnn\b", text)]
    assert found == []
