"""Random choices that never drift: whole numbers taken straight from the raw words of PCG64.

NumPy promises the streams of `SeedSequence` and of a bit generator's raw words; it promises none for the methods of
`Generator`. Everything here is therefore built on raw words, and on integer arithmetic.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """A stream of choices that depends on `key` alone.

    Args:
        key: whole numbers >= 0; any difference gives an unrelated stream.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(list(key)))
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """One of 0 .. n - 1."""
        if not self._words:
            self._words = self._bits.random_raw(128).tolist()
        return (self._words.pop() * n) >> 64

    def between(self, low: int, high: int) -> int:
        """One of low .. high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 throws."""
        return self.below(100) < percent

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`, all alike."""
        return items[self.below(len(items))]

    def weighted(self, items: Sequence[tuple[T, int]]) -> T:
        """One of `(item, weight)`; weights are whole numbers."""
        left = self.below(sum(weight for _, weight in items))
        for item, weight in items:
            left -= weight
            if left < 0:
                return item
        raise AssertionError("weights must be positive")

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in another order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]

    def bytes(self, count: int) -> np.ndarray:
        """`count` bytes as uint8 [count], the same on machines of either byte order."""
        words = np.asarray(self._bits.random_raw((count + 7) // 8), dtype="<u8")
        return words.view(np.uint8)[:count]
