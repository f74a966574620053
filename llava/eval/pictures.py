"""Pictures as a report carries them: shrunk, layers coloured, encoded for an `img` element."""

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from llava.data.images import load_image, load_mask, load_pair
from llava.errors import DataError

MAP_COLOUR = (255, 92, 0)
TRUTH_COLOUR = (0, 200, 255)
LAYER_LEVELS = 32
"""Steps of opacity of a layer; few steps make a small file."""
SHOWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
"""What can be linked; other files (TIFF) are embedded in any case."""


@dataclass(frozen=True)
class PairFiles:
    """Where the pictures of one pair are."""

    before: Path
    after: Path
    truth: Path | None = None
    """The true mask, 0 where nothing changed."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How pictures get into a report."""

    side: int
    """Pixels of the longer side of an embedded picture, at most."""
    quality: int = 78
    """Of the JPEGs, 1 to 95."""
    link_from: Path | None = None
    """Folder of the report: link photographs relative to it instead of embedding them."""


def encode_pair(files: PairFiles, maps: list[Image.Image | None], how: Encoding) -> dict[str, Any]:
    """One pair as the page reads it: `size` [width, height], and addresses of `before`, `after`, `maps`, `truth`.

    Embedded addresses are data URIs. Layers are always embedded: they are small, and have to be coloured.

    Args:
        files: the pair's files.
        maps: a change map for each run, grey of any size, bright where the model sees change.
        how: sizes, and whether photographs are linked.

    Raises:
        ImageError: a file that cannot be read; it is named.
        DataError: a link that cannot be relative to the report.
    """
    linked = how.link_from is not None and _can_be_linked(files)
    if linked:
        assert how.link_from is not None
        before = load_image(
            files.before
        )  # read it all the same: a broken file is found here, not by the reader
        load_image(files.after)
        sources = [_relative(path, how.link_from) for path in (files.before, files.after)]
        size = before.size
        before.thumbnail((how.side, how.side))
        frame = before.size
    else:
        before, after = load_pair(files.before, files.after)
        before = _shrunk(before, how.side)
        size = frame = before.size
        # One frame for both dates, or the wipe would compare different places.
        after = after.convert("RGB").resize(frame, Image.Resampling.BICUBIC)
        sources = [_jpeg(picture, how.quality) for picture in (before, after)]
    return {
        "size": list(size),
        "before": sources[0],
        "after": sources[1],
        "maps": [None if grey is None else layer(grey, frame, MAP_COLOUR) for grey in maps],
        "truth": None
        if files.truth is None
        else layer(_outline(load_mask(files.truth), frame), frame, TRUTH_COLOUR),
    }


def layer(grey: Image.Image, size: tuple[int, int], colour: tuple[int, int, int]) -> str:
    """A one-colour picture whose opacity follows the grey value; shrunk to `size`, never enlarged."""
    levels = grey.convert("L")
    if levels.width > size[0] or levels.height > size[1]:
        levels = levels.resize(size, Image.Resampling.BOX)
    levels = levels.point(lambda value: value * LAYER_LEVELS // 256)
    picture = Image.frombytes("P", levels.size, levels.tobytes())
    picture.putpalette(bytes(colour) * LAYER_LEVELS)
    opacity = bytes(round(205 * level / (LAYER_LEVELS - 1)) for level in range(LAYER_LEVELS))
    return _data_uri(picture, "PNG", optimize=True, transparency=opacity)


def _outline(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask as bright edges around a faint inside, so that the change map stays visible under it."""
    levels = np.asarray(mask if mask.mode == "I" else mask.convert("L"))  # [H, W]
    inside = Image.fromarray((levels > 0).astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    edge = ImageChops.difference(inside, inside.filter(ImageFilter.MinFilter(5)))
    return ImageChops.lighter(edge, inside.point(lambda value: value // 5))


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((side, side))
    return image


def _can_be_linked(files: PairFiles) -> bool:
    return all(path.suffix.lower() in SHOWN_BY_BROWSERS for path in (files.before, files.after))


def _relative(path: Path, folder: Path) -> str:
    try:
        relative = os.path.relpath(path.resolve(), folder.resolve())
    except ValueError as error:  # another drive
        raise DataError(
            f"{path} cannot be linked from {folder}: {error}; embed the images instead"
        ) from error
    return quote(Path(relative).as_posix())


def _jpeg(image: Image.Image, quality: int) -> str:
    return _data_uri(image, "JPEG", quality=quality, optimize=True)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
