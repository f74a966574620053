"""A dialogue about a pair as a file: one record (`llava.data.record`) on one line, with both paths and all rounds.

Such files can be gone on with (`llava chat --load`), asked behind (`llava ask --history`) and, put together into one
file, learned from.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from llava.data.json_line import json_line
from llava.data.record import Record, parse_record
from llava.data.whole_file import write_whole
from llava.errors import DataError


@dataclass(frozen=True)
class Dialogue:
    """Rounds about a pair; a file of rounds alone has no paths."""

    before: str | None
    after: str | None
    rounds: tuple[tuple[str, str], ...] = ()
    """(question, answer), oldest first."""


def write_dialogue(path: Path, dialogue: Dialogue) -> None:
    """Write it, whole or not at all; paths of files are made absolute, so that it may be moved.

    Raises:
        DataError: a dialogue without paths or rounds, an empty answer, or a place that cannot be written to.
    """
    if not dialogue.before or not dialogue.after or not dialogue.rounds:
        raise DataError(f"{path}: nothing was said yet, so there is no dialogue to save")
    for number, (_, answer) in enumerate(dialogue.rounds, 1):
        if not answer.strip():
            raise DataError(
                f"{path}: the answer of round {number} is empty, which no record keeps; not saved"
            )
    record = Record(
        uid=path.stem,
        img1_path=_absolute(dialogue.before),
        img2_path=_absolute(dialogue.after),
        conversation=dialogue.rounds,
    )
    write_whole(path, (json_line(record.to_dict()) + "\n").encode())


def read_dialogue(path: Path) -> Dialogue:
    """What `write_dialogue` wrote, or a JSON list of [question, answer] alone.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no dialogue: it cannot be read as one JSON value ({error})") from error
    if isinstance(value, list):
        paths = {"uid": path.stem, "img1_path": "-", "img2_path": "-"}
        return Dialogue(None, None, parse_record(paths | {"conversation": value}, str(path)).conversation)
    record = parse_record(value, str(path))
    return Dialogue(record.img1_path, record.img2_path, record.conversation)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())
