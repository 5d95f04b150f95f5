"""Values that a device computes now and the host reads later, so that the host does not wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateValue:
    """A tensor on its way to the host.

    Reading a GPU's tensor at once waits for everything that the GPU has been given. Read a step later, it has arrived.

    Args:
        value: The tensor.
        work: The collective operation that computes it, as `torch.distributed` returns it with `async_op=True`.
    """

    def __init__(self, value: Tensor, work: Any = None) -> None:
        self._work, self._arrival = work, None
        if value.is_cuda:
            if work is not None:
                work.wait()  # here the GPU's stream waits, not the host
            self._value = value.to("cpu", non_blocking=True)  # into page-locked memory
            self._arrival = torch.cuda.current_stream(value.device).record_event()
        else:
            self._value = value

    def read(self) -> Tensor:
        """The tensor on the host (or on a device without streams), after waiting for it alone."""
        if self._arrival is not None:
            self._arrival.synchronize()
        elif self._work is not None:
            self._work.wait()
        return self._value
