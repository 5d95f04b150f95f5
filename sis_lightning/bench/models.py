"""Throughput and memory of networks, ours and those of other libraries, timed alternately."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sis_lightning.bench.paired import Timing, time_alternately, waits_for
from sis_lightning.bench.report import Benchmark, benchmark
from sis_lightning.bench.roofline import Ceilings, ceilings, compiled_traffic, eager_traffic, flops
from sis_lightning.errors import UsageError, nearest
from sis_lightning.models import Classifier
from sis_lightning.models.deploy import deploy

Mode = Literal["train", "inference"]
_TREATMENTS = ("deploy", "compile", "graphs", "nchw")


@dataclass(frozen=True)
class Contender:
    """A network and how it is run: `sis50:interactive2+deploy+compile`, `timm:res2net50_26w_4s`.

    Attributes:
        text: The short form that was typed.
        source: `ours`, `torchvision` or `timm`.
        name: Name of a backbone in `configs/backbones/`, or the library's name of a network.
        operator: Operator that replaces the one of our backbone, or None.
        treatments: Any of `deploy` (batch norms fused; by torch.fx in other libraries' networks), `compile`, `graphs`
            (compiled, with CUDA graphs) and `nchw` (contiguous memory format instead of channels_last).
    """

    text: str
    source: str
    name: str
    operator: str | None
    treatments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Parses the short form.

        Raises:
            UsageError: If a treatment is unknown.
        """
        head, *treatments = text.split("+")
        for treatment in treatments:
            if treatment not in _TREATMENTS:
                raise UsageError(f"{text}: no treatment '{treatment}': {nearest(treatment, _TREATMENTS)}")
        prefix, colon, rest = head.partition(":")
        if colon and prefix in ("torchvision", "timm"):
            return cls(text, prefix, rest, None, tuple(treatments))
        return cls(text, "ours", prefix, rest or None, tuple(treatments))

    def build(self, mode: Mode, classes: int = 1000) -> nn.Module:
        """Builds the classifier, which maps (N, 3, H, W) to (N, classes), with new weights.

        Raises:
            UsageError: If the library has no such network, or a treatment does not suit the mode.
        """
        if self.source == "ours":
            model: nn.Module = Classifier(self.name, classes, operator=self.operator)
        else:
            model = _peer(self.source, self.name, classes)
        model.train(mode == "train")
        if "deploy" in self.treatments:
            if mode == "train":
                raise UsageError(f"{self.text}: a deployed model cannot be trained, only run in mode inference")
            if self.source == "ours":
                model = deploy(model, inplace=True)
            else:
                from torch.fx.experimental.optimization import fuse

                model = fuse(model)
        return model

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is used."""
        return bool({"compile", "graphs"} & {*self.treatments})

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of the network and the images."""
        return torch.contiguous_format if "nchw" in self.treatments else torch.channels_last


def _peer(source: str, name: str, classes: int) -> nn.Module:
    try:
        if source == "torchvision":
            from torchvision.models import get_model

            model: nn.Module = get_model(name, weights=None, num_classes=classes)
        else:
            import timm

            model = timm.create_model(name, pretrained=False, num_classes=classes)
    except ImportError:
        raise UsageError(f'{source} is not installed: pip install "sis-lightning[bench]"') from None
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{source}:{name}: {error}") from None
    return model


@dataclass(frozen=True)
class Settings:
    """What all networks of a comparison share.

    Attributes:
        mode: `train` for a training step (forward, cross-entropy, backward, SGD), `inference` for a forward pass.
        batch: Number of images per step.
        size: Side of the images in px.
        precision: `32`, or `bf16` for autocast.
        device: `cpu` or `cuda`.
    """

    mode: Mode = "train"
    batch: int = 8
    size: int = 224
    precision: Literal["32", "bf16"] = "32"
    device: str = "cpu"


def work(contender: Contender, settings: Settings) -> Callable[[], object]:
    """Builds a network, and returns a function that runs one step of it."""
    torch.manual_seed(0)
    device = torch.device(settings.device)
    model = contender.build(settings.mode).to(device).to(memory_format=contender.layout)
    network: Callable[..., Tensor] = model
    if contender.compiled:
        network = torch.compile(model, mode="reduce-overhead" if "graphs" in contender.treatments else None)
    images = torch.randn(settings.batch, 3, settings.size, settings.size, device=device)
    images = images.contiguous(memory_format=contender.layout)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    if settings.mode == "inference":

        def infer() -> Tensor:
            with torch.inference_mode(), autocast:
                return network(images)

        return infer
    labels = torch.randint(1000, (settings.batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = nn.functional.cross_entropy(network(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()

    return train


def time_models(
    names: Sequence[str], settings: Settings, *, rounds: int = 11, seconds: float = 1.0, only_speed: bool = False
) -> Benchmark:
    """Compares the first network with each of the others.

    Args:
        names: Networks in their short form.
        settings: Settings that all share.
        rounds: Number of rounds.
        seconds: Duration of each network in a round.
        only_speed: Whether memory and traffic are left out. To count them, each compiled network is compiled twice
            more.

    Raises:
        UsageError: If a network cannot be built.
    """
    contenders = [Contender.parse(name) for name in names]
    wait = waits_for(settings.device)
    works = [work(contender, settings) for contender in contenders]
    traffic = [
        None if only_speed else compiled_traffic(step) if contender.compiled else eager_traffic(step)
        for contender, step in zip(contenders, works, strict=True)
    ]
    on_gpu = settings.device.startswith("cuda")
    # The warm-up lets compilers compile, and the heap grow to what all networks need.
    timings = time_alternately(works, rounds=rounds, seconds=seconds, warmup=8, wait=wait)
    del works
    limits = ceilings(settings.device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    rows: list[dict[str, str | float]] = []
    claims = []
    for contender, timing, moved in zip(contenders, timings, traffic, strict=True):
        peak = None if only_speed else peak_memory(contender, settings)
        row = _row(contender, timing, settings, moved, peak, limits)
        rows.append(row)
        if timing is timings[0]:
            continue
        ratio = timings[0].faster_than(timing)
        row["first / this"] = str(ratio)
        row["CPU time, first / this"] = median(timings[0].cpu) / median(timing.cpu)
        peaks = [entry["peak MB"] for entry in (rows[0], row)]
        row["peak memory, first / this"] = float(peaks[0]) / float(peaks[1]) if "unknown" not in peaks else "unknown"
        claims.append(f"{contenders[0].text} is {_said(ratio.verdict)} {contender.text} ({ratio}).")
    what = {"train": "training steps", "inference": "inference"}[settings.mode]
    command = f"sis-lightning bench {' '.join(names)} " + " ".join(
        f"--{key} {value}" for key, value in {**asdict(settings), "rounds": rounds, "seconds": seconds}.items()
    )
    command += " --only-speed" if only_speed else ""
    where = f" on {torch.cuda.get_device_name()}" if on_gpu else f", {torch.get_num_threads()} threads"
    slug = "-vs-".join(text.replace(":", "_") for text in names)
    return benchmark(
        name=f"models-{settings.device.partition(':')[0]}-{settings.mode}-{settings.precision}-{slug}",
        title=f"{what.capitalize()}, {settings.batch} images of {settings.size} px, {settings.precision}{where}",
        command=command,
        rows=rows,
        note="Ratios of images per second, paired by round: median (95 % interval). "
        + " ".join(claims)
        + f" In brackets: share of what the device reaches at most, {limits.bandwidth / 1e9:.4g} GB/s in copying and "
        f"{limits.compute / 1e9:.4g} GFLOP/s in matrix products. MB: bytes that the operations read and write, without "
        "caches; of compiled networks as counted by inductor, without loss and optimizer.",
        packages=("torch", *sorted({c.source for c in contenders} - {"ours"})),
    )


def _said(verdict: str) -> str:
    return {"faster": "faster than", "slower": "slower than"}.get(verdict, "not shown to be faster or slower than")


def _row(
    contender: Contender, timing: Timing, settings: Settings, moved: int | None, peak: float | None, limits: Ceilings
) -> dict[str, str | float]:
    seconds = median(timing.wall)
    # Counted on the network without treatments, whose operations torch knows; batch norm needs two images.
    few = replace(settings, batch=2)
    computed = flops(work(replace(contender, treatments=()), few)) / few.batch * settings.batch / seconds
    bandwidth = moved / seconds if moved is not None else 0.0
    return {
        "network": contender.text,
        "images/s": settings.batch / seconds,
        "CPU ms an image": 1000 * median(timing.cpu) / settings.batch,
        "GFLOP/s": f"{computed / 1e9:.4g} ({computed / limits.compute:.0%})",
        "MB an image": moved / settings.batch / 1e6 if moved is not None else "unknown",
        "GB/s": f"{bandwidth / 1e9:.4g} ({bandwidth / limits.bandwidth:.0%})" if moved is not None else "unknown",
        "peak MB": peak / 1e6 if peak is not None else "unknown",
        "first / this": "",
        "CPU time, first / this": "",
        "peak memory, first / this": "",
    }


def peak_memory(contender: Contender, settings: Settings) -> float | None:
    """Peak memory in bytes of some steps, including weights: on the GPU, or of a new process on Linux; else None."""
    if settings.device.startswith("cuda"):
        gc.collect()  # compiled networks contain reference cycles
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = work(contender, settings)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of_process, contender, settings).result()


def _peak_of_process(contender: Contender, settings: Settings) -> float | None:
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # sets the peak to the current resident size
        before = _kilobytes(status, "VmHWM")
        step = work(contender, settings)
        for _ in range(2):
            step()
        return 1024.0 * (_kilobytes(status, "VmHWM") - before)
    except OSError:  # not Linux
        return None


def _kilobytes(status: Path, key: str) -> int:
    fields: dict[str, Any] = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(fields[key].split()[0])
