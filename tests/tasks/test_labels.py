"""Labels of masks: hand-made ones, and random ones against a plain count that fills pixel by pixel."""

from collections import deque

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llava.errors import ConfigError, DataError
from llava.tasks.answers import PLACES
from llava.tasks.labels import BUILDING, ROAD, Labels, class_map, labels_from_mask, object_middles

Mask = npt.NDArray[np.uint8]


def empty(height: int = 256, width: int = 256) -> Mask:
    return np.zeros((height, width), dtype=np.uint8)


def drawn(*rows: str) -> Mask:
    """A mask from rows of ".", "r" and "b"."""
    return np.array([[".rb".index(sign) for sign in row] for row in rows], dtype=np.uint8)


# --- the plain twin ---------------------------------------------------------------------------------


def filled(hits: npt.NDArray[np.bool_], start: tuple[int, int], corners: bool) -> set[tuple[int, int]]:
    """The pixels that hang together with `start`."""
    steps = [(-1, 0), (1, 0), (0, -1), (0, 1)] + corners * [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    seen, todo = {start}, deque([start])
    while todo:
        row, column = todo.popleft()
        for down, right in steps:
            place = (row + down, column + right)
            inside = 0 <= place[0] < hits.shape[0] and 0 <= place[1] < hits.shape[1]
            if inside and place not in seen and hits[place] == hits[start]:
                seen.add(place)
                todo.append(place)
    return seen


def plain_objects(hits: npt.NDArray[np.bool_], min_area: int) -> list[set[tuple[int, int]]]:
    """Objects that touch what can be walked to from outside, as pixels of the mask padded by one."""
    hits = np.pad(hits, 1)
    outside = filled(hits, (0, 0), corners=False)
    left = {(row, column) for row, column in np.argwhere(hits).tolist()}
    found = []
    while left:
        part = filled(hits, min(left), corners=True)
        left -= part
        touches = any(
            (r + d, c + e) in outside for r, c in part for d, e in ((-1, 0), (1, 0), (0, -1), (0, 1))
        )
        if touches and len(part) >= min_area:
            found.append(part)
    return found


def plain_count(hits: npt.NDArray[np.bool_], min_area: int) -> int:
    return len(plain_objects(hits, min_area))


def plain_places(hits: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """By shares in float64; 5 % itself is met exactly by integers below."""
    height, width = hits.shape
    named = []
    for i in range(3):
        for j in range(3):
            cell = hits[
                int(i * height / 3) : int((i + 1) * height / 3), int(j * width / 3) : int((j + 1) * width / 3)
            ].astype(np.float64)
            if cell.size and cell.sum() / cell.size > 0.05:
                named.append(PLACES[3 * i + j])
    return tuple(named)


def plain_labels(mask: Mask, min_area: int = 1) -> Labels:
    return Labels(
        bool((mask > 0).any()),
        plain_count(mask == ROAD, min_area),
        plain_count(mask == BUILDING, min_area),
        plain_places(mask == ROAD),
        plain_places(mask == BUILDING),
    )


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=14), elements=st.integers(0, 2)),
    st.integers(1, 4),
)
def test_random_masks_give_what_the_plain_twin_gives(mask: Mask, min_area: int) -> None:
    assert labels_from_mask(mask, min_area) == plain_labels(mask, min_area)
    hits = mask == ROAD
    middles = [np.mean(sorted(part), axis=0) - 0.5 for part in plain_objects(hits, min_area)]
    wanted = np.array(middles).reshape(-1, 2) / hits.shape
    np.testing.assert_allclose(object_middles(hits, min_area), wanted, atol=1e-12)


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.9])
def test_noise_of_many_densities(share: float) -> None:
    hits = np.random.default_rng(int(100 * share)).random((61, 47)) < share
    mask = hits.astype(np.uint8) * BUILDING
    assert labels_from_mask(mask) == plain_labels(mask)


# --- by hand ----------------------------------------------------------------------------------------


def test_nothing() -> None:
    assert labels_from_mask(empty()) == Labels(False, 0, 0, (), ())


def test_five_percent_is_not_enough_and_one_pixel_more_is() -> None:
    mask = empty(60, 60)  # cells of 400 pixels
    mask[20:21, 20:40] = ROAD  # 20 of 400
    assert labels_from_mask(mask) == Labels(True, 1, 0, (), ())
    mask[21, 20] = ROAD
    assert labels_from_mask(mask) == Labels(True, 1, 0, ("center-center",), ())


def test_a_share_counts_one_class_at_a_time() -> None:
    mask = empty(60, 60)
    mask[0, :20], mask[1, :20] = ROAD, BUILDING
    assert labels_from_mask(mask) == Labels(True, 1, 1, (), ())


def test_neighbours_across_a_corner_are_one_object() -> None:
    assert labels_from_mask(drawn("b..", ".b.", "..b")).buildings == 1
    assert labels_from_mask(drawn("..b", ".b.", "b..")).buildings == 1
    assert labels_from_mask(drawn("b.b", "...", "b.b")).buildings == 4
    assert labels_from_mask(drawn("r.", ".b")) == plain_labels(drawn("r.", ".b"))


def test_what_lies_in_a_hole_is_no_further_object() -> None:
    ring = drawn("bbbbb", "b...b", "b.b.b", "b...b", "bbbbb")
    assert labels_from_mask(ring).buildings == 1
    of_roads = ring.copy()
    of_roads[2, 2] = ROAD  # another class is no part of the ring's matter
    assert (labels_from_mask(of_roads).buildings, labels_from_mask(of_roads).roads) == (1, 1)
    opened = ring.copy()
    opened[0, 2] = 0  # the hole is open to the outside now
    assert labels_from_mask(opened).buildings == 2
    corner = ring.copy()
    corner[0, 0] = 0  # open at a corner only: corners join objects, not what surrounds them
    assert labels_from_mask(corner).buildings == 1


def test_rings_in_rings() -> None:
    rows = ["bbbbbbb", "b.....b", "b.bbb.b", "b.b.b.b", "b.bbb.b", "b.....b", "bbbbbbb"]
    assert labels_from_mask(drawn(*rows)).buildings == 1


def test_shapes_that_join_late() -> None:
    assert labels_from_mask(drawn("r.r.r", "r.r.r", "rrrrr")).roads == 1
    assert labels_from_mask(drawn("rrrrr", "r...r", "r.r.r", "..r..", "rrr..")).roads == 1 + 1
    spiral = drawn("rrrrrr", ".....r", "rrrr.r", "r..r.r", "r....r", "rrrrrr")
    assert labels_from_mask(spiral).roads == 1


def test_small_objects_may_be_left_out() -> None:
    mask = drawn("b.bb", "....", "bb..", "b...")
    assert [labels_from_mask(mask, area).buildings for area in (1, 2, 3, 4)] == [3, 2, 1, 0]


BORDERS = (0, 85, 170, 256)


@pytest.mark.parametrize("place", PLACES)
def test_borders_of_a_tile_of_256(place: str) -> None:
    """Cells are cut at 0, 85, 170 and 256, and hold what is more than 5 % of them, to the pixel.

    The fewest pixels above 5 %, among them all of the cell's edge: where any border of it were a line further out or
    in, they would be too few. And the most pixels that are not above 5 %, none at the edge: where a border were a line
    further in, they would be enough.
    """
    row, column = divmod(PLACES.index(place), 3)
    cell = slice(*BORDERS[row : row + 2]), slice(*BORDERS[column : column + 2])
    height, width = (side.stop - side.start for side in cell)
    most = height * width // 20
    edge = np.ones((height, width), dtype=bool)
    edge[1:-1, 1:-1] = False
    inner = np.argwhere(~edge)
    enough, too_few = empty(), empty()
    enough[cell][edge] = ROAD
    enough[cell][tuple(inner[: most + 1 - edge.sum()].T)] = ROAD
    assert (enough == ROAD).sum() == most + 1
    assert labels_from_mask(enough).road_places == (place,)
    too_few[cell][tuple(inner[:most].T)] = BUILDING
    assert (too_few == BUILDING).sum() == most
    assert labels_from_mask(too_few).building_places == ()


def test_pictures_become_class_maps() -> None:
    grey = np.array([[0, 128, 255]], dtype=np.uint8)
    assert class_map(grey).tolist() == [[0, ROAD, BUILDING]]
    assert class_map(np.repeat(grey[..., None], 3, axis=2)).tolist() == [[0, ROAD, BUILDING]]
    colours = np.array([[[0, 0, 0, 9], [255, 255, 0, 9], [255, 0, 0, 9]]], dtype=np.uint8)
    assert class_map(colours).tolist() == [[0, ROAD, BUILDING]]
    with pytest.raises(DataError, match=r"\[7\] at row 0, column 1"):
        class_map(np.array([[0, 7]], dtype=np.uint8))
    with pytest.raises(DataError, match="this is"):
        class_map(np.zeros((2, 2, 2), dtype=np.uint8))


def test_what_is_no_class_map_is_refused() -> None:
    with pytest.raises(DataError, match=r"this holds \[128\]"):
        labels_from_mask(np.array([[0, 128]]))
    with pytest.raises(DataError, match=r"\[2, 2, 3\]"):
        labels_from_mask(np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="float64"):
        labels_from_mask(np.zeros((2, 2)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="min_area=0"):
        labels_from_mask(empty(3, 3), 0)
