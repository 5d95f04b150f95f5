"""What a step moves and computes, and what its device could: the two ceilings of a roofline (Williams et al. 2009)."""

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

from sis_lightning.bench.paired import take_turns, waits_for
from sis_lightning.models.complexity import OperationCounter


@dataclass(frozen=True)
class Ceilings:
    """What a device reached here.

    Attributes:
        bandwidth: Bytes a second, read and written, of copying a tensor much larger than its caches.
        compute: Floating-point operations a second (a multiplication and an addition are two) of multiplying matrices.
    """

    bandwidth: float
    compute: float


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measures both, in about two seconds.

    Args:
        device: `cpu` or `cuda`.
        dtype: Of the matrices.
    """
    on_gpu = device.startswith("cuda")
    source = torch.ones(2**28 if on_gpu else 2**26, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    works: list[Callable[[], object]] = [lambda: target.copy_(source), lambda: left @ right]
    copying, multiplying = take_turns(works, rounds=5, seconds=0.2, warmup=3, wait=waits_for(device))
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(moved / median(copying.wall), 2 * side**3 / median(multiplying.wall))


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of one uncompiled step: of convolutions and matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def eager_traffic(step: Callable[[], object]) -> int:
    """Bytes that the operations of one uncompiled step read and write, were there no caches."""
    with OperationCounter(_bytes) as counter:
        step()
    return int(counter.total)


def _bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    if func.is_view or func.name().startswith(("aten::empty", "aten::new_empty", "aten::detach")):
        return 0
    tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compiled_traffic(first_step: Callable[[], object]) -> int | None:
    """Bytes that what the step compiles reads and writes, as inductor counts them; None where it does not say."""
    try:
        from torch._functorch import config as functorch_config
        from torch._inductor import config, metrics
        from torch._inductor.compile_fx import inductor_metrics_log as log
    except ImportError:
        first_step()
        return None
    level, propagate, before = log.level, log.propagate, metrics.num_bytes_accessed
    # It counts where somebody reads its log, and nothing that it finds in its cache.
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
            first_step()
    finally:
        log.setLevel(level)
        log.propagate = propagate
    return metrics.num_bytes_accessed - before or None
