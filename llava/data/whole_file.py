"""A small file that is written whole or not at all."""

import contextlib
from pathlib import Path

from llava.errors import DataError


def write_whole(path: Path, content: bytes) -> None:
    """Write aside and rename; folders are made.

    Raises:
        DataError: it cannot be written; what was there stays.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # nothing was begun, say
            part.unlink()
        raise DataError(f"{path} cannot be written ({error})") from error
