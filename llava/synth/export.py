"""Writes pairs of the synthetic world to disk, in the layouts of published corpora, or as our records.

Every file is written aside and renamed. An interrupted export goes on where it was; lists (captions, records) are
written last, so a folder with its lists is complete.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from PIL import Image

from llava.errors import ConfigError, DataError
from llava.registry import pick
from llava.synth import built
from llava.synth.palette import MASK_COLOURS
from llava.synth.task_lists import LEAST_SIZE, Listed, changechat_files, read_mask, record_files
from llava.synth.world import SPLITS, VERSION, Changes, Pair, Split, World

if TYPE_CHECKING:
    from typing_extensions import Unpack

Layout = Literal["records", "tasks", "levir-cc", "levir-cd", "levir-mci", "changechat"]

MCI_GREY = np.array([0, 128, 255], dtype=np.uint8)
"""LEVIR-MCI's grey values of none, road, building."""

_EVEN = 0.5
"""The rate of change that a manifest does not name."""
_MANIFEST = "synth.json"
_CHUNK = 16

Files = dict[str, np.ndarray]
"""Path relative to the folder -> pixels."""


class Drawing(TypedDict, total=False):
    """How an export draws its pairs."""

    seed: int
    """Of the world (0)."""
    size: int
    """Side of the images in pixels (256)."""
    workers: int
    """Processes to draw with (1); a script that asks for several needs the `__main__` guard."""
    change_rate: float
    """Share of the pairs that changed (0.5), see `World`."""


def _images(folder: str, pair: Pair, name: str) -> Files:
    return {f"{folder}/A/{name}": pair.before, f"{folder}/B/{name}": pair.after}


def _levir_cc(pair: Pair, split: str, name: str) -> Files:
    return _images(f"images/{split}", pair, name)


def _records(pair: Pair, split: str, name: str) -> Files:
    label = pair.binary_mask * np.uint8(255)
    return _images(f"images/{split}", pair, name) | {f"images/{split}/label/{name}": label}


def _levir_cd(pair: Pair, split: str, name: str) -> Files:
    return _images(split, pair, name) | {f"{split}/label/{name}": pair.binary_mask * np.uint8(255)}


def _levir_cd_buildings(pair: Pair, split: str, name: str) -> Files:
    return _images(split, pair, name) | {f"{split}/label/{name}": (pair.change_mask == 2) * np.uint8(255)}


def _with_classes(pair: Pair, split: str, name: str) -> Files:
    folder = f"images/{split}"
    grey = MCI_GREY[pair.change_mask]
    three = np.repeat(grey[:, :, None], 3, axis=2)  # equal channels, as published
    return _images(folder, pair, name) | {f"{folder}/label/{name}": three}


def _levir_mci(pair: Pair, split: str, name: str) -> Files:
    coloured = {f"images/{split}/label_rgb/{name}": MASK_COLOURS[pair.change_mask]}
    return _with_classes(pair, split, name) | coloured


_FILES: dict[str, Callable[[Pair, str, str], Files]] = {
    "records": _records,
    "levir-cc": _levir_cc,
    "levir-cd": _levir_cd,
    "levir-cd-buildings": _levir_cd_buildings,
    "levir-mci": _levir_mci,
    "tasks": _with_classes,
    "changechat": _with_classes,
}
_ASKED = ("tasks", "changechat")
"""Layouts of the world in which roads and buildings alone change, with questions of six kinds about each pair."""


def export_records(counts: Mapping[str, int], folder: str | Path, **how: Unpack[Drawing]) -> Path:
    """Our records: `SPLIT.jsonl` with paths relative to `folder`, images and masks under `images/SPLIT/{A,B,label}`.

    Args:
        counts: number of pairs by split ("train", "val", "test").
        folder: where to write; made if need be.
        how: fields of `Drawing`.

    Returns:
        The folder.

    Raises:
        ConfigError: an unknown split, a negative count, a size, seed or rate that the world does not take.
        DataError: the folder holds another export, or cannot be written.
    """
    return _export("records", counts, folder, **how)


def export_levir_cc(counts: Mapping[str, int], folder: str | Path, **how: Unpack[Drawing]) -> Path:
    """LEVIR-CC: `images/SPLIT/{A,B}/NAME.png` and `LevirCCcaptions.json`. See `export_records` for the arguments."""
    return _export("levir-cc", counts, folder, **how)


def export_levir_cd(
    counts: Mapping[str, int], folder: str | Path, *, buildings_only: bool = False, **how: Unpack[Drawing]
) -> Path:
    """LEVIR-CD: `SPLIT/{A,B,label}/NAME.png`, labels 0 / 255. See `export_records` for the other arguments.

    Args:
        buildings_only: mark changes of buildings alone, as LEVIR-CD does, and not every change.
    """
    layout = "levir-cd-buildings" if buildings_only else "levir-cd"
    return _export(layout, counts, folder, **how)


def export_levir_mci(counts: Mapping[str, int], folder: str | Path, **how: Unpack[Drawing]) -> Path:
    """LEVIR-MCI: LEVIR-CC's layout with `label` (0 none, 128 road, 255 building, three equal channels) and `label_rgb`.

    See `export_records` for the arguments.
    """
    return _export("levir-mci", counts, folder, **how)


def export_tasks(counts: Mapping[str, int], folder: str | Path, **how: Unpack[Drawing]) -> Path:
    """Our records of six tasks about pairs in which roads and buildings appear (`World(changes="built")`).

    `SPLIT.jsonl` holds all records of a split, `test_TASK.jsonl` those of one task; images and labels (LEVIR-MCI's
    grey levels) are under `images/SPLIT/{A,B,label}`. See `export_records` for the arguments.
    """
    return _export("tasks", counts, folder, **how)


def export_changechat(counts: Mapping[str, int], folder: str | Path, **how: Unpack[Drawing]) -> Path:
    """The pairs of `export_tasks` as ChangeChat-105k: its eight files, and LEVIR-CC's captions of all splits.

    No file asks about validation pairs, as published; their captions are in `LevirCCcaptions.json`. See
    `export_records` for the arguments.
    """
    return _export("changechat", counts, folder, **how)


@dataclass(frozen=True)
class _Job:
    """Some pairs of one split, to be drawn by one process."""

    layout: str
    folder: Path
    world: World
    start: int
    stop: int


def _name(split: str, index: int) -> str:
    return f"{split}_{index:06d}.png"


def _export(
    layout: str,
    counts: Mapping[str, int],
    folder: str | Path,
    *,
    seed: int = 0,
    size: int = 256,
    workers: int = 1,
    change_rate: float = _EVEN,
) -> Path:
    folder = Path(folder)
    pick(_FILES, layout, what="synth layout")
    wanted = {split: count for split, count in counts.items() if count}
    for split, count in wanted.items():
        if split not in SPLITS or count < 0:
            raise ConfigError(
                f"synth export: {count} pairs of {split!r}; splits are {', '.join(SPLITS)}, counts >= 0"
            )
    if not wanted:
        raise ConfigError("synth export: no pairs asked for; give a count for train, val or test")
    if workers < 1:
        raise ConfigError(f"synth export: workers={workers}, at least 1 is needed")
    changes: Changes = "built" if layout in _ASKED else "any"
    if layout in _ASKED and size < LEAST_SIZE:
        raise ConfigError(
            f"size={size} must be at least {LEAST_SIZE} for layout {layout!r}: objects would merge"
        )
    worlds = {split: World(seed, split, size, changes, change_rate) for split in SPLITS if split in wanted}
    run = {"layout": layout, "seed": seed, "size": size, "world": VERSION}
    if layout in _ASKED:
        run["built"] = built.VERSION
    if change_rate != _EVEN:
        run["change_rate"] = change_rate
    try:
        _claim(folder, run, wanted)
        jobs = [
            _Job(layout, folder, world, start, min(start + _CHUNK, wanted[split]))
            for split, world in worlds.items()
            for start in range(0, wanted[split], _CHUNK)
        ]
        total, done, began = sum(wanted.values()), 0, time.monotonic()
        asked: dict[Split, list[Listed]] = {split: [] for split in worlds}
        for job, pairs in zip(jobs, _run(jobs, workers), strict=True):
            asked[job.world.split] += pairs
            done += job.stop - job.start
            _progress(done, total, began)
        _write_lists(layout, folder, worlds, wanted, asked)
    except OSError as error:
        raise DataError(f"{folder}: the export cannot be written ({error})") from error
    return folder


def _claim(folder: Path, run: dict[str, Any], counts: dict[str, int]) -> None:
    """Make sure the folder is new, or holds a part of this very export."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / _MANIFEST
    if not manifest.exists():
        if (folder / "images").exists() or any((folder / split).exists() for split in SPLITS):
            raise DataError(f"{folder} holds images of something else; export to an empty folder")
    else:
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
            before = dict(found.pop("counts"))
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{manifest} is damaged ({error}); delete the folder and export again") from error
        if found != run:
            even = {"change_rate": _EVEN}
            there, now = even | found, even | run
            changed = ", ".join(f"{key}={there.get(key)!r} there, {now.get(key)!r} now" for key in there | now
                                if there.get(key) != now.get(key))  # fmt: skip
            raise DataError(f"{folder} holds another export ({changed}); export to an empty folder")
        if any(counts.get(split, 0) < count for split, count in before.items()):
            raise DataError(
                f"{folder} holds a larger export ({before}, asked {counts}); export to an empty folder"
            )
    _write_text(manifest, json.dumps({**run, "counts": counts}, indent=1))


def _run(jobs: list[_Job], workers: int) -> Iterator[list[Listed]]:
    """Work through the jobs; yields what each made, see `_draw`."""
    if workers == 1:
        yield from map(_draw, jobs)
        return
    # spawned, not forked: a fork in a process with threads of other libraries may hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_draw, jobs)


def _draw(job: _Job) -> list[Listed]:
    """Write the images of a job's pairs; a pair whose last file is there is left alone.

    Returns:
        What is asked of each pair, in layouts that ask.
    """
    split, make = job.world.split, _FILES[job.layout]
    last = job.folder / _last(job.layout, split)
    for index in range(job.start, job.stop):
        name = _name(split, index)
        if (last / name).exists():
            continue
        for path, pixels in make(job.world.pair(index), split, name).items():
            target = job.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.part")
            Image.fromarray(pixels).save(part, format="PNG", compress_level=1)
            part.replace(target)
    if job.layout not in _ASKED:
        return []
    return [_listed(job.folder, job.world, index) for index in range(job.start, job.stop)]


def _last(layout: str, split: str) -> str:
    """The folder whose file of a pair is written last."""
    return {
        "records": f"images/{split}/label", "levir-cc": f"images/{split}/B", "levir-mci": f"images/{split}/label_rgb",
        "tasks": f"images/{split}/label", "changechat": f"images/{split}/label",
    }.get(layout, f"{split}/label")  # fmt: skip


def _write_lists(
    layout: str,
    folder: Path,
    worlds: Mapping[Split, World],
    counts: Mapping[str, int],
    asked: Mapping[Split, list[Listed]],
) -> None:
    if layout == "records":
        for split, world in worlds.items():
            lines = [json.dumps(_record(world, index)) + "\n" for index in range(counts[split])]
            _write_text(folder / f"{split}.jsonl", "".join(lines))
    elif layout in _ASKED:
        for name, text in (record_files if layout == "tasks" else changechat_files)(asked):
            _write_text(folder / name, text)
    if layout in ("levir-cc", "levir-mci", "changechat"):
        images: list[dict[str, Any]] = []
        for split, world in worlds.items():
            first = len(images)
            images += [_published(world, index, first + index) for index in range(counts[split])]
        _write_text(folder / "LevirCCcaptions.json", json.dumps({"images": images, "dataset": "LEVIR-CC"}))


def _listed(folder: Path, world: World, index: int) -> Listed:
    """A pair that was written, and what is asked of it by its label."""
    name = _name(world.split, index)
    mask = read_mask(folder / "images" / world.split / "label" / name)
    return Listed(world.uid(index), world.split, name, world.asked(index, mask))


def _record(world: World, index: int) -> dict[str, Any]:
    """One line of our record files."""
    folder, name = f"images/{world.split}", _name(world.split, index)
    return {
        "uid": world.uid(index),
        "change_flag": int(world.changed(index)),
        "img1_path": f"{folder}/A/{name}",
        "img2_path": f"{folder}/B/{name}",
        "change_caption": list(world.captions(index)),
        "mask_path": f"{folder}/label/{name}",
    }


def _published(world: World, index: int, number: int) -> dict[str, Any]:
    """One entry of LEVIR-CC's caption file; sentences are stored tokenised, with a blank in front and a full stop."""
    ids = [number * 5 + k for k in range(5)]
    sentences = [
        {"tokens": text.split(), "raw": f" {text} .", "imgid": number, "sentid": key}
        for key, text in zip(ids, world.captions(index), strict=True)
    ]
    return {
        "filepath": world.split,
        "filename": _name(world.split, index),
        "imgid": number,
        "split": world.split,
        "changeflag": int(world.changed(index)),
        "sentences": sentences,
        "sentids": ids,
    }


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _progress(done: int, total: int, began: float) -> None:
    """One line on a terminal; elsewhere a line at every tenth."""
    rate = done / max(time.monotonic() - began, 1e-6)
    text = f"synth: {done}/{total} pairs, {rate:.0f} pairs/s"
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done * 10 // total > (done - _CHUNK) * 10 // total:
        print(text, file=sys.stderr, flush=True)
