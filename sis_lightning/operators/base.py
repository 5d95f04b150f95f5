"""The contract of an operator, and the registry in which backbones, tasks and tables find operators by name."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sis_lightning.errors import UsageError, nearest


class SISOperator(nn.Module):
    """A drop-in replacement for one k×k convolution: (N, C_in, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉).

    A new operator subclasses this, declares its kernels in `kernel_shapes`, writes its equations in `literal`, and is
    registered with `register_operator`. A fast form, which consists of `prepare` and `parts`, is optional.

    Args:
        in_channels: Number of input channels C_in, divisible by `groups`.
        out_channels: Number of output channels C; C / groups must be divisible by `channel_multiple`.
        kernel_size: Side k of the kernels in pixels, odd.
        stride: Stride of the first kernel, K1. The other kernels work at the resolution of its output Y1 (see
            `sis_lightning.operators.sis`).
        dilation: Dilation of all kernels.
        groups: Number of groups of all kernels.
        across_groups: Whether Y1 is divided into halves over all groups, so that outputs see other groups; by default
            each group is an operator of its own, as the groups of a convolution are, and its outputs are together.
            The paper does not say; kernels, parameters and MACs are the same.
        steps: Number of time steps T of the recurrent operators (Table 1-1), at least 1. Other operators ignore it.
        bias: Whether to add a learnable bias to each output channel. The paper's operators have none; `replace_convs`
            uses it to keep the bias of the convolution that it replaces.

    Raises:
        UsageError: If an argument is out of its range, or the channels do not divide. It is also a ValueError.
    """

    name: ClassVar[str]
    recurrent: ClassVar[bool] = False
    channel_multiple: ClassVar[int] = 4
    K1: Tensor
    K2: Tensor
    K3: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        steps: int = 2,
        bias: bool = False,
        across_groups: bool = False,
    ) -> None:
        super().__init__()
        reason = self.unsuitable(in_channels, out_channels, kernel_size, groups=groups)
        if reason:
            raise UsageError(f"operator '{self.name}': {reason}.")
        for argument, value in {"stride": stride, "dilation": dilation, "steps": steps}.items():
            if value < 1:
                raise UsageError(f"operator '{self.name}': {argument} is {value}, must be at least 1.")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.dilation, self.groups, self.steps = stride, dilation, groups, steps
        self.across_groups = across_groups
        self.padding = dilation * (kernel_size - 1) // 2
        for kernel, (outputs, inputs) in self.kernel_shapes().items():
            shape = (outputs, inputs // groups, kernel_size, kernel_size)
            self.register_parameter(kernel, nn.Parameter(torch.empty(shape)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels)) if bias else None)
        self.reset_parameters()

    @classmethod
    def unsuitable(cls, in_channels: int, out_channels: int, kernel_size: int, *, groups: int = 1) -> str | None:
        """Returns the reason why the operator cannot replace such a convolution, or None if it can."""
        if min(in_channels, out_channels, kernel_size, groups) < 1:
            return (
                f"in_channels {in_channels}, out_channels {out_channels}, kernel_size {kernel_size} and "
                f"groups {groups} must all be at least 1"
            )
        if kernel_size % 2 == 0:
            return f"kernel_size {kernel_size} is even, 'same' padding needs an odd one"
        if in_channels % groups or out_channels % groups:
            return f"{in_channels} and {out_channels} channels do not divide into {groups} groups"
        width = out_channels // groups
        if width % cls.channel_multiple:
            per_group = f" / {groups} groups = {width} channels per group" if groups > 1 else ""
            return f"out_channels {out_channels}{per_group} is not divisible by {cls.channel_multiple}"
        return None

    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns the number of output and input channels of each kernel, all groups together."""
        half, quarter = self.out_channels // 2, self.out_channels // 4
        return {"K1": (half, self.in_channels), "K2": (quarter, quarter), "K3": (quarter, quarter)}

    def reset_parameters(self) -> None:
        """Draws all kernels from the normal distribution of He et al. 2015, and sets the bias to 0.

        The fan-out is that of all channels, also of a grouped kernel: so do the code of ResNeXt and torchvision.
        """
        for kernel in self.kernel_shapes():
            nn.init.kaiming_normal_(self.get_parameter(kernel), mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def kernels(self) -> dict[str, Tensor]:
        """Returns the paper's kernels by name, each of shape (C_out, C_in / groups, k, k)."""
        return {kernel: self.get_parameter(kernel) for kernel in self.kernel_shapes()}

    def convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int | None = None
    ) -> Tensor:
        """Computes ``kernel * x + bias`` with "same" padding and the operator's dilation."""
        return F.conv2d(x, kernel, bias, stride, self.padding, self.dilation, groups or self.groups)

    def transform(self, x: Tensor) -> Tensor:
        """Computes Y1 = K1 * X (eqs. 2, 8, 19): (N, C_in, H, W) → (N, C/2, H', W')."""
        return self.convolve(x, self.K1, stride=self.stride)

    def literal(self, x: Tensor) -> Tensor:
        """Computes the paper's equations line by line, on one group or across all groups."""
        raise NotImplementedError

    @property
    def apart(self) -> bool:
        """Whether there are groups that do not see one another."""
        return self.groups > 1 and not self.across_groups

    def equations(self, x: Tensor) -> Tensor:
        """Computes `literal`, on each group alone if they are apart; every fast form is tested against it."""
        if not self.apart:
            return self.literal(x)
        kernels = {name: kernel.chunk(self.groups) for name, kernel in self.kernels().items()}
        outputs = []
        for index, part in enumerate(x.chunk(self.groups, dim=1)):
            alone = copy.copy(self)
            own: Any = {name: parts[index] for name, parts in kernels.items()}
            alone._parameters = own
            alone.groups = 1
            alone.in_channels, alone.out_channels = self.in_channels // self.groups, self.out_channels // self.groups
            outputs.append(alone.literal(part))
        return torch.cat(outputs, dim=1)

    def prepare(self) -> dict[str, Tensor]:
        """Returns the kernels that `parts` convolves with; they depend on the parameters alone.

        The kernel named `last`, if there is one, computes the last part of the output and nothing else, so that a
        channel-wise layer behind the operator, such as batch norm, can be folded into it.
        """
        return self.kernels()

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """Computes the output as a list of tensors that are consecutive in the channels.

        Args:
            x: Input of shape (N, C_in, H, W).
            kernels: The kernels that `prepare` returned.
            bias: Bias of the convolution with the kernel `last`, if `prepare` returns one.

        Returns:
            Tensors (N, C_i, H', W') whose channels add up to C.
        """
        return [self.equations(x)]

    def last(self, name: str) -> str:
        """The name of the kernel that computes the last part: `last`, or this if its channels are not at the end."""
        return name if self.apart else "last"

    def grouped(self, parts: list[Tensor]) -> list[Tensor]:
        """Puts the channels of each group together if groups are apart, given parts that have all groups in order."""
        if not self.apart:
            return parts
        return [torch.cat([torch.unflatten(part, 1, (self.groups, -1)) for part in parts], dim=2).flatten(1, 2)]

    def fast(self, x: Tensor) -> Tensor:
        """Computes the same function as `equations` in fewer passes over memory."""
        parts = self.parts(x, self.prepare())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C, H', W') by the fast form."""
        y = self.fast(x)
        # Under autocast the bias has full precision, and the output, like that of a convolution, has not.
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    def extra_repr(self) -> str:
        """Describes the operator as `nn.Conv2d` does, with T for recurrent operators."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"{key}={getattr(self, key)}" for key in ("dilation", "groups") if getattr(self, key) > 1]
        parts += ["across_groups=True"] if self.groups > 1 and self.across_groups else []
        parts += [f"steps={self.steps}"] if self.recurrent else []
        return ", ".join(parts)


_OPERATORS: dict[str, type[SISOperator]] = {}
_Operator = TypeVar("_Operator", bound=type[SISOperator])


def register_operator(name: str) -> Callable[[_Operator], _Operator]:
    """Class decorator that makes an operator available to backbones, tasks, tables and tests.

    Args:
        name: The name under which `create_operator` and the field `operator` of a backbone find the operator.

    Raises:
        UsageError: If another class is registered under this name.
    """

    def register(operator: _Operator) -> _Operator:
        if name in _OPERATORS:
            raise UsageError(f"operator '{name}' is registered already, by {_OPERATORS[name].__qualname__}.")
        operator.name = name
        _OPERATORS[name] = operator
        return operator

    return register


@functools.cache
def _import_user_operators() -> None:
    """Imports the modules in which users register operators, the first time that an operator is looked up."""
    for entry in entry_points(group="sis_lightning.operators"):
        entry.load()
    modules = os.environ.get("SIS_OPERATORS", "").split()
    sys.path.insert(0, "")  # modules in the current directory
    try:
        for name in modules:
            import_module(name)
    except ImportError as error:
        raise UsageError(f"$SIS_OPERATORS names {', '.join(modules)}: {error}") from error
    finally:
        sys.path.remove("")


def list_operators() -> list[str]:
    """Lists the names of all registered operators: the paper's in its order, then those of users.

    User operators are registered by modules that `$SIS_OPERATORS` names (separated by spaces; the current directory is
    searched too), or by installed packages with an entry point of the group `sis_lightning.operators`.
    """
    _import_user_operators()
    return list(_OPERATORS)


def operator_class(name: str) -> type[SISOperator]:
    """Returns the class that is registered under a name.

    Raises:
        UsageError: If there is none; the message lists the nearest names.
    """
    if name not in _OPERATORS:
        _import_user_operators()
    if name not in _OPERATORS:
        raise UsageError(f"no operator is called '{name}': {nearest(name, _OPERATORS)}")
    return _OPERATORS[name]


def create_operator(
    name: str,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    steps: int = 2,
    bias: bool = False,
    across_groups: bool = False,
) -> SISOperator:
    """Creates an operator that maps the same shapes as the convolution that it replaces.

    The input has shape (N, C_in, H, W), the output (N, C, ⌈H/stride⌉, ⌈W/stride⌉), with "same" padding. The equations
    are in `sis_lightning.operators.sis`.

    Args:
        name: `conv` (eq. 1), `basic` (eqs. 2-5), `interactive1` (eqs. 8-12), `interactive2` (eqs. 13-15), `recurrent1`
            (eqs. 19-23), `recurrent2` (eq. 24), or the name of an operator added by `register_operator`.
        in_channels: Number of input channels C_in, divisible by `groups`.
        out_channels: Number of output channels C; C / groups must be divisible by 4 (by 1 for `conv`).
        kernel_size: Side k of the kernels in pixels, odd.
        stride: Stride of the output.
        dilation: Dilation of every kernel.
        groups: Number of groups of every kernel.
        steps: Number of time steps T ≥ 1 of the recurrent operators (Table 1-1). Other operators ignore it.
        bias: Whether to add a learnable bias to the output. The paper's operators have none.
        across_groups: Whether outputs see other groups (see `SISOperator`); by default they do not.

    Raises:
        UsageError: If the name is unknown or an argument is invalid. It is also a ValueError.
    """
    return operator_class(name)(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        dilation=dilation,
        groups=groups,
        steps=steps,
        bias=bias,
        across_groups=across_groups,
    )
