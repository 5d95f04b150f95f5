"""The SIS operators: section 3 of Zhou, Fu, Liu, "SIS: A new multi-scale convolutional operator" (JUSTC 2022).

Each operator stands in for one k×k convolution C_in → C and is linear: no bias unless asked for, no norm and
no activation inside. Notation as in the paper: ``*`` convolves, ``[ , , ]`` concatenates over channels, K1 maps
C_in → C/2, K2 and K3 map to C/4, and Y1 = K1 * X = [Y11, Y12] in halves of C/4 channels.

=============== ============ =============== =====================================================================
name            paper        equations       output
=============== ============ =============== =====================================================================
`conv`          regular      1               K * X
`basic`         Basic SIS    2-5, Fig. 1c    [Y1, Y2, Y3], Y2 = K2 * Y1, Y3 = K3 * Y2
`interactive1`  I, layers    8-12, Fig. 1d   [Y1, K2 * (A + B), K3 * (A + B)], A = K2 * Y11, B = K3 * Y12
`interactive2`  II, layers   13-15, Fig. 1e  [Y1, K2 * (A + Y12), K3 * (Y11 + B)]
`recurrent1`    I, time      19-23, Fig. 1f  [Y1, h_T, g_T], h_1 = K2 * Y11, h_t = K2 * (h_{t-1} + Y11); g: K3, Y12
`recurrent2`    II, time     24, Fig. 1g     [Y1, h_1 + … + h_T, g_1 + … + g_T]
=============== ============ =============== =====================================================================

Every class has two forms of the same mathematics over the same state dict: `SISOperator.literal` follows the
equations line by line and is the reference; `SISOperator.fast` does the same work in fewer passes over memory
and is what `forward` runs. It has two halves, `prepare` (of the kernels alone, which a trained network needs once)
and `parts` (of the image). Stride lies on K1; dilation, groups and "same" padding are alike for all kernels.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
    for entry in entry_points(group="sis_lightning.operators"):
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


@register_operator("conv")
class Conv(SISOperator):
    """Regular convolution, eq. 1: Y = K * X."""

    channel_multiple = 1
    K: Tensor

    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """One kernel, C_in → C."""
        return {"K": (self.out_channels, self.in_channels)}

    def literal(self, x: Tensor) -> Tensor:
        """Eq. 1."""
        return self.convolve(x, self.K, stride=self.stride)

    def prepare(self) -> dict[str, Tensor]:
        """K alone."""
        return {"last": self.K}

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """As the equation."""
        return [self.convolve(x, kernels["last"], bias, stride=self.stride)]


@register_operator("basic")
class Basic(SISOperator):
    """Basic SIS, eqs. 2-5, Fig. 1c: three convolutions in sequence, every one's output kept."""

    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """K2 narrows C/2 → C/4."""
        half, quarter = self.out_channels // 2, self.out_channels // 4
        return {"K1": (half, self.in_channels), "K2": (quarter, half), "K3": (quarter, quarter)}

    def literal(self, x: Tensor) -> Tensor:
        """Eqs. 2-5."""
        Y1 = self.transform(x)
        Y2 = self.convolve(Y1, self.K2)
        Y3 = self.convolve(Y2, self.K3)
        return torch.cat([Y1, Y2, Y3], dim=1)

    def prepare(self) -> dict[str, Tensor]:
        """The paper's kernels."""
        return {"K1": self.K1, "K2": self.K2, "last": self.K3}

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """As the equations: they waste nothing."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        Y2 = self.convolve(Y1, kernels["K2"])
        return [Y1, Y2, self.convolve(Y2, kernels["last"], bias)]


@register_operator("interactive1")
class Interactive1(SISOperator):
    """Interactive SIS-I (inter-layer), eqs. 8-12, Fig. 1d: both paths see the sum of the first layer."""

    def literal(self, x: Tensor) -> Tensor:
        """Eqs. 8-12."""
        Y1 = self.transform(x)
        Y11, Y12 = Y1.chunk(2, dim=1)
        A, B = self.convolve(Y11, self.K2), self.convolve(Y12, self.K3)
        Y112, Y122 = self.convolve(A + B, self.K2), self.convolve(A + B, self.K3)
        return torch.cat([Y1, Y112, Y122], dim=1)

    def prepare(self) -> dict[str, Tensor]:
        """K2 and K3 side by side, and one above the other."""
        if self.groups > 1:
            # A group's channels of Y11 and Y12 do not lie side by side.
            return {**self.kernels(), "last": self.K3}
        return {"K1": self.K1, "sum": torch.cat([self.K2, self.K3], dim=1), "last": torch.cat([self.K2, self.K3])}

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """S = A + B is one convolution of the whole Y1: no adds, no copied halves."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        if "sum" in kernels:
            S = self.convolve(Y1, kernels["sum"])
            return [Y1, self.convolve(S, kernels["last"], bias)]
        Y11, Y12 = Y1.chunk(2, dim=1)
        S = self.convolve(Y11, kernels["K2"]) + self.convolve(Y12, kernels["K3"])
        return [Y1, self.convolve(S, kernels["K2"]), self.convolve(S, kernels["last"], bias)]


class _TwoPaths(SISOperator):
    """Operators whose paths Y11 → K2 and Y12 → K3 run as the two halves of one grouped convolution."""

    def prepare(self) -> dict[str, Tensor]:
        """K2 above K3; as `last` once more, for what is folded into that alone."""
        K23 = torch.cat([self.K2, self.K3])
        return {"K1": self.K1, "K23": K23, "last": K23}

    def both(self, y: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
        """[K2 * y1, K3 * y2] for y = [y1, y2] and kernels = [K2; K3]."""
        return self.convolve(y, kernels, bias, groups=2 * self.groups)


@register_operator("interactive2")
class Interactive2(_TwoPaths):
    """Interactive SIS-II (cross-layer), eqs. 13-15, Fig. 1e: each path sees the other's input."""

    def literal(self, x: Tensor) -> Tensor:
        """Eqs. 8, 13-15."""
        Y1 = self.transform(x)
        Y11, Y12 = Y1.chunk(2, dim=1)
        A, B = self.convolve(Y11, self.K2), self.convolve(Y12, self.K3)
        Y112, Y122 = self.convolve(A + Y12, self.K2), self.convolve(Y11 + B, self.K3)
        return torch.cat([Y1, Y112, Y122], dim=1)

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """Both paths at once; crossing them is adding Y1 with its halves swapped."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        AB = self.both(Y1, kernels["K23"])
        swapped = Y1.roll(self.out_channels // 4, dims=1)
        return [Y1, self.both(AB + swapped, kernels["last"], bias)]


class _Recurrent(_TwoPaths):
    """Operators that run each path's kernel T times."""

    recurrent = True

    def plus_identity(self, kernels: Tensor, times: int) -> Tensor:
        """K + times · δ, so that (K + times · δ) * y = K * y + times · y within each group."""
        inputs, middle = kernels.shape[1], kernels.shape[-1] // 2
        identity = torch.eye(inputs, dtype=kernels.dtype, device=kernels.device)
        sums = kernels.clone()
        sums[:, :, middle, middle].view(-1, inputs, inputs).add_(identity, alpha=times)
        return sums


@register_operator("recurrent1")
class Recurrent1(_Recurrent):
    """Recurrent SIS-I, eqs. 19-23, Fig. 1f: the final step alone."""

    def literal(self, x: Tensor) -> Tensor:
        """Eqs. 19-23 for any T."""
        Y1 = self.transform(x)
        Y11, Y12 = Y1.chunk(2, dim=1)
        h, g = self.convolve(Y11, self.K2), self.convolve(Y12, self.K3)
        for _ in range(2, self.steps + 1):
            h, g = self.convolve(h + Y11, self.K2), self.convolve(g + Y12, self.K3)
        return torch.cat([Y1, h, g], dim=1)

    def prepare(self) -> dict[str, Tensor]:
        """K + δ too."""
        kernels = super().prepare()
        return {**kernels, "first": self.plus_identity(kernels["K23"], 1)}

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """With u_t = h_t + Y1: u_1 = (K + δ) * Y1, u_t = K * u_{t-1} + Y1, and h_T = K * u_{T-1}."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        u = Y1 if self.steps == 1 else self.both(Y1, kernels["first"])
        for _ in range(2, self.steps):
            u = self.both(u, kernels["K23"]) + Y1
        return [Y1, self.both(u, kernels["last"], bias)]


@register_operator("recurrent2")
class Recurrent2(_Recurrent):
    """Recurrent SIS-II, eq. 24, Fig. 1g: all steps fused by their sum."""

    def literal(self, x: Tensor) -> Tensor:
        """Eq. 24 for any T."""
        Y1 = self.transform(x)
        Y11, Y12 = Y1.chunk(2, dim=1)
        h, g = self.convolve(Y11, self.K2), self.convolve(Y12, self.K3)
        sum_h, sum_g = h, g
        for _ in range(2, self.steps + 1):
            h, g = self.convolve(h + Y11, self.K2), self.convolve(g + Y12, self.K3)
            sum_h, sum_g = sum_h + h, sum_g + g
        return torch.cat([Y1, sum_h, sum_g], dim=1)

    def prepare(self) -> dict[str, Tensor]:
        """For T = 2, the paper's, the last convolution is one with K + 2δ."""
        K23 = torch.cat([self.K2, self.K3])
        if self.steps == 1:
            return {"K1": self.K1, "last": K23}
        second = self.plus_identity(K23, 2)
        if self.steps == 2:
            return {"K1": self.K1, "K23": K23, "last": second}
        return {"K1": self.K1, "K23": K23, "second": second}

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """With s_t = h_1 + … + h_t: s_t = K * s_{t-1} + t · h_1, so s_2 = (K + 2δ) * h_1 in one pass."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        if self.steps == 1:
            return [Y1, self.both(Y1, kernels["last"], bias)]
        first = self.both(Y1, kernels["K23"])
        if self.steps == 2:
            return [Y1, self.both(first, kernels["last"], bias)]
        total = self.both(first, kernels["second"])
        for step in range(3, self.steps + 1):
            total = self.both(total, kernels["K23"]) + step * first
        return [Y1, total]


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
