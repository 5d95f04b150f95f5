"""The operators' fast forms against the paper's equations, and the operators against the convolution they replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sis_lightning.bench.paired import take_turns, waits_for
from sis_lightning.bench.report import Benchmark, benchmark
from sis_lightning.operators import create_operator, list_operators

#: (channels, side of the map) of the 3×3 of Res2Net-50's stages at 224 px (stage 1 has 26, not divisible by 4), of
#: stage 4 at output stride 8, and of ResNet-50's stage 3, whose quarter, 64 channels, fills vector registers.
SHAPES = ((52, 28), (104, 14), (208, 7), (208, 28), (256, 14))


def time_operators(
    names: Sequence[str] = (), *, batch: int = 16, device: str = "cpu", rounds: int = 9, seconds: float = 0.2
) -> Benchmark:
    """Times forward, and forward with backward, of every operator's two forms and of a plain convolution, in turns.

    Args:
        names: Of operators; all but `conv` by default.
        batch: Images.
        device: `cpu` or `cuda`.
        rounds: Turns of each.
        seconds: Of a turn.

    Raises:
        UsageError: Where torch has no such device.
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
                fast, literal, plain = take_turns(works, rounds=rounds, seconds=seconds, wait=wait)
                # Of the time, not of the speed: below 1 is a gain.
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
        note="Ratios of the time, paired: median (its 95 % interval); one that covers 1 shows no difference.",
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
        # Kernels' gradients accumulate: what forgetting them would cost is no form's own.
        torch.autograd.backward(form(leaf), gradient)

    return work
