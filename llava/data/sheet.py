"""A contact sheet of records: before, after, mask and captions, to see with one's own eyes what a list holds."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava.data.images import load_mask, load_pair
from llava.data.record import Record
from llava.errors import ConfigError, LlavaError

GAP, LINE, FONT = 10, 16, 12
LINES = 4
"""Lines of captions under a pair."""
WHITE, INK, PALE, RED = "white", (20, 20, 20), (150, 150, 150), (180, 30, 30)
FLAGS = {True: "changed", False: "unchanged", None: "change not said"}


def contact_sheet(
    records: Sequence[Record], root: str | Path, *, columns: int = 3, side: int = 192
) -> Image.Image:
    """Pairs side by side, before and after (and the mask, where one of them has it), with uid, flag and captions.

    A pair that cannot be read is drawn as an empty frame that says why.

    Args:
        records: those to draw, in this order.
        root: folder that their paths count from.
        columns: pairs in a row.
        side: of the square that each picture is fitted into, in pixels.

    Raises:
        ConfigError: nothing to draw, or senseless sizes.
    """
    if not records or columns < 1 or not 32 <= side <= 2048:
        raise ConfigError(
            f"a contact sheet of {len(records)} records, {columns} columns, {side} pixels a side; at least 1 record "
            "and column, 32 to 2048 pixels"
        )
    shown = 3 if any(record.mask_path for record in records) else 2
    columns = min(columns, len(records))
    width, height = shown * side + (shown - 1) * 4, 2 * LINE + side + LINES * LINE
    rows = -(-len(records) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), WHITE)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT)
    for number, record in enumerate(records):
        x, y = GAP + number % columns * (width + GAP), GAP + number // columns * (height + GAP)
        _draw_pair(sheet, pen, font, record, Path(root), (x, y), side, shown)
    return sheet


def _draw_pair(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    font: Any,
    record: Record,
    root: Path,
    corner: tuple[int, int],
    side: int,
    shown: int,
) -> None:
    x, y = corner
    width = shown * side + (shown - 1) * 4
    flag = FLAGS[record.change_flag]
    room = width - pen.textlength(flag, font) - GAP
    pen.text((x, y), _fitting(record.uid, pen, font, room), fill=INK, font=font)
    pen.text((x + width, y), flag, fill=RED if record.change_flag else PALE, font=font, anchor="ra")
    y += LINE
    for k, name in enumerate(("before", "after", "mask")[:shown]):
        pen.text((x + k * (side + 4), y), name, fill=PALE, font=font)
    y += LINE
    pictures: list[Image.Image | None] = [None] * shown
    problem = ""
    try:
        pictures[:2] = load_pair(*record.paths(root))
        if shown == 3 and record.mask_path is not None:
            pictures[2] = _visible(load_mask(root / record.mask_path))
    except LlavaError as error:
        problem = str(error)
    for k, picture in enumerate(pictures):
        left = x + k * (side + 4)
        pen.rectangle((left, y, left + side - 1, y + side - 1), outline=(225, 225, 225))
        if picture is not None:
            scale = side / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            small = picture.resize(size, Image.Resampling.NEAREST if k == 2 else Image.Resampling.BICUBIC)
            sheet.paste(small, (left + (side - size[0]) // 2, y + (side - size[1]) // 2))
    if problem:
        lines = _wrapped(problem, pen, font, width - 2 * GAP)[: side // LINE - 1]
        for n, line in enumerate(lines):
            pen.text((x + GAP, y + GAP + n * LINE), line, fill=RED, font=font)
    y += side + 2
    spoken = list(record.change_caption) or [f"{q} - {a}" for q, a in record.conversation] or ["(no caption)"]
    lines = []
    for caption in dict.fromkeys(spoken):
        lines += _wrapped(f"- {caption}", pen, font, width)
    if len(lines) > LINES:
        lines[LINES - 1] += " ..."
    for n, line in enumerate(lines[:LINES]):
        pen.text((x, y + n * LINE), line, fill=INK, font=font)


def _visible(mask: Image.Image) -> Image.Image:
    """A mask whose levels can be told from black: those of 0 and 1, or other small numbers, are spread."""
    if mask.mode == "I":
        mask = Image.fromarray(np.asarray(mask).clip(0, 255).astype(np.uint8)).convert("RGB")
    top = int(np.asarray(mask).max())
    return mask.point([min(255, level * 255 // top) for level in range(256)] * 3) if 0 < top < 64 else mask


def _wrapped(text: str, pen: ImageDraw.ImageDraw, font: Any, width: float) -> list[str]:
    """Text as lines no wider than `width` pixels, as far as words allow."""
    text = _drawable(text)
    letters = max(8, int(width / max(pen.textlength("abcdefghij", font) / 10, 1)))
    lines = textwrap.wrap(text, letters)
    while letters > 8 and any(pen.textlength(line, font) > width for line in lines):
        letters -= 2
        lines = textwrap.wrap(text, letters)
    return lines


def _fitting(text: str, pen: ImageDraw.ImageDraw, font: Any, width: float) -> str:
    """The end of the text, if it is too wide: that is where uids differ."""
    text = _drawable(text)
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(f"...{text}", font) > width:
        text = text[1:]
    return f"...{text}"


def _drawable(text: str) -> str:
    """On one line, and without half characters."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
