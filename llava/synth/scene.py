"""What a scene is: its ground, the things on it at each date, what changed, and how each date was seen."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llava.synth.shapes import CELLS, Shape

CLASSES = (
    "bareland", "grass", "desert", "trees", "water", "field", "road", "parking lot", "house", "building", "playground",
)  # fmt: skip
"""Class names by id, as in the class maps; 0 is the background."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Date = Literal["before", "after"]
DATES: tuple[Date, Date] = ("before", "after")
Presence = Literal["before", "after", "both"]
Action = Literal["appear", "disappear", "replace", "grow"]

COLOURS = {
    "house": ("red", "grey", "white", "blue"),
    "building": ("white", "blue", "grey"),
    "field": ("green", "golden"),
    "road": ("asphalt", "concrete"),
}
"""Colours by class; a thing's is `COLOURS[name][style]`."""

PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
"""Names of the 3 x 3 cells, row by row."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing on the ground. `style` is its colour, `seed` chooses its small details."""

    id: int
    name: str
    presence: Presence
    shape: Shape
    style: int = 0
    seed: int = 0

    def at(self, date: Date) -> bool:
        """Is it there at that date?"""
        return self.presence in (date, "both")


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a pair.

    Attributes:
        action: "appear", "disappear", "replace" (`former` made way for `subject`) or "grow".
        subject: class name of what appeared, disappeared, came instead or grew.
        former: class name of what was replaced, else None.
        count: how many of the subject.
        cells: cells of the 3 x 3 grid it touches, row by row, 0 .. 8.
        instances: ids of the things that came, went or grew.
        place: where its middle lies, one of `PLACES`, or for a road the way it runs ("diagonal", "top", ...).
        context: what it stands on or beside ("grass", "bareland", "desert", "road" for "along the road"), or "".
        manner: a further property ("curved", "row"), or "".
        colour: of the subject's roofs, crop or surface, or "".
    """

    action: Action
    subject: str
    former: str | None
    count: int
    cells: tuple[int, ...]
    instances: tuple[int, ...]
    place: str
    context: str = ""
    manner: str = ""
    colour: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """The plan of a pair, free of pixels: the same for every image size."""

    ground: str
    theme: str
    things: tuple[Thing, ...]
    changes: tuple[Change, ...]
    sun: tuple[int, int]
    looks: tuple[int, ...] = field(default=(0,) * 8)
    """Small numbers that choose textures and their offsets."""


def cells_of(cells: np.ndarray) -> tuple[int, ...]:
    """Cells of the 3 x 3 grid that hold at least a seventh of `cells` (bool [CELLS, CELLS]), row by row."""
    edges = [0, (CELLS + 1) // 3, (2 * CELLS + 1) // 3, CELLS]
    total = int(cells.sum())
    found = []
    for k in range(9):
        row, column = divmod(k, 3)
        part = cells[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
        if int(part.sum()) * 7 >= total > 0:
            found.append(k)
    return tuple(found)
