"""Fingerprints of pictures: an exact one of the pixels, and one of the look that survives scaling and compression.

The exact one finds the same pixels under any name, format or metadata. The one of the look finds a picture that was
saved as JPEG, scaled, or made a little lighter or darker. Neither finds crops, shifts, turned or mirrored copies.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
from PIL import Image

NEAR = 4
"""Bits of 63 in which two looks may differ to be called near: re-compressed, scaled and slightly lighter copies of
satellite tiles differ in at most 4 to 6, tiles of different places in 16 and more (30 real and 150 drawn ones)."""

_SIDE, _KEPT = 32, 8
_BITS = _KEPT * _KEPT - 1
_FLAT = 2.0
"""Grey levels: a picture whose reduced form varies less has no look to compare."""


def pixel_hash(picture: Image.Image) -> bytes:
    """16 bytes of SHA-256 over the size and the RGB values."""
    digest = hashlib.sha256(f"{picture.width} {picture.height} ".encode())
    digest.update(picture.tobytes())
    return digest.digest()[:16]


def look_of(picture: Image.Image) -> int | None:
    """63 bits of the picture's look: the signs of its low cosine frequencies against their median; None if it is flat.

    After reduction to 32 x 32 grey values, the 8 x 8 lowest frequencies of a DCT-II, without the mean.
    """
    small = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float64)  # [32, 32]
    if grey.std() < _FLAT:
        return None
    waves = (_COSINES @ grey @ _COSINES.T).ravel()[1:]  # [63]
    bits = np.packbits(waves > np.median(waves))
    return int.from_bytes(bits.tobytes(), "big")


def _cosines() -> np.ndarray:
    """[8, 32], the lowest waves of a DCT-II."""
    k, n = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * (2 * n + 1) * k / (2 * _SIDE))


_COSINES = _cosines()


class Looks:
    """Looks to be found again within `near` bits, without a comparison with every one.

    The 64 bits are cut into `near` + 1 bands; two looks that differ in at most `near` bits agree in a whole band.

    Args:
        looks: name -> look.
        near: bits that may differ.
    """

    def __init__(self, looks: Mapping[str, int], near: int = NEAR) -> None:
        self.near = near
        edges = [round((_BITS + 1) * band / (near + 1)) for band in range(near + 2)]
        self._bands = [(low, (1 << high - low) - 1) for low, high in pairwise(edges)]
        self._tables: list[dict[int, list[tuple[int, str]]]] = [defaultdict(list) for _ in self._bands]
        for name, look in looks.items():
            for table, (shift, mask) in zip(self._tables, self._bands, strict=True):
                table[look >> shift & mask].append((look, name))

    def near_to(self, look: int) -> Iterator[tuple[int, str]]:
        """(bits that differ, name) of every look near to this one."""
        seen: set[str] = set()
        for table, (shift, mask) in zip(self._tables, self._bands, strict=True):
            for other, name in table.get(look >> shift & mask, ()):
                distance = (look ^ other).bit_count()
                if distance <= self.near and name not in seen:
                    seen.add(name)
                    yield distance, name
