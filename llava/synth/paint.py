"""How each kind of thing looks from above: small patches of pixel codes, drawn once and laid into both dates."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llava.synth.canvas import Canvas
from llava.synth.palette import MATERIAL, code
from llava.synth.scene import Thing
from llava.synth.shapes import FINE, Arc, Blob, Block, Line, box, cover, direction, local, ring

# Shapes: h, w pixels of a patch. Codes are uint16, 0 where nothing is drawn.

HEIGHTS = {"house": 6, "building": 9, "tree": 3}
"""How far shadows fall, in units."""


@dataclass(frozen=True, slots=True, eq=False)
class Stamp:
    """A drawn thing: where its patch lies on the canvas, its codes [h, w] and what they cover [h, w]."""

    y: int
    x: int
    codes: np.ndarray
    mask: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        """The canvas's pixels under the patch."""
        height, width = self.mask.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)


@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """The pixels around a block in its own axes: u along, v across, int32 [h, w], fine steps."""

    u: np.ndarray
    v: np.ndarray
    hu: int
    hv: int
    sun: tuple[int, int]
    """The sun's direction in the block's axes, times 1024."""

    def inside(self) -> np.ndarray:
        return (np.abs(self.u) <= self.hu) & (np.abs(self.v) <= self.hv)


def draw(thing: Thing, canvas: Canvas, sun: tuple[int, int]) -> Stamp | None:
    """The thing's stamp, or None where it lies outside the canvas; trees are drawn by the renderer."""
    bounds = box(thing.shape, 1)
    if bounds is None:
        y0 = x0 = 0
        y1 = x1 = canvas.side
    else:
        x0, y0, x1, y1 = (
            min(max(edge * canvas.size // 256 + canvas.margin + (k > 1), 0), canvas.side)
            for k, edge in enumerate(bounds)
        )
        if x0 >= x1 or y0 >= y1:
            return None
    x, y = canvas.at[x0:x1], canvas.at[y0:y1]
    shape = thing.shape
    if isinstance(shape, Line | Arc):
        codes = _road(thing, shape, x, y)
    elif isinstance(shape, Blob):
        codes = _pond(thing, shape, x, y)
    else:
        assert isinstance(shape, Block)
        u, v = local(x, y, shape.cx, shape.cy, shape.turn)
        c, s = direction(shape.turn)
        to_sun = (-(sun[0] * c + sun[1] * s) * 5 // 7, -(sun[1] * c - sun[0] * s) * 5 // 7)
        codes = _DRAWN[thing.name](thing, Spot(u, v, shape.hu * FINE, shape.hv * FINE, to_sun))
    return Stamp(y0, x0, codes, codes > 0)


def _road(thing: Thing, shape: Line | Arc, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A strip of asphalt or concrete with kerbs; asphalt has a dashed middle line."""
    dark = thing.style == 0
    if isinstance(shape, Line):
        along, across = local(x, y, shape.cx, shape.cy, shape.turn)
    else:
        across = ring(shape, x, y)
        along = None
    off = np.abs(across)
    if thing.name == "trail":
        return np.where(off <= shape.half, np.uint16(code("trail", 120)), np.uint16(0))
    codes = np.where(off <= shape.half, np.uint16(code("asphalt" if dark else "concrete")), np.uint16(0))
    codes[(off > shape.half) & (off <= shape.half + 26)] = code("verge", 120)
    codes[(off <= shape.half) & (off > shape.half - 20)] = code("kerb", 128 if dark else 116)
    if dark:
        middle = off <= 10
        if along is not None:
            middle &= (along & 255) < 150
        codes[middle] = code("line")
    return codes


def _street(thing: Thing, spot: Spot) -> np.ndarray:
    """A road that ends within the scene, drawn like the endless ones, but without a verge to lay over their kerbs."""
    dark, inside, off = thing.style == 0, spot.inside(), np.abs(spot.v)
    codes = np.where(inside, np.uint16(code("asphalt" if dark else "concrete")), np.uint16(0))
    codes[inside & (off > spot.hv - 20)] = code("kerb", 128 if dark else 116)
    if dark:
        codes[inside & (off <= 10) & ((spot.u & 255) < 150)] = code("line")
    return codes


def surface(codes: np.ndarray) -> np.ndarray:
    """Where a road's stamp shows its driving surface: bool [h, w]."""
    material = codes >> 8
    return (material == MATERIAL["asphalt"]) | (material == MATERIAL["concrete"])


def _yard(thing: Thing, spot: Spot) -> np.ndarray:
    """A fenced plot, a little greener than the ground."""
    inside = spot.inside()
    edge = (np.abs(spot.u) > spot.hu - 14) | (np.abs(spot.v) > spot.hv - 14)
    codes = np.where(inside, np.uint16(code("yard", 112 + thing.seed % 24)), np.uint16(0))
    codes[inside & edge] = code("fence", 104)
    return codes


def _drive(thing: Thing, spot: Spot) -> np.ndarray:
    """A paved way from the road to a house."""
    return np.where(spot.inside(), np.uint16(code("drive", 118)), np.uint16(0))


def _tree(thing: Thing, spot: Spot) -> np.ndarray:
    """One crown with an uneven edge, bright where it faces the sun."""
    u, v, radius = spot.u, spot.v, spot.hu
    square = u * u + v * v + (u * v * (thing.seed % 5 - 2) >> 2)
    light = 112 + thing.seed % 24 + (u * spot.sun[0] + v * spot.sun[1]) * 34 // (radius * 724)
    leaf = MATERIAL["leaf_warm" if thing.seed & 64 else "leaf"] << 8
    return np.where(square <= radius * radius, np.clip(light, 40, 200) | leaf, 0).astype(np.uint16)


def _pond(thing: Thing, shape: Blob, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Water with a pale shore, a little lighter towards the edge."""
    body = cover(shape, x, y)
    inner = cover(shape, x, y, -3)
    deep = cover(shape, x, y, -9)
    water = "water" if thing.seed % 3 else "water_green"
    codes = np.where(body, np.uint16(code("shore")), np.uint16(0))
    codes[inner] = code(water, 138)
    codes[deep] = code(water, 124)
    return codes


ROOFS = ("tile_red", "tile_grey", "tile_white", "tile_blue")


def _house(thing: Thing, spot: Spot) -> np.ndarray:
    """A pitched roof: gabled, hipped, or with a wing; each side lit by the sun it faces."""
    u, v = spot.u, spot.v
    kind = thing.seed % 3
    to_u, to_v = spot.sun
    step = 48  # brightness of a side that faces the sun
    shade_u = 128 + np.where(u > 0, to_u, -to_u) * step // 1024
    shade_v = 128 + np.where(v > 0, to_v, -to_v) * step // 1024
    rise_u, rise_v = spot.hu - np.abs(u), spot.hv - np.abs(v)
    if kind == 0:
        inside, shade = (rise_u >= 0) & (rise_v >= 0), shade_v
    elif kind == 1:
        inside = (rise_u >= 0) & (rise_v >= 0)
        shade = np.where(rise_u < rise_v, shade_u, shade_v)
    else:
        lean = spot.hv // 5 * (1 if thing.seed & 8 else -1)
        main = spot.hv - abs(lean) - np.abs(v - lean)  # the long roof, moved aside to let the wing stand out
        at = spot.hu * (2 if thing.seed & 16 else -2) // 5
        wing = spot.hu * 2 // 5 - np.abs(u - at)
        in_main, in_wing = (main >= 0) & (rise_u >= 0), (wing >= 0) & (rise_v >= 0)
        inside = in_main | in_wing
        on_wing = in_wing & ((wing > main) | ~in_main)
        side_v = 128 + np.where(v > lean, to_v, -to_v) * step // 1024
        side_u = 128 + np.where(u > at, to_u, -to_u) * step // 1024
        shade = np.where(on_wing, side_u, side_v)
    shade = shade + ((v >> 5) & 1) * 5
    roof = MATERIAL[ROOFS[thing.style]] << 8
    codes = np.where(inside, np.clip(shade, 40, 210) | roof, 0).astype(np.uint16)
    if thing.seed & 32:
        codes[(np.abs(u - spot.hu // 2) < 26) & (np.abs(v - spot.hv // 3) < 22) & inside] = code("chimney")
    return codes


FLAT_ROOFS = ("roof_white", "roof_blue", "roof_grey")


def _building(thing: Thing, spot: Spot) -> np.ndarray:
    """A large flat roof: bright parapet, sheet seams, units for air, and sometimes a notched corner."""
    u, v = spot.u + spot.hu, spot.v  # u from the end that stays when the building grows
    inside = spot.inside()
    if thing.seed & 1 and spot.hu > 28 * FINE:
        inside &= ~((u > 2 * spot.hu * 3 // 5) & (v > spot.hv // 5))
    roof = FLAT_ROOFS[thing.style]
    seams = 126 - ((u % 96 < 14) * 10)
    if thing.seed & 2:  # a shallow ridge along the middle
        seams = seams + np.where(v > 0, spot.sun[1], -spot.sun[1]) * 16 // 1024
    codes = np.where(inside, seams | MATERIAL[roof] << 8, 0).astype(np.uint16)
    edge = inside & ((np.abs(spot.u) > spot.hu - 20) | (np.abs(v) > spot.hv - 20))
    codes[edge] = code("roof_edge", 118)
    places = (thing.seed >> 4) & 255
    unit = ((u >> 8) * 5 + ((v + 8192) >> 8) * 3 + places) % 7 == 0
    codes[unit & inside & ~edge & ((u & 255) > 120) & (((v + 8192) & 255) > 140)] = code("roof_unit")
    return codes


CARS = ("car_white", "car_red", "car_blue", "car_silver", "car_black", "car_white", "car_silver", "lot")


def _parking_lot(thing: Thing, spot: Spot) -> np.ndarray:
    """Rows of marked stalls with cars, aisles between them."""
    inside = spot.inside()
    u, v = spot.u + spot.hu, spot.v + spot.hv
    codes = np.where(inside, np.uint16(code("lot")), np.uint16(0))
    codes[inside & ((np.abs(spot.u) > spot.hu - 18) | (np.abs(spot.v) > spot.hv - 18))] = code(
        "lot_line", 104
    )
    lane, stall = 18 * FINE, 96
    row, in_row = v // lane, v % lane
    stalls = inside & (in_row < 11 * FINE) & (np.abs(spot.u) < spot.hu - 60) & (np.abs(spot.v) < spot.hv - 18)
    slot, in_slot = u // stall, u % stall
    codes[stalls & (in_slot < 13)] = code("lot_line")
    number = (row * 37 + slot) & 255
    mixed = [(thing.seed ^ k * 2654435761) * 40503 >> 16 & 0xFFFF for k in range(256)]
    cars = np.array([code(CARS[number % len(CARS)]) for number in mixed], dtype=np.uint16)
    body = stalls & (in_slot > 26) & (in_slot < 84) & (in_row > 24) & (in_row < 10 * FINE - 8)
    codes[body] = cars[number[body]]
    return codes


def _field(thing: Thing, spot: Spot) -> np.ndarray:
    """A crop in furrows along or across the field, with a bare edge."""
    inside = spot.inside()
    along = spot.v if thing.seed & 1 else spot.u
    furrow = (along + 8192) % 112
    shade = 106 + np.abs(furrow - 56) * 40 // 56
    crop = ("crop", "crop_gold")[thing.style]
    codes = np.where(inside, shade | MATERIAL[crop] << 8, 0).astype(np.uint16)
    codes[inside & ((np.abs(spot.u) > spot.hu - 16) | (np.abs(spot.v) > spot.hv - 16))] = code(crop, 100)
    return codes


def _playground(thing: Thing, spot: Spot) -> np.ndarray:
    """A running track around a lawn with a marked pitch."""
    straight = max(spot.hu - spot.hv, 0)
    past = np.maximum(np.abs(spot.u) - straight, 0)
    square = past * past + spot.v * spot.v

    def within(radius: int) -> np.ndarray:
        return square <= radius * radius

    codes = np.where(within(spot.hv), np.uint16(code("track")), np.uint16(0))
    for lane in (4, 7):
        codes[within(spot.hv - lane * 32 + 8) & ~within(spot.hv - lane * 32 - 4)] = code("paint", 118)
    lawn = within(spot.hv * 5 // 8)
    stripes = ((spot.u + 8192) // 160 & 1) * 10
    codes[lawn] = (stripes[lawn] + code("turf", 122)).astype(np.uint16)
    pitch = lawn & ((np.abs(spot.u) < 10) | (np.abs(square - (spot.hv // 4) ** 2) < spot.hv * 6))
    codes[pitch] = code("paint")
    return codes


_DRAWN: dict[str, Callable[[Thing, Spot], np.ndarray]] = {
    "tree": _tree,
    "yard": _yard,
    "drive": _drive,
    "house": _house,
    "building": _building,
    "road": _street,
    "parking lot": _parking_lot,
    "field": _field,
    "playground": _playground,
}
