"""How fast a mixture of 1.2 million captions opens, what it adds to each process, and how fast records come.

    OMP_NUM_THREADS=1 python benchmarks/mixture.py [--pairs 240000] [--out benchmarks/results/mixture.json]

Writes nine record files of synthetic pairs with five captions each, in the proportions and with the up-sampling of a
published mixture (a set six times, two three times, one twice), half of them JSON lists and half JSON Lines. Each way
of opening them then runs in a process of its own:

    json.load       dictionaries, one reference for each listing: what one would write at first
    lists           `load_mixture(in_memory=True)`: checked records, all in memory
    table, first    `load_mixture` with an empty cache: files are read, checked and turned into Arrow
    table, later    `load_mixture` with the cache of the run before

Memory is what the process has more than before opening: resident (RSS, which counts pages of mapped files, shared by
all processes and dropped when memory is short) and anonymous (its own alone). A forked worker then goes through all
records once; what it dirties it has on its own too. Files are in the page cache throughout. The ways run in turn in
several rounds, so that a busy machine slows all alike; of each way the round that opened soonest counts. Linux only.
"""

import argparse
import gc
import json
import os
import pickle
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from llava.data.mixture import Records, load_mixture

SETS = (
    ("changesim.json", 20_000, 1),
    ("clevr_change.jsonl", 70_000, 1),
    ("image_editing.json", 3_061, 1),
    ("spot_the_diff.jsonl", 10_000, 2),
    ("stvchrono.json", 24_000, 1),
    ("vismin.jsonl", 94_124, 1),
    ("levir_cc.json", 6_815, 6),
    ("sysu_cd.jsonl", 8_000, 3),
    ("second.json", 4_000, 3),
)
"""File, pairs, times it is listed; 240,000 pairs together."""
CAPTIONS = 5
WAYS = ("json.load", "lists", "table, first", "table, later")
WORDS = """
the a building road tree house field water appears is removed near next to on left right top bottom some many new old
constructed beside corner scene bare land villas parking lot two three rows along while has changed
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=240_000, help="in the files (default: %(default)s)")
    parser.add_argument("--reads", type=int, default=100_000, help="random ones (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.reads)))
        return
    load = [round(value, 1) for value in os.getloadavg()]
    folder = Path(tempfile.mkdtemp())
    try:
        size = write_files(folder, args.pairs)
        rounds = []
        for _ in range(args.rounds):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            rounds.append({way: in_process(way, folder, args.reads) for way in WAYS})
        found = {way: min((one[way] for one in rounds), key=lambda f: f["opened in, s"]) for way in WAYS}
        cache = sum(file.stat().st_size for file in (folder / "cache").glob("*.arrow"))
    finally:
        shutil.rmtree(folder)
    result = {
        "date": f"{date.today()}",
        "command": f"python benchmarks/mixture.py --pairs {args.pairs} --reads {args.reads} --rounds {args.rounds}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load before": load,
        "captions in the files": args.pairs * CAPTIONS,
        "records listed": found["json.load"].pop("records"),
        "record files, MB": round(size / 1e6, 1),
        "Arrow files, MB": round(cache / 1e6, 1),
        "ways": found,
    }
    assert {way.pop("records", result["records listed"]) for way in found.values()} == {
        result["records listed"]
    }
    print(text_table(found))
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(args.out)


def write_files(folder: Path, pairs: int) -> int:
    """The record files and their mixture; returns their bytes."""
    dice, words = random.Random(0), WORDS.split()
    whole = sum(count for _, count, _ in SETS)
    entries, size = [], 0
    for name, count, times in SETS:
        stem = name.partition(".")[0]
        rows = []
        for number in range(max(1, count * pairs // whole)):
            captions = [" ".join(dice.choices(words, k=dice.randint(6, 16))) + " ." for _ in range(CAPTIONS)]
            rows.append(
                {
                    "uid": f"{stem}/train_{number:06d}",
                    "change_flag": number % 2,
                    "img1_path": f"{stem}/images/train/A/train_{number:06d}.png",
                    "img2_path": f"{stem}/images/train/B/train_{number:06d}.png",
                    "change_caption": captions,
                }
            )
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        size += (folder / name).write_text(text, encoding="utf-8")
        entries += [{"json_path": name, "sampling_strategy": "all"}] * times
    (folder / "mixture.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    return size


def in_process(way: str, folder: Path, reads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--reads", str(reads), "--measure", way, str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(way: str, folder: Path, reads: int) -> dict[str, Any]:
    """One way of opening, in this process."""
    path = folder / "mixture.yaml"
    ways: dict[str, Callable[[], Sequence[Any]]] = {
        "json.load": lambda: plain(path),
        "lists": lambda: load_mixture(path, in_memory=True).records,
        "table, first": lambda: load_mixture(path, cache=folder / "cache").records,
        "table, later": lambda: load_mixture(path, cache=folder / "cache").records,
    }
    gc.collect()
    before = memory()
    wall, cpu = time.perf_counter(), time.process_time()
    records = ways[way]()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gc.collect()
    opened = memory()
    peak = status("VmHWM")

    dice = random.Random(1)
    places = [dice.randrange(len(records)) for _ in range(reads)]
    started = time.process_time()
    for place in places:
        records[place]
    one_by_one = time.process_time() - started
    started = time.process_time()
    for _ in records:
        pass
    in_order = time.process_time() - started
    gc.collect()
    used = memory()
    started = time.process_time()
    if isinstance(records, Records):
        records.pair_codes()
    grouped = time.process_time() - started
    return {
        "records": len(records),
        "opened in, s": round(wall, 2),
        "of that CPU, s": round(cpu, 2),
        "added anonymous, MB": added(opened, before, "Anonymous"),
        "added resident, MB": added(opened, before, "Rss"),
        "added resident at the peak, MB": round((peak - before["Rss"]) / 1e6),
        "added anonymous after reading all, MB": added(used, before, "Anonymous"),
        "added resident after reading all, MB": added(used, before, "Rss"),
        "dirtied by a forked worker, MB": worker(records),
        "random records/s": round(reads / one_by_one),
        "records/s in order": round(len(records) / in_order),
        "codes of all pairs, s": round(grouped, 2) if isinstance(records, Records) else None,
        "pickled, kB": round(len(pickle.dumps(records)) / 1e3),
    }


def plain(path: Path) -> list[dict[str, Any]]:
    """The mixture as one would read it at first."""
    files: dict[str, list[dict[str, Any]]] = {}
    records: list[dict[str, Any]] = []
    for entry in yaml.safe_load(path.read_text())["datasets"]:
        name = entry["json_path"]
        if name not in files:
            with (path.parent / name).open(encoding="utf-8") as file:
                files[name] = (
                    json.load(file) if name.endswith(".json") else [json.loads(line) for line in file]
                )
        records += files[name]
    return records


def memory() -> dict[str, int]:
    """Bytes of this process, by kind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def status(name: str) -> int:
    """Bytes, of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def added(after: dict[str, int], before: dict[str, int], kind: str) -> int:
    return round((after[kind] - before[kind]) / 1e6)


def worker(records: Sequence[Any]) -> int:
    """What a forked process dirties by going through all records, MB."""
    reader, writer = os.pipe()
    if not os.fork():
        before = memory()
        for record in records:
            for caption in record["change_caption"] if isinstance(record, dict) else record.change_caption:
                len(caption)  # merely to hold an object writes to its reference count
        os.write(writer, str(added(memory(), before, "Private_Dirty")).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found = int(answer.read())
    os.wait()
    return found


def text_table(found: dict[str, dict[str, Any]]) -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        yield ("", *found)
        for name in next(iter(found.values())):
            yield (name, *("-" if way[name] is None else f"{way[name]:,}" for way in found.values()))

    widths = [max(map(len, column)) for column in zip(*rows(), strict=True)]
    return "\n".join(
        "  ".join(
            f"{c:{w}}" if k == 0 else f"{c:>{w}}" for k, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows()
    )


if __name__ == "__main__":
    main()
