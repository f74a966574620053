"""The synthetic world: a seeded, endless list of pairs, each made from its number alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import Literal

import numpy as np

from llava.errors import ConfigError
from llava.synth import describe
from llava.synth.built import CELLS, RECIPES, Recipe
from llava.synth.canvas import canvas
from llava.synth.dice import Dice
from llava.synth.plan import plan
from llava.synth.render import Look, render, visible
from llava.synth.scene import (
    CLASSES,
    DATES,
    PLACES,
    SPLITS,
    Change,
    Date,
    Presence,
    Scene,
    Split,
    Thing,
    cells_of,
)
from llava.synth.shapes import coarse
from llava.synth.task_lists import Asked, ask
from llava.tasks.labels import Labels, labels_from_mask

VERSION = 2
"""Goes up when a pair of the same number changes."""
SIZES = (32, 4096)
Changes = Literal["any", "built"]
CHANGES: tuple[Changes, ...] = ("any", "built")


@dataclass(frozen=True, slots=True)
class Instance:
    """One thing of a pair.

    Attributes:
        id: its number within the pair.
        name: its class.
        box: (x0, y0, x1, y1) in pixels, x1 and y1 excluded, clipped to the image.
        cells: cells of the 3 x 3 grid it lies in, row by row, 0 .. 8.
        presence: at which date it is there.
    """

    id: int
    name: str
    box: tuple[int, int, int, int]
    cells: tuple[int, ...]
    presence: Presence


@dataclass(frozen=True, eq=False)
class Pair:
    """One place at two dates, and the whole truth about it. The truth is in the frame of `before`.

    Attributes:
        uid: "synth/SPLIT_NUMBER"; "synth-built/..." where roads and buildings alone change.
        before: uint8 [S, S, 3], RGB.
        after: uint8 [S, S, 3]; displaced by up to 3/256 of the side against the truth.
        changed: does anything but season, light and camera differ?
        captions: five sentences, lower case, without full stop.
        classes_before: uint8 [S, S], ids into `CLASSES`.
        classes_after: uint8 [S, S].
        changes: what happened.
        instances: what is there, at either date.
        scene: the plan behind the pixels.
    """

    uid: str
    before: np.ndarray
    after: np.ndarray
    changed: bool
    captions: tuple[str, ...]
    classes_before: np.ndarray
    classes_after: np.ndarray
    changes: tuple[Change, ...]
    instances: tuple[Instance, ...]
    scene: Scene
    key: tuple[int, ...] = field(repr=False)

    @cached_property
    def binary_mask(self) -> np.ndarray:
        """Every change of class: bool [S, S]."""
        return self.classes_before != self.classes_after

    @cached_property
    def change_mask(self) -> np.ndarray:
        """LEVIR-MCI's mask: 0 none, 1 road, 2 building (of any size); uint8 [S, S]."""
        found = np.zeros(self.before.shape[:2], dtype=np.uint8)
        for value, names in ((1, ("road",)), (2, ("house", "building"))):
            table = np.isin(np.arange(len(CLASSES)), [CLASSES.index(name) for name in names])
            either = table[self.classes_before] | table[self.classes_after]
            found[either & self.binary_mask] = value
        return found

    @cached_property
    def labels(self) -> Labels:
        """What `change_mask` says of roads and buildings: how many, and in which cells."""
        return labels_from_mask(self.change_mask)

    @property
    def canonical(self) -> str:
        """The sentence of usual wordings: what a perfect describer with no taste of its own would say."""
        return describe.sentence(self.changes, self.scene.ground) if self.changed else describe.UNCHANGED[2]

    def describe(self, date: Date) -> list[str]:
        """Five captions of the single image at `date`: what is there, how many, where, on what ground."""
        if date not in DATES:
            raise ConfigError(f"date {date!r} is not one of {', '.join(DATES)}")
        dice = Dice(*self.key, 8 + (date == "after"))
        shown = [thing for thing in self.instances if thing.presence in (date, "both")]
        seen = [(thing.name, _middle(thing.box, self.before.shape[0])) for thing in shown]
        return describe.single(seen, self.scene.ground, dice)


@dataclass(frozen=True)
class World:
    """All pairs of one seed, split and rate of change. `pair(i)` depends on these, the size and i, and nothing else.

    The same number at another size shows the same place, changes and captions.

    Args:
        seed: any whole number >= 0.
        split: "train", "val" or "test"; splits share no scene.
        size: side of the images in pixels, 32 .. 4096.
        changes: "any" kind, or "built": roads and buildings appear, and nothing else is a change, though plants and
            water may come and go; `Pair.change_mask` is then the whole truth.
        change_rate: share of the pairs that changed, 0 .. 1, to six digits. Changed and unchanged pairs are spread
            evenly: the first n pairs hold n times the rate, less than one pair more or less.
    """

    seed: int = 0
    split: Split = "train"
    size: int = 256
    changes: Changes = "any"
    change_rate: float = 0.5

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"synth split {self.split!r} is not one of {', '.join(SPLITS)}")
        if self.changes not in CHANGES:
            raise ConfigError(f"synth changes {self.changes!r} is not one of {', '.join(CHANGES)}")
        if not SIZES[0] <= self.size <= SIZES[1]:
            raise ConfigError(f"synth size {self.size} is not within {SIZES[0]} .. {SIZES[1]} pixels")
        if self.seed < 0:
            raise ConfigError(f"synth seed {self.seed} is negative; take a whole number >= 0")
        if not 0 <= self.change_rate <= 1:
            raise ConfigError(
                f"synth change_rate {self.change_rate} is not within 0 .. 1, the share of changed pairs"
            )

    def changed(self, index: int) -> bool:
        """Whether pair `index` shows a change: at the default rate exactly one of the pairs 2 k and 2 k + 1 does."""
        return self._turn(index)[0]

    def uid(self, index: int) -> str:
        """Name of pair `index`."""
        folder = "synth" if self.changes == "any" else f"synth-{self.changes}"
        return f"{folder}/{self.split}_{index:06d}"

    def scene(self, index: int) -> Scene:
        """The plan of pair `index`, without drawing it."""
        return plan(Dice(*self._key(index), 2), self.changed(index), self._built(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """The five captions of pair `index`, without drawing it."""
        return self._captions(self.scene(index), index)

    def pair(self, index: int) -> Pair:
        """Pair number `index` (>= 0)."""
        scene = self.scene(index)
        key = self._key(index)
        lights = Dice(*key, 3)
        looks = (Look.draw(lights, displaced=False), Look.draw(lights, displaced=True))
        seen = render(scene, canvas(self.size), looks, (Dice(*key, 4), Dice(*key, 5)))
        instances = tuple(
            _instance(thing, seen.boxes[thing.id]) for thing in visible(scene.things, seen.boxes)
        )
        return Pair(
            uid=self.uid(index),
            before=seen.images[0],
            after=seen.images[1],
            changed=bool(scene.changes),
            captions=self._captions(scene, index),
            classes_before=seen.classes[0],
            classes_after=seen.classes[1],
            changes=scene.changes,
            instances=instances,
            scene=scene,
            key=key,
        )

    def asked(self, index: int, mask: np.ndarray | None = None) -> Asked:
        """What is asked of pair `index`, with the answers; only where nothing but roads and buildings changes.

        Args:
            index: the pair's number.
            mask: its `change_mask`, if it is at hand.

        Raises:
            ConfigError: changes of this world are of any kind.
        """
        if self.changes != "built":
            raise ConfigError("questions are about roads and buildings alone: take World(changes='built')")
        mask = self.pair(index).change_mask if mask is None else mask
        scene = self.scene(index)
        return ask(mask, scene, self._captions(scene, index), self._key(index))

    def pairs(self, start: int, stop: int) -> Iterator[Pair]:
        """Pairs start .. stop - 1, one after the other."""
        for index in range(start, stop):
            yield self.pair(index)

    def _key(self, index: int) -> tuple[int, int, int]:
        if index < 0:
            raise ConfigError(f"pair {index} does not exist: numbers start at 0")
        return self.seed, SPLITS.index(self.split), index

    def _turn(self, index: int) -> tuple[bool, int]:
        """Whether pair `index` changed, and how many before it did.

        Each pair of the rarer kind, changed or unchanged, has a stretch of numbers of its own, 1 / rate long, and
        lies anywhere in it.
        """
        seed, split, _ = self._key(index)
        rate = Fraction(self.change_rate).limit_denominator(10**6)
        rarer = min(rate, 1 - rate)
        rare, before = False, 0
        if rarer:
            stretch = int(index * rarer)
            start, stop = ceil(stretch / rarer), ceil((stretch + 1) / rarer)
            place = start + Dice(seed, split, stretch, 1).below(stop - start)
            rare, before = index == place, stretch + (place < index)
        return (rare, before) if rate == rarer else (not rare, index - before)

    def _built(self, index: int) -> tuple[Recipe, int] | None:
        """What is built in pair `index`, and where: every recipe and every cell has its turn."""
        if self.changes == "any":
            return None
        seed, split, _ = self._key(index)
        changed, before = self._turn(index)
        chosen = []
        for stream, choices in ((10, range(len(RECIPES))), (11, CELLS)):
            turn, place = divmod(before if changed else index // 2, len(choices))
            chosen.append(Dice(seed, split, turn, stream).shuffled(choices)[place])
        return RECIPES[chosen[0]], chosen[1]

    def _captions(self, scene: Scene, index: int) -> tuple[str, ...]:
        return describe.captions(scene.changes, Dice(*self._key(index), 6), scene.ground)


def _instance(thing: Thing, box: tuple[int, int, int, int]) -> Instance:
    return Instance(thing.id, thing.name, box, cells_of(coarse(thing.shape)), thing.presence)


def _middle(box: tuple[int, int, int, int], size: int) -> str:
    column, row = ((box[k] + box[k + 2]) * 3 // (2 * size) for k in (0, 1))
    return PLACES[min(row, 2) * 3 + min(column, 2)]
