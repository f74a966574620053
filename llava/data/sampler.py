"""The order of training samples: by seed and epoch alone, the same on every rank, machine and resumption."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from llava.errors import ConfigError

FILLER = -1
"""Index of a place that teaches nothing: it fills the last batches up, so that all ranks take as many steps."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which sample, in which epoch: what a worker needs to know, however long it has been alive."""

    index: int
    epoch: int = 0


class EpochSampler(Sampler[Place]):
    """Every sample once an epoch, in an order that depends on `seed` and the epoch alone.

    Each rank walks through the whole order and takes its batches of it (accelerate's `BatchSamplerShard`), so the
    number of ranks does not change the order.

    Args:
        length: samples of the dataset.
        seed: of all epochs' orders.
        shuffle: False: the dataset's own order, every epoch.
        multiple_of: fill the epoch up to a multiple of this many places, with `FILLER`s. Batch size times processes
            makes every sample come exactly once; without, accelerate repeats the first ones to fill the last batches.

    Raises:
        ConfigError: nothing to sample from.
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = True, multiple_of: int = 1) -> None:
        if length < 1 or multiple_of < 1:
            raise ConfigError(
                f"EpochSampler(length={length}, multiple_of={multiple_of}): both must be 1 or more"
            )
        self.length, self.seed, self.shuffle, self.multiple_of = length, seed, shuffle, multiple_of
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self.multiple_of) * self.multiple_of

    def __iter__(self) -> Iterator[Place]:
        epoch = self.epoch  # of this iteration, whatever is set while it lasts
        for index in self._order(epoch):
            yield Place(int(index), epoch)
        for _ in range(len(self) - self.length):
            yield Place(FILLER, epoch)

    def _order(self, epoch: int) -> "range | np.ndarray":
        if not self.shuffle:
            return range(self.length)
        # RandomState: of numpy's generators the one whose streams are promised to stay as they are
        sequence = np.random.SeedSequence([self.seed % 2**64, epoch])
        return np.random.RandomState(np.random.MT19937(sequence)).permutation(self.length)
