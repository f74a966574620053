"""Whether the files that a run learns from are still those that it began with.

A list of another length has another order of samples: a run that goes on would see some twice and others never.
"""

import hashlib
import json
from pathlib import Path

from llava.data.mixture import SUFFIXES, mixture_files
from llava.train.checkpoints import write_json
from llava.train.config import TrainConfig

DATA = "data.json"
_CHUNK = 1 << 22


def remember_data(run: TrainConfig) -> None:
    """Write into the run's folder what its files hold."""
    write_json(run.output_dir / DATA, [{"file": str(path), "sha256": _digest(path)} for path in _files(run)])


def changed_data(run: TrainConfig) -> list[str]:
    """Files of the run's data that hold something else than when it began; none where that is not known."""
    kept = run.output_dir / DATA
    if not kept.is_file():
        return []
    before = [row["sha256"] for row in json.loads(kept.read_text(encoding="utf-8"))]
    files = _files(run)
    if len(files) != len(before):
        return [str(run.data)]
    # by their order: a folder of data may have moved
    return [str(path) for path, digest in zip(files, before, strict=True) if _digest(path) != digest]


def _files(run: TrainConfig) -> list[Path]:
    """The list, or the mixture and its lists, each once."""
    if run.data.suffix not in SUFFIXES:
        return [run.data]
    return [run.data, *dict.fromkeys(path for path, _ in mixture_files(run.data, run.root))]


def _digest(path: Path) -> str:
    """sha256 of a file; of one that is not there, none: it is named when it is read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()
