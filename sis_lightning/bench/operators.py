"""Times the fast forms of operators against the paper's equations, and operators against a plain convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sis_lightning.bench.paired import time_alternately, waits_for
from sis_lightning.bench.report import Benchmark, benchmark
from sis_lightning.operators import create_operator, list_operators

#: Channels and side of the feature map: of the 3×3 convolutions in the stages of Res2Net-50 at 224 px (without stage
#: 1, whose 26 channels 4 does not divide), of stage 4 at output stride 8, and of stage 3 of ResNet-50, a quarter of
#: whose channels (64) fills vector registers.
SHAPES = ((52, 28), (104, 14), (208, 7), (208, 28), (256, 14))


def time_operators(
    names: Sequence[str] = (), *, batch: int = 16, device: str = "cpu", rounds: int = 9, seconds: float = 0.2
) -> Benchmark:
    """Times forward, and forward with backward, of both forms of each operator and of a plain convolution.

    Args:
        names: Names of operators; all but `conv` by default.
        batch: Number of images.
        device: `cpu` or `cuda`.
        rounds: Number of rounds.
        seconds: Duration of each form in a round.

    Raises:
        UsageError: If torch has no such device.
    """
    names = names or [name for name in list_operators() if name != "conv"]
    wait = waits_for(device)
    rows: list[dict[str, str | float]] = []
    for channels, side in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(batch, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
        for name in names:
            operator, conv = (
                create_operator(kind, channels, channels).to(device).to(memory_format=torch.channels_last)
                for kind in (name, "conv")
            )
            row: dict[str, str | float] = {"operator": name, "channels": channels, "map": f"{side}×{side}"}
            for label, how in {"forward": _forward, "with backward": _backward}.items():
                works = [how(operator.fast, x), how(operator.literal, x), how(conv.fast, x)]
                fast, literal, plain = time_alternately(works, rounds=rounds, seconds=seconds, wait=wait)
                # Ratios of times, not of speeds: below 1 is a gain.
                row[f"fast / literal, {label}"] = str(literal.faster_than(fast))
                row[f"fast / conv, {label}"] = str(plain.faster_than(fast))
            rows.append(row)
    place = device.partition(":")[0]
    return benchmark(
        name=f"operators-{place}",
        title=f"Operators, {batch} images, float32, channels_last, on {place}",
        command=f"sis-lightning bench --operators --batch {batch} --device {device} --rounds {rounds} "
        f"--seconds {seconds}",
        rows=rows,
        note="Ratios of times, paired by round: median (95 % interval); one that contains 1 shows no difference.",
        packages=("torch",),
    )


def _forward(form: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def work() -> Tensor:
        with torch.inference_mode():
            return form(x)

    return work


def _backward(form: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    gradient = torch.ones_like(form(x))

    def work() -> None:
        # Gradients of kernels accumulate, as resetting them would cost the same in every form.
        torch.autograd.backward(form(leaf), gradient)

    return work
