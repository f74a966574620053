"""From a plan to the pixels of both dates and the truth about them.

Each date is a map of codes (material, shade, shadow) laid on the same ground, turned into colours by a table that holds
the date's season, light and haze; then come displacement, blur and noise. All of it in whole numbers.
"""

from dataclasses import dataclass

import numpy as np

from llava.synth.canvas import PAD, SHIFT, Canvas
from llava.synth.dice import Dice
from llava.synth.paint import HEIGHTS, Stamp, draw, surface
from llava.synth.palette import MATERIAL, SHADOW, class_table, colour_table
from llava.synth.scene import CLASSES, DATES, Date, Scene, Thing
from llava.synth.shapes import CELLS, Patch

# Shapes: N side of the canvas (with margin), S side of the image.

GROUNDS = {
    "grass": ("grass", "grass_rough"),
    "bareland": ("soil", "soil_rough"),
    "desert": ("sand", "sand_rough"),
}
ORDER = (
    *("trail", "yard", "drive", "field", "water", "playground", "parking lot", "road"),
    *("trees", "tree", "building", "house"),
)
"""From the lowest to the highest."""
_CLASS = {ground: class_table(CLASSES, ground) for ground in GROUNDS}


@dataclass(frozen=True, slots=True)
class Look:
    """How a date was seen: what differs between two photographs of one unchanged place."""

    season: int
    gain: tuple[int, int, int]
    lift: int
    haze: int
    shift: tuple[int, int]
    shadow: int
    blur: int
    noise: int
    veil: int

    @classmethod
    def draw(cls, dice: Dice, *, displaced: bool) -> "Look":
        """A random look; only the second date is displaced against the first, which is the frame of the truth."""
        light = dice.between(214, 288)
        gain = tuple(light + dice.between(-12, 12) for _ in range(3))
        shift = tuple(dice.between(-SHIFT, SHIFT) if displaced else 0 for _ in range(2))
        return cls(
            season=dice.below(257),
            gain=(gain[0], gain[1], gain[2]),
            lift=dice.between(-10, 10),
            haze=dice.weighted([(0, 40), (18, 25), (36, 20), (54, 15)]),
            shift=(shift[0], shift[1]),
            shadow=dice.between(6, 10),
            blur=dice.weighted([(1, 60), (2, 40)]),
            noise=dice.weighted([(8, 40), (14, 40), (20, 20)]),
            veil=dice.between(-24, 24),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """Both dates in pixels: images uint8 [S, S, 3], class maps uint8 [S, S], and each thing's box by its id."""

    images: tuple[np.ndarray, np.ndarray]
    classes: tuple[np.ndarray, np.ndarray]
    boxes: dict[int, tuple[int, int, int, int]]


class _Woods:
    """The canopy over the scene, and which of its crowns stand on given coarse cells."""

    def __init__(self, scene: Scene, canvas: Canvas) -> None:
        canopy = canvas.canopies[scene.sun]
        oy, ox = scene.looks[0] * canvas.size >> 16, scene.looks[1] * canvas.size >> 16
        side = canvas.side
        if side + max(oy, ox) > 2 * canvas.size:
            oy, ox = min(oy, 2 * canvas.size - side), min(ox, 2 * canvas.size - side)
        window = (slice(oy, oy + side), slice(ox, ox + side))
        shade = canopy.code[window]
        self.present = shade > 0
        leaf = np.where(
            canopy.warm[window], np.uint16(MATERIAL["leaf_warm"] << 8), np.uint16(MATERIAL["leaf"] << 8)
        )
        self.codes = leaf | shade
        base = 2 * canvas.size - canvas.margin
        row = canvas.cell[canopy.row[window].astype(np.int32) + (base - oy)]
        column = canvas.cell[canopy.column[window].astype(np.int32) + (base - ox)]
        self.cell = row * (CELLS + 2 * PAD) + column

    def mask(self, patch: Patch) -> np.ndarray:
        """Pixels of the crowns that stand on the patch: bool [N, N]."""
        padded = np.pad(patch.cells, PAD, mode="edge").reshape(-1)
        return padded.take(self.cell) & self.present


def render(scene: Scene, canvas: Canvas, looks: tuple[Look, Look], noise: tuple[Dice, Dice]) -> Rendered:
    """Draw both dates."""
    ground = _ground(scene, canvas)
    stamps: dict[int, Stamp] = {}
    trees: dict[int, np.ndarray] = {}
    woods = _Woods(scene, canvas) if any(isinstance(thing.shape, Patch) for thing in scene.things) else None
    for thing in scene.things:
        if isinstance(thing.shape, Patch):
            assert woods is not None
            trees[thing.id] = woods.mask(thing.shape)
        else:
            stamp = draw(thing, canvas, scene.sun)
            if stamp is not None:
                stamps[thing.id] = stamp
    images, classes = [], []
    for date, look, dice in zip(DATES, looks, noise, strict=True):
        codes, shadow = _date(scene, canvas, date, ground, stamps, trees, woods, look)
        inner = slice(canvas.margin, canvas.margin + canvas.size)
        classes.append(_CLASS[scene.ground].take(codes[inner, inner] >> 8))
        codes[shadow] |= SHADOW
        images.append(_see(codes, scene, canvas, look, dice))
    boxes = _boxes(canvas, stamps, trees)
    return Rendered((images[0], images[1]), (classes[0], classes[1]), boxes)


def _ground(scene: Scene, canvas: Canvas) -> np.ndarray:
    """Codes of the bare ground: two tones in patches, hills and grain; uint16 [N, N]."""
    looks, side = scene.looks, canvas.side

    def window(k: int, texture: np.ndarray) -> np.ndarray:
        room = texture.shape[0] - side
        y, x = looks[k] * room >> 16, looks[k + 1] * room >> 16
        cut = texture[y : y + side, x : x + side]
        return cut.T if looks[k] & 1 else cut[::-1] if looks[k + 1] & 1 else cut

    broad, middle, fine = (window(k + 2, texture) for k, texture in enumerate(canvas.textures))
    plain, rough = GROUNDS[scene.ground]
    shade = 128 + ((broad * 5 + middle + fine * 2 - 1024) >> 5)
    patches = broad * 2 + middle + (fine >> 1) > 500 + (looks[6] & 63)
    base = np.where(patches, np.int16(MATERIAL[rough]), np.int16(MATERIAL[plain]))
    return ((base << 8) | shade).astype(np.uint16)


def _date(
    scene: Scene,
    canvas: Canvas,
    date: Date,
    ground: np.ndarray,
    stamps: dict[int, Stamp],
    trees: dict[int, np.ndarray],
    woods: _Woods | None,
    look: Look,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint16 [N, N] and shadow bool [N, N] of one date."""
    codes = ground.copy()
    shadow = np.zeros(codes.shape, dtype=bool)
    things = sorted(
        (thing for thing in scene.things if thing.at(date)), key=lambda thing: ORDER.index(thing.name)
    )
    roads = [stamps[thing.id] for thing in things if thing.name == "road" and thing.id in stamps]
    for thing in things:
        if thing.id in trees:
            assert woods is not None
            mask = trees[thing.id]
            _cast(shadow, mask, 0, 0, scene.sun, max(canvas.pixels(look.shadow * 3 // 8), 1))
            shadow &= ~mask
            np.copyto(codes, woods.codes, where=mask)
        elif thing.id in stamps:
            stamp = stamps[thing.id]
            window = stamp.window
            if thing.name in HEIGHTS:
                fall = canvas.pixels(HEIGHTS[thing.name] * look.shadow // 8)
                for reach in (fall // 2, fall):
                    _cast(shadow, stamp.mask, stamp.y, stamp.x, scene.sun, reach)
                shadow[window] &= ~stamp.mask
            np.copyto(codes[window], stamp.codes, where=stamp.mask)
            if len(roads) > 1 and stamp is roads[-1]:  # no kerbs or lines across a junction
                for road in roads:
                    np.copyto(codes[road.window], road.codes, where=surface(road.codes))
    return codes, shadow


def _cast(shadow: np.ndarray, mask: np.ndarray, y: int, x: int, sun: tuple[int, int], reach: int) -> None:
    """Add the shadow of `mask`, which lies at (y, x), moved `reach` pixels away from the sun."""
    side = shadow.shape[0]
    y, x = y + sun[1] * reach, x + sun[0] * reach
    height, width = mask.shape
    y0, x0 = max(y, 0), max(x, 0)
    y1, x1 = min(y + height, side), min(x + width, side)
    if y0 < y1 and x0 < x1:
        shadow[y0:y1, x0:x1] |= mask[y0 - y : y1 - y, x0 - x : x1 - x]


def _see(codes: np.ndarray, scene: Scene, canvas: Canvas, look: Look, dice: Dice) -> np.ndarray:
    """The photograph: colours, displacement, blur, haze that drifts, noise; uint8 [S, S, 3]."""
    size, margin = canvas.size, canvas.margin
    table = colour_table(look.season, look.gain, look.lift, look.haze)
    dy, dx = (canvas.pixels(abs(step)) * (1 if step > 0 else -1) for step in look.shift)
    top, left = margin + dy - 1, margin + dx - 1
    packed = table.take(codes[top : top + size + 2, left : left + size + 2])
    rgb = (
        packed.astype("<u4", copy=False)
        .view(np.uint8)
        .reshape(size + 2, size + 2, 4)[:, :, :3]
        .astype(np.int16)
    )
    weight = (0, 6, 2)[look.blur]  # of the pixel itself, its neighbours having 1 each
    rgb = rgb[:, :-2] + rgb[:, 1:-1] * weight + rgb[:, 2:]
    rgb = rgb[:-2] + rgb[1:-1] * weight + rgb[2:]
    rgb >>= (0, 6, 4)[look.blur]
    y, x = scene.looks[6] * (size + margin) >> 16, scene.looks[7] * (size + margin) >> 16
    rgb += canvas.grain[y : y + size, x : x + size]
    room = canvas.textures[0].shape[0] - size
    y, x = dice.below(room), dice.below(room)
    rgb += (((canvas.textures[0][y : y + size, x : x + size] - 128) * look.veil) >> 8)[:, :, None]
    dots = dice.bytes(size * size * 3).reshape(size, size, 3)
    speckle = (dots & 15).astype(np.int16) + (dots >> 4)
    rgb += ((speckle - 15) * look.noise) >> 5
    np.clip(rgb, 0, 255, out=rgb)
    return rgb.astype(np.uint8)


def _boxes(
    canvas: Canvas, stamps: dict[int, Stamp], trees: dict[int, np.ndarray]
) -> dict[int, tuple[int, int, int, int]]:
    """Pixel boxes (x0, y0, x1, y1), ends excluded, of what is visible in the image."""
    found = {}
    masks = [(key, stamp.mask, stamp.y, stamp.x) for key, stamp in stamps.items()]
    masks += [(key, mask, 0, 0) for key, mask in trees.items()]
    low, high = canvas.margin, canvas.margin + canvas.size
    for key, mask, y, x in masks:
        top, left = max(low - y, 0), max(low - x, 0)
        seen = mask[top : max(high - y, 0), left : max(high - x, 0)]
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        if len(rows):
            y0, x0 = y + top - low, x + left - low
            found[key] = (
                int(columns[0]) + x0,
                int(rows[0]) + y0,
                int(columns[-1]) + 1 + x0,
                int(rows[-1]) + 1 + y0,
            )
    return found


def visible(things: tuple[Thing, ...], boxes: dict[int, tuple[int, int, int, int]]) -> list[Thing]:
    """Things worth naming: those of a class of their own with pixels in the image; single trees are left out."""
    return [thing for thing in things if thing.id in boxes and thing.name in CLASSES]
