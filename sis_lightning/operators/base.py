"""The contract of an operator, and the registry in which backbones, tasks and tables find operators by name."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sis_lightning.errors import UsageError, nearest


class SISOperator(nn.Module):
    """A linear stand-in for one k×k convolution: (N, C_in, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉).

    A new operator subclasses this, names its kernels in `kernel_shapes`, writes its equations in `literal`, and is
    registered with `register_operator`. A fast form, `prepare` and `parts`, is optional.

    Args:
        in_channels: C_in, divisible by `groups`.
        out_channels: C, with C / groups divisible by `channel_multiple`.
        kernel_size: k, odd.
        stride: Of K1; the other kernels see Y1's resolution.
        dilation: Of all kernels.
        groups: Of all kernels.
        steps: T of the recurrent operators (Table 1-1), at least 1; the others have no recurrence.
        bias: Adds a per-channel bias to the output. The paper has none; `replace_convs` keeps a conv's bias with it.

    Raises:
        UsageError: (a ValueError) where one of the numbers above cannot be.
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
        self.padding = dilation * (kernel_size - 1) // 2
        for kernel, (outputs, inputs) in self.kernel_shapes().items():
            shape = (outputs, inputs // groups, kernel_size, kernel_size)
            self.register_parameter(kernel, nn.Parameter(torch.empty(shape)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels)) if bias else None)
        self.reset_parameters()

    @classmethod
    def unsuitable(cls, in_channels: int, out_channels: int, kernel_size: int, *, groups: int = 1) -> str | None:
        """Says why the operator cannot replace such a convolution, or None where it can."""
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
            per_group = f" / {groups} groups = {width} channels a group" if groups > 1 else ""
            return f"out_channels {out_channels}{per_group} is not divisible by {cls.channel_multiple}"
        return None

    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """The (output, input) channels of each kernel, before grouping."""
        half, quarter = self.out_channels // 2, self.out_channels // 4
        return {"K1": (half, self.in_channels), "K2": (quarter, quarter), "K3": (quarter, quarter)}

    def reset_parameters(self) -> None:
        """Draws all kernels from He et al.'s normal distribution (fan-out), as the host's convolutions are."""
        for kernel in self.kernel_shapes():
            # The fan-out of a grouped kernel is that of one group.
            weight = self.get_parameter(kernel)
            fan_out = weight.shape[0] // self.groups * self.kernel_size**2
            nn.init.normal_(weight, std=math.sqrt(2 / fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def kernels(self) -> dict[str, Tensor]:
        """The paper's kernels in their literal layout, each (C_out, C_in / groups, k, k)."""
        return {kernel: self.get_parameter(kernel) for kernel in self.kernel_shapes()}

    def convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int | None = None
    ) -> Tensor:
        """``kernel * x + bias`` with "same" padding and the operator's dilation."""
        return F.conv2d(x, kernel, bias, stride, self.padding, self.dilation, groups or self.groups)

    def transform(self, x: Tensor) -> Tensor:
        """Y1 = K1 * X (eqs. 2, 8, 19): (N, C_in, H, W) → (N, C/2, H', W')."""
        return self.convolve(x, self.K1, stride=self.stride)

    def literal(self, x: Tensor) -> Tensor:
        """The paper's equations, line by line: the reference."""
        raise NotImplementedError

    def prepare(self) -> dict[str, Tensor]:
        """The kernels as `parts` convolves with them.

        The one under `last`, if any, makes the last part and nothing else, so that what follows the operator channel by
        channel, as a batch norm does, can be folded into it.
        """
        return self.kernels()

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """The output in pieces of channels, in order.

        Args:
            x: (N, C_in, H, W).
            kernels: Of `prepare`.
            bias: Of the convolution with `last`, where `prepare` has that.
        """
        return [self.literal(x)]

    def fast(self, x: Tensor) -> Tensor:
        """The same function as `literal` in fewer passes over memory."""
        parts = self.parts(x, self.prepare())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C, H', W') by the fast form."""
        y = self.fast(x)
        # Under autocast the bias is of full precision, and the output, as a convolution's, is not.
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    def extra_repr(self) -> str:
        """Shows what `nn.Conv2d` shows, and T."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"{key}={getattr(self, key)}" for key in ("dilation", "groups") if getattr(self, key) > 1]
        parts += [f"steps={self.steps}"] if self.recurrent else []
        return ", ".join(parts)


_OPERATORS: dict[str, type[SISOperator]] = {}
_Operator = TypeVar("_Operator", bound=type[SISOperator])


def register_operator(name: str) -> Callable[[_Operator], _Operator]:
    """Class decorator under whose `name` an operator joins backbones, tasks, tables and tests.

    Raises:
        UsageError: Where the name is taken by another class.
    """

    def register(operator: _Operator) -> _Operator:
        if name in _OPERATORS:
            raise UsageError(f"operator '{name}' is registered already, by {_OPERATORS[name].__qualname__}.")
        operator.name = name
        _OPERATORS[name] = operator
        return operator

    return register


@functools.cache
def _import_others() -> None:
    """Imports the modules in which users register operators, when an operator is first asked for."""
    for entry in entry_points(group="sis_lightning.operators.sis"):
        entry.load()
    modules = os.environ.get("SIS_OPERATORS", "").split()
    sys.path.insert(0, "")  # beside which the command was typed
    try:
        for name in modules:
            import_module(name)
    except ImportError as error:
        raise UsageError(f"$SIS_OPERATORS names {', '.join(modules)}: {error}") from error
    finally:
        sys.path.remove("")


def operator_names() -> tuple[str, ...]:
    """All registered operators: the paper's in its order, then those of users.

    These register in modules that `$SIS_OPERATORS` names (separated by spaces; also in the current directory), or that
    an installed package has as an entry point of the group `sis_lightning.operators`.
    """
    _import_others()
    return tuple(_OPERATORS)


def operator_class(name: str) -> type[SISOperator]:
    """The class registered under `name`.

    Raises:
        UsageError: Where there is none; the message lists the nearest names.
    """
    if name not in _OPERATORS:
        _import_others()
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
) -> SISOperator:
    """Builds the operator `name`, which maps shapes as the convolution it replaces would.

    Input (N, C_in, H, W), output (N, C, H', W') with H' = ⌈H / stride⌉ ("same" padding). Equations: see the module.

    Args:
        name: `conv` (eq. 1), `basic` (eqs. 2-5), `interactive1` (8-12), `interactive2` (13-15), `recurrent1` (19-23),
            `recurrent2` (24), or one that `register_operator` added.
        in_channels: C_in, divisible by `groups`.
        out_channels: C; C / groups divisible by 4 (`conv`: by 1).
        kernel_size: k, odd.
        stride: Carried by K1.
        dilation: Of every kernel.
        groups: Of every kernel.
        steps: T ≥ 1 of the recurrent operators (Table 1-1); the others have no recurrence and no use for it.
        bias: Adds a bias to the output; the paper has none.

    Raises:
        UsageError: (a ValueError) for an unknown name, or numbers that cannot be, naming them.
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
    )
