"""Batches for every process: none dropped, none of one row, no row counted twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch.utils.data import DataLoader, DistributedSampler, Sampler

from .data import Clips, Row


class EpochBatches(Sampler[list[Row]]):
    """This process's batches of an epoch, shuffled.

    No row is dropped. Instead of a small last batch, the batches of an epoch have equal sizes, give
    or take one row. `DistributedSampler` repeats rows so that every process gets as many; the
    repeats are marked as not counting.

    Args:
        length: number of rows.
        batch_size: the most rows in a batch, of all processes together.
        rank: of this process.
        world: number of processes.
        seed: of the shuffling.

    Attributes:
        epoch: to be set before each epoch.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world: int, seed: int) -> None:
        self._shares = DistributedSampler(range(length), world, rank, seed=seed)
        self._length, self._rank, self._world = length, rank, world
        self._batches = -(-length // batch_size)
        self.epoch = 0

    def _bounds(self) -> list[tuple[int, int]]:
        ends = [len(self._shares) * k // self._batches for k in range(self._batches + 1)]
        return list(itertools.pairwise(ends))

    def counting(self) -> list[int]:
        """For each batch, how many rows of all processes together count."""
        return [
            min(end * self._world, self._length) - min(start * self._world, self._length)
            for start, end in self._bounds()
        ]

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[Row]]:
        self._shares.set_epoch(self.epoch)
        rows = [
            Row(self.epoch, index, counts=self._rank + self._world * k < self._length)
            for k, index in enumerate(self._shares)
        ]
        for start, end in self._bounds():
            yield rows[start:end]


def training_loader(clips: Clips, batches: EpochBatches, workers: int, pin: bool) -> DataLoader:
    """Loads what `batches` says."""
    return DataLoader(
        clips,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
    )


def evaluation_loader(
    clips: Clips, batch_size: int, rank: int, world: int, workers: int, pin: bool
) -> DataLoader:
    """Loads every `world`-th row, beginning with `rank`: all processes together see each once."""
    return DataLoader(
        clips,
        batch_size=max(1, batch_size // world),
        sampler=range(rank, len(clips), world),
        num_workers=workers,
        pin_memory=pin,
    )
