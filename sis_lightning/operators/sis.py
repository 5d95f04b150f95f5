"""The SIS operators: section 3 of Zhou, Fu, Liu, "SIS: A new multi-scale convolutional operator" (JUSTC 2022).

Each operator is a drop-in replacement for a k×k convolution from C_in to C channels. It is linear: it has no bias
unless asked for, and no norm and no activation inside. The notation is that of the paper: ``*`` is convolution, and
``[ , , ]`` is concatenation over the channels. K1 maps C_in to C/2 channels, K2 and K3 map to C/4 channels, and
Y1 = K1 * X = [Y11, Y12] consists of two halves with C/4 channels each.

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

Every class computes the same function in two ways, with the same parameters. `literal` follows the equations line by
line. `fast` computes the same in fewer passes over memory, and is what `forward` runs. It consists of `prepare`, which
depends on the kernels only, so that a trained network needs it once, and `parts`, which depends on the input. K1 has
the stride; dilation, groups and "same" padding are those of all kernels.

The paper is silent on groups. By default each is an operator of its own: the output is [Y of group 1, Y of group 2, …],
Y1 of a group and its halves are next to each other. With `across_groups`, Y11 and Y12 are the halves of Y1 over all
groups. In both, a kernel has the rows of the groups one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sis_lightning.operators.base import SISOperator, register_operator


@register_operator("conv")
class Conv(SISOperator):
    """Regular convolution, eq. 1: Y = K * X."""

    channel_multiple = 1
    K: Tensor

    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """One kernel, from C_in to C channels."""
        return {"K": (self.out_channels, self.in_channels)}

    def literal(self, x: Tensor) -> Tensor:
        """Computes eq. 1."""
        return self.convolve(x, self.K, stride=self.stride)

    def prepare(self) -> dict[str, Tensor]:
        """Returns the kernel as it is."""
        return {"last": self.K}

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """Computes eq. 1."""
        return [self.convolve(x, kernels["last"], bias, stride=self.stride)]


@register_operator("basic")
class Basic(SISOperator):
    """Basic SIS, eqs. 2-5, Fig. 1c: three convolutions in sequence, whose outputs are all kept."""

    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """K2 maps all C/2 channels of Y1 to C/4."""
        half, quarter = self.out_channels // 2, self.out_channels // 4
        return {"K1": (half, self.in_channels), "K2": (quarter, half), "K3": (quarter, quarter)}

    def literal(self, x: Tensor) -> Tensor:
        """Computes eqs. 2-5."""
        Y1 = self.transform(x)
        Y2 = self.convolve(Y1, self.K2)
        Y3 = self.convolve(Y2, self.K3)
        return torch.cat([Y1, Y2, Y3], dim=1)

    def prepare(self) -> dict[str, Tensor]:
        """Returns the kernels as they are."""
        return self.kernels() if self.apart else {"K1": self.K1, "K2": self.K2, "last": self.K3}

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """Computes eqs. 2-5, which have nothing to save."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        Y2 = self.convolve(Y1, kernels["K2"])
        Y3 = self.convolve(Y2, kernels[self.last("K3")], bias)
        return self.grouped([Y1, Y2, Y3])


class _TwoPaths(SISOperator):
    """Operators that compute the paths Y11 → K2 and Y12 → K3 as the two halves of one grouped convolution."""

    def paired(self) -> Tensor:
        """[K2; K3], over all groups or, if these are apart, of each group."""
        if not self.apart:
            return torch.cat([self.K2, self.K3])
        kernels = [torch.unflatten(kernel, 0, (self.groups, -1)) for kernel in (self.K2, self.K3)]
        return torch.stack(kernels, dim=1).flatten(0, 2)

    def prepare(self) -> dict[str, Tensor]:
        """Concatenates K2 and K3 over the outputs.

        The result is returned twice, because a norm is folded into the kernel `last` only.
        """
        K23 = self.paired()
        return {"K1": self.K1, "K23": K23} if self.apart else {"K1": self.K1, "K23": K23, "last": K23}

    def both(self, y: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
        """Computes [K2 * y1, K3 * y2] for y = [y1, y2] and kernels = [K2; K3]."""
        return self.convolve(y, kernels, bias, groups=2 * self.groups)


@register_operator("interactive1")
class Interactive1(_TwoPaths):
    """Interactive SIS-I (inter-layer), eqs. 8-12, Fig. 1d: both paths see the sum of the first layer."""

    def literal(self, x: Tensor) -> Tensor:
        """Computes eqs. 8-12."""
        Y1 = self.transform(x)
        Y11, Y12 = Y1.chunk(2, dim=1)
        A, B = self.convolve(Y11, self.K2), self.convolve(Y12, self.K3)
        Y112, Y122 = self.convolve(A + B, self.K2), self.convolve(A + B, self.K3)
        return torch.cat([Y1, Y112, Y122], dim=1)

    def prepare(self) -> dict[str, Tensor]:
        """Concatenates K2 and K3 over the inputs (`sum`) and over the outputs (`last`)."""
        if self.groups > 1 and self.across_groups:
            # The channels of a group of Y11 are not next to those of the same group of Y12.
            return {**self.kernels(), "last": self.K3}
        both = torch.cat([self.K2, self.K3], dim=1)
        return {"K1": self.K1, "sum": both, self.last("K23"): self.paired()}

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """Computes S = A + B as one convolution of the whole Y1, without sums and without copies of its halves."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        if "sum" in kernels:
            S = self.convolve(Y1, kernels["sum"])
            return self.grouped([Y1, self.convolve(S, kernels[self.last("K23")], bias)])
        Y11, Y12 = Y1.chunk(2, dim=1)
        S = self.convolve(Y11, kernels["K2"]) + self.convolve(Y12, kernels["K3"])
        return [Y1, self.convolve(S, kernels["K2"]), self.convolve(S, kernels["last"], bias)]


@register_operator("interactive2")
class Interactive2(_TwoPaths):
    """Interactive SIS-II (cross-layer), eqs. 13-15, Fig. 1e: each path sees the input of the other."""

    def literal(self, x: Tensor) -> Tensor:
        """Computes eqs. 8 and 13-15."""
        Y1 = self.transform(x)
        Y11, Y12 = Y1.chunk(2, dim=1)
        A, B = self.convolve(Y11, self.K2), self.convolve(Y12, self.K3)
        Y112, Y122 = self.convolve(A + Y12, self.K2), self.convolve(Y11 + B, self.K3)
        return torch.cat([Y1, Y112, Y122], dim=1)

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """Computes both paths at once; they cross by adding Y1 with its halves swapped."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        AB = self.both(Y1, kernels["K23"])
        if self.apart:
            width = self.out_channels // self.groups // 4
            swapped = torch.unflatten(Y1, 1, (self.groups, -1)).roll(width, dims=2).flatten(1, 2)
        else:
            swapped = Y1.roll(self.out_channels // 4, dims=1)
        return self.grouped([Y1, self.both(AB + swapped, kernels[self.last("K23")], bias)])


class _Recurrent(_TwoPaths):
    """Operators that apply the kernel of each path T times."""

    recurrent = True

    def plus_identity(self, kernels: Tensor, times: int) -> Tensor:
        """Returns K + times · δ, for which (K + times · δ) * y = K * y + times · y within each group."""
        inputs, middle = kernels.shape[1], kernels.shape[-1] // 2
        identity = torch.eye(inputs, dtype=kernels.dtype, device=kernels.device)
        sums = kernels.clone()
        sums[:, :, middle, middle].view(-1, inputs, inputs).add_(identity, alpha=times)
        return sums


@register_operator("recurrent1")
class Recurrent1(_Recurrent):
    """Recurrent SIS-I, eqs. 19-23, Fig. 1f: the output has the last time step only."""

    def literal(self, x: Tensor) -> Tensor:
        """Computes eqs. 19-23 for any T."""
        Y1 = self.transform(x)
        Y11, Y12 = Y1.chunk(2, dim=1)
        h, g = self.convolve(Y11, self.K2), self.convolve(Y12, self.K3)
        for _ in range(2, self.steps + 1):
            h, g = self.convolve(h + Y11, self.K2), self.convolve(g + Y12, self.K3)
        return torch.cat([Y1, h, g], dim=1)

    def prepare(self) -> dict[str, Tensor]:
        """Adds K + δ, the kernel of the first step."""
        kernels = super().prepare()
        return {**kernels, "first": self.plus_identity(kernels["K23"], 1)}

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """Computes u_t = h_t + Y1 instead: u_1 = (K + δ) * Y1, u_t = K * u_{t-1} + Y1, and h_T = K * u_{T-1}."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        u = Y1 if self.steps == 1 else self.both(Y1, kernels["first"])
        for _ in range(2, self.steps):
            u = self.both(u, kernels["K23"]) + Y1
        return self.grouped([Y1, self.both(u, kernels[self.last("K23")], bias)])


@register_operator("recurrent2")
class Recurrent2(_Recurrent):
    """Recurrent SIS-II, eq. 24, Fig. 1g: the output has the sum over all time steps."""

    def literal(self, x: Tensor) -> Tensor:
        """Computes eq. 24 for any T."""
        Y1 = self.transform(x)
        Y11, Y12 = Y1.chunk(2, dim=1)
        h, g = self.convolve(Y11, self.K2), self.convolve(Y12, self.K3)
        sum_h, sum_g = h, g
        for _ in range(2, self.steps + 1):
            h, g = self.convolve(h + Y11, self.K2), self.convolve(g + Y12, self.K3)
            sum_h, sum_g = sum_h + h, sum_g + g
        return torch.cat([Y1, sum_h, sum_g], dim=1)

    def prepare(self) -> dict[str, Tensor]:
        """Adds K + 2δ, the kernel of the second step, which is the last one for T = 2, as in the paper."""
        K23 = self.paired()
        if self.steps == 1:
            return {"K1": self.K1, self.last("K23"): K23}
        return {
            "K1": self.K1,
            "K23": K23,
            self.last("second") if self.steps == 2 else "second": self.plus_identity(K23, 2),
        }

    def parts(self, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None = None) -> list[Tensor]:
        """Computes the sums s_t = h_1 + … + h_t = K * s_{t-1} + t · h_1, of which s_2 = (K + 2δ) * h_1."""
        Y1 = self.convolve(x, kernels["K1"], stride=self.stride)
        if self.steps == 1:
            return self.grouped([Y1, self.both(Y1, kernels[self.last("K23")], bias)])
        first = self.both(Y1, kernels["K23"])
        if self.steps == 2:
            return self.grouped([Y1, self.both(first, kernels[self.last("second")], bias)])
        total = self.both(first, kernels["second"])
        for step in range(3, self.steps + 1):
            total = self.both(total, kernels["K23"]) + step * first
        return self.grouped([Y1, total])
