"""Shapes on the ground, and which points they cover, in whole numbers.

Lengths are in units of 1/256 of the scene's side, whatever its size in pixels, so one scene has one plan. Points are
given in `FINE` steps per unit; angles as `turn`, 1/32 of a circle.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

UNITS = 256
FINE = 16
TURNS = 32
ONE = 1024
_QUARTER = (0, 200, 392, 569, 724, 851, 946, 1004, 1024)  # 1024 * sin(k * 90 / 8 degrees)

CELLS = 64
"""The coarse grid on which things are placed has CELLS x CELLS cells of `CELL` units."""
CELL = UNITS // CELLS
COARSE = (np.arange(CELLS, dtype=np.int32) * CELL + CELL // 2) * FINE
"""Fine coordinates of the coarse cells' centres."""


def direction(turn: int) -> tuple[int, int]:
    """(cosine, sine) * 1024 of `turn`."""
    quadrant, k = divmod(turn % TURNS, 8)
    low, high = _QUARTER[k], _QUARTER[8 - k]
    return ((high, low), (-low, high), (-high, -low), (low, -high))[quadrant]


@dataclass(frozen=True, slots=True)
class Block:
    """A turned rectangle: centre, half length along `turn`, half width across it, in units."""

    cx: int
    cy: int
    turn: int
    hu: int
    hv: int

    def point(self, u: int, v: int) -> tuple[int, int]:
        """The scene's (x, y) of the point (u, v) of the block's own axes."""
        c, s = direction(self.turn)
        return self.cx + ((u * c - v * s) >> 10), self.cy + ((u * s + v * c) >> 10)

    def reach(self) -> tuple[int, int]:
        """Half width and half height of the upright box around it."""
        c, s = direction(self.turn)
        return ((abs(c) * self.hu + abs(s) * self.hv) >> 10) + 1, (
            (abs(s) * self.hu + abs(c) * self.hv) >> 10
        ) + 1


@dataclass(frozen=True, slots=True)
class Blob:
    """A rounded outline inside a block, `lean` and `bend` (-24 .. 24) pull it out of the ellipse."""

    block: Block
    lean: int
    bend: int


@dataclass(frozen=True, slots=True)
class Line:
    """An endless straight strip through (cx, cy); `half` is its half width in fine steps."""

    cx: int
    cy: int
    turn: int
    half: int


@dataclass(frozen=True, slots=True)
class Arc:
    """A ring around (cx, cy), which usually lies outside the scene; `half` in fine steps."""

    cx: int
    cy: int
    radius: int
    half: int


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """Cells of the coarse grid: bool [CELLS, CELLS]."""

    cells: np.ndarray


Shape: TypeAlias = Block | Blob | Line | Arc | Patch


def local(x: np.ndarray, y: np.ndarray, cx: int, cy: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across `turn` from (cx, cy): two int32 [H, W] in fine steps, from x [W] and y [H]."""
    c, s = direction(turn)
    dx, dy = x - cx * FINE, y - cy * FINE
    return ((dx * c)[None] + (dy * s)[:, None]) >> 10, ((dy * c)[:, None] - (dx * s)[None]) >> 10


def box(shape: Shape, grow: int = 0) -> tuple[int, int, int, int] | None:
    """Upright bounds (x0, y0, x1, y1) in units, or None for a shape that may be anywhere."""
    block = shape.block if isinstance(shape, Blob) else shape
    if not isinstance(block, Block):
        return None
    rx, ry = block.reach()
    if isinstance(shape, Blob):
        rx, ry = rx * 5 // 4, ry * 5 // 4
    return block.cx - rx - grow, block.cy - ry - grow, block.cx + rx + grow, block.cy + ry + grow


def cover(shape: Shape, x: np.ndarray, y: np.ndarray, grow: int = 0) -> np.ndarray:
    """Which of the points x [W], y [H] (fine, int32) the shape covers, `grow` units fatter: bool [H, W]."""
    more = grow * FINE
    if isinstance(shape, Block):
        u, v = local(x, y, shape.cx, shape.cy, shape.turn)
        return (np.abs(u) <= shape.hu * FINE + more) & (np.abs(v) <= shape.hv * FINE + more)
    if isinstance(shape, Blob):
        b = shape.block
        u, v = local(x, y, b.cx, b.cy, b.turn)
        u, v = u * 16 // (b.hu + grow), v * 16 // (b.hv + grow)  # the outline is at radius 256
        np.clip(u, -330, 330, out=u)
        np.clip(v, -330, 330, out=v)
        uv = u * v
        return u * u + v * v + ((uv * (u * shape.lean + v * shape.bend)) >> 13) <= 65536
    if isinstance(shape, Line):
        _, v = local(x, y, shape.cx, shape.cy, shape.turn)
        return np.abs(v) <= shape.half + more
    if isinstance(shape, Arc):
        return np.abs(ring(shape, x, y)) <= shape.half + more
    raise TypeError("a patch has no outline of its own: read its cells")


def ring(arc: Arc, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the middle of the arc, fine steps, int32 [H, W].

    (d^2 - r^2) / 2r is that distance to first order, exact enough over a road's width, and needs no square root.
    """
    dx, dy = x - arc.cx * FINE, y - arc.cy * FINE
    radius = arc.radius * FINE
    return ((dx * dx)[None] + (dy * dy)[:, None] - radius * radius) // (2 * radius)


def coarse(shape: Shape, grow: int = 0) -> np.ndarray:
    """The shape on the coarse grid: bool [CELLS, CELLS]."""
    if isinstance(shape, Patch):
        return shape.cells
    found = np.zeros((CELLS, CELLS), dtype=bool)
    bounds = box(shape, grow)
    if bounds is None:
        return cover(shape, COARSE, COARSE, grow)
    x0, y0, x1, y1 = (min(max(edge // CELL + (k > 1), 0), CELLS) for k, edge in enumerate(bounds))
    if x0 < x1 and y0 < y1:
        found[y0:y1, x0:x1] = cover(shape, COARSE[x0:x1], COARSE[y0:y1], grow)
    return found


def dilate(cells: np.ndarray, steps: int) -> np.ndarray:
    """`cells` bool [CELLS, CELLS] grown by `steps` cells in the four directions, and squarely over two of them."""
    grown = cells.copy()
    for step in range(1, steps + 1):
        grown[step:] |= cells[:-step]
        grown[:-step] |= cells[step:]
    wide = grown.copy()
    for step in range(1, steps + 1):
        wide[:, step:] |= grown[:, :-step]
        wide[:, :-step] |= grown[:, step:]
    return wide
