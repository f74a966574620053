"""What numbers below 1e-38 cost an update on a CPU: AdamW's memory of words that were long unseen decays to them.

    OMP_NUM_THREADS=1 python benchmarks/denormals.py

An embedding [V, D] that had gradients once: updates are timed early, and after a thousand without; as it is, and with
such numbers taken for 0, as training does (llava/train/guard.py).
"""

import argparse
import json
import platform
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path

import torch

from llava.train.guard import denormals_as_zero

HERE = Path(__file__).parent
UPDATES, COUNTED = 1000, 50


def updates(rows: int, width: int, inside: AbstractContextManager[None]) -> tuple[float, float]:
    """Median seconds of the first and of the last updates."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(rows, width))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.randn_like(weight) * 1e-3
    seconds = []
    with inside:
        for _ in range(UPDATES):
            began = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
            weight.grad = torch.zeros_like(weight)
    return statistics.median(seconds[:COUNTED]), statistics.median(seconds[-COUNTED:])


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "denormals.json")
    args = parser.parse_args()
    ways = {"as it is": nullcontext(), "taken for 0": denormals_as_zero()}
    found = {name: updates(args.rows, args.width, inside) for name, inside in ways.items()}
    for name, (early, late) in found.items():
        print(f"{name:12} {early * 1e3:6.2f} ms early, {late * 1e3:6.2f} ms after {UPDATES} updates")
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "command": "OMP_NUM_THREADS=1 python benchmarks/denormals.py",
        "seconds": {name: {"early": early, "late": late} for name, (early, late) in found.items()},
    }
    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
