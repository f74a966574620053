"""A published corpus to files of our records: one file, or one for each split; whole, or not there."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from llava.data.record import Record
from llava.data.sources import Options, read
from llava.errors import ConfigError, DataError

ALL = "all"
"""As a split: every record, whatever its split, into one file."""
SPLIT_MARK = "{split}"


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    files: dict[Path, int]
    """File -> records in it."""
    splits: dict[str, int]
    """Split -> records of it in the source, those of other splits than the one asked for included."""
    faults: list[str]
    """Entries that were left out, each with its place and reason."""
    asked: dict[str, int]
    """What captions answer in the source's own words -> records."""


def convert(
    name: str,
    source: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    max_captions: int | None = None,
    options: Options | None = None,
    question_out: str | Path | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write the records of a published corpus as JSON Lines.

    Args:
        name: of `llava.data.sources.SOURCES`.
        source: its folder or file.
        out: the file to write; `{split}` in its name gives each split a file.
        split: write this one alone; "all" puts all into one file. Without it, and without `{split}` in `out`, a
            source with several splits is refused: test pairs would end up among training pairs.
        max_captions: keep at most so many captions of a pair, drawn by the uid: the same ones in every run.
        options: of the reader; its `faults` decide whether a faulty entry ends the conversion.
        question_out: also write what most captions answer in the source's own words: `question: {file: F}` of a
            training config.
        overwrite: replace files that are there.

    Raises:
        ConfigError: an unknown source, or options that do not go together.
        DataError: a fault in the source, a uid that comes twice, files in the way, or `question_out` where captions
            answer no question; nothing is written then.
    """
    out, options = Path(out), options or Options()
    by_split = SPLIT_MARK in out.name
    if by_split and split is not None:
        raise ConfigError(
            f"--out {out} asks for a file a split, --split {split} for one alone; leave one away"
        )
    if max_captions is not None and max_captions < 1:
        raise ConfigError(f"at most {max_captions} captions a pair: at least 1 is needed")
    seen: Counter[str] = Counter()
    uids: set[str] = set()
    asked: Counter[str] = Counter()
    kept: str | None = None
    with _Writers(overwrite) as writers:
        for item in read(name, source, options):
            own = item.split
            seen[own or ""] += 1
            if by_split and own is None:
                raise ConfigError(f"source {name!r} says no splits; leave {SPLIT_MARK} out of --out {out}")
            if split not in (None, ALL):
                if own is None:
                    raise ConfigError(f"source {name!r} says no splits; leave --split {split} away")
                if own != split:
                    continue
            if split is None and not by_split and len(seen) > 1:
                raise ConfigError(
                    f"{source} has the splits {', '.join(sorted(seen))}; say which one (--split), or give each its "
                    f"own file (--out {out.stem}_{SPLIT_MARK}{out.suffix}), or say --split {ALL}"
                )
            record = _fewer(item.record, max_captions)
            if record.uid in uids:
                raise DataError(f"{source}: uid {record.uid!r} comes twice; remove one of the two entries")
            uids.add(record.uid)
            if item.asked is not None:
                asked[item.asked] += 1
            kept = own or ""
            writers.write(out.with_name(out.name.replace(SPLIT_MARK, own or "")), record)
        if kept is None:
            held = f"; it has {', '.join(sorted(filter(None, seen)))}" if seen else ""
            raise DataError(f"{source}: no record of {split or 'any split'}{held}")
        if question_out is not None:
            if not asked:
                raise DataError(
                    f"{source}: no caption answers a question, so there is none for {question_out}"
                )
            writers.write_text(Path(question_out), f"{asked.most_common(1)[0][0]}\n")
        files = writers.finish()
    return Converted(files, dict(seen), list(options.faults.messages), dict(asked.most_common()))


def _fewer(record: Record, count: int | None) -> Record:
    """At most `count` captions, in their order."""
    captions = record.change_caption
    if count is None or len(captions) <= count:
        return record
    drawn = sorted(
        range(len(captions)),
        key=lambda k: hashlib.sha256(f"{record.uid}\0{k}".encode("utf-8", "replace")).digest(),
    )
    return replace(record, change_caption=tuple(captions[k] for k in sorted(drawn[:count])))


class _Writers:
    """Files written aside, which get their names together at the end, or are removed."""

    def __init__(self, overwrite: bool) -> None:
        self._overwrite = overwrite
        self._open: dict[Path, IO[str]] = {}
        self._counts: Counter[Path] = Counter()

    def write(self, path: Path, record: Record) -> None:
        """Add a record to a file."""
        self.write_text(path, json.dumps(record.to_dict(), ensure_ascii=False) + "\n")
        self._counts[path] += 1

    def write_text(self, path: Path, text: str) -> None:
        """Add a text to a file."""
        file = self._open.get(path) or self._start(path)
        try:
            file.write(text)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error})") from error

    def finish(self) -> dict[Path, int]:
        """Give all files their names; returns the number of records in each."""
        try:
            for file in self._open.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for path in self._open:
                _aside(path).replace(path)
        except OSError as error:
            raise DataError(f"the records cannot be written ({error})") from error
        return dict(self._counts)

    def _start(self, path: Path) -> IO[str]:
        if path.exists() and not self._overwrite:
            raise DataError(f"{path} exists; give another name, or --overwrite to replace it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[path] = _aside(path).open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error})") from error
        return self._open[path]

    def __enter__(self) -> "_Writers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path, file in self._open.items():
            with contextlib.suppress(OSError):  # a full disk was reported already
                file.close()
            _aside(path).unlink(missing_ok=True)  # after success it is gone


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
