"""Room on a disk, asked for before anything is written."""

import shutil
from pathlib import Path

from llava.errors import DownloadError


def need_space(size: int, folder: Path) -> None:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise DownloadError(
            f"disk full: {size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free at {there}; "
            "make room, or choose another disk with HF_HOME (downloads) or LLAVA_HOME (imports)"
        )
