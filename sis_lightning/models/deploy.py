"""The deployed (fused) form of a trained network: the same outputs from fewer passes over memory.

Batch norm is folded into the convolutions before it, the kernels of an operator are prepared once, and the outputs of
the splits are written directly into the tensor that concatenates them. Folding is not as simple as for a plain
convolution: Y1 is a part of an operator's output, which the norm scales and shifts, and also the input of K2 and K3,
which see it without the norm (eqs. 2-24). Therefore the norm is folded into the last convolution only, and applied to
the other parts as they are written.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sis_lightning.backbones.resnet import Bottleneck, Split, Stem, hierarchical_split
from sis_lightning.backbones.torch_internals import fused_convolution, fuses_convolutions, is_traced
from sis_lightning.operators import SISOperator

_Model = TypeVar("_Model", bound=nn.Module)
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def deploy(model: _Model, *, inplace: bool = False) -> _Model:
    """Returns the deployed (fused) form of a network with a `Backbone` or SIS operators.

    It gives the same outputs as `model.eval()` up to rounding: in float32 it is at most 1e-5 of the largest output
    further from the exact outputs. It cannot be trained, and its state dict has other keys.

    Args:
        model: A backbone, one of the four networks, a task, or any network after `replace_convs`.
        inplace: Whether to change `model` instead of a copy. An operator or a block as such is replaced even then: use
            the return value.

    Returns:
        The deployed network, in evaluation mode and without gradients of its weights.
    """
    model = (model if inplace else copy.deepcopy(model)).eval().requires_grad_(False)
    deployed: _Model = _deployed(model)
    return deployed


def _deployed(module: nn.Module) -> Any:
    """Returns the deployed form of a module: another module, or the same one with deployed children."""
    if isinstance(module, Bottleneck):
        return DeployedBottleneck(module)
    if isinstance(module, SISOperator):
        return DeployedOperator(module)
    if isinstance(module, Stem):
        _fold(module, "conv", "norm")
        if isinstance(module.norm, nn.Identity) and isinstance(module.conv, nn.Conv2d):
            module.add_module("conv", FusedConv(module.conv, relu=True))
            module.add_module("relu", nn.Identity())
    if isinstance(module, nn.Sequential):
        for (before, _), (after, _) in itertools.pairwise(list(module.named_children())):
            _fold(module, before, after)
    if not isinstance(module, DeployedBottleneck | DeployedOperator):
        for name, child in list(module.named_children()):
            setattr(module, name, _deployed(child))
    return module


def _fold(parent: nn.Module, conv: str, norm: str) -> None:
    """Folds a batch norm into the convolution before it, if two children of a module are such a pair."""
    one, other = parent.get_submodule(conv), parent.get_submodule(norm)
    # A separable convolution is a sequence itself; the norm belongs to its last convolution.
    holder, key = parent, conv
    while isinstance(one, nn.Sequential) and len(one):
        holder = one
        key, one = list(one.named_children())[-1]
    if isinstance(one, nn.Conv2d) and isinstance(other, _BATCH_NORMS) and other.running_mean is not None:
        setattr(holder, key, fuse_conv_bn_eval(one, other))
        setattr(parent, norm, nn.Identity())


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    place: tuple[Any, Any, Any, int],
    *,
    add: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Computes relu(weight * x + bias + add): in one pass by oneDNN on a CPU, and by plain operations otherwise.

    Args:
        x: Input (N, C_in, H, W).
        weight: Kernel (C, C_in / groups, k, k).
        bias: Bias (C,), or None.
        place: Padding, stride, dilation and number of groups.
        add: Tensor (N, C, H', W') to add, or None. It may be overwritten.
        relu: Whether to apply ReLU to the result.

    Returns:
        The result (N, C, H', W').
    """
    if fuses_convolutions(x) and (add is None or not add.requires_grad):
        return fused_convolution(x, weight, bias, place, add=add, relu=relu)
    padding, stride, dilation, groups = place
    plain = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    plain = plain if add is None else plain.add_(add)
    return plain.relu_() if relu else plain


class FusedConv(nn.Module):
    """A convolution that is followed by an optional sum and an optional ReLU, see `convolve`.

    Args:
        conv: The convolution, with its norm folded in.
        relu: Whether ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.conv, self.relu = conv, relu

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Computes conv(x) + add, if `add` is given, which may be overwritten."""
        conv = self.conv
        place = (conv.padding, conv.stride, conv.dilation, conv.groups)
        return convolve(x, conv.weight, conv.bias, place, add=add, relu=self.relu)


class DeployedBottleneck(nn.Module):
    """A `Bottleneck` whose batch norm is folded, and whose ReLUs and sum are parts of its convolutions.

    Args:
        block: The trained block; it is changed.
    """

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        _fold(block, "reduce", "reduce_norm")
        _fold(block, "expand", "expand_norm")
        _deployed(block.shortcut)
        self.folded = isinstance(block.reduce_norm, nn.Identity)
        self.reduce, self.reduce_norm = FusedConv(block.reduce, relu=self.folded), block.reduce_norm
        self.split = DeployedSplit(block.split)
        self.expand, self.expand_norm = FusedConv(block.expand, relu=self.folded), block.expand_norm
        self.shortcut = block.shortcut
        conv = next(iter(self.shortcut), None)
        if self.folded and isinstance(conv, nn.Conv2d):
            self.shortcut[0] = FusedConv(conv, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps the shapes of `Bottleneck`; x is overwritten if the shortcut is the identity."""
        if self.folded:
            y: Tensor = self.expand(self.split(self.reduce(x)), self.shortcut(x))
            return y
        y = torch.relu(self.reduce_norm(self.reduce(x)))
        y = self.expand_norm(self.expand(self.split(y)))
        return torch.relu(y + self.shortcut(x))


class DeployedOperator(nn.Module):
    """An operator with the batch norm behind it, with constants that are computed once.

    Args:
        operator: The trained operator; it is copied.
        norm: The layer behind it. A batch norm is included; any other layer stays with the caller.
    """

    _operator: SISOperator

    def __init__(self, operator: SISOperator, norm: nn.Module | None = None) -> None:
        super().__init__()
        kernels = {name: kernel.detach().clone() for name, kernel in operator.prepare().items()}
        self._operator = copy.deepcopy(operator)
        weight = next(iter(kernels.values()))
        channels = operator.out_channels
        scale, shift = weight.new_ones(channels), weight.new_zeros(channels)
        if isinstance(norm, _BATCH_NORMS):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = (norm.running_var + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight.detach()
            shift = -norm.running_mean * scale
            shift = shift if norm.bias is None else shift + norm.bias.detach()
        if operator.bias is not None:
            shift = shift + operator.bias.detach() * scale
        #: Number of channels that the kernel `last` does not compute; scale and shift are applied to them when written.
        self.rest = channels
        self.bias: Tensor | None
        self.register_buffer("bias", None)
        if "last" in kernels:
            self.rest -= len(kernels["last"])
            kernels["last"] *= scale[self.rest :, None, None, None]
            self.bias = shift[self.rest :].clone()
            for name in operator.kernel_shapes():  # `parts` needs the prepared kernels only
                self._operator.register_parameter(name, None)
        self._operator.register_parameter("bias", None)
        self._operator.convolve = self._convolve  # type: ignore[method-assign]
        for name, kernel in kernels.items():
            self.register_buffer(name, kernel)
        self.names = list(kernels)
        plain = not isinstance(norm, _BATCH_NORMS) and operator.bias is None
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", None if plain else scale[None, : self.rest, None, None].clone())
        self.register_buffer("shift", None if plain else shift[None, : self.rest, None, None].clone())

    def _convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int | None = None
    ) -> Tensor:
        own = self._operator
        place = ([own.padding] * 2, [stride] * 2, [own.dilation] * 2, groups or own.groups)
        return convolve(x, kernel, bias, place)

    def parts(self, x: Tensor) -> list[Tensor]:
        """Computes the parts of the output; the first `rest` channels still need scale and shift."""
        return self._operator.parts(x, {name: self.get_buffer(name) for name in self.names}, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C, H', W'), the output of the norm."""
        parts = self.parts(x)
        if self.scale is None or self.shift is None or self.rest == 0:
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        done, first = [], 0
        for part in parts:
            last = first + part.shape[1]
            # An operator without a kernel `last` may compute its whole output as one part.
            if first < self.rest:
                # Under autocast the constants keep full precision, but the output does not.
                scaled = torch.addcmul(self.shift[:, first:last], part, self.scale[:, first:last])
                part = scaled.to(part.dtype)
            done.append(part)
            first = last
        return done[0] if len(done) == 1 else torch.cat(done, dim=1)

    def write_relu(self, parts: list[Tensor], out: Tensor) -> None:
        """Writes max(0, norm(parts)) into a tensor (N, C, H', W'), which may be some channels of a larger one."""
        first = 0
        for part in parts:
            last = first + part.shape[1]
            target = out[:, first:last]
            if first < self.rest and self.scale is not None and self.shift is not None:
                torch.addcmul(self.shift[:, first:last], part, self.scale[:, first:last], out=target)
                target.relu_()
            else:
                torch.clamp_min(part, 0, out=target)
            first = last


class DeployedSplit(nn.Module):
    """A `Split` whose operators write their outputs directly into the concatenation.

    Args:
        split: The trained split; its operators are copied.
    """

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.width, self.scale, self.first, self.pool = split.width, split.scale, split.first, split.pool
        folded = [isinstance(norm, _BATCH_NORMS) for norm in split.norms]
        self.convs = nn.ModuleList()
        for conv, norm in zip(split.convs, split.norms, strict=True):
            assert isinstance(conv, SISOperator)
            self.convs.append(DeployedOperator(conv, norm))
        self.norms = nn.ModuleList(
            nn.Identity() if done else norm for done, norm in zip(folded, split.norms, strict=True)
        )
        self.writes = all(folded)

    def forward(self, x: Tensor) -> Tensor:
        """Maps the shapes of `Split`; the output overwrites x if it has the same shape."""
        splits = torch.split(x, self.width, dim=1)
        # A compiler fuses the writes itself, and norms other than batch norm need the whole output of an operator.
        if not self.writes or is_traced(x) or x.requires_grad:
            branches = [_branch(conv, norm) for conv, norm in zip(self.convs, self.norms, strict=True)]
            outputs = hierarchical_split(splits, branches, hierarchical=not self.first)
            if len(outputs) < self.scale:
                outputs.append(self.pool(splits[-1]))
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        writer = _Writer(x, self.width, self.scale)
        hierarchical_split(splits, [writer.branch(conv) for conv in self.convs], hierarchical=not self.first)
        out = writer.out
        assert out is not None
        if len(self.convs) < self.scale and (self.first or out is not x):
            out[:, -self.width :].copy_(self.pool(splits[-1]))
        return out


def _branch(conv: nn.Module, norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.relu(norm(conv(x)))


class _Writer:
    """Branches of `hierarchical_split` that write their outputs, one after the other, into one tensor.

    Attributes:
        out: The tensor (N, scale · width, H', W'): the input if that has the same shape, or else a new one; None until
            the first branch has run.

    Args:
        x: Input of the split. The branches may overwrite the splits that they have read.
        width: Number of channels of each output.
        scale: Number of splits.
    """

    def __init__(self, x: Tensor, width: int, scale: int) -> None:
        self.x, self.width, self.scale = x, width, scale
        self.out: Tensor | None = None
        self._channel = 0

    def branch(self, conv: nn.Module) -> Callable[[Tensor], Tensor]:
        """Returns the branch that a deployed operator and ReLU make."""
        assert isinstance(conv, DeployedOperator)

        def write(y: Tensor) -> Tensor:
            parts = conv.parts(y)
            if len(parts) == 1 == self.scale and conv.rest == 0:
                self.out = parts[0].relu_()
                return self.out
            if self.out is None:
                same = parts[0].shape[2:] == self.x.shape[2:] and parts[0].dtype == self.x.dtype
                self.out = self.x if same else _empty(parts[0], self.scale * self.width)
            mine = self.out[:, self._channel : self._channel + self.width]
            self._channel += self.width
            conv.write_relu(parts, mine)
            return mine

        return write


def _empty(like: Tensor, channels: int) -> Tensor:
    """Returns an uninitialised tensor (N, channels, H, W) with the memory format, type and device of another one."""
    shape = (like.shape[0], channels, *like.shape[2:])
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
