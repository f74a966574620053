"""A contact sheet of pairs with their captions, to see with one's own eyes what the world looks like."""

import textwrap

from PIL import Image, ImageDraw

from llava.synth.world import World

GAP, LINE = 8, 13
LINES = 3
"""Lines of text under a pair."""


def contact_sheet(world: World, count: int = 12, *, start: int = 0, columns: int = 3) -> Image.Image:
    """Pairs start .. start + count - 1 side by side, before and after, with number, first captions and place.

    Args:
        world: where they come from.
        count: how many pairs.
        start: the first pair's number.
        columns: pairs in a row.
    """
    side = world.size
    columns = min(columns, count)
    width, height = 2 * side + GAP, side + LINES * LINE + GAP
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for k, pair in enumerate(world.pairs(start, start + count)):
        x, y = GAP + k % columns * (width + GAP), GAP + k // columns * (height + GAP)
        sheet.paste(Image.fromarray(pair.before), (x, y))
        sheet.paste(Image.fromarray(pair.after), (x + side + GAP, y))
        text = f"{pair.uid.removeprefix('synth/')}: {pair.captions[0]}; {pair.captions[1]}"
        for n, line in enumerate(textwrap.wrap(text, width=max(2 * side // 6, 12))[:LINES]):
            pen.text((x, y + side + 2 + n * LINE), line, fill="black")
    return sheet
