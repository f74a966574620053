"""Lays out a scene: roads first, then the place where something happens, then what was always there."""

from dataclasses import replace

import numpy as np

from llava.synth.built import Recipe, plan_built, settle
from llava.synth.dice import Dice
from llava.synth.events import arc, plan_events
from llava.synth.ground import Ground
from llava.synth.scene import DATES, Scene, Thing
from llava.synth.shapes import CELL, CELLS, Arc, Blob, Block, Line, Patch, coarse, dilate

THEMES = {
    "residential": ([("grass", 60), ("bareland", 30), ("desert", 10)], 85),
    "rural": ([("grass", 55), ("bareland", 45)], 60),
    "forest": ([("grass", 55), ("bareland", 45)], 50),
    "industrial": ([("bareland", 50), ("grass", 35), ("desert", 15)], 85),
    "desert": ([("desert", 100)], 60),
}
"""Per theme: grounds with weights, and in how many of 100 scenes an old road runs through."""


def plan(dice: Dice, changed: bool, built: tuple[Recipe, int] | None = None) -> Scene:
    """A new scene. An unchanged one is a changed one of which both dates show the same side.

    Args:
        dice: where every choice comes from.
        changed: whether something happens between the dates.
        built: what is built, and in which cell, where nothing else may change; None for changes of any kind.
    """
    theme = dice.weighted(
        [("residential", 32), ("rural", 20), ("forest", 20), ("industrial", 18), ("desert", 10)]
    )
    grounds, road_percent = THEMES[theme]
    site = Ground(dice, dice.weighted(grounds), theme)
    side = dice.pick(DATES)
    changes = plan_events(site, road_percent) if built is None else plan_built(site, road_percent, *built)
    _fill(site)
    _trails(site)
    things = _with_woods(site)
    if not changed:
        if built is None:
            things = [replace(thing, presence="both") for thing in things if thing.at(side)]
        else:
            things = settle(things, side)
        changes = []
    sun = (dice.pick((-1, 1)), dice.pick((-1, 1)))
    looks = tuple(dice.below(1 << 16) for _ in range(8))
    return Scene(site.name, theme, tuple(things), tuple(changes), sun, looks)


def _fill(site: Ground) -> None:
    """Put down what was there at both dates; how much and what depends on the theme."""
    dice, theme = site.dice, site.theme
    if theme == "residential":
        for road in site.old_roads:
            _houses_along(site, road, 75)
        if not site.old_roads or dice.chance(25):
            _houses_loose(site, dice.between(0, 3))
    elif theme == "industrial":
        for _ in range(dice.between(0, 2)):
            _put(site, "building", dice.between(24, 40), dice.between(18, 28))
        if dice.chance(55):
            _put(site, "parking lot", dice.between(26, 38), dice.between(18, 24))
    elif theme == "rural":
        for _ in range(dice.between(1, 3)):
            _put(site, "field", dice.between(36, 58), dice.between(28, 46))
        _houses_loose(site, dice.between(0, 2))
    elif theme == "desert":
        _houses_loose(site, dice.between(0, 2))
    if theme in ("rural", "forest", "residential") and dice.chance(22):
        block = site.free_block(dice.between(24, 44), dice.between(20, 36), tries=3, inside=False)
        if block:
            site.add("water", Blob(block, dice.between(-22, 22), dice.between(-22, 22)))
    if theme == "residential" and dice.chance(10):
        _put(site, "playground", 34, 22)


def _put(site: Ground, name: str, hu: int, hv: int) -> None:
    block = site.free_block(hu, hv, tries=4, inside=False)
    if block:
        site.add(name, block)


def _houses_loose(site: Ground, count: int) -> None:
    for _ in range(count):
        block = site.free_block(site.dice.between(15, 17), site.dice.between(12, 14), tries=3, inside=True)
        if block:
            site.add_house(block)


def _houses_along(site: Ground, road: Line | Arc, percent: int) -> None:
    """Rows of houses on one or both sides of a straight road, with gaps."""
    dice = site.dice
    if isinstance(road, Arc):
        return
    for side in dice.pick(((-1, 1), (-1,), (1,), (-1, 1))):
        step = dice.between(40, 46)
        start = dice.below(step)
        for k in range(-4, 5):
            if not dice.chance(percent):
                continue
            hu, hv = dice.between(15, 17), dice.between(12, 14)
            away = (road.half >> 4) + hv + 9
            x, y = Block(road.cx, road.cy, road.turn, 0, 0).point(k * step + start, side * away)
            block = Block(x, y, road.turn + (16 if side > 0 else 0), hu, hv)
            if 4 < x < 252 and 4 < y < 252 and site.fits(block, 4):
                site.add_house(block, gap=9)


def _trails(site: Ground) -> None:
    """Tracks worn into the ground, too faint and narrow to pass for roads."""
    dice = site.dice
    for _ in range(dice.weighted([(0, 50), (1, 35), (2, 15)])):
        half = dice.between(18, 26)
        if dice.chance(50):
            site.add("trail", Line(dice.between(40, 216), dice.between(40, 216), dice.below(32), half))
        else:
            site.add("trail", replace(arc(dice), half=half))


def _with_woods(site: Ground) -> list[Thing]:
    """All things, with clumps and single trees put where the ground is free, and events' own trees trimmed."""
    dice = site.dice
    hard = np.zeros((CELLS, CELLS), dtype=bool)
    for thing in site.things:
        if thing.name not in ("trees", "trail"):
            hard |= coarse(thing.shape)
    hard = dilate(hard, 2)
    mine = np.zeros((CELLS, CELLS), dtype=bool)  # ground that an event owns
    for block in site.owned:
        mine |= coarse(block, 4)
    things = []
    for thing in site.things:
        if thing.name == "trees" and isinstance(thing.shape, Patch):
            trimmed = thing.shape.cells & ~dilate(site.hard_but(thing.id), 2)
            thing = replace(thing, shape=Patch(trimmed))
        things.append(thing)
    free = ~(hard | dilate(mine, 2))
    next_id = len(things)
    woods = {"forest": 100, "rural": 45, "residential": 35, "industrial": 25, "desert": 0}[site.theme]
    surround = site.in_woods or site.theme == "forest"
    if surround:
        wood = free & (site.relief(9) > (96 if site.in_woods else dice.between(104, 128)))
        if site.in_woods:  # the event's trees stand in a wood, not in a meadow
            wood |= free & dilate(mine, 7)
        things.append(Thing(next_id, "trees", "both", Patch(wood)))
    elif dice.chance(woods):
        block = site.anywhere(dice.between(24, 60), dice.between(20, 44))
        clump = coarse(block) & (site.relief(6) > 84) & free
        if clump.sum() > 40:
            things.append(Thing(next_id, "trees", "both", Patch(clump)))
    if site.theme != "desert":
        things += _single_trees(dice, free, things[-1].id + 1)
    return things


def _single_trees(dice: Dice, free: np.ndarray, next_id: int) -> list[Thing]:
    """Trees that stand alone on free cells; part of the class map, but no things of their own."""
    trees: list[Thing] = []
    for _ in range(dice.between(0, 18)):
        x, y, radius = dice.between(2, 253), dice.between(2, 253), dice.between(4, 7)
        if free[y // CELL, x // CELL]:
            shape = Block(x, y, 0, radius, radius)
            trees.append(Thing(next_id + len(trees), "tree", "both", shape, 0, dice.below(1 << 30)))
    return trees
