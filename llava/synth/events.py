"""What can happen between two dates, and where it is made to happen."""

from dataclasses import dataclass

import numpy as np

from llava.synth.dice import Dice
from llava.synth.ground import Ground
from llava.synth.scene import COLOURS, PLACES, Action, Change, Presence, cells_of
from llava.synth.shapes import CELLS, TURNS, Arc, Blob, Block, Line, Patch, coarse, direction

KINDS: tuple[tuple[tuple[Action, str, str | None], int], ...] = (
    (("appear", "house", None), 15), (("disappear", "house", None), 7), (("replace", "house", "trees"), 7),
    (("replace", "house", "field"), 4), (("appear", "building", None), 5), (("disappear", "building", None), 4),
    (("replace", "building", "trees"), 3), (("replace", "building", "house"), 3),
    (("replace", "building", "field"), 2), (("grow", "building", None), 4), (("appear", "road", None), 12),
    (("disappear", "road", None), 5), (("disappear", "trees", None), 8), (("appear", "trees", None), 6),
    (("appear", "water", None), 6), (("disappear", "water", None), 5), (("grow", "water", None), 4),
    (("appear", "field", None), 6), (("disappear", "field", None), 5), (("appear", "parking lot", None), 6),
    (("disappear", "parking lot", None), 4), (("replace", "parking lot", "trees"), 4),
    (("appear", "playground", None), 6), (("disappear", "playground", None), 4),
    (("replace", "playground", "field"), 3),
)  # fmt: skip
"""(action, subject, former) with weights: what happens how often."""

COUNTS = {
    "house": ((1, 18), (2, 20), (3, 19), (4, 10), (5, 5), (6, 12), (8, 12), (9, 4)),
    "building": ((1, 80), (2, 20)),
}
"""(how many, weight) by class; of everything else there is one."""
HOUSE_GRIDS = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 5: (5, 1), 6: (3, 2), 8: (4, 2), 9: (3, 3)}
PITCH = (42, 40)
"""From one house of an estate to the next, along and across, in units."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A place for an event and what it lies beside."""

    block: Block
    beside_road: bool


def plan_events(site: Ground, road_percent: int) -> list[Change]:
    """Put down one change (70 in 100) or two, and the old roads; returns at least one change."""
    dice = site.dice
    kinds = [dice.weighted(KINDS)]
    if dice.chance(30):
        others = [kind for kind in KINDS if kind[0][1] != kinds[0][1] and kind[0][2] != kinds[0][1]]
        kinds.append(dice.weighted(others))
    kinds.sort(key=lambda kind: kind[1] != "road")  # roads need the most room
    new_road = next((kind for kind in kinds if kind[1] == "road"), None)
    changes = []
    if new_road:
        changes.append(_road_event(site, new_road[0]))
        kinds.remove(new_road)
        road_percent //= 2
    old_roads(site, road_percent)
    for kind in kinds:
        change = _try_event(site, *kind)
        if change is None and not changes:
            change = _try_event(site, "appear", "house", None, tries=400, count=1)
        if change is not None:
            changes.append(change)
    if not changes:
        raise AssertionError("an empty scene has room for a house")
    return changes


def old_roads(site: Ground, percent: int) -> None:
    """In `percent` of 100 scenes a road that was always there, or a crossing."""
    dice = site.dice
    if not dice.chance(percent):
        return
    turns = [r.turn for r in site.roads if isinstance(r, Line)]
    turn = turns[0] + 8 if turns else site.turn + dice.pick((0, 8))
    kind = dice.weighted([("line", 60), ("cross", 20), ("arc", 20)])
    if kind == "arc" and not site.roads:
        site.add("road", arc(dice))
        return
    half = dice.between(96, 136)
    line = Line(dice.between(40, 216), dice.between(40, 216), turn % TURNS, half)
    site.add("road", line)
    if kind == "cross" and not turns:
        site.add("road", Line(dice.between(50, 206), dice.between(50, 206), (turn + 8) % TURNS, half))


def arc(dice: Dice) -> Arc:
    """A bend that shows in the scene: its middle line passes near the scene's centre."""
    c, s = direction(dice.below(TURNS))
    radius = dice.between(120, 190)
    away = radius + dice.between(-30, 20)
    return Arc(128 + (c * away >> 10), 128 + (s * away >> 10), radius, dice.between(100, 130))


def _road_event(site: Ground, action: Action) -> Change:
    """A road that came or went: level, upright, slanting or curved, named by the way it runs."""
    dice = site.dice
    presence: Presence = "after" if action == "appear" else "before"
    half = dice.between(112, 144)
    way = dice.weighted([("level", 34), ("upright", 34), ("slant", 18), ("arc", 14)])
    manner = ""
    shape: Line | Arc
    if way == "arc":
        shape, place, manner = arc(dice), "", "curved"
    elif way == "slant":
        rising = dice.chance(50)
        shape = Line(128 + dice.between(-24, 24), 128 + dice.between(-24, 24), 28 if rising else 4, half)
        place = "rising" if rising else "falling"
    else:
        lane = dice.below(3)
        offset = (42, 128, 214)[lane] + dice.between(-14, 14)
        tilt = dice.pick((0, 0, 1, -1)) % TURNS if lane == 1 else 0
        level = way == "level"
        shape = Line(128, offset, tilt, half) if level else Line(offset, 128, tilt + 8, half)
        place = ("top", "across", "bottom")[lane] if level else ("left", "down", "right")[lane]
    road = site.add("road", shape, presence)
    context = site.name
    colour = COLOURS["road"][road.style]
    return Change(
        action, "road", None, 1, cells_of(coarse(shape)), (road.id,), place, context, manner, colour
    )


def _try_event(
    site: Ground, action: Action, subject: str, former: str | None, *, tries: int = 24, count: int = 0
) -> Change | None:
    """Find room for the event and put it down, or None."""
    dice = site.dice
    count = count or dice.weighted(COUNTS.get(subject, ((1, 1),)))
    old = dice.pick((2, 3)) if former == "house" else 1
    size = _size(dice, subject, count)
    if former == "house":
        size = (max(size[0], old * 21 + 2), size[1])
    elif former in ("trees", "field"):
        size = (max(size[0] + 8, 30), max(size[1] + 8, 28))
    spot = _spot(site, size, tries, roadside=subject in ("house", "building") and former is None)
    if spot is None:
        return None
    block = spot.block
    site.own(block)
    came: Presence = "before" if action == "disappear" else "after"
    ids: list[int] = []
    if former == "trees":
        ids.append(wood(site, block, "before"))
        site.in_woods = dice.chance(60)
    elif former == "house":
        ids += _houses(site, Block(block.cx, block.cy, block.turn, old * 21, 18), old, "before")
    elif former == "field":
        ids.append(site.add("field", block, "before").id)
    inner = Block(block.cx, block.cy, block.turn, *_size_inside(subject, size, former))
    style = dice.below(len(COLOURS[subject])) if subject in COLOURS else None
    row = subject == "house" and count >= 3 and HOUSE_GRIDS[count][1] == 1
    if action == "grow":
        ids += _grow(site, subject, inner, style)
    elif subject == "house":
        ids += _houses(site, inner, count, came, style)
    elif subject == "building" and count == 2:
        for side in (-1, 1):
            x, y = inner.point(side * (inner.hu // 2 + 2), 0)
            half = Block(x, y, inner.turn, inner.hu // 2 - 4, inner.hv)
            ids.append(site.add("building", half, came, style).id)
    elif subject == "trees":
        ids.append(wood(site, inner, came))
    elif subject == "water":
        blob = Blob(inner, dice.between(-22, 22), dice.between(-22, 22))
        ids.append(site.add("water", blob, came).id)
    else:
        ids.append(site.add(subject, inner, came, style).id)
    cells = cells_of(coarse(block))
    middle = PLACES[min(block.cy * 3 // 256, 2) * 3 + min(block.cx * 3 // 256, 2)]
    context = "road" if spot.beside_road else "" if former or action == "grow" else site.name
    manner, colour = "row" if row else "", "" if style is None else COLOURS[subject][style]
    return Change(action, subject, former, count, cells, tuple(ids), middle, context, manner, colour)


def _size(dice: Dice, subject: str, count: int) -> tuple[int, int]:
    """Half length and half width of the subject's site, in units."""
    if subject == "house":
        columns, rows = HOUSE_GRIDS[count]
        return columns * PITCH[0] // 2 + (2 if count == 1 else 0), rows * PITCH[1] // 2
    if subject == "building" and count == 2:
        return dice.between(52, 60), dice.between(24, 30)
    low_u, high_u, low_v, high_v = {
        "building": (30, 44, 24, 32), "parking lot": (32, 44, 22, 30), "playground": (36, 44, 24, 28),
        "field": (42, 56, 34, 46), "water": (30, 42, 26, 36), "trees": (40, 56, 34, 46),
    }[subject]  # fmt: skip
    return dice.between(low_u, high_u), dice.between(low_v, high_v)


def _size_inside(subject: str, size: tuple[int, int], former: str | None) -> tuple[int, int]:
    """The subject's half sizes on a site that may be larger for the sake of what stood there."""
    if former in ("trees", "field"):
        return size[0] - 8, size[1] - 8
    return size


def _spot(site: Ground, size: tuple[int, int], tries: int, *, roadside: bool) -> Spot | None:
    """A free place in a random cell; beside an old straight road in about half of the scenes where that makes sense."""
    dice = site.dice
    straight = [road for road in site.old_roads if isinstance(road, Line)]
    if roadside and straight and dice.chance(60):
        for _ in range(8):
            spot = beside(site, dice.pick(straight), size)
            if spot:
                return spot
    for _ in range(tries):
        block = site.site(*size, site.turn + dice.pick((0, 8)), dice.below(9))
        if block:
            return Spot(block, False)
    return None


def beside(site: Ground, road: Line, size: tuple[int, int]) -> Spot | None:
    """A place along the road, or None if the one that was tried is taken."""
    dice = site.dice
    away = (road.half >> 4) + size[1] + 7
    x, y = Block(road.cx, road.cy, road.turn, 0, 0).point(dice.between(-110, 110), dice.pick((-1, 1)) * away)
    block = Block(x, y, road.turn, *size)
    rx, ry = block.reach()
    clear = all(not (79 < at < 91 or 165 < at < 177) for at in (x, y))
    inside = rx + 5 <= x <= 251 - rx and ry + 5 <= y <= 251 - ry
    return Spot(block, True) if clear and inside and site.fits(block, 3) else None


def _houses(
    site: Ground, block: Block, count: int, presence: Presence, style: int | None = None
) -> list[int]:
    """`count` houses in rows and columns over the block."""
    dice, (columns, rows) = site.dice, HOUSE_GRIDS[count]
    ids = []
    for k in range(count):
        row, column = divmod(k, columns)
        u = (2 * column + 1 - columns) * PITCH[0] // 2 + dice.between(-2, 2)
        v = (2 * row + 1 - rows) * PITCH[1] // 2 + dice.between(-2, 2)
        x, y = block.point(u, v)
        small = 0 if count > 1 else 2
        hu, hv = dice.between(15, 17) + small, dice.between(12, 14) + small
        ids.append(site.add_house(Block(x, y, block.turn, hu, hv), presence, style).id)
    return ids


def wood(site: Ground, block: Block, presence: Presence) -> int:
    """A wood that fills the block, with an uneven edge."""
    cells = coarse(block, 2) & ((site.relief(12) > 84) | coarse(block, -7))
    thing = site.add("trees", Patch(np.ascontiguousarray(cells.reshape(CELLS, CELLS))), presence)
    return thing.id


def _grow(site: Ground, subject: str, block: Block, style: int | None) -> list[int]:
    """The thing as it was, and what was added to it."""
    dice = site.dice
    if subject == "water":
        lean, bend = dice.between(-22, 22), dice.between(-22, 22)
        small = Block(block.cx, block.cy, block.turn, block.hu * 5 // 9, block.hv * 5 // 9)
        first = site.add("water", Blob(small, lean, bend), "before")
        return [first.id, site.add("water", Blob(block, lean, bend), "after").id]
    old_half = block.hu // 2
    x, y = block.point(old_half - block.hu, 0)
    first = site.add("building", Block(x, y, block.turn, old_half, block.hv), "before", style)
    return [first.id, site.add("building", block, "after", style).id]
