"""Samplers: the samples of each device and their order depend on seed and epoch only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


def sample_seed(*parts: int) -> int:
    """Mixes numbers such as seed, epoch and index into one seed.

    Args:
        parts: The numbers.

    Returns:
        A seed of 63 bits.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) for one device; each epoch has its own permutation, drawn from seed and epoch.

    All devices get the same number of samples (the last few of the permutation are left out), so that none waits for
    another. The Trainer calls `set_epoch`.

    Args:
        length: Number of samples.
        seed: Seed of the run.
        rank: Number of this device, from 0.
        world_size: Number of devices.
        groups: A number for each sample: all batches but the last one or two then hold samples of one number only. None
            for no groups.
        batch_size: Number of samples in a batch, over all devices.
        start: The epoch to begin with, and how many of its samples (over all devices) have been used already.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[int] | None = None,
        batch_size: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.groups, self.batch_size = groups, batch_size
        # The epoch is set from the beginning: Lightning draws from a loader before it calls set_epoch.
        self.start, self.epoch = start, start[0]

    def set_epoch(self, epoch: int) -> None:
        """Selects the permutation of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        if self.groups is not None:
            order = self._by_group(order, generator)
        done = self.start[1] if self.epoch == self.start[0] else 0
        for index in order.tolist()[done + self.rank : len(self) * self.world_size : self.world_size]:
            yield self.epoch, index

    def _by_group(self, order: Tensor, generator: torch.Generator) -> Tensor:
        group_of = torch.as_tensor(self.groups)[order]
        whole: list[Tensor] = []
        rest: list[Tensor] = []
        for group in sorted(set(group_of.tolist())):
            members = order[group_of == group]
            cut = len(members) - len(members) % self.batch_size
            whole += members[:cut].view(-1, self.batch_size)
            rest.append(members[cut:])
        batches = torch.randperm(len(whole), generator=generator).tolist()
        return torch.cat([*(whole[batch] for batch in batches), *rest])


class BatchesBySize(Sampler[list[tuple[int, int]]]):
    """Yields batches of (0, index) for one device, of images in the order of their sizes, so that most can be stacked.

    Args:
        sizes: Height and width in px of each image.
        batch_size: Maximum number of images in a batch.
        max_pixels: Maximum number of pixels in a batch of more than one image.
        rank: Number of this device, from 0.
        world_size: Number of devices; each gets at least one batch if there are as many images.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], batch_size: int, max_pixels: int, rank: int = 0, world_size: int = 1
    ) -> None:
        batches: list[list[tuple[int, int]]] = []
        pixels = 0
        # The largest first: if memory does not suffice, that is known at once.
        for index in sorted(range(len(sizes)), key=lambda index: (sizes[index], -index), reverse=True):
            area = sizes[index][0] * sizes[index][1]
            if not batches or len(batches[-1]) == batch_size or pixels + area > max_pixels:
                batches.append([])
                pixels = 0
            batches[-1].append((0, index))
            pixels += area
        if len(batches) < world_size:
            batches = [[key] for batch in batches for key in batch]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class ShardSampler(Sampler[tuple[int, int]]):
    """Yields (0, index) for one device, in order; over all devices each sample comes exactly once.

    Args:
        length: Number of samples.
        rank: Number of this device, from 0.
        world_size: Number of devices.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)
