"""Six change tasks by small models of both families, over seeds, same data and budget: the table of the README.

    python benchmarks/six_tasks.py --out runs/six_tasks           hours on two cores; goes on where it stopped

The world of roads and buildings (`llava synth --layout tasks`): every run reads the same pairs as often, each once with
all its captions and questions. All start from the same tower, which has looked at single images, and the same
language model (benchmarks/six_start.py). ChangeVLM also learns the masks of roads and buildings and where each patch
stands (llava/train/auxiliary.py), which DeltaVLM has no place for. Trivial answers, and the same model with every
pair's images replaced by another pair's, stand beside.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIG = HERE / "six_tasks.yaml"


@dataclass(frozen=True)
class Kind:
    """A model of the table."""

    name: str
    family: str
    fusion: str | None
    """Of a DeltaVLM's start; a ChangeVLM gets the config's, or none."""

    @property
    def settings(self) -> list[str]:
        """Of its training, on top of the config's."""
        if self.family == "delta":
            return ["fusion=keep", "mask_weight=0", "mask_levels=[]", "place_weight=0"]
        return [] if self.fusion else ["fusion=null"]


KINDS = (
    Kind("ChangeVLM, difference", "change", "difference"),
    Kind("ChangeVLM, none", "change", None),
    Kind("DeltaVLM, csrm", "delta", "csrm"),
    Kind("DeltaVLM, csrm_paper", "delta", "csrm_paper"),
    Kind("DeltaVLM, concat", "delta", "concat"),
)
COLUMNS: dict[str, tuple[str, str, str]] = {
    "binary accuracy": ("binary", "answers", "accuracy"),
    "binary F1": ("binary", "answers", "F1"),
    "roads MAE": ("count", "all", "roads MAE"),
    "roads RMSE": ("count", "all", "roads RMSE"),
    "buildings MAE": ("count", "all", "buildings MAE"),
    "buildings RMSE": ("count", "all", "buildings RMSE"),
    "loc F1": ("loc", "both", "F1"),
    "loc Jaccard": ("loc", "both", "jaccard"),
    "loc exact": ("loc", "both", "subset accuracy"),
    "open exact": ("open", "answers", "exact"),
    "dialog round 3 ROUGE-L": ("dialog", "round 3", "ROUGE-L"),
    "dialog consistent": ("dialog", "consistency", "consistent"),
}
"""Column -> task, beginning of the table's name, value."""
CAPTIONS = ("Sm", "Sm changed", "decision")


def figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Values of the predictions by column."""
    found: dict[str, float | None] = {}
    for column, (task, beginning, value) in COLUMNS.items():
        tables = metrics["tasks"][task]["tables"]
        table = next(table for table in tables if table["name"].startswith(beginning))
        found[column] = table["rows"][0]["values"][value]
    own = metrics["scores"]["predictions"]
    found["Sm"] = own["captions"]["all"]["Sm"]
    found["Sm changed"] = own["captions"]["changed"]["Sm"]
    found["decision"] = own["decision"]["accuracy"]
    return found


def floors(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The trivial answers of each table that a column is of."""
    found = []
    for task, beginning in dict.fromkeys((task, table) for task, table, _ in COLUMNS.values()):
        tables = metrics["tasks"][task]["tables"]
        table = next(table for table in tables if table["name"].startswith(beginning))
        found += [{"task": task, "name": row["name"], "values": row["values"]} for row in table["rows"][1:]]
    return found


def run(out: Path, kind: Kind, seed: int, threads: int, settings: list[str]) -> dict[str, Any]:
    """Train and score one; what has ended before is not done again."""
    folder = out / f"{kind.name.replace(', ', '_')}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:

        def call(*words: str) -> None:
            subprocess.run([sys.executable, *words], check=True, stdout=log, stderr=log, env=surroundings)

        data = out / "data"
        words = ["--config", str(CONFIG), f"data={data / 'train.jsonl'}", f"output_dir={folder / 'model'}"]
        start = out / "start"
        if kind.family == "delta":
            made = ["--delta", str(kind.fusion), "--base", str(start), "--seed", str(seed)]
            start = folder / "start"
            if not (start / "processor_config.json").is_file():
                call(str(HERE / "six_start.py"), *made, "--out", str(start))
        words.append(f"model={start}")
        call("-m", "llava.train", *words, f"seed={seed}", *kind.settings, *settings)
        for name, more in (("own", []), ("shuffled", ["--shuffle-images"])):
            if not (folder / name / "metrics.json").is_file():
                words = ["--model", str(folder / "model"), "--data", str(data / "test.jsonl")]
                call("-m", "llava.eval", *words, "--task", "all", "--out", str(folder / name), *more)
    own, shuffled = (
        json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))
        for name in ("own", "shuffled")
    )
    return {"kind": kind.name, "seed": seed, "own": own, "shuffled": shuffled}


def main() -> None:
    """Run what is missing, print the table, write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/six_tasks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=[kind.name for kind in KINDS])
    parser.add_argument("--train", type=int, default=4000, help="pairs to learn from (default: %(default)s)")
    parser.add_argument("--test", type=int, default=300, help="held-out pairs (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="other training settings")
    parser.add_argument(
        "--parallel", type=int, default=2, help="runs at once, each on its share of the cores"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "six_tasks.json")
    args = parser.parse_args()
    out = args.out.resolve()
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    counts = ["--train", str(args.train), "--test", str(args.test), "--layout", "tasks"]
    subprocess.run([sys.executable, "-m", "llava", "synth", str(out / "data"), *counts], check=True)
    if not (out / "start" / "processor_config.json").is_file():
        made = ["--words", str(out / "data" / "train.jsonl"), "--out", str(out / "start")]
        subprocess.run([sys.executable, str(HERE / "six_start.py"), *made], check=True)
    jobs = [(kind, seed) for seed in args.seeds for kind in KINDS if kind.name in args.kinds]
    with ThreadPoolExecutor(args.parallel) as pool:
        results = list(pool.map(lambda job: run(out, job[0], job[1], threads, args.set), jobs))

    columns = [*COLUMNS, *CAPTIONS]
    print("| model | seed | " + " | ".join(columns) + " |")
    print("|---" * (2 + len(columns)) + "|")

    def told(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "-"
        spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
        return f"{statistics.mean(known):.2f}{spread}"

    for kind in dict.fromkeys(result["kind"] for result in results):
        for which in ("own", "shuffled"):
            rows = [figures(result[which]) for result in results if result["kind"] == kind]
            label = kind if which == "own" else f"{kind}, images shuffled"
            if which == "own" and len(rows) > 1:
                for result, row in zip((r for r in results if r["kind"] == kind), rows, strict=True):
                    print(
                        f"| {label} | {result['seed']} | "
                        + " | ".join(told([row[c]]) for c in columns)
                        + " |"
                    )
            print(
                f"| **{label}** | mean ± sd | "
                + " | ".join(told([r[c] for r in rows]) for c in columns)
                + " |"
            )
    trivial = floors(results[0]["own"])
    for row in trivial:
        print(f"{row['task']}, {row['name']}: {row['values']}")
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads a run",
        "command": "python benchmarks/six_tasks.py --seeds " + " ".join(map(str, args.seeds)),
        "runs": [
            {
                "model": result["kind"],
                "seed": result["seed"],
                "own": figures(result["own"]),
                "images shuffled": figures(result["shuffled"]),
            }
            for result in results
        ],
        "trivial answers": trivial,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
