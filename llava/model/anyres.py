"""Any-resolution views of one image: which grid of tiles fits, how many tokens it gives, and their order.

LLaVA-OneVision's way (arXiv 2408.03326, "anyres_max_9"): the encoder sees the whole image once and then, at a
higher resolution, the tiles of a grid. The features of the tiles are laid out as one map, cropped to the
image's own shape, scaled down if there are too many, and written row by row with a newline token after each.

Legend: T views (1 whole + tiles), N = s * s tokens a view (s the side), D width. Sizes are (height, width);
`image_size` is the side in pixels of what the encoder takes, and of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llava.errors import ConfigError

Size = tuple[int, int]


def default_pinpoints(image_size: int, most: int = 6) -> list[Size]:
    """LLaVA-OneVision's candidates: every grid from 1 x 1 to `most` x `most` tiles, in pixels."""
    counts = range(1, most + 1)
    return [(rows * image_size, columns * image_size) for rows in counts for columns in counts]


def select_resolution(size: Size, candidates: Sequence[Size]) -> Size:
    """The candidate that keeps most pixels of the image and, among those, wastes least; first of equals."""
    if not candidates:
        raise ConfigError("grid_pinpoints is empty; give at least one (height, width) in pixels")
    height, width = size

    def kept_and_unused(candidate: Size) -> tuple[int, int]:
        scale = min(candidate[1] / width, candidate[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - candidate[0] * candidate[1]

    return max(candidates, key=kept_and_unused)


@dataclass(frozen=True)
class _Layout:
    """What becomes of the map of tile features: [rows * s, columns * s] is cropped, then scaled."""

    rows: int
    columns: int
    crop_top: int
    crop_left: int
    height: int
    width: int
    scaled: Size | None


def _layout(
    size: Size, image_size: int, side: int, max_tiles: int, candidates: Sequence[Size] | None
) -> _Layout:
    target = select_resolution(size, candidates or default_pinpoints(image_size))
    rows, columns = target[0] // image_size, target[1] // image_size
    height, width = rows * side, columns * side
    top = left = 0
    # The picture fills one axis of the map. Rounding to 7 places makes 26.9999999 rows 27, as in training.
    if size[1] / size[0] > width / height:
        top = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        height -= 2 * top
    else:
        left = (width - int(round(size[1] * (height / size[0]), 7))) // 2
        width -= 2 * left
    ratio = math.sqrt(height * width / (max_tiles * side**2))
    # Up to a tenth too many a side is let through, as in training.
    scaled = (max(1, int(height // ratio)), max(1, int(width // ratio))) if ratio > 1.1 else None
    return _Layout(rows, columns, top, left, height, width, scaled)


def anyres_tile_count(size: Size, image_size: int, candidates: Sequence[Size] | None = None) -> int:
    """Views T of an image of `size`: the whole and its tiles; arguments as in `anyres_token_count`."""
    height, width = select_resolution(size, candidates or default_pinpoints(image_size))
    return 1 + (height // image_size) * (width // image_size)


def anyres_token_count(
    size: Size, image_size: int, tokens: int, max_tiles: int = 9, candidates: Sequence[Size] | None = None
) -> int:
    """Tokens the language model gets for one image.

    Args:
        size: (height, width) of the image itself, in pixels.
        image_size: side of one view in pixels (384).
        tokens: N, the tokens of one view (729), a square number.
        max_tiles: the map of tiles is scaled down to about `max_tiles * tokens` tokens.
        candidates: grid resolutions (height, width) in pixels, multiples of `image_size`; by default all
            grids from 1 x 1 to 6 x 6.

    Returns:
        N for the whole view, then the cropped (and scaled) map with one newline token a row.
    """
    layout = _layout(size, image_size, _side(tokens), max_tiles, candidates)
    height, width = layout.scaled or (layout.height, layout.width)
    return tokens + height * (width + 1)


def arrange_anyres(
    features: Tensor,
    size: Size,
    newline: Tensor,
    *,
    image_size: int,
    max_tiles: int = 9,
    candidates: Sequence[Size] | None = None,
) -> Tensor:
    """Put the features of the views of one image into the order the language model reads.

    Args:
        features: [T, N, D], the whole image first, then the tiles row by row.
        newline: [D], the learned token that ends a row.
        size, image_size, max_tiles, candidates: as in `anyres_token_count`.

    Returns:
        [anyres_token_count(...), D].
    """
    views, tokens, width = features.shape
    side = _side(tokens)
    layout = _layout(size, image_size, side, max_tiles, candidates)
    if views != 1 + layout.rows * layout.columns:
        raise ConfigError(
            f"{views} views were given for an image of {size[0]} x {size[1]} pixels, which is cut into "
            f"1 + {layout.rows} x {layout.columns}; processor and model must agree on grid_pinpoints"
        )
    grid = features[1:].reshape(layout.rows, layout.columns, side, side, width)
    grid = grid.permute(4, 0, 2, 1, 3).reshape(width, layout.rows * side, layout.columns * side)  # [D, H, W]
    grid = grid[:, layout.crop_top :, layout.crop_left :][:, : layout.height, : layout.width]
    if layout.scaled is not None:
        grid = functional.interpolate(grid[None], size=layout.scaled, mode="bilinear")[0]
    ends = newline.to(grid)[:, None, None].expand(-1, grid.shape[1], 1)
    lines = torch.cat([grid, ends], dim=-1).flatten(1).T  # [H * (W + 1), D]
    return torch.cat([features[0], lines])


def _side(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ConfigError(
            f"{tokens} tokens a view are no square, so the views of an image form no map; use 'pad'"
        )
    return side
