"""Materials and their colours, in the green season and in the dry one, and the table that turns them into pixels."""

import numpy as np

MASK_COLOURS = np.array([(0, 0, 0), (255, 255, 0), (255, 0, 0)], dtype=np.uint8)
"""LEVIR-MCI's colours of none, road, building in masks."""
GROUND = "ground"
"""Class of what is part of the ground, whichever that is in a scene."""

# name: (green season, dry season, class)
_TABLE: tuple[tuple[str, tuple[int, int, int], tuple[int, int, int], str], ...] = (
    ("soil", (146, 122, 98), (154, 130, 104), "bareland"),
    ("soil_rough", (128, 108, 86), (140, 117, 93), "bareland"),
    ("grass", (86, 108, 64), (124, 122, 78), "grass"),
    ("grass_rough", (74, 96, 58), (114, 109, 70), "grass"),
    ("sand", (208, 186, 146), (212, 190, 152), "desert"),
    ("sand_rough", (194, 170, 130), (200, 176, 136), "desert"),
    ("verge", (150, 138, 112), (156, 142, 114), GROUND),
    ("trail", (164, 148, 120), (168, 152, 122), GROUND),
    ("yard", (98, 118, 70), (126, 124, 82), GROUND),
    ("fence", (118, 108, 90), (124, 112, 92), GROUND),
    ("drive", (170, 166, 158), (172, 168, 158), GROUND),
    ("leaf", (42, 72, 38), (66, 66, 36), "trees"),
    ("leaf_warm", (54, 80, 38), (80, 70, 36), "trees"),
    ("water", (40, 66, 84), (44, 68, 80), "water"),
    ("water_green", (48, 80, 76), (50, 76, 70), "water"),
    ("shore", (150, 142, 116), (156, 146, 120), "water"),
    ("crop", (88, 132, 56), (118, 136, 60), "field"),
    ("crop_gold", (190, 164, 78), (196, 170, 88), "field"),
    ("asphalt", (96, 96, 100), (98, 98, 101), "road"),
    ("concrete", (168, 166, 160), (170, 167, 160), "road"),
    ("line", (226, 226, 220), (226, 226, 220), "road"),
    ("kerb", (188, 184, 174), (188, 184, 174), "road"),
    ("lot", (82, 83, 88), (84, 84, 88), "parking lot"),
    ("lot_line", (212, 212, 206), (212, 212, 206), "parking lot"),
    ("car_white", (232, 232, 230), (232, 232, 230), "parking lot"),
    ("car_red", (168, 44, 40), (168, 44, 40), "parking lot"),
    ("car_blue", (58, 84, 142), (58, 84, 142), "parking lot"),
    ("car_silver", (158, 162, 168), (158, 162, 168), "parking lot"),
    ("car_black", (34, 35, 38), (34, 35, 38), "parking lot"),
    ("tile_red", (172, 82, 62), (172, 82, 62), "house"),
    ("tile_grey", (98, 98, 106), (98, 98, 106), "house"),
    ("tile_white", (206, 204, 198), (206, 204, 198), "house"),
    ("tile_blue", (84, 108, 148), (84, 108, 148), "house"),
    ("chimney", (212, 206, 196), (212, 206, 196), "house"),
    ("roof_white", (222, 222, 220), (222, 222, 220), "building"),
    ("roof_grey", (112, 115, 122), (112, 115, 122), "building"),
    ("roof_blue", (86, 124, 176), (86, 124, 176), "building"),
    ("roof_edge", (240, 240, 238), (240, 240, 238), "building"),
    ("roof_unit", (128, 132, 138), (128, 132, 138), "building"),
    ("track", (172, 78, 58), (170, 80, 62), "playground"),
    ("turf", (70, 136, 66), (84, 138, 70), "playground"),
    ("paint", (234, 232, 226), (234, 232, 226), "playground"),
)  # fmt: skip

MATERIAL = {name: number for number, (name, _, _, _) in enumerate(_TABLE, start=1)}
"""Number of each material; 0 is no material."""

SHADOW = 1 << 14
"""Set in a pixel's code where it lies in shadow. A code is material << 8 | shade, shade 128 being the plain colour."""


def code(name: str, shade: int = 128) -> int:
    """A pixel's code."""
    return MATERIAL[name] << 8 | shade


def class_table(classes: tuple[str, ...], ground: str) -> np.ndarray:
    """Class id by material number on ground of that class: uint8 [materials + 1]."""
    kinds = [ground if kind == GROUND else kind for _, _, _, kind in _TABLE]
    return np.array([0] + [classes.index(kind) for kind in kinds], dtype=np.uint8)


_GREEN = np.array([(0, 0, 0)] + [green for _, green, _, _ in _TABLE], dtype=np.int32)
_DRY = np.array([(0, 0, 0)] + [dry for _, _, dry, _ in _TABLE], dtype=np.int32)
_SHADES = np.arange(256, dtype=np.int32)


def colour_table(season: int, gain: tuple[int, int, int], lift: int, haze: int) -> np.ndarray:
    """Packed colours by code, as one date's light shows them: uint32 [2 * SHADOW], red in the lowest byte.

    Args:
        season: 0 (green) .. 256 (dry).
        gain: brightness of red, green and blue in 1/256.
        lift: added to every colour.
        haze: 0 .. 256, how much of everything is white air.
    """
    plain = (_GREEN * (256 - season) + _DRY * season) >> 8  # [M, 3]
    lit = (plain[:, None] * _SHADES[None, :, None]) >> 7  # [M, 256, 3]
    table = np.empty((2, SHADOW >> 8, 256, 3), dtype=np.int32)
    count = len(plain)
    table[:, count:] = 0
    table[0, :count] = lit
    table[1, :count] = (lit * np.array((112, 118, 132), dtype=np.int32)) >> 8
    part = table[:, :count]
    part *= np.array(gain, dtype=np.int32)
    part >>= 8
    part += lift
    part += ((np.array((206, 212, 222), dtype=np.int32) - part) * haze) >> 8
    np.clip(part, 0, 255, out=part)
    packed = table[..., 0] | table[..., 1] << 8 | table[..., 2] << 16
    return packed.astype(np.uint32).reshape(-1)
