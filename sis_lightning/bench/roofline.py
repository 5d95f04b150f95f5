"""Bytes and operations of a step, and the ceilings of the device: a roofline model (Williams et al. 2009)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sis_lightning.bench.paired import time_alternately, waits_for
from sis_lightning.models.complexity import OperationCounter


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most.

    Attributes:
        bandwidth: Bytes per second, read plus written, in copying a tensor much larger than the caches.
        compute: Floating-point operations per second in matrix products; a multiply-accumulate counts as two.
    """

    bandwidth: float
    compute: float


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measures both ceilings in about two seconds.

    Args:
        device: `cpu` or `cuda`.
        dtype: Data type of the matrices.
    """
    on_gpu = device.startswith("cuda")
    source = torch.ones(2**28 if on_gpu else 2**26, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    works: list[Callable[[], object]] = [lambda: target.copy_(source), lambda: left @ right]
    copying, multiplying = time_alternately(works, rounds=5, seconds=0.2, warmup=3, wait=waits_for(device))
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(moved / median(copying.wall), 2 * side**3 / median(multiplying.wall))


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of one uncompiled step, in convolutions and matrix products as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def eager_traffic(step: Callable[[], object]) -> int:
    """Bytes that the operations of one uncompiled step read and write, without caches."""
    with OperationCounter(_bytes) as counter:
        step()
    return int(counter.total)


def _bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    if func.is_view or func.name().startswith(("aten::empty", "aten::new_empty", "aten::detach")):
        return 0
    tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compiled_traffic(first_step: Callable[[], object]) -> int | None:
    """Bytes that a step reads and writes as inductor counts them while it compiles the step; None if it does not."""
    try:
        from torch._functorch import config as functorch_config
        from torch._inductor import config, metrics
        from torch._inductor.compile_fx import inductor_metrics_log as log
    except ImportError:
        first_step()
        return None
    level, propagate, before = log.level, log.propagate, metrics.num_bytes_accessed
    # Inductor counts only if its log is enabled, and nothing that it finds in its cache.
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
            first_step()
    finally:
        log.setLevel(level)
        log.propagate = propagate
    return metrics.num_bytes_accessed - before or None
