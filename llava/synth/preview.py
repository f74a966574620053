"""A contact sheet of pairs with their captions, to see with one's own eyes what the world looks like."""

import textwrap

from PIL import Image, ImageDraw

from llava.synth.palette import MASK_COLOURS
from llava.synth.task_lists import Asked
from llava.synth.world import World

GAP, LINE = 8, 13
LINES = 3
"""Lines of text under a pair."""


def contact_sheet(world: World, count: int = 12, *, start: int = 0, columns: int = 3) -> Image.Image:
    """Pairs start .. start + count - 1 side by side, before and after, with number and first captions.

    Of a world in which roads and buildings alone change, with their mask, their numbers and a question.

    Args:
        world: where they come from.
        count: how many pairs.
        start: the first pair's number.
        columns: pairs in a row.
    """
    side = world.size
    columns = min(columns, count)
    shown = 2 + (world.changes == "built")
    lines = LINES + shown - 2
    width, height = shown * (side + GAP) - GAP, side + lines * LINE + GAP
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for k, pair in enumerate(world.pairs(start, start + count)):
        x, y = GAP + k % columns * (width + GAP), GAP + k // columns * (height + GAP)
        for n, picture in enumerate((pair.before, pair.after, MASK_COLOURS[pair.change_mask])[:shown]):
            sheet.paste(Image.fromarray(picture), (x + n * (side + GAP), y))
        text = f"{pair.uid.partition('/')[2]}: {pair.captions[0]}; "
        text += pair.captions[1] if shown == 2 else _answers(world.asked(start + k, pair.change_mask))
        for n, line in enumerate(textwrap.wrap(text, width=max(shown * side // 6, 12))[:lines]):
            pen.text((x, y + side + 2 + n * LINE), line, fill="black")
    return sheet


def _answers(asked: Asked) -> str:
    """The numbers and the places in words, and the first open question."""
    told = {task: rounds[0] for task, rounds in reversed(asked.rounds)}
    return " | ".join([told["count"][1], told["loc"][1], " ".join(told["open"])])
