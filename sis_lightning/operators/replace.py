"""Puts an operator in place of the convolutions of any network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sis_lightning.errors import UsageError
from sis_lightning.operators.base import SISOperator, operator_class


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_convs` did to a network.

    Attributes:
        operator: The operator put in.
        replaced: Names of the convolutions that it stands in for now.
        left: Names of the k×k convolutions that stayed, each with the reason.
        parameters_before: Of the whole network.
        parameters_after: Of the whole network.
    """

    operator: str
    replaced: tuple[str, ...]
    left: dict[str, str]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        """One line a group of reasons, for people."""
        lines = [
            f"{self.operator}: {len(self.replaced)} convolutions replaced, {len(self.left)} left, parameters "
            f"{self.parameters_before:,} → {self.parameters_after:,} "
            f"({self.parameters_after / max(self.parameters_before, 1):.1%})"
        ]
        lines += [f"  left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace_convs(model: nn.Module, operator: str, *, steps: int = 2) -> ReplacementReport:
    """Puts an operator (eqs. 1-24) in place of every k×k convolution (k > 1) of any network, in place.

    Each maps (N, C_in, H, W) to (N, C, ⌈H/stride⌉, ⌈W/stride⌉), as the convolution did, so the network's shapes stay.

    "Pluggable into any promising backbone" (section 1). The new kernels are freshly drawn; a convolution's bias is
    kept, as are its device, dtype and train/eval mode. 1×1 convolutions are not touched and not listed. A convolution
    under several names (shared weights) becomes one operator under the same names.

    Args:
        model: Any network; it is changed.
        operator: A registered name.
        steps: T of the recurrent operators.

    Returns:
        What was replaced, what was left and why, and the parameters before and after.

    Raises:
        UsageError: Where the operator does not exist, or `model` itself is a convolution (it has no parent to hold the
            replacement).
    """
    cls = operator_class(operator)
    if isinstance(model, nn.Conv2d):
        raise UsageError("replace_convs changes a network's convolutions; for a single one use create_operator.")
    before = sum(parameter.numel() for parameter in model.parameters())
    replaced: list[str] = []
    left: dict[str, str] = {}
    operators: dict[nn.Module, SISOperator] = {}
    for name, conv in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(conv, nn.Conv2d) or max(conv.kernel_size) == 1:
            continue
        reason = _keeps_conv(cls, conv)
        if reason:
            left[name] = reason
            continue
        if conv not in operators:
            operators[conv] = _stand_in(cls, conv, steps)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, operators[conv])
        replaced.append(name)
    after = sum(parameter.numel() for parameter in model.parameters())
    return ReplacementReport(operator, tuple(replaced), left, before, after)


def _keeps_conv(cls: type[SISOperator], conv: nn.Conv2d) -> str | None:
    """Why a convolution stays one, or None."""
    k, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not a plain nn.Conv2d"
    if len({*conv.kernel_size}) > 1 or len({*conv.stride}) > 1 or len({*conv.dilation}) > 1:
        return f"kernel {conv.kernel_size}, stride {conv.stride}, dilation {conv.dilation}: not the same in H and W"
    if conv.groups == conv.in_channels and conv.groups > 1:
        return f"depthwise: {conv.groups} groups of {conv.out_channels // conv.groups} channel"
    reason = cls.unsuitable(conv.in_channels, conv.out_channels, k, groups=conv.groups)
    if reason:
        return reason
    if conv.padding not in ("same", (dilation * (k - 1) // 2,) * 2) or (conv.padding == "same" and stride > 1):
        return f"padding {conv.padding} is not 'same' for kernel {k}, dilation {dilation}"
    if conv.padding_mode != "zeros":
        return f"padding mode '{conv.padding_mode}' is not zeros"
    return None


def _stand_in(cls: type[SISOperator], conv: nn.Conv2d, steps: int) -> SISOperator:
    """The operator in place of `conv`: same shapes, device, dtype, mode and bias, fresh kernels."""
    operator = cls(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        stride=conv.stride[0],
        dilation=conv.dilation[0],
        groups=conv.groups,
        steps=steps,
    )
    operator.to(device=conv.weight.device, dtype=conv.weight.dtype).train(conv.training)
    operator.bias = conv.bias if isinstance(conv.bias, nn.Parameter) else None
    return operator
