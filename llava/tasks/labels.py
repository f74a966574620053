"""From a mask of changed roads and buildings to the labels of the tasks: changed, how many, in which grid cells.

The paper (arXiv 2507.22346) counts contours, and marks a cell of a 3x3 grid above 5 % of its pixels, without more
detail. What it leaves open is settled here: outer contours of 8-connected objects, cells cut at floor(i * side / 3),
each class by itself, and integers only, so that nothing hangs on rounding.

Shapes: H, W of the mask; R runs, maximal rows of equal pixels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llava.errors import ConfigError, DataError
from llava.tasks.answers import PLACES

NOTHING, ROAD, BUILDING = 0, 1, 2
"""Values of a class map."""

_GREY = {0: NOTHING, 128: ROAD, 255: BUILDING}
_COLOURS: dict[tuple[int, ...], int] = {(0, 0, 0): NOTHING, (255, 255, 0): ROAD, (255, 0, 0): BUILDING}
_GREYS: dict[tuple[int, ...], int] = {(level, level, level): value for level, value in _GREY.items()}

Mask = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Labels:
    """What a mask says, as the tasks ask for it."""

    changed: bool
    """Whether any pixel changed. LEVIR-CC's own flag is another label, and may differ."""
    roads: int
    """Objects, by their outer contours."""
    buildings: int
    road_places: tuple[str, ...]
    """Cells of more than 5 % changed road, row by row. A small change is changed, counted, and in no cell."""
    building_places: tuple[str, ...]


def labels_from_mask(mask: Mask, min_area: int = 1) -> Labels:
    """Labels of a class map.

    Args:
        mask: [H, W] of 0 (no change), 1 (road) and 2 (building); pictures become one by `class_map`.
        min_area: objects of fewer pixels are not counted.

    Raises:
        DataError: another shape, or other values.
        ConfigError: `min_area` below 1.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or not mask.size or not np.issubdtype(mask.dtype, np.integer):
        raise DataError(f"a class map is [H, W] of integers, this is {list(mask.shape)} of {mask.dtype}")
    if odd := sorted(set(np.unique(mask).tolist()) - {NOTHING, ROAD, BUILDING}):
        raise DataError(f"a class map holds 0, 1 and 2, this holds {odd[:5]}; decode pictures with class_map")
    if min_area < 1:
        raise ConfigError(f"min_area={min_area} must be at least 1 pixel")
    roads, buildings = mask == ROAD, mask == BUILDING
    return Labels(
        changed=bool(mask.any()),
        roads=count_objects(roads, min_area),
        buildings=count_objects(buildings, min_area),
        road_places=grid_places(roads),
        building_places=grid_places(buildings),
    )


def class_map(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The class map [H, W] of a mask picture in LEVIR-MCI's values.

    Args:
        picture: [H, W] or [H, W, 3 or 4]: grey 0, 128 (road) and 255 (building); the same in three equal channels;
            or black, yellow (road) and red (building). A fourth channel is left out.

    Raises:
        DataError: other values; the first is named.
    """
    picture = np.asarray(picture)
    values: dict[tuple[int, ...], int]
    if picture.ndim == 2:
        levels, values = picture[..., None], {(grey,): value for grey, value in _GREY.items()}
    elif picture.ndim == 3 and picture.shape[2] in (3, 4):
        levels, values = picture[..., :3], _COLOURS | _GREYS
    else:
        raise DataError(f"a mask is [H, W] or [H, W, 3], this is {list(picture.shape)}")
    found = np.full(picture.shape[:2], 255, dtype=np.uint8)
    for level, value in values.items():
        found[(levels == np.array(level)).all(axis=-1)] = value
    if (odd := np.argwhere(found == 255)).size:
        row, column = odd[0].tolist()
        raise DataError(
            f"the mask holds {levels[row, column].tolist()} at row {row}, column {column}; known are grey 0, 128 and "
            "255, and black, yellow and red"
        )
    return found


def grid_places(hits: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """Names of the cells of a 3x3 grid in which more than 5 % of the pixels [H, W] are on, row by row."""
    height, width = hits.shape
    places = []
    for i, name in enumerate(PLACES):
        row, column = divmod(i, 3)
        cell = hits[
            row * height // 3 : (row + 1) * height // 3, column * width // 3 : (column + 1) * width // 3
        ]
        if 20 * int(cell.sum()) > cell.size:
            places.append(name)
    return tuple(places)


def count_objects(hits: npt.NDArray[np.bool_], min_area: int = 1) -> int:
    """Objects in [H, W]: 8-connected, of `min_area` pixels or more, and not inside a hole of another one."""
    return len(_objects(hits, min_area)[1])


def object_middles(hits: npt.NDArray[np.bool_], min_area: int = 1) -> npt.NDArray[np.float64]:
    """Centres of gravity of the objects that `count_objects` counts: [K, 2], row and column, each 0 .. 1."""
    inside, firsts = _objects(hits, min_area)
    row, start = np.divmod(inside.starts, inside.width)
    sizes = (inside.ends - inside.starts).astype(float)
    areas = np.bincount(inside.parts, sizes)[firsts]
    # pixel k reaches from k to k + 1; the padding is one pixel wide
    rows = np.bincount(inside.parts, sizes * (row - 0.5))[firsts] / areas
    columns = np.bincount(inside.parts, sizes * (start - 1 + sizes / 2))[firsts] / areas
    return np.stack([rows / hits.shape[0], columns / hits.shape[1]], axis=1)


def _objects(hits: npt.NDArray[np.bool_], min_area: int) -> "tuple[_Runs, npt.NDArray[np.int64]]":
    """Runs of the padded mask, and the first run of each object that counts."""
    inside = _Runs(np.pad(hits, 1), corners=True)
    if not len(inside.starts):
        return inside, np.empty(0, np.int64)
    # What surrounds 8-connected objects is 4-connected; the frame of padding belongs to the outside.
    around = _Runs(~np.pad(hits, 1), corners=False)
    # An object's first run in reading order stands for it.
    firsts = np.flatnonzero(inside.parts == np.arange(len(inside.parts)))
    areas = np.bincount(inside.parts, weights=inside.ends - inside.starts)[firsts]
    # Above an object's first pixel is what surrounds it: the outside, or a hole.
    above = np.searchsorted(around.starts, inside.starts[firsts] - inside.width, side="right") - 1
    return inside, firsts[(around.parts[above] == around.parts[0]) & (areas >= min_area)]


class _Runs:
    """The runs of true pixels, and which of them hang together.

    Args:
        hits: [H, W].
        corners: join runs of neighbouring rows that meet at a corner too, not only those that share a side.
    """

    def __init__(self, hits: npt.NDArray[np.bool_], corners: bool) -> None:
        self.width = hits.shape[1] + 1
        # A false pixel ends each row, so a run never goes on in the next one.
        line = np.pad(hits, ((0, 0), (0, 1))).ravel()
        edges = np.flatnonzero(np.diff(np.concatenate(([False], line, [False])).astype(np.int8)))
        # [R] each: places in reading order; a run's end is the place behind it.
        self.starts, self.ends = edges[::2], edges[1::2]
        self.parts = self._joined(corners)

    def _joined(self, corners: bool) -> npt.NDArray[np.intp]:
        """[R]: for each run the first run of its part."""
        first = np.searchsorted(self.ends, self.starts + self.width, side="left" if corners else "right")
        behind = np.searchsorted(self.starts, self.ends + self.width, side="right" if corners else "left")
        parent = list(range(len(self.starts)))

        def root(run: int) -> int:
            while parent[run] != run:
                parent[run] = parent[parent[run]]
                run = parent[run]
            return run

        for run, (low, high) in enumerate(zip(first.tolist(), behind.tolist(), strict=True)):
            for below in range(low, high):
                one, other = sorted((root(run), root(below)))
                parent[other] = one
        return np.array([root(run) for run in range(len(parent))], dtype=np.intp)
