"""How fast a pair of files becomes pixel values, beside a plain implementation, and where the time goes.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/images.py
    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/images.py --before A/1.png --after B/1.png

Without files, two synthetic 256 px PNGs of about the size of aerial tiles are made. All steps run in turn in
many short rounds, so that a busy machine slows all alike; the best round of each counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava.data.images import load_image, load_pair
from llava.model.image_processing import ChangeImageProcessor


def aerial_like(path: Path, side: int, seed: int) -> Path:
    """A smooth scene with sensor noise: compresses about as well as a real tile (100 kB at 256 px)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 216, (side // 8, side // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(float)
    Image.fromarray((smooth + rng.normal(0, 2.0, smooth.shape)).clip(0, 255).astype(np.uint8)).save(path)
    return path


def plain(before: Path, after: Path, size: int) -> torch.Tensor:
    """The same arithmetic as one would write it at first: one image, one step, one whole array at a time."""
    values = []
    for path in (before, after):
        with Image.open(path) as file:
            resized = file.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        scaled = np.array(resized).astype(np.float32) * (1 / 255)
        values.append((scaled - np.float32(0.5)) / np.float32(0.5))
    return torch.from_numpy(np.stack(values).transpose(0, 3, 1, 2).astype(np.float32))


def best_seconds(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    """Seconds a call, the best of `rounds` rounds in which the calls take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / repeats)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="an image file (default: synthetic, 256 px)")
    parser.add_argument("--after", type=Path, help="the other date")
    parser.add_argument(
        "--size", type=int, default=384, help="side of the encoder's input (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=40, help="the best of so many (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=4, help="pairs a round (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = ChangeImageProcessor(size=args.size)

    with tempfile.TemporaryDirectory() as folder:
        before = args.before or aerial_like(Path(folder) / "before.png", 256, 0)
        after = args.after or aerial_like(Path(folder) / "after.png", 256, 1)

        def ours() -> torch.Tensor:
            return processor.preprocess(list(load_pair(before, after)))["pixel_values"]

        difference = float((ours() - plain(before, after, args.size)).abs().max())
        picture = load_image(before)
        resized = picture.resize((args.size, args.size), Image.Resampling.BICUBIC)
        seconds = best_seconds(
            {
                "pair": ours,
                "plain pair": lambda: plain(before, after, args.size),
                "decode": lambda: load_image(before),
                "resize": lambda: picture.resize((args.size, args.size), Image.Resampling.BICUBIC),
                "normalise": lambda: processor.normalise([resized]),
            },
            args.rounds,
            args.repeats,
        )
        kilobytes = (before.stat().st_size + after.stat().st_size) / 2000

    steps = {name: seconds[name] for name in ("decode", "resize", "normalise")}
    result = {
        "files": f"{picture.width} x {picture.height}, {kilobytes:.0f} kB",
        "pairs_per_second": round(1 / seconds["pair"], 1),
        "plain_pairs_per_second": round(1 / seconds["plain pair"], 1),
        "speedup": round(seconds["plain pair"] / seconds["pair"], 2),
        "largest_difference": difference,
        "milliseconds_an_image": {name: round(value * 1e3, 3) for name, value in steps.items()},
        "share": {name: round(value / sum(steps.values()), 3) for name, value in steps.items()},
    }
    print(json.dumps(result, indent=2))
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(result, indent=2) + "\n")
        part.replace(args.out)


if __name__ == "__main__":
    main()
