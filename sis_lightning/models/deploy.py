"""The inference form of a trained network: the same outputs from fewer passes over memory.

Batch norms are folded into the convolutions before them, an operator's kernels are prepared once, and what is
concatenated is written where it belongs at once. Folding is not as simple as for a plain convolution: Y1 is a part of
an operator's output, which the norm scales and shifts, and the input of K2 and K3, which see it as it is (eqs. 2-24).
So the norm is folded into the last convolution alone, and applied to the other parts as they are written.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.weak import WeakTensorKeyDictionary

from sis_lightning.backbones.resnet import Bottleneck, Split, Stem
from sis_lightning.backbones.torch_internals import is_traced
from sis_lightning.operators import SISOperator

_Model = TypeVar("_Model", bound=nn.Module)
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def deploy(model: _Model, *, inplace: bool = False) -> _Model:
    """The inference form of any network with our backbones or operators, equal to 1e-5 of the outputs in float32.

    It maps what `model.eval()` does, to the same shapes; it cannot be trained, and its state dict is another.

    Args:
        model: A backbone, a classifier, a task, or any network after `replace_convs`.
        inplace: Changes `model` instead of a copy (an operator or block by itself is not changed but replaced).
    """
    model = (model if inplace else copy.deepcopy(model)).eval().requires_grad_(False)
    deployed: _Model = _deployed(model)
    return deployed


def _deployed(module: nn.Module) -> Any:
    """A module's inference form: another one, or itself with those of its parts."""
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
    if not isinstance(module, DeployedBottleneck | DeployedOperator):  # these are done
        for name, child in list(module.named_children()):
            setattr(module, name, _deployed(child))
    return module


def _fold(parent: nn.Module, conv: str, norm: str) -> None:
    """Folds a batch norm into the convolution before it, if these two are that."""
    one, other = parent.get_submodule(conv), parent.get_submodule(norm)
    # A separable convolution is a sequence itself: the norm belongs to its last one.
    holder, key = parent, conv
    while isinstance(one, nn.Sequential) and len(one):
        holder, key = one, list(one._modules)[-1]
        one = holder.get_submodule(key)
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
    """A convolution, what is added to it, and ReLU: on a CPU in one pass by oneDNN, with weights in its own layout.

    The operators that do so are those that `torch.compile` emits; where they are missing or do not suit (another device
    or type, autocast, gradients, a compiler at work), it is passes of plain torch.

    Args:
        x: (N, C_in, H, W).
        weight: (C, C_in / groups, k, k).
        bias: (C,).
        place: Padding, stride, dilation and groups.
        add: (N, C, H', W'), which may be overwritten.
        relu: Whether what is below 0 becomes 0.
    """
    padding, stride, dilation, groups = place
    if not _fuses(x) or (add is not None and add.requires_grad):
        plain = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        plain = plain if add is None else plain.add_(add)
        return plain.relu_() if relu else plain
    known, packed = _packed.get(weight, (None, None))
    version = -1 if weight.is_inference() else weight._version
    if known != version:
        pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed = pack(weight.to_mkldnn(), *place, x.shape)
        _packed[weight] = (version, packed)
    last = "relu" if relu else "none"
    if add is None:
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *place, last, [], "")
    else:
        fused = torch.ops.mkldnn._convolution_pointwise_.binary
        y = fused(add, x, packed, bias, *place, "add", 1.0, last if relu else None, [], "")
    return y


#: Of each weight its state (torch counts changes in place) and oneDNN's copy.
_packed: Any = WeakTensorKeyDictionary()


def _fuses(x: Tensor) -> bool:
    if is_traced(x) or x.requires_grad or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    backend: Any = torch.backends.mkldnn
    return bool(
        backend.is_available()
        and backend.enabled
        and not torch.is_autocast_enabled("cpu")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


class FusedConv(nn.Module):
    """`convolve` with a convolution's weights.

    Args:
        conv: With everything folded in.
        relu: Whether ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.conv, self.relu = conv, relu

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """conv(x) + add, where that is given; it may be overwritten."""
        conv = self.conv
        place = (conv.padding, conv.stride, conv.dilation, conv.groups)
        return convolve(x, conv.weight, conv.bias, place, add=add, relu=self.relu)


class DeployedBottleneck(nn.Module):
    """`Bottleneck` with its batch norms folded, its ReLUs and its sum within its convolutions."""

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
        """(N, inputs, H, W) → (N, outputs, …), as `Bottleneck`; x is overwritten where it is the shortcut."""
        if self.folded:
            y: Tensor = self.expand(self.split(self.reduce(x)), self.shortcut(x))
            return y
        y = torch.relu(self.reduce_norm(self.reduce(x)))
        y = self.expand_norm(self.expand(self.split(y)))
        return torch.relu(y + self.shortcut(x))


class DeployedOperator(nn.Module):
    """An operator and the batch norm behind it, with constants that are computed once.

    Args:
        operator: Any; it is copied.
        norm: Behind it. Other than a batch norm, it is left to who calls.
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
        #: Channels of the parts that `last` does not make, to which scale and shift are applied as they are written.
        self.rest = channels
        self.bias: Tensor | None
        self.register_buffer("bias", None)
        if "last" in kernels:
            self.rest -= len(kernels["last"])
            kernels["last"] *= scale[self.rest :, None, None, None]
            self.bias = shift[self.rest :].clone()
            for name in operator.kernel_shapes():  # `parts` of such an operator needs those of `prepare` alone
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
        """The output in pieces; those of the first `rest` channels still to be scaled and shifted."""
        return self._operator.parts(x, {name: self.get_buffer(name) for name in self.names}, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, C, H', W'), through the norm."""
        parts = self.parts(x)
        if self.scale is None or self.shift is None or self.rest == 0:
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        done, first = [], 0
        for part in parts:
            last = first + part.shape[1]
            # Also where `last` is None and a literal form gives the whole in one piece.
            if first < self.rest:
                # The constants are of full precision under autocast too; what is written is not.
                scaled = torch.addcmul(self.shift[:, first:last], part, self.scale[:, first:last])
                part = scaled.to(part.dtype)
            done.append(part)
            first = last
        return done[0] if len(done) == 1 else torch.cat(done, dim=1)

    def write_relu(self, parts: list[Tensor], out: Tensor) -> None:
        """Writes max(0, norm(parts)) into `out` (N, C, H', W'), which may be channels of a larger tensor."""
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
    """`Split` whose convolutions write their channels of the block's output where they belong."""

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
        """(N, scale · width, H, W) → (N, scale · width, ⌈H/stride⌉, ⌈W/stride⌉), in place of x where they are alike."""
        if not self.writes or is_traced(x) or x.requires_grad:
            # A compiler fuses the writes itself, and other norms than batch norm see an operator's whole output.
            return self._concatenate(x)
        splits = torch.split(x, self.width, dim=1)
        out, y = None, splits[0]
        for index, conv in enumerate(self.convs):
            assert isinstance(conv, DeployedOperator)
            parts = conv.parts(y)
            if out is None:
                if len(parts) == 1 == self.scale and conv.rest == 0:
                    return parts[0].relu_()
                same = parts[0].shape[2:] == x.shape[2:] and parts[0].dtype == x.dtype
                out = x if same else _empty(parts[0], self.scale * self.width)
            mine = out[:, index * self.width : (index + 1) * self.width]
            conv.write_relu(parts, mine)
            if index + 1 < len(self.convs):
                y = splits[index + 1] if self.first else mine + splits[index + 1]
        assert out is not None
        if len(self.convs) < self.scale and (self.first or out is not x):
            out[:, -self.width :].copy_(self.pool(splits[-1]))
        return out

    def _concatenate(self, x: Tensor) -> Tensor:
        splits = torch.split(x, self.width, dim=1)
        outputs: list[Tensor] = []
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = splits[index] if index == 0 or self.first else outputs[-1] + splits[index]
            outputs.append(torch.relu(norm(conv(y))))
        if len(outputs) < self.scale:
            outputs.append(self.pool(splits[-1]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _empty(like: Tensor, channels: int) -> Tensor:
    """An uninitialised (N, channels, H, W) in the layout, type and place of `like`."""
    shape = (like.shape[0], channels, *like.shape[2:])
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
