"""Replaces the convolutions of any network by an operator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sis_lightning.errors import UsageError
from sis_lightning.operators.base import SISOperator, operator_class


@dataclass(frozen=True)
class ReplacementReport:
    """The changes that `replace_convs` made to a network.

    Attributes:
        operator: Name of the operator.
        replaced: Names of the convolutions that were replaced.
        left: Names of the k×k convolutions that stayed, each with the reason.
        parameters_before: Number of parameters of the whole network before.
        parameters_after: Number of parameters of the whole network afterwards.
    """

    operator: str
    replaced: tuple[str, ...]
    left: dict[str, str]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        """Returns a summary, and one line for each convolution that stayed."""
        lines = [
            f"{self.operator}: {len(self.replaced)} convolutions replaced, {len(self.left)} left, parameters "
            f"{self.parameters_before:,} → {self.parameters_after:,} "
            f"({self.parameters_after / max(self.parameters_before, 1):.1%})"
        ]
        lines += [f"  left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace_convs(model: nn.Module, operator: str, *, steps: int = 2) -> ReplacementReport:
    """Replaces every k×k convolution (k > 1) of any network by an operator (eqs. 1-24), in place.

    Each operator maps (N, C_in, H, W) to (N, C, ⌈H/stride⌉, ⌈W/stride⌉), like the convolution before it, so that all
    shapes in the network stay the same: the operators are "pluggable into any promising backbone" (section 1). The new
    kernels are initialised randomly. The bias of a convolution is kept, and so are its device, dtype and mode. 1×1
    convolutions stay and are not reported. A convolution that has several names (shared weights) becomes one operator
    with the same names.

    Args:
        model: Network to change. It must not be a convolution itself.
        operator: Name of a registered operator, see `list_operators`.
        steps: Number of time steps T of the recurrent operators. Other operators ignore it.

    Returns:
        A report of the replaced convolutions, of those that stayed and why, and of the parameters.

    Raises:
        UsageError: If the operator does not exist, or `model` is a convolution, which has no parent that could hold
            the replacement. It is also a ValueError.
    """
    cls = operator_class(operator)
    if isinstance(model, nn.Conv2d):
        raise UsageError("replace_convs changes convolutions inside a network; for a single one, use create_operator")
    before = sum(parameter.numel() for parameter in model.parameters())
    replaced: list[str] = []
    left: dict[str, str] = {}
    operators: dict[nn.Module, SISOperator] = {}
    for name, conv in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(conv, nn.Conv2d) or max(conv.kernel_size) == 1:
            continue
        reason = _reason_to_stay(cls, conv)
        if reason:
            left[name] = reason
            continue
        if conv not in operators:
            operators[conv] = _replacement(cls, conv, steps)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, operators[conv])
        replaced.append(name)
    after = sum(parameter.numel() for parameter in model.parameters())
    return ReplacementReport(operator, tuple(replaced), left, before, after)


def _reason_to_stay(cls: type[SISOperator], conv: nn.Conv2d) -> str | None:
    """Returns the reason why a convolution cannot be replaced, or None if it can."""
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


def _replacement(cls: type[SISOperator], conv: nn.Conv2d, steps: int) -> SISOperator:
    """Creates the operator for a convolution, with the same shapes, device, dtype, mode and bias."""
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
