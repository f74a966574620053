"""Everything that depends on the size of the image alone: coordinates, tileable textures, a closed canopy of trees."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llava.synth.dice import Dice
from llava.synth.shapes import CELL, CELLS, FINE, UNITS

SHIFT = 3
"""Largest displacement between the dates, in units."""
PAD = 5
"""Coarse cells around the scene that crowns reaching into it may stand on."""
_SMOOTH = [(k * k * (768 - 2 * k)) >> 16 for k in range(257)]  # 0 .. 256, an ease-in-out curve


@dataclass(frozen=True, slots=True, eq=False)
class Canopy:
    """Tree crowns side by side, twice in each direction so that any window of one period can be cut out.

    Attributes:
        code: shade of the crown's pixel, 0 between crowns: uint8 [2 P, 2 P].
        warm: which of the two leaf colours: bool [2 P, 2 P].
        row: pixel row of the crown's middle: int16 [2 P, 2 P].
        column: pixel column of the crown's middle.
    """

    code: np.ndarray
    warm: np.ndarray
    row: np.ndarray
    column: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """A scene's pixels with a margin for the displacement: N = size + 2 * margin on a side."""

    size: int
    margin: int
    side: int
    at: np.ndarray
    """Fine coordinate of each pixel's centre, along either axis: int32 [N]."""
    cell: np.ndarray
    """Padded coarse cell of each pixel, with a further period's worth on both ends: int32."""
    textures: tuple[np.ndarray, ...]
    """Tileable hills 0 .. 255, from broad to fine: int16 [T, T] with T >= 2 N."""
    grain: np.ndarray
    """Fine-grained structure of the ground, around 0: int16 [T, T, 1]."""
    canopies: dict[tuple[int, int], Canopy]
    """By the direction of the sun."""

    def pixels(self, units: int) -> int:
        """A length in units as whole pixels, rounded."""
        return (units * self.size + UNITS // 2) // UNITS


@lru_cache(maxsize=4)
def canvas(size: int) -> Canvas:
    """The canvas for images of `size` pixels; made once per process."""
    margin = -(-SHIFT * size // UNITS) + 1  # one more pixel for the blur
    side = size + 2 * margin
    pixel = np.arange(-margin, size + margin, dtype=np.int64)
    at = ((2 * pixel + 1) * UNITS * FINE // (2 * size)).astype(np.int32)
    reach = np.arange(-2 * size, 3 * size, dtype=np.int64)
    cell = np.clip((2 * reach + 1) * UNITS // (2 * size) // CELL + PAD, 0, CELLS + 2 * PAD - 1).astype(
        np.int32
    )
    tile = 2 * side
    textures = tuple(
        _hills(Dice(7, k), tile, max(size * knot // UNITS, 1)) for k, knot in enumerate((61, 23, 7))
    )
    rough = (_hills(Dice(7, 8), tile, max(size * 4 // UNITS, 1)) - 128) // 14
    rough += (_hills(Dice(7, 9), tile, max(size * 2 // UNITS, 1)) - 128) // 11
    canopies = {(sx, sy): _canopy(size, sx, sy) for sx in (-1, 1) for sy in (-1, 1)}
    return Canvas(size, margin, side, at, cell, textures, rough[:, :, None].astype(np.int16), canopies)


def _hills(dice: Dice, side: int, step: int) -> np.ndarray:
    """Value noise with a knot every `step` pixels: int16 [side, side], 0 .. 255."""
    knots = side // step + 2
    heights = dice.bytes(knots * knots).astype(np.int32).reshape(knots, knots)
    at = np.arange(side, dtype=np.int64)
    whole = at // step
    part: np.ndarray = np.array(_SMOOTH, dtype=np.int32)[(at % step) * 256 // step]
    rows: np.ndarray = heights[whole] * (256 - part)[:, None] + heights[whole + 1] * part[:, None]
    hills = (rows[:, whole] * (256 - part) + rows[:, whole + 1] * part) >> 16
    return hills.astype(np.int16)


def _canopy(size: int, sx: int, sy: int) -> Canopy:
    """Crowns on a jittered lattice, later ones over earlier ones, lit from (-sx, -sy)."""
    dice = Dice(11)
    shade = np.zeros((size, size), dtype=np.uint8)
    warm = np.zeros((size, size), dtype=bool)
    row = np.zeros((size, size), dtype=np.int32)
    column = np.zeros((size, size), dtype=np.int32)
    pitch = 10
    spots = [(x, y) for y in range(0, UNITS - 5, pitch) for x in range(0, UNITS - 5, pitch)]
    for x0, y0 in dice.shuffled(spots):
        x, y = (x0 + dice.below(pitch)) * FINE, (y0 + dice.below(pitch)) * FINE
        radius = dice.between(5 * FINE, 8 * FINE)
        tone, is_warm, dent = dice.between(96, 146), dice.chance(35), dice.between(0, 3)
        cx, cy = x * size // (UNITS * FINE), y * size // (UNITS * FINE)
        reach = radius * size // (UNITS * FINE) + 1
        near = np.arange(-reach, reach + 1)
        fine = near * UNITS * FINE // size
        dx, dy = fine[None], fine[:, None]
        square = dx * dx + dy * dy + (dx * dy * (dent - 1) >> 2)
        inside = square <= radius * radius
        inside[reach, reach] = True  # at tiny sizes a crown is at least one pixel
        light = tone - (dx * sx + dy * sy) * 44 // radius - square * 26 // (radius * radius)
        ys, xs = np.nonzero(inside)
        to = ((cy + near[ys]) % size, (cx + near[xs]) % size)
        shade[to] = np.clip(light, 30, 220)[ys, xs]
        warm[to] = is_warm
        row[to] = -near[ys]
        column[to] = -near[xs]
    at = np.arange(2 * size, dtype=np.int32)
    twice = (2, 2)
    return Canopy(
        np.tile(shade, twice),
        np.tile(warm, twice),
        (np.tile(row, twice) + at[:, None]).astype(np.int16),
        (np.tile(column, twice) + at[None]).astype(np.int16),
    )
