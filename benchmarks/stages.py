"""Three stages against the last alone against the baseline without fusion, same budget, several seeds.

    python benchmarks/stages.py --out runs/stages             about 45 minutes on two cores; goes on where it stopped
    python benchmarks/stages.py --out runs/stages2 --times 2  the same with twice as many updates in each stage

The world stands in for the corpora: 3,000 pairs of one seed to align and pretrain on, 1,000 of another to fine-tune on,
and 500 of that other to score. Every run reads 6,000 pairs with all their captions, 16 an update. Prints the table, and
writes the figures and the curves beside the other results.
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

import yaml

HERE = Path(__file__).parent
CONFIG = HERE / "stages.yaml"
BATCH = 16
BROAD, TARGET, TEST, VAL = 3000, 1000, 500, 200
FUSION = "fusion={kind: difference, depth: 1, head_dim: 32, mlp_dim: 256, map_head: true}"
KINDS = ("three stages", "stage 3 alone", "three stages, no fusion")
COLUMNS = ("decision", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm", "Sm changed")
COLOURS = {"three stages": "#1f5fa8", "stage 3 alone": "#c2571a", "three stages, no fusion": "#5a8f29"}


def commands(kind: str, seed: int, updates: dict[str, int]) -> list[list[str]]:
    """The trainings of a run, one after the other, as arguments of `python -m llava.train`."""
    common = ["--config", str(CONFIG), f"seed={seed}"]
    if kind == "stage 3 alone":
        steps = sum(updates.values())
        return [["--stage", "sft", *common, "model=tiny-base", FUSION, f"stages.sft.max_steps={steps}"]]
    if kind == "three stages, no fusion":
        common.append("fusion=null")
    return [
        ["--stage", name, *(["--chained"] if number else []), *common, f"stages.{name}.max_steps={steps}"]
        for number, (name, steps) in enumerate(updates.items())
    ]


def stages(times: int) -> dict[str, int]:
    """Stage -> its updates; read as plain YAML, for the folders it names are given to the trainings alone."""
    held = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["stages"]
    return {name: times * fields["max_steps"] for name, fields in held.items()}


def run(out: Path, data: Path, kind: str, seed: int, threads: int, updates: dict[str, int]) -> dict[str, Any]:
    """Train and score one; what has ended before is not done again."""
    folder = out / f"{kind.replace(',', '').replace(' ', '_')}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    steps = list(updates.values())
    names = ["sft"] if kind == "stage 3 alone" else list(updates)
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads), "OUT": str(folder), "DATA_ROOT": str(data)}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:

        def call(*words: str) -> None:
            subprocess.run([sys.executable, *words], check=True, stdout=log, stderr=log, env=surroundings)

        for words in commands(kind, seed, updates):
            call("-m", "llava.train", *words)
        if not (folder / "test" / "metrics.json").is_file():
            target = data / "target"
            where = ["--data", str(target / "test.jsonl"), "--out", str(folder / "test")]
            call("-m", "llava.eval", "--model", str(folder / names[-1]), *where)
    found = json.loads((folder / "test" / "metrics.json").read_text(encoding="utf-8"))
    curve, before = [], 0
    for name, length in zip(names, [sum(steps)] if len(names) == 1 else steps, strict=True):
        lines = (folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = {row["step"]: row for row in map(json.loads, lines) if "eval_Sm" in row}
        curve += [(BATCH * (before + step), rows[step]["eval_Sm"]) for step in sorted(rows)]
        before += length
    return {"kind": kind, "seed": seed, "scores": found["scores"], "curve": curve}


def figures(result: dict[str, Any]) -> dict[str, float]:
    """The figures of one run by column."""
    own = result["scores"]["predictions"]
    whole = own["captions"]["all"]
    row = {name: whole[name] for name in ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm")}
    row |= {"decision": own["decision"]["accuracy"], "Sm changed": own["captions"]["changed"]["Sm"]}
    return {name: row[name] for name in COLUMNS}


def draw(results: list[dict[str, Any]], seams: list[int], path: Path) -> None:
    """Curves of Sm on the validation pairs over the pairs read: thin lines seeds, thick ones their mean."""
    width, height, left, top, right, bottom = 760, 380, 60, 20, 20, 70
    pairs = max(x for result in results for x, _ in result["curve"])
    most = 10 * (1 + int(max(y for result in results for _, y in result["curve"]) // 10))

    def place(x: float, y: float) -> str:
        across, up = (width - left - right) * x / pairs, (height - top - bottom) * y / most
        return f"{left + across:.1f},{height - bottom - up:.1f}"

    def line(points: list[tuple[float, float]], colour: str, thick: float, opacity: float) -> str:
        told = " ".join(place(*point) for point in points)
        return f'<polyline points="{told}" fill="none" stroke="{colour}" stroke-width="{thick}" opacity="{opacity}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for value in range(0, most + 1, 20):
        x, y = place(0, value).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{width - right}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y}" dy="4" text-anchor="end">{value}</text>')
    for value in range(0, pairs + 1, 1000 if pairs < 8000 else 2000):
        x, y = place(value, 0).split(",")
        parts.append(f'<text x="{x}" y="{y}" dy="18" text-anchor="middle">{value:,}</text>')
    for seam in seams:
        (x, low), (_, high) = place(seam, 0).split(","), place(seam, most).split(",")
        parts.append(f'<line x1="{x}" y1="{low}" x2="{x}" y2="{high}" stroke="#999" stroke-dasharray="4 4"/>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - bottom + 36}" text-anchor="middle">pairs read '
        "(dashed: where a stage ends)</text>"
    )
    parts.append(f'<text transform="translate(16,{(height - bottom) / 2}) rotate(-90)">Sm</text>')
    for number, kind in enumerate(KINDS):
        curves = [result["curve"] for result in results if result["kind"] == kind]
        for curve in curves:
            parts.append(line(curve, COLOURS[kind], 1, 0.45))
        mean = [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*curves, strict=True)]
        parts.append(line(mean, COLOURS[kind], 3, 1))
        start, base = left + number * 220, height - 12
        parts.append(
            f'<line x1="{start}" y1="{base}" x2="{start + 24}" y2="{base}" stroke="{COLOURS[kind]}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{start + 30}" y="{base}" dy="4">{kind}</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def rounded(value: Any) -> Any:
    """Two digits behind the point, wherever there are more."""
    if isinstance(value, float):
        return round(value, 2)
    if isinstance(value, dict):
        return {name: rounded(held) for name, held in value.items()}
    return [rounded(held) for held in value] if isinstance(value, list | tuple) else value


def main() -> None:
    """Run what is missing, print the table, write figures and curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/stages"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--times", type=int, default=1, help="as many updates in each stage")
    parser.add_argument(
        "--parallel", type=int, default=2, help="runs at once, each on its share of the cores"
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="for stages.json and .svg, or stages_2x"
    )
    args = parser.parse_args()
    out = args.out.resolve()
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    updates = stages(args.times)
    for name, counts in (
        ("broad", ["--train", str(BROAD), "--seed", "11"]),
        ("target", ["--train", str(TARGET), "--val", str(VAL), "--test", str(TEST), "--seed", "12"]),
    ):
        command = [sys.executable, "-m", "llava", "synth", str(out / "data" / name), *counts]
        subprocess.run(command, check=True)
    jobs = [(kind, seed) for seed in args.seeds for kind in KINDS]
    with ThreadPoolExecutor(args.parallel) as pool:
        results = list(pool.map(lambda job: run(out, out / "data", job[0], job[1], threads, updates), jobs))

    print("| training | seed | " + " | ".join(COLUMNS) + " |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for kind in KINDS:
        rows = {result["seed"]: figures(result) for result in results if result["kind"] == kind}
        for seed, row in rows.items():
            print(f"| {kind} | {seed} | " + " | ".join(f"{row[name]:.1f}" for name in COLUMNS) + " |")
        if len(rows) > 1:
            spread = [[row[name] for row in rows.values()] for name in COLUMNS]
            told = (f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" for values in spread)
            print(f"| **{kind}** | mean ± sd | " + " | ".join(told) + " |")
    for row in results[0]["scores"]["baselines"]:
        told = (f"{row['captions'][subset]['Sm']:.1f} on {subset} pairs" for subset in ("all", "changed"))
        print(f"{row['name']}: Sm {', '.join(told)}")
    steps = list(updates.values())
    seams = [BATCH * sum(steps[: number + 1]) for number in range(len(steps) - 1)]
    name = "stages" if args.times == 1 else f"stages_{args.times}x"
    draw(results, seams, args.results / f"{name}.svg")
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads a run",
        "command": f"python benchmarks/stages.py --times {args.times} --seeds "
        + " ".join(map(str, args.seeds)),
        "pairs": {"broad": BROAD, "target": TARGET, "test": TEST, "read": BATCH * sum(steps)},
        "runs": [
            {"training": r["kind"], "seed": r["seed"], **figures(r), "curve": r["curve"]} for r in results
        ],
        "baselines": [
            {
                "name": b["name"],
                "Sm": b["captions"]["all"]["Sm"],
                "Sm changed": b["captions"]["changed"]["Sm"],
            }
            for b in results[0]["scores"]["baselines"]
        ],
    }
    (args.results / f"{name}.json").write_text(json.dumps(rounded(record), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
