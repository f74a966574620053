"""A dialogue about a pair as the README shows it: its words, and a picture of the pair with its change map.

    python benchmarks/dialogue.py BEFORE AFTER --model runs/six --ask "..." "..." --out dialogue.png
    python benchmarks/dialogue.py BEFORE AFTER --model runs/six --ask "..." --out map.png --map-only

The same as `llava chat`, which from a pipe gives one answer a line. `--map-only`: for images that may not be passed on.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from llava.captioner import ChangeCaptioner
from llava.data.images import load_pair

SIDE, GAP = 256, 8


def coloured(values: np.ndarray) -> Image.Image:
    """Scores [H, W] in 0..1, black over red to white."""
    levels = np.clip(np.stack([values * 2, values * 2 - 0.7, values * 2 - 1], -1), 0, 1)  # [H, W, 3]
    return Image.fromarray((levels * 255).round().astype(np.uint8))


def main() -> None:
    """Ask, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ask", nargs="+", required=True, metavar="QUESTION")
    parser.add_argument("--out", type=Path, metavar="PNG", help="the picture")
    parser.add_argument("--map-only", action="store_true", help="without the images themselves")
    args = parser.parse_args()
    captioner = ChangeCaptioner.from_pretrained(args.model, device="cpu")
    chat = captioner.chat(args.before, args.after)
    for question in args.ask:
        print(f"> {question}\n{chat.ask(question).text}")
    if args.out is None:
        return
    views = [] if args.map_only else [image.convert("RGB") for image in load_pair(args.before, args.after)]
    if captioner.model.config.fusion is not None:
        views.append(coloured(chat.change_map()))
    elif not views:
        sys.exit(f"{args.model} has no fusion, and so no change map")
    sheet = Image.new("RGB", (len(views) * (SIDE + GAP) - GAP, SIDE), "white")
    for i, view in enumerate(views):
        sheet.paste(view.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (i * (SIDE + GAP), 0))
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
