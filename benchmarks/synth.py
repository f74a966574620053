"""How many pairs of the synthetic world are drawn a second, in one process and in two.

python benchmarks/synth.py [size] [pairs]
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from llava.synth import World


def draw(size: int, start: int, stop: int) -> int:
    return sum(len(pair.captions) > 0 for pair in World(size=size).pairs(start, stop))


def main(size: int = 256, pairs: int = 1000) -> None:
    for workers in (1, 2):
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(draw, [size] * workers, [0] * workers, [4] * workers))  # start-up and textures
            step = pairs // workers
            began = time.perf_counter()
            starts = [k * step for k in range(workers)]
            done = sum(pool.map(draw, [size] * workers, starts, [start + step for start in starts]))
            seconds = time.perf_counter() - began
        print(f"{size} px, {workers} process(es): {done / seconds:.1f} pairs/s", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
