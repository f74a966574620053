"""Checkpoints on disk: which are whole, which one to go on from, which to keep.

A checkpoint is a folder `checkpoint-STEP`. It counts only with the mark that is written into it last, when every
process has written its part: a run killed at any moment leaves the one before, and the broken one is cleared away.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava.data.whole_file import write_whole
from llava.errors import ConfigError
from llava.train.guard import sync

WHOLE = "whole.json"
FINISHED = "finished.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing, on disk when this returns."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
    sync(path)
    sync(path.parent)


def mark_whole(folder: Path, step: int, processes: int, sharding: str = "plain") -> None:
    """Make a checkpoint count; call it when all processes have written.

    Args:
        sharding: how the run's state is spread, see `llava.train.sharded.kind`.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
    write_json(folder / WHOLE, {"step": step, "processes": processes, "sharding": sharding})


def is_whole(folder: Path) -> bool:
    """Whether all of a checkpoint is there."""
    return (folder / WHOLE).is_file()


def checkpoints(out: Path) -> dict[int, Path]:
    """step -> folder of the whole checkpoints, oldest first."""
    found = {
        int(match[1]): path
        for path in out.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name)) and is_whole(path)
    }
    return dict(sorted(found.items()))


def clear_broken(out: Path) -> list[Path]:
    """Remove checkpoints that were being written when a run was killed; returns them."""
    broken = [p for p in out.glob("checkpoint-*") if _NAME.fullmatch(p.name) and not is_whole(p)]
    for path in broken:
        shutil.rmtree(path)
    return broken


def rotate(out: Path, keep: Iterable[int]) -> None:
    """Remove whole checkpoints of steps not in `keep`; the mark goes first."""
    kept = set(keep)
    for step, path in checkpoints(out).items():
        if step not in kept:
            (path / WHOLE).unlink()
            shutil.rmtree(path)


def choose(out: Path, wanted: str, processes: int, sharding: str = "plain") -> Path | None:
    """The checkpoint to go on from, or None to start anew.

    Args:
        out: the run's folder.
        wanted: "auto", "never", or a checkpoint's folder.
        processes, sharding: of this run.

    Raises:
        ConfigError: the named folder is no whole checkpoint, or was written by another number of processes, or with
            the optimizer's state spread in another way.
    """
    if wanted == "never":
        return None
    if wanted == "auto":
        found = list(checkpoints(out).values())
        chosen = found[-1] if found else None
    else:
        chosen = Path(wanted)
        if not is_whole(chosen):
            raise ConfigError(
                f"resume_from_checkpoint={wanted}: no whole checkpoint there (it has no {WHOLE}); known: "
                f"{', '.join(map(str, checkpoints(out).values())) or 'none'}"
            )
    if chosen is not None:
        held = json.loads((chosen / WHOLE).read_text(encoding="utf-8"))
        if missing := sorted({"processes", "sharding"} - held.keys()):
            raise ConfigError(
                f"{chosen / WHOLE} does not say {' and '.join(missing)}: another version wrote it. Name the folder as "
                "`model` of a new run"
            )
        if (wrote := held["processes"]) != processes:
            raise ConfigError(
                f"{chosen} was written by {wrote} processes, this run has {processes}: the order of the samples "
                f"would be another. Start {wrote} processes, or name the folder as `model` of a new run"
            )
        if held["sharding"] != sharding:
            raise ConfigError(
                f"{chosen} was written by a run of kind {held['sharding']!r}, this one is {sharding!r}: it could not "
                "read the optimizer's state. Set `deepspeed` as it was, or name the folder as `model` of a new run"
            )
    return chosen


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any], may_change: Iterable[str]) -> list[str]:
    """ "field: old -> new" of what a run may not change when it goes on."""
    free = set(may_change)
    return [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if name not in free and before.get(name) != now.get(name)
    ]
