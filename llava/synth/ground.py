"""The ground a scene is laid out on: what stands where, on a coarse grid, and where there is room."""

from collections.abc import Sequence

import numpy as np

from llava.synth.dice import Dice
from llava.synth.scene import COLOURS, Presence, Thing
from llava.synth.shapes import CELL, CELLS, TURNS, UNITS, Arc, Blob, Block, Line, Patch, Shape, box, coarse

MIDDLES = (42, 128, 214)
"""Middles of the three columns (or rows) of the 3 x 3 grid, in units."""


class Ground:
    """Things put down so far, and the cells they take.

    Args:
        dice: where choices come from.
        name: class of the bare ground ("grass", "bareland", "desert").
        theme: what kind of place it is.
    """

    def __init__(self, dice: Dice, name: str, theme: str) -> None:
        self.dice, self.name, self.theme = dice, name, theme
        self.taken = np.zeros((CELLS, CELLS), dtype=bool)
        self.things: list[Thing] = []
        self.roads: list[Line | Arc] = []
        self.old_roads: list[Line | Arc] = []
        self.owned: list[Block] = []
        self.in_woods = False
        self.usual_style = {name: dice.below(len(colours)) for name, colours in COLOURS.items()}
        self.turn = dice.weighted([(0, 40), (1, 10), (31, 10), (2, 10), (30, 10), (4, 20)])

    def add(self, name: str, shape: Shape, presence: Presence = "both", style: int | None = None) -> Thing:
        """Put a thing down and take its cells; without a `style` most things of a scene look alike."""
        seed = self.dice.below(1 << 30)
        if style is None:
            style = self.usual_style.get(name, 0)
            if name in ("house", "building", "field") and self.dice.chance(30):
                style = self.dice.below(len(COLOURS[name]))
        thing = Thing(len(self.things), name, presence, shape, style, seed)
        self.things.append(thing)
        self.taken |= coarse(shape, 1)
        if name == "road" and isinstance(shape, Line | Arc):
            self.roads.append(shape)
            if presence == "both":
                self.old_roads.append(shape)
        return thing

    def add_house(
        self, block: Block, presence: Presence = "both", style: int | None = None, gap: int = 0
    ) -> Thing:
        """A house on its plot; with a `gap` in units between its front (+v) and a road, there is a drive."""
        x, y = block.point(0, gap // 2 - 1)
        self._decorate("yard", Block(x, y, block.turn, block.hu + 3, block.hv + 2 + gap // 2), presence)
        if gap:
            x, y = block.point(block.hu // 2, block.hv + gap // 2)
            self._decorate("drive", Block(x, y, block.turn, 3, gap // 2 + 1), presence)
        return self.add("house", block, presence, style)

    def _decorate(self, name: str, block: Block, presence: Presence) -> None:
        """Put down a part of the ground, which takes no room."""
        self.things.append(Thing(len(self.things), name, presence, block, 0, self.dice.below(1 << 30)))

    def own(self, block: Block) -> None:
        """Keep `block` free of everything but an event."""
        self.owned.append(block)
        self.taken |= coarse(block, 2)

    def fits(self, block: Block, margin: int) -> bool:
        """Is the block, `margin` units fatter, free of what was put down?"""
        bounds = box(block, margin)
        assert bounds is not None
        x0, y0 = max(bounds[0] // CELL, 0), max(bounds[1] // CELL, 0)
        x1, y1 = min(bounds[2] // CELL + 1, CELLS), min(bounds[3] // CELL + 1, CELLS)
        if x0 >= x1 or y0 >= y1:
            return False
        taken = self.taken[y0:y1, x0:x1]
        if not taken.any():
            return True
        return not bool((taken & coarse(block, margin)[y0:y1, x0:x1]).any())

    def anywhere(self, hu: int, hv: int, turns: Sequence[int] | None = None) -> Block:
        """A block of that size around a random place, in line with the scene."""
        turn = self.dice.pick(turns) if turns else self.turn + self.dice.pick((0, 8))
        return Block(self.dice.between(8, 248), self.dice.between(8, 248), turn % TURNS, hu, hv)

    def free_block(self, hu: int, hv: int, *, tries: int, inside: bool) -> Block | None:
        """A free place for a block, or None after `tries`; `inside` keeps all of it in the scene."""
        for _ in range(tries):
            block = self.anywhere(hu, hv)
            rx, ry = block.reach()
            if inside and not (rx + 4 < block.cx < UNITS - rx - 4 and ry + 4 < block.cy < UNITS - ry - 4):
                continue
            if self.fits(block, 6):
                return block
        return None

    def site(self, hu: int, hv: int, turn: int, cell: int) -> Block | None:
        """A free place for an event in that cell of the 3 x 3 grid: all of it visible, its middle clearly in a cell.

        What is too long to lie in an outer column goes to the middle one, and the same for rows.
        """
        rx, ry = Block(0, 0, turn, hu, hv).reach()
        centre = []
        for reach, index in ((rx, cell % 3), (ry, cell // 3)):
            middle = MIDDLES[index if reach <= 66 else 1]
            jitter = 14 if reach <= 66 else max(min(118 - reach, 14), 0)
            where = middle + self.dice.between(-jitter, jitter)
            where = min(max(where, reach + 5), UNITS - reach - 5) if reach < 123 else 128
            if 79 < where < 91 or 165 < where < 177:
                return None
            centre.append(where)
        block = Block(centre[0], centre[1], turn % TURNS, hu, hv)
        return block if self.fits(block, 5) else None

    def hard_but(self, patch: int) -> np.ndarray:
        """Cells of all things that do not belong to the event of the trees `patch`: bool [CELLS, CELLS]."""
        cells = np.zeros((CELLS, CELLS), dtype=bool)
        trees = self.things[patch].shape
        assert isinstance(trees, Patch)
        for thing in self.things:
            if thing.name in ("trees", "yard", "drive", "trail"):
                continue
            if isinstance(thing.shape, Block | Blob):
                block = thing.shape.block if isinstance(thing.shape, Blob) else thing.shape
                row, column = (
                    min(max(block.cy // CELL, 0), CELLS - 1),
                    min(max(block.cx // CELL, 0), CELLS - 1),
                )
                if thing.presence != "both" and trees.cells[row, column]:
                    continue
            cells |= coarse(thing.shape)
        return cells

    def relief(self, knots: int) -> np.ndarray:
        """Smooth random hills on the coarse grid, 0 .. 255 around 128: int32 [CELLS, CELLS]."""
        heights = self.dice.bytes(knots * knots).astype(np.int32).reshape(knots, knots)
        at = np.arange(CELLS) * (knots - 1) * 256 // CELLS
        whole, part = at >> 8, (at & 255).astype(np.int32)
        rows = heights[whole] * (256 - part)[:, None] + heights[whole + 1] * part[:, None]
        return (rows[:, whole] * (256 - part) + rows[:, whole + 1] * part) >> 16
