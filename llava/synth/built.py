"""A world in which nothing changes but roads and buildings, which appear; plants and water come and go beside them.

What counts as change is what LEVIR-MCI marks, so that a mask gives the answers to all tasks. Things of one class that
appear are kept apart: each is one object of the mask.
"""

from dataclasses import dataclass, replace
from typing import Literal

from llava.synth.dice import Dice
from llava.synth.events import Spot, arc, beside, old_roads, wood
from llava.synth.ground import MIDDLES, Ground
from llava.synth.scene import COLOURS, PLACES, Change, Presence, Thing, cells_of
from llava.synth.shapes import TURNS, UNITS, Arc, Blob, Block, Line, coarse

VERSION = 2
"""Goes up when a pair of the same number changes in this world alone."""

GAP = 9
"""Units that lie between two things of one class at least: 3 pixels at 85 pixels a side, 9 at 256."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What appears in a pair: so many roads and buildings, drawn between two numbers."""

    roads: tuple[int, int]
    buildings: tuple[int, int]
    small: bool = False
    """One building that covers less than 5 % of any cell."""


RECIPES = (
    Recipe((0, 0), (1, 1), small=True),
    Recipe((1, 1), (0, 0)),
    Recipe((1, 1), (0, 0)),
    Recipe((2, 3), (0, 0)),
    Recipe((0, 0), (1, 1)),
    Recipe((0, 0), (1, 1)),
    Recipe((0, 0), (2, 3)),
    Recipe((0, 0), (4, 6)),
    Recipe((0, 0), (7, 12)),
    Recipe((1, 1), (1, 1)),
    Recipe((1, 1), (2, 4)),
    Recipe((2, 3), (1, 3)),
)
"""Each comes once in as many changed pairs, in an order of its own."""

CELLS = tuple(range(9))

_GRIDS = {
    1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 5: (3, 2), 6: (3, 2), 7: (4, 2), 8: (4, 2), 9: (3, 3), 10: (4, 3),
    11: (4, 3), 12: (4, 3),
}  # fmt: skip
"""Columns and rows that so many houses stand in; the last places stay free."""

_PASSING = ("trees", "field", "water")
"""What may come and go without being a change."""
_REACH = 20
"""Units that a wood keeps from roads if it comes or goes: its crowns reach 13 beyond its block."""


def plan_built(site: Ground, road_percent: int, recipe: Recipe, cell: int) -> list[Change]:
    """Put down roads and buildings that appear, the old roads, and what comes and goes without being a change.

    Args:
        site: the ground.
        road_percent: in how many of 100 scenes an old road runs through.
        recipe: what appears; where there is no room for all of it, less does.
        cell: of the 3 x 3 grid, in which the first thing is put if there is room.
    """
    dice = site.dice
    changes = _roads(site, road_percent, dice.between(*recipe.roads), cell)
    count = dice.between(*recipe.buildings)
    for part in _parts(dice, count):
        here = cell if not changes else dice.below(9)
        made = _buildings(site, part, here, small=recipe.small)
        while made is None and part > 1:  # fewer fit where many do not
            part = (part + 1) // 2
            made = _buildings(site, part, here)
        if made is not None:
            changes.append(made)
    if not changes:
        lone = _buildings(site, 1, cell, small=recipe.small, tries=400)
        if lone is None:
            raise AssertionError("an empty scene has room for a house")
        changes.append(lone)
    for _ in range(dice.weighted([(0, 40), (1, 40), (2, 20)])):
        _passing(site)
    return changes


def settle(things: list[Thing], side: Literal["before", "after"]) -> list[Thing]:
    """The things of a pair without change: of roads and buildings those of one side, at both dates."""
    return [
        thing if thing.name in _PASSING else replace(thing, presence="both")
        for thing in things
        if thing.name in _PASSING or thing.at(side)
    ]


def _parts(dice: Dice, count: int) -> tuple[int, ...]:
    """Groups that so many buildings stand in."""
    if count < 2 or not dice.chance(25 if count < 5 else 45):
        return (count,) if count else ()
    first = dice.between(1, count - 1)
    return (max(first, count - first), min(first, count - first))


def _roads(site: Ground, road_percent: int, count: int, cell: int) -> list[Change]:
    """The roads that appear, and the old ones; a new road never crosses another one, which would cut it in two."""
    dice = site.dice
    through = count > 0 and dice.chance(55)
    if not through:
        old_roads(site, road_percent)
        made = _streets(site, count, cell) if count else None
        return [made] if made else []
    ways = [("rows", 38), ("columns", 38), ("slant", 14 * (count == 1)), ("arc", 10 * (count == 1))]
    way = dice.weighted(ways)
    if way in ("slant", "arc"):
        return [_slanting(site, way)]
    lane = cell // 3 if way == "rows" else cell % 3
    others = dice.shuffled([k for k in range(3) if k != lane])
    parallel = count if count == 1 or dice.chance(60) else 1
    lanes = [lane, *others[: parallel - 1]]
    style = dice.below(len(COLOURS["road"]))
    turn = 0 if way == "rows" else 8
    shapes = [_lane(dice, k, turn) for k in lanes]
    ids = tuple(site.add("road", shape, "after", style).id for shape in shapes)
    cells = tuple(sorted({key for shape in shapes for key in cells_of(coarse(shape))}))
    named = {"rows": ("top", "across", "bottom"), "columns": ("left", "down", "right")}[way]
    place = named[lane] if parallel == 1 else way
    colour = COLOURS["road"][style]
    manner = "parallel" if parallel > 1 else ""
    changes = [Change("appear", "road", None, parallel, cells, ids, place, site.name, manner, colour)]
    if parallel < 3 and dice.chance(road_percent // 2):  # an old road beside the new ones
        site.add("road", replace(_lane(dice, others[-1], turn), half=dice.between(96, 136)))
    rest = _streets(site, count - parallel, dice.below(9)) if count > parallel else None
    return [*changes, rest] if rest else changes


def _lane(dice: Dice, lane: int, turn: int) -> Line:
    """A level (turn 0) or upright (8) road in one of three lanes."""
    offset, half = MIDDLES[lane] + dice.between(-14, 14), dice.between(56, 96)
    return Line(offset, 128, turn, half) if turn else Line(128, offset, turn, half)


def _slanting(site: Ground, way: str) -> Change:
    """One road from edge to edge, slanting or curved."""
    dice = site.dice
    half = dice.between(56, 96)
    shape: Line | Arc
    if way == "arc":
        shape, place = replace(arc(dice), half=half), ""
    else:
        rising = dice.chance(50)
        place = "rising" if rising else "falling"
        shape = Line(128 + dice.between(-24, 24), 128 + dice.between(-24, 24), 28 if rising else 4, half)
    road = site.add("road", shape, "after")
    manner = "curved" if way == "arc" else ""
    cells, colour = cells_of(coarse(shape)), COLOURS["road"][road.style]
    return Change("appear", "road", None, 1, cells, (road.id,), place, site.name, manner, colour)


def _streets(site: Ground, count: int, cell: int) -> Change | None:
    """Roads that end within the scene, side by side; one alone may leave an old road."""
    dice = site.dice
    blocks: list[Block] = []
    straight = [road for road in site.old_roads if isinstance(road, Line)]
    if count == 1 and straight and dice.chance(50):
        branch = _branch(site, dice.pick(straight))
        blocks = [branch] if branch else []
    if not blocks:
        blocks = _terrace(site, count, cell)
    if not blocks:
        return None
    style = dice.below(len(COLOURS["road"]))
    ids = tuple(site.add("road", block, "after", style).id for block in blocks)
    site.own(_around(blocks))
    cells = tuple(sorted({key for block in blocks for key in cells_of(coarse(block))}))
    x, y = (sum(at) // len(blocks) for at in zip(*((b.cx, b.cy) for b in blocks), strict=True))
    place = PLACES[min(max(y, 0) * 3 // UNITS, 2) * 3 + min(max(x, 0) * 3 // UNITS, 2)]
    colour = COLOURS["road"][style]
    return Change("appear", "road", None, len(blocks), cells, ids, place, site.name, "street", colour)


def _around(blocks: list[Block]) -> Block:
    """One block over parallel ones of equal length."""
    first, last = blocks[0], blocks[-1]
    away = max(abs(first.cx - last.cx), abs(first.cy - last.cy))
    middle = (first.cx + last.cx) // 2, (first.cy + last.cy) // 2
    return Block(*middle, first.turn, first.hu, first.hv + (away + 1) // 2)


def _branch(site: Ground, road: Line) -> Block | None:
    """A road that begins at the edge of an old one, at right angles."""
    dice = site.dice
    start = (road.half >> 4) - 2  # under the kerb, so that no strip of ground remains
    for _ in range(12):
        half, side = dice.between(22, 46), dice.pick((-1, 1))
        along, width = dice.between(-100, 100), dice.between(4, 6)
        own = Block(road.cx, road.cy, road.turn, 0, 0)
        block = Block(*own.point(along, side * (start + half)), (road.turn + 8) % TURNS, half, width)
        clear = Block(*own.point(along, side * (start + half + 6)), block.turn, half - 6, width)
        x, y = block.cx, block.cy
        if 30 <= x <= 226 and 30 <= y <= 226 and site.fits(clear, GAP - 2):
            return block
    return None


def _terrace(site: Ground, count: int, cell: int) -> list[Block]:
    """Parallel roads that touch nothing."""
    dice = site.dice
    for k in range(24):
        half, width = dice.between(20, 40 - k // 2), dice.between(4, 6)
        pitch = dice.between(2 * width + GAP + 2, 2 * width + 26)
        turn = site.turn + dice.pick((0, 8))
        fat = width + (count - 1) * pitch // 2
        around = site.site(half, fat + 1, turn, cell if k < 8 else dice.below(9))
        if around is not None and site.fits(around, GAP):
            ways = (k * pitch - (count - 1) * pitch // 2 for k in range(count))
            return [Block(*around.point(0, v), around.turn, half, width) for v in ways]
    return []


def _buildings(site: Ground, count: int, cell: int, *, small: bool = False, tries: int = 24) -> Change | None:
    """`count` houses in rows, or one large building, in that cell if there is room."""
    dice = site.dice
    subject = "building" if count == 1 and not small and dice.chance(45) else "house"
    size = _half_sizes(dice, subject, count, small)
    columns, rows = _GRIDS[count]
    gap = dice.between(GAP + 1, GAP + 6)
    pitch = (2 * size[0] + gap, 2 * size[1] + gap)
    half = (columns * pitch[0] // 2, rows * pitch[1] // 2) if count > 1 else size
    spot = _spot(site, half, cell, tries)
    if spot is None:
        return None
    block = spot.block
    if not spot.beside_road and dice.chance(25) and site.fits(block, _REACH):
        wood(site, block, "before")
        site.in_woods = dice.chance(60)
    site.own(block)
    style = dice.below(len(COLOURS[subject]))
    ids = []
    for k in range(count):
        row, column = divmod(k, columns)
        u, v = (2 * column + 1 - columns) * pitch[0] // 2, (2 * row + 1 - rows) * pitch[1] // 2
        x, y = block.point(u, v)
        less = dice.below(2) if count > 1 else 0
        one = Block(x, y, block.turn, size[0] - less, size[1])
        if subject == "house":
            ids.append(site.add_house(one, "after", style).id)
        else:
            ids.append(site.add(subject, one, "after", style).id)
    context = "road" if spot.beside_road else site.name
    manner = "row" if count >= 3 and rows == 1 else ""
    place = PLACES[min(block.cy * 3 // UNITS, 2) * 3 + min(block.cx * 3 // UNITS, 2)]
    colour, cells = COLOURS[subject][style], cells_of(coarse(block))
    return Change("appear", subject, None, count, cells, tuple(ids), place, context, manner, colour)


def _half_sizes(dice: Dice, subject: str, count: int, small: bool) -> tuple[int, int]:
    """Half length and half width of one building, in units."""
    if small:
        return dice.between(7, 8), dice.between(6, 8)
    if subject == "building":
        return dice.between(14, 28), dice.between(12, 18)
    if count == 1:
        return dice.between(12, 16), dice.between(11, 14)
    if count <= 3:
        return dice.between(12, 14), dice.between(10, 12)
    return (
        (dice.between(10, 12), dice.between(8, 10))
        if count <= 6
        else (dice.between(8, 9), dice.between(6, 7))
    )


def _spot(site: Ground, size: tuple[int, int], cell: int, tries: int) -> Spot | None:
    """A free place, in that cell if there is one; where there are straight roads, often beside one."""
    dice = site.dice
    straight = [road for road in site.roads if isinstance(road, Line)]
    if straight and dice.chance(35):
        for _ in range(6):
            spot = beside(site, dice.pick(straight), size)
            if spot and site.fits(spot.block, 4):
                return spot
    for k in range(tries):
        block = site.site(*size, site.turn + dice.pick((0, 8)), cell if k < 12 else dice.below(9))
        if block:
            return Spot(block, False)
    return None


def _passing(site: Ground) -> None:
    """Trees, a field or water that come or go, where there is room."""
    dice = site.dice
    name = dice.weighted([("trees", 40), ("field", 30), ("water", 30)])
    presence: Presence = dice.pick(("before", "after"))
    size = dice.between(18, 44), dice.between(16, 34)
    block = site.free_block(*size, tries=6, inside=False)
    if block is None or (name == "trees" and not site.fits(block, _REACH)):
        return
    site.own(block)
    if name == "trees":
        wood(site, block, presence)
    elif name == "water":
        site.add("water", Blob(block, dice.between(-22, 22), dice.between(-22, 22)), presence)
    else:
        site.add("field", block, presence)
