"""The small model over seeds, with fusion and without, same data and budget: the table of the README.

    python benchmarks/tiny_seeds.py --out runs/seeds            about an hour on two cores; goes on where it stopped

Each run is `llava quickstart`; this script only starts the runs and gathers their metrics.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from llava.cli.quickstart import TRAIN_PAIRS

COLUMNS = ("decision", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm", "Sm changed", "Sm shuffled")


def run(out: Path, fusion: str, seed: int, threads: int) -> dict[str, Any]:
    """One quickstart, unless its metrics are there already."""
    folder = out / f"{fusion}_{seed}"
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "llava", "quickstart", "--fusion", fusion, "--seed", str(seed)]
        command += ["--out", str(folder), "--data", str(out / "data")]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return json.loads(metrics.read_text(encoding="utf-8"))


def row(metrics: dict[str, Any]) -> dict[str, float]:
    """The figures of one run by column."""
    own, shuffled = metrics["scores"]["predictions"], metrics["shuffled_images"]["predictions"]
    whole = own["captions"]["all"]
    figures = {name: whole[name] for name in ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm")}
    figures["decision"] = own["decision"]["accuracy"]
    figures["Sm changed"] = own["captions"]["changed"]["Sm"]
    figures["Sm shuffled"] = shuffled["captions"]["all"]["Sm"]
    return {name: figures[name] for name in COLUMNS}


def baselines(metrics: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Name, Sm on all and Sm on changed pairs of each baseline."""
    rows = metrics["scores"]["baselines"]
    return [(b["name"], b["captions"]["all"]["Sm"], b["captions"]["changed"]["Sm"]) for b in rows]


def main() -> None:
    """Run what is missing, print the table, write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--parallel", type=int, default=2, help="runs at once, each on its share of the cores"
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "tiny_seeds.json")
    args = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    jobs = [(fusion, seed) for seed in args.seeds for fusion in ("difference", "none")]
    pairs = ["--train", str(TRAIN_PAIRS), "--test", "500"]  # what all runs share
    subprocess.run([sys.executable, "-m", "llava", "synth", str(args.out / "data"), *pairs], check=True)
    with ThreadPoolExecutor(args.parallel) as pool:
        made = list(pool.map(lambda job: run(args.out, *job, threads), jobs))
    results = dict(zip(jobs, made, strict=True))
    first = made[0]
    rows = {job: row(metrics) for job, metrics in results.items()}

    print("| fusion | seed | " + " | ".join(COLUMNS) + " |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for fusion in ("difference", "none"):
        chosen = [rows[fusion, seed] for seed in args.seeds]
        for seed, figures in zip(args.seeds, chosen, strict=True):
            print(f"| {fusion} | {seed} | " + " | ".join(f"{figures[name]:.1f}" for name in COLUMNS) + " |")
        if len(chosen) > 1:
            spread = [[f[name] for f in chosen] for name in COLUMNS]
            told = (f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" for values in spread)
            print(f"| **{fusion}** | mean ± sd | " + " | ".join(told) + " |")
    for name, whole, changed in baselines(first):
        print(f"{name}: Sm {whole:.1f} on all pairs, {changed:.1f} on changed pairs")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads a run",
        "command": "python benchmarks/tiny_seeds.py --seeds " + " ".join(map(str, args.seeds)),
        "runs": [
            {"fusion": f, "seed": s, **figures, "train_seconds": results[f, s]["train_seconds"]}
            for (f, s), figures in rows.items()
        ],
        "baselines": [
            {"name": n, "Sm": whole, "Sm changed": changed} for n, whole, changed in baselines(first)
        ],
    }
    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
