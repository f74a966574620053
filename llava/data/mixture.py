"""A mixture: several record files in one YAML, each taken whole or in part, and as often as one likes.

    root: data                                                        # optional: everything below counts from here
    seed: 7                                                           # optional: of all draws
    datasets:
      - {json_path: levir_cc/train.json, repeat: 6}                   # all of it, six times
      - {json_path: second/train.jsonl, take: "random:30%"}           # three tenths of its records
      - {json_path: clevr_change/train.jsonl, take: "first:2000", weight: 2.5}
      - {json_path: captions/dubai.json, root: dubai_cc}              # its images are in dubai_cc/
      - {json_path: changechat/train.jsonl, task: [count, loc], weight: 2}   # of its questions only these, twice

Fields of an entry; only `json_path` is needed:

- `task`: only the file's records of this task, or of these, see `llava.tasks.definitions`; all that follows is about
  them. Records of one pair are read together where they are of one entry.
- `take` (or `sampling_strategy`, the same thing under its older name): which records. `all` (the default), `first:N`,
  `end:N` or `random:N`; N is a number of records, or a share like `30%` (rounded up). A draw depends on the seed, on
  the entry's `json_path` and on the uids, not on the other entries; a file that is listed twice is drawn from twice.
- `repeat`: how often the records taken come in an epoch, a whole number; or
- `weight`: the same as any number above 0. W means W times the records taken (rounded up): whole copies, and for the
  rest a draw that is the same in every epoch. `repeat: 3` and `weight: 3` are one thing.
- `root`: folder that the image paths inside the file count from; else the mixture's.

Paths count from one root: the one that is given to `load_mixture`, else the YAML's `root`, itself counted from the
YAML's own folder, else that folder. Nothing is rewritten on disk. Large record files are opened as memory-mapped
tables, see `llava.data.table`; a mixture in memory is a few bytes a record, and records are built when asked for.
"""

import hashlib
import math
import operator
import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import yaml
from numpy.typing import NDArray

from llava.data.record import Record
from llava.data.table import ListField, RecordFile, RecordList, Rows, open_records
from llava.errors import DataError
from llava.tasks.definitions import TASK_NAMES

STRATEGIES = ("all", "first", "end", "random")
SUFFIXES = (".yaml", ".yml")
"""File names that are taken for mixtures; all others hold records."""

_FIELDS = ("json_path", "task", "sampling_strategy", "take", "repeat", "weight", "root")
_TOP = ("datasets", "root", "seed")
_MOST = 1000
"""Times that a record may come in an epoch; more is a slip of the pen."""
_AMOUNT = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) *(%?)", re.ASCII)


@dataclass(frozen=True)
class Part:
    """Rows of one record file, each once."""

    file: RecordFile
    rows: Rows
    root: str = ""
    """Put before the records' paths."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return self._rooted(self.file[int(self.rows[index])])

    def __iter__(self) -> Iterator[Record]:
        return map(self._rooted, self.file.select(self.rows))

    def _rooted(self, record: Record) -> Record:
        if not self.root:
            return record
        return replace(
            record,
            img1_path=_under(self.root, record.img1_path),
            img2_path=_under(self.root, record.img2_path),
            mask_path=record.mask_path and _under(self.root, record.mask_path),
        )


def _under(root: str, path: str) -> str:
    return os.path.join(root, path)  # noqa: PTH118 - for every record, and many times quicker than pathlib's


class Records(Sequence[Record]):
    """Parts of record files one after the other; what is listed twice comes twice.

    A slice is lazy too. Pickled, it is the row numbers and the names of the tables, and small files whole.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return self._slice(range(len(self))[index])
        place = range(len(self))[operator.index(index)]
        number = bisect_right(self._ends, place)
        return self.parts[number][place - self._ends[number] + len(self.parts[number])]

    def _slice(self, places: range) -> "Records":
        if places.step < 0:
            raise ValueError("a slice of records goes forward; use reversed()")
        parts = []
        for part, end in zip(self.parts, self._ends, strict=True):
            start = end - len(part)
            inside = places[bisect_left(places, start) : bisect_left(places, end)]
            if inside:
                rows = part.rows[inside.start - start : inside.stop - start : inside.step]
                parts.append(replace(part, rows=rows))
        return Records(parts)

    def __iter__(self) -> Iterator[Record]:
        for part in self.parts:
            yield from part

    def lengths(self, field: ListField) -> NDArray[np.int32]:
        """[N], captions or rounds of each record, without building any."""
        lengths = {file: file.lengths(field) for file in {part.file: None for part in self.parts}}
        return _joined([lengths[part.file][_index(part.rows)] for part in self.parts], np.int32)

    def pair_codes(self) -> NDArray[np.int64]:
        """[N], equal for records of one part with the same two images, different for all others.

        A part is one listing: of an entry with `repeat: 2`, each copy has codes of its own.
        """
        codes = {file: file.pair_codes() for file in {part.file: None for part in self.parts}}
        found, first = [], 0
        for part in self.parts:
            found.append(codes[part.file][_index(part.rows)] + np.int64(first))
            first += int(codes[part.file].max()) + 1
        return _joined(found, np.int64)


def _index(rows: Rows) -> Any:
    """What takes rows out of an array."""
    return slice(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows


def _joined(arrays: Sequence[NDArray[Any]], kind: Any) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, kind)


@dataclass(frozen=True)
class Source:
    """One entry of a mixture, and what it gave."""

    json_path: str
    """As written in the mixture."""
    strategy: str
    held: int
    """Records in the file, of the tasks asked for."""
    taken: int
    """Records that the strategy asked for."""
    times: float
    """How often those come in an epoch."""
    start: int
    """Place of its first record in the mixture."""
    records: Records
    """Those of an epoch, in the file's order, copy after copy."""

    @property
    def slice(self) -> slice:
        """Its part of the mixture's records."""
        return slice(self.start, self.start + len(self.records))


@dataclass(frozen=True)
class Mixture:
    """All entries of a mixture file."""

    path: Path
    root: Path
    """Folder that the records' paths count from."""
    seed: int
    sources: tuple[Source, ...]

    @cached_property
    def records(self) -> Records:
        """Records of all sources one after the other; what is listed twice comes twice."""
        return Records(part for source in self.sources for part in source.records.parts)

    def table(self) -> str:
        """What was taken of each file, and how often, as aligned text."""
        rows = []
        for source in self.sources:
            pairs = f"{source.taken} of {source.held} pairs"
            if source.times != 1:
                pairs += f", {source.times:g} times: {len(source.records)}"
            rows.append((source.json_path, source.strategy, pairs, *_texts(source.records)))
        rows.append(("together", "", f"{len(self.records)} pairs", *_texts(self.records)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                f"{cell:>{width}}" if k > 2 else f"{cell:{width}}"
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def _texts(records: Records) -> tuple[str, str]:
    """How many captions and conversations there are."""
    captions = int(records.lengths("change_caption").sum(dtype=np.int64))
    conversations = int(np.count_nonzero(records.lengths("conversation")))
    return f"{captions} captions", f"{conversations} conversations" if conversations else ""


def load_mixture(
    path: str | Path,
    root: str | Path | None = None,
    *,
    seed: int = 0,
    cache: str | Path | None = None,
    in_memory: bool = False,
) -> Mixture:
    """Read a mixture and open the record files it names.

    Args:
        path: a YAML file, see the module.
        root: folder that all paths count from; goes before the YAML's own.
        seed: of draws, where the YAML names none.
        cache: folder for the tables of large files, see `llava.data.table`.
        in_memory: read all files as lists and write no tables: for those who go through the records once.

    Raises:
        DataError: a fault in the YAML or in a record file; the message names file and field.
    """
    path = Path(path)
    fields = _read(path)
    base, prefix = _roots(path, root, fields)
    seed = _seed(fields, path, seed)
    files: dict[Path, RecordFile] = {}
    listed: Counter[str] = Counter()
    sources: list[Source] = []
    start = 0
    for number, described in enumerate(_entries(fields, path)):
        where = f"{path}, datasets[{number}]"
        entry = _checked(described, where)
        file = base / prefix / entry.json_path
        if file not in files:
            if not file.is_file():
                raise DataError(
                    f"{where}: json_path {entry.json_path!r} is no file; looked for {file}. Paths of a mixture are "
                    f"relative to its root, here {base / prefix}"
                )
            files[file] = RecordList(file) if in_memory else open_records(file, cache)
        listed[entry.json_path] += 1
        draw = f"{seed}\0{entry.json_path}\0{listed[entry.json_path]}"
        held = _of_tasks(files[file], entry.tasks, f"{where}: {file}")
        rows = _take(files[file], held, entry.strategy, draw, f"{where}: {entry.field}")
        part = Part(files[file], rows, _under(prefix, entry.root))
        parts = [part] * int(entry.times)
        if rest := math.ceil(entry.times % 1 * len(rows)):
            parts.append(replace(part, rows=_draw(files[file], rows, rest, f"{draw}\0weight")))
        records = Records(parts)
        sources.append(
            Source(
                json_path=entry.json_path,
                strategy=" ".join([*entry.tasks, entry.strategy]),
                held=len(held),
                taken=len(rows),
                times=float(entry.times),
                start=start,
                records=records,
            )
        )
        start += len(records)
    return Mixture(path, base, seed, tuple(sources))


def read_mixture(path: str | Path, root: str | Path | None = None, *, seed: int = 0) -> list[Record]:
    """The records of `load_mixture` as a list, repeats included."""
    return list(load_mixture(path, root, seed=seed, in_memory=True).records)


def mixture_files(path: str | Path, root: str | Path | None = None) -> list[tuple[Path, Path]]:
    """The record files that a mixture names, whatever part of them it takes.

    Faults of an entry are passed over; `load_mixture` names them.

    Returns:
        (record file, folder that its image paths count from), each once.

    Raises:
        DataError: no YAML, or it names no file.
    """
    path = Path(path)
    fields = _read(path)
    base, prefix = _roots(path, root, fields)
    entries = fields.get("datasets") if isinstance(fields, dict) else None
    found: dict[tuple[Path, Path], None] = {}
    for entry in entries if isinstance(entries, list) else ():
        name = entry.get("json_path") if isinstance(entry, dict) else None
        if isinstance(name, str) and name.strip():
            images = entry.get("root")
            folder = base / prefix / (images if isinstance(images, str) else "")
            found[base / prefix / name, folder] = None
    if not found:
        raise DataError(f"{path} names no record files; a mixture has datasets: [{{json_path: ...}}, ...]")
    return list(found)


def unique(records: Iterable[Record]) -> list[Record]:
    """Each uid once, where it comes first: what an evaluation scores.

    Raises:
        DataError: one uid stands for two different records.
    """
    first: dict[str, Record] = {}
    for record in records:
        known = first.setdefault(record.uid, record)
        if known != record:
            raise DataError(
                f"uid {record.uid!r} stands for two records, of {known.img1_path} and {record.img1_path}, that are "
                "not the same; a uid must name one pair: change one of them"
            )
    return list(first.values())


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as YAML: {reason}") from error


def _roots(path: Path, root: str | Path | None, fields: Any) -> tuple[Path, str]:
    """Folder that the records' paths count from, and what goes before the paths of the YAML and of its files."""
    if root is not None:
        return Path(root), ""
    inside = fields.get("root") if isinstance(fields, dict) else None
    if inside is None:
        return path.parent, ""
    return path.parent, _folder(inside, str(path))


def _seed(fields: Any, path: Path, default: int) -> int:
    seed = fields.get("seed") if isinstance(fields, dict) else None
    if seed is None:
        return default
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise DataError(f"{path}: field 'seed' is {seed!r}, expected a whole number")
    return seed


def _entries(fields: Any, path: Path) -> list[Any]:
    """The list under `datasets`."""
    entries = fields.get("datasets") if isinstance(fields, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: field 'datasets' must be a list of {{json_path, sampling_strategy}}")
    if unknown := [str(name) for name in fields if name not in _TOP]:
        raise DataError(f"{path}: unknown fields {unknown}; known: {', '.join(_TOP)}")
    return entries


@dataclass(frozen=True)
class _Entry:
    json_path: str
    field: str
    """Name under which the strategy is given."""
    strategy: str
    times: Fraction
    root: str
    tasks: tuple[str, ...]


def _checked(entry: Any, where: str) -> _Entry:
    """The fields of one entry."""
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {entry!r}, expected {{json_path, sampling_strategy}}")
    if unknown := [str(name) for name in entry if name not in _FIELDS]:
        raise DataError(f"{where}: unknown fields {unknown}; known: {', '.join(_FIELDS)}")
    for one, other in (("take", "sampling_strategy"), ("repeat", "weight")):
        if one in entry and other in entry:
            raise DataError(
                f"{where}: has both {one!r} and {other!r}, which say the same thing; leave one out"
            )
    name = entry.get("json_path")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: json_path is {name!r}, expected the path of a record file")
    field = "take" if "take" in entry else "sampling_strategy"
    strategy = entry.get(field, "all")
    if not isinstance(strategy, str):
        raise DataError(f"{where}: {field} is {strategy!r}, expected text such as 'first:100'")
    images = _folder(entry["root"], where) if "root" in entry else ""
    tasks = entry.get("task", [])
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(tasks, list) or not all(task in TASK_NAMES for task in tasks):
        raise DataError(
            f"{where}: task is {entry['task']!r}, expected one or several of {', '.join(TASK_NAMES)}"
        )
    return _Entry(name, field, strategy.strip(), _times(entry, where), images, tuple(tasks))


def _times(entry: dict[str, Any], where: str) -> Fraction:
    """How often the records taken come in an epoch."""
    if "repeat" in entry:
        repeat = entry["repeat"]
        if not isinstance(repeat, int) or isinstance(repeat, bool) or not 1 <= repeat <= _MOST:
            raise DataError(f"{where}: repeat is {repeat!r}, expected a whole number from 1 to {_MOST}")
        return Fraction(repeat)
    weight = entry.get("weight", 1)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= _MOST:
        raise DataError(f"{where}: weight is {weight!r}, expected a number above 0 and up to {_MOST}")
    return Fraction(str(weight))  # as it is written: 0.1 of 10 records is one, not a little more


def _folder(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: root is {value!r}, expected a folder")
    return value


def _of_tasks(file: RecordFile, tasks: Sequence[str], where: str) -> Rows:
    """The rows of a file with records of some tasks; all, where none is named."""
    if not tasks:
        return range(len(file))
    rows = np.fromiter((row for row, task in enumerate(file.tasks()) if task in tasks), np.int32)
    if not len(rows):
        raise DataError(f"{where} has no record of task {' or '.join(tasks)}")
    return rows


def _take(file: RecordFile, held: Rows, strategy: str, draw: str, where: str) -> Rows:
    """The rows of a file, of those held, that a strategy asks for."""
    kind, colon, amount = strategy.partition(":")
    if kind == "all" and not colon:
        return held
    if kind not in STRATEGIES or kind == "all":
        raise DataError(
            f"{where} is {strategy!r}; known: all, first:N, end:N, random:N, where N is a number "
            "of records or a share like 30%"
        )
    count = _count(amount.strip(), len(held), f"{where} {strategy!r}")
    if kind == "first":
        return held[:count]
    if kind == "end":
        return held[-count:]
    return _draw(file, held, count, draw)


def _draw(file: RecordFile, rows: Rows, count: int, draw: str) -> NDArray[np.int32]:
    """Some of the rows, by chance.

    By hash, not by a generator: the same draw on every platform and version, and a larger one holds a smaller one.
    """
    hashes = (hashlib.sha256(f"{draw}\0{uid}".encode("utf-8", "replace")).digest()[:8] for uid in file.uids())
    keys = np.fromiter((int.from_bytes(part, "big") for part in hashes), np.uint64, len(file))
    order = np.argsort(keys[_index(rows)], kind="stable")[:count]
    return np.arange(len(file), dtype=np.int32)[_index(rows)][np.sort(order)]


def _count(amount: str, held: int, where: str) -> int:
    """N or P% as a number of records."""
    match = _AMOUNT.fullmatch(amount)
    if match is None:
        raise DataError(f"{where}: {amount!r} is neither a number of records nor a share like 30%")
    value, share = Fraction(match[1]), bool(match[2])
    if value <= 0 or (share and value > 100) or (not share and value.denominator != 1):
        raise DataError(
            f"{where}: {amount!r} must be a whole number above 0, or a share above 0% and up to 100%"
        )
    count = math.ceil(value * held / 100) if share else int(value)
    if count > held:
        raise DataError(f"{where} asks for {count} records, the file holds {held}")
    return count
