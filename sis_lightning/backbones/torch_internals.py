"""All private interfaces of torch that the package relies on, each behind one function or name.

Nothing else in the library may use a private name of torch. `tests/backbones/test_torch_internals.py` checks each of
them, so that a release of torch which changes one fails there, by its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["TorchDispatchMode", "fused_convolution", "fuses_convolutions", "is_traced", "operation"]


def is_traced(x: Tensor) -> bool:
    """Returns whether a compiler, an exporter or a transform of torch.func follows the computation on a tensor.

    All of these need plain operations without hooks or writes into other tensors. torch has no public function that
    tells whether a transform of torch.func is active.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if torch.compiler.is_compiling() or tracing or not isinstance(x, Tensor):  # torch.fx passes a proxy
        return True
    return torch._C._are_functorch_transforms_active()


def operation(function: Any) -> Any:
    """Returns the operation (such as `torch.ops.aten.add`) that an overload seen by a dispatch mode belongs to."""
    return function._overloadpacket


def fuses_convolutions(x: Tensor) -> bool:
    """Returns whether `fused_convolution` works for an input: float32 on a CPU, with oneDNN, without gradients."""
    if is_traced(x) or x.requires_grad or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    backend: Any = torch.backends.mkldnn
    return bool(
        backend.is_available()
        and backend.enabled
        and not torch.is_autocast_enabled("cpu")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    place: tuple[Any, Any, Any, int],
    *,
    add: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Computes relu(weight * x + bias + add) in one pass by oneDNN, with the weight in oneDNN's own layout.

    These are the operations that `torch.compile` emits on CPUs. A converted copy of each weight is kept until the
    weight changes.

    Args:
        x: Input (N, C_in, H, W) for which `fuses_convolutions` holds.
        weight: Kernel (C, C_in / groups, k, k).
        bias: Bias (C,), or None.
        place: Padding, stride, dilation and number of groups.
        add: Tensor (N, C, H', W') to add, or None. It is overwritten with the result.
        relu: Whether to apply ReLU to the result.

    Returns:
        The result (N, C, H', W').
    """
    known, packed = _packed.get(weight, (None, None))
    # torch counts the changes of a tensor in place, but not for tensors made in inference mode.
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


#: The version of each weight, and oneDNN's copy of it.
_packed: Any = WeakTensorKeyDictionary()
