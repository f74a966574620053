"""Records as other projects' training files: ms-swift's messages, and LLaMA-Factory's ShareGPT form."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from llava.data.conversation import IMAGE_TOKEN, QUESTION
from llava.data.record import Record, read_records
from llava.data.whole_file import write_whole
from llava.errors import ConfigError, DataError
from llava.registry import pick

Rounds = Sequence[tuple[str, str]]


def _messages(rounds: Rounds) -> dict[str, Any]:
    turns: list[dict[str, str]] = []
    for question, answer in rounds:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def _sharegpt(rounds: Rounds) -> dict[str, Any]:
    turns: list[dict[str, str]] = []
    for question, answer in rounds:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}


FORMS: dict[str, Callable[[Rounds], dict[str, Any]]] = {"messages": _messages, "sharegpt": _sharegpt}
"""Name -> the turns of a conversation in that form."""


def export(
    source: str | Path,
    out: str | Path,
    form: str,
    *,
    question: str = QUESTION,
    images: str = "",
    overwrite: bool = False,
) -> int:
    """Write the records of a file for another trainer.

    A record with captions gives an entry for each of them; one with a conversation gives one. The images are marked at
    the beginning of the first question. Beside what the other project reads, entries say `uid`, `task` and `changeflag`
    where the record does; both projects ignore further fields.

    Args:
        source: records (JSON list or JSON Lines).
        out: `.jsonl` for JSON Lines, `.json` for a list.
        form: of `FORMS`.
        question: asked before captions.
        images: folder put before image paths.
        overwrite: replace a file that is there.

    Returns:
        The number of entries.

    Raises:
        ConfigError: an unknown form, or another ending.
        DataError: a fault in the records, a record with nothing to learn, a file in the way.
    """
    out, turns_of = Path(out), pick(FORMS, form, what="export form")
    if out.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"{out}: the name must end in .jsonl (a line an entry) or .json (one list)")
    if not question.strip():
        raise ConfigError("the question asked before captions is empty")
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists; give another name, or --overwrite to replace it")
    entries = [
        turns_of(_marked(rounds)) | _about(record, images)
        for record in read_records(source)
        for rounds in _conversations(record, question, source)
    ]
    if out.suffix == ".json":
        text = json.dumps(entries, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: a text holds half a character, which no file may ({error})") from error
    write_whole(out, content)
    return len(entries)


def _conversations(record: Record, question: str, source: str | Path) -> Iterator[Rounds]:
    if not record.change_caption and not record.conversation:
        raise DataError(
            f"{source}: {record.uid!r} has no caption and no conversation; there is nothing to export"
        )
    for caption in record.change_caption:
        yield ((question, caption),)
    if record.conversation:
        yield record.conversation


def _marked(rounds: Rounds) -> Rounds:
    """Rounds that mark both images before the first question, and nowhere else."""
    plain = [
        (question.replace(IMAGE_TOKEN, "< image >"), answer.replace(IMAGE_TOKEN, "< image >"))
        for question, answer in rounds
    ]
    return [(IMAGE_TOKEN * 2 + plain[0][0], plain[0][1]), *plain[1:]]


def _about(record: Record, images: str) -> dict[str, Any]:
    """What an entry says beside its turns."""
    paths = (record.img1_path, record.img2_path)
    about: dict[str, Any] = {
        "images": [str(PurePosixPath(images) / path) for path in paths],
        "uid": record.uid,
    }
    if record.task is not None:
        about["task"] = record.task
    if record.change_flag is not None:
        about["changeflag"] = int(record.change_flag)
    return about
