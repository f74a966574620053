"""Records of a file as a sequence: in memory-mapped Arrow where the file is large, as a list where it is small.

A large file is read and checked once. What was found is kept as an Arrow stream in a cache folder; from then on every
process that opens the file, on the same machine, maps the same pages and builds a `Record` when one is asked for. The
name of a cache file says which record file it was made from (path, size, time of change), so a record file that was
changed is read anew. A cache file ends in a checksum: one that was damaged is made anew too. It is written aside and
renamed, so several processes may open the same record file at once; each that finds nothing writes its own, and the
first to be done is used by all that come later. The folder may be deleted whenever nothing runs.

The rule (`open_records`): files under 2 MiB are read as they are, for that takes no longer than loading Arrow; small
lists, evaluation sets among them, so leave nothing in the cache. So does every file where pyarrow, which the extra
`train` brings, is not installed.
"""

import contextlib
import glob
import hashlib
import importlib
import json
import os
import time
import uuid
import warnings
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import numpy as np
from numpy.typing import NDArray

from llava.data.record import Record, iter_records, read_records
from llava.errors import DataError, MissingDependencyError

SMALL = 2 << 20
"""Bytes under which `open_records` reads a file as a list."""

Rows = range | NDArray[np.int32]
"""Numbers of rows, in rising order."""
ListField = Literal["change_caption", "conversation"]

_FORMAT = 2
"""Goes up when what is stored changes, or what `parse_record` lets through."""
_BATCH = 4096
_BLOCK = 1 << 20
_SEAL = b"\0records"
"""Stands between the Arrow stream and its CRC-32 (4 bytes, little-endian); readers of Arrow stop before it."""
_ABANDONED = 24 * 3600.0
"""Seconds after which a file that somebody began to write is taken for given up."""


class CacheError(DataError):
    """The cache folder cannot be written."""


class RecordList(Sequence[Record]):
    """Records of a file, all in memory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records = read_records(path)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        return self._records[index]

    def select(self, rows: Rows) -> Iterator[Record]:
        """The records of some rows."""
        return (self._records[row] for row in rows)

    def uids(self) -> Iterator[str]:
        """All uids, in order."""
        return (record.uid for record in self._records)

    def tasks(self) -> Iterator[str | None]:
        """The task of each record that names one."""
        return (record.task for record in self._records)

    def lengths(self, field: ListField) -> NDArray[np.int32]:
        """[N], captions or rounds of each record."""
        return np.fromiter((len(getattr(record, field)) for record in self._records), np.int32, len(self))

    def pair_codes(self) -> NDArray[np.int32]:
        """[N], equal where both image paths are; numbered from 0 in the order in which pairs come first."""
        known: dict[tuple[str, str], int] = {}
        codes = (known.setdefault((r.img1_path, r.img2_path), len(known)) for r in self._records)
        return np.fromiter(codes, np.int32, len(self))


class RecordTable(Sequence[Record]):
    """Records of a file, in memory-mapped Arrow: `RecordTable.open(path)`.

    A pickled table is a few hundred bytes: it is opened again where it arrives.
    """

    def __init__(self, path: Path, file: Path, identity: str, batches: list[Any]) -> None:
        self.path = path
        """The record file."""
        self.file = file
        """The Arrow stream made of it."""
        self._identity = identity
        self._columns: list[list[Any]] = [batch.columns for batch in batches]
        self._ends = list(accumulate(batch.num_rows for batch in batches))

    @classmethod
    def open(cls, path: str | Path, cache: str | Path | None = None) -> "RecordTable":
        """The table of a record file; the first opening reads the file and fills the cache.

        Args:
            path: a JSON list or JSON Lines, see `llava.data.record.read_records`.
            cache: folder of the Arrow files; `default_cache()` if not given.

        Raises:
            DataError: file, line and field of the first fault.
            CacheError: the cache folder cannot be written.
            MissingDependencyError: pyarrow is not installed.
        """
        path = Path(path)
        folder = default_cache() if cache is None else Path(cache)
        identity = _identity(path)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        file = folder / f"{path.stem[:40]}-{digest[:20]}.arrow"
        table = cls._load(path, file, identity)
        if table is not None:
            return table
        part = _write_aside(path, file, identity)
        try:
            # Another process may have been quicker: a file in use is better not replaced, for on a network's file
            # system those who mapped it elsewhere may lose it.
            table = cls._load(path, file, identity)
            if table is None:
                part.replace(file)
                table = cls._load(path, file, identity)
        except OSError as error:
            raise _unwritable(file, error) from error
        finally:
            part.unlink(missing_ok=True)
        if table is None:
            raise CacheError(f"{file} is damaged as soon as it is written; check the disk, or set LLAVA_HOME")
        return table

    @classmethod
    def _load(cls, path: Path, file: Path, identity: str, check: bool = True) -> "RecordTable | None":
        """The table of a cache file; None if the file is not there, not whole, or of other records."""
        pa = _arrow()
        try:
            if check and not _sealed(file):
                return None
            reader = pa.ipc.open_stream(pa.memory_map(str(file)))
            if (reader.schema.metadata or {}).get(b"records") != identity.encode():
                return None
            return cls(path, file, identity, list(reader))
        except (FileNotFoundError, pa.ArrowInvalid):
            return None
        except OSError as error:
            raise CacheError(
                f"{file} cannot be read ({error}); delete it, or set LLAVA_HOME to another folder"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.path, self.file, self._identity)

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        batch = bisect_right(self._ends, row)
        row -= self._ends[batch - 1] if batch else 0
        return _record([column[row].as_py() for column in self._columns[batch]])

    def __iter__(self) -> Iterator[Record]:
        return self.select(range(len(self)))

    def select(self, rows: Rows) -> Iterator[Record]:
        """The records of some rows; quicker than one by one."""
        start = 0
        for end, columns in zip(self._ends, self._columns, strict=True):
            wanted = rows[bisect_left(rows, start) : bisect_left(rows, end)]
            if len(wanted):
                lists = (_some(column, wanted, start).to_pylist() for column in columns)
                yield from map(_record, zip(*lists, strict=True))
            start = end

    def uids(self) -> Iterator[str]:
        """All uids, in order."""
        for columns in self._columns:
            yield from columns[0].to_pylist()

    def tasks(self) -> Iterator[str | None]:
        """The task of each record that names one."""
        for columns in self._columns:
            yield from columns[_NAMES.index("task")].to_pylist()

    def lengths(self, field: ListField) -> NDArray[np.int32]:
        """[N], captions or rounds of each record."""
        number = _NAMES.index(field)
        counts = [columns[number].value_lengths().to_numpy() for columns in self._columns]
        return np.concatenate(counts).astype(np.int32, copy=False)

    def pair_codes(self) -> NDArray[np.int32]:
        """[N], equal where both image paths are; numbered from 0 in the order in which pairs come first."""
        before, _ = self._codes(_NAMES.index("img1_path"))
        after, count = self._codes(_NAMES.index("img2_path"))
        both = _arrow().array(before.astype(np.int64) * count + after)
        return both.dictionary_encode().indices.to_numpy()

    def _codes(self, number: int) -> tuple[NDArray[np.int32], int]:
        """[N], equal where a text column is, and the number of different texts."""
        pa = _arrow()
        column = pa.chunked_array([columns[number] for columns in self._columns])
        # in one piece: many chunks would each grow the dictionary anew
        texts = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
        return texts.indices.to_numpy(), len(texts.dictionary)

    @property
    def dataset(self) -> Any:
        """The same rows as a `datasets.Dataset`, for its filters, statistics and exports.

        Raises:
            MissingDependencyError: `datasets` is not installed.
        """
        try:
            from datasets import Dataset
        except ImportError as error:
            raise MissingDependencyError('needs datasets: pip install "llava[train]"') from error
        return Dataset.from_file(str(self.file))


RecordFile = RecordTable | RecordList


def open_records(path: str | Path, cache: str | Path | None = None) -> RecordFile:
    """The records of a file, by the rule at the top of this module.

    Where the cache folder cannot be written, a large file is read into memory as well, with a warning.

    Args:
        path: a JSON list or JSON Lines.
        cache: see `RecordTable.open`.

    Raises:
        DataError: file, line and field of the first fault.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size < SMALL or find_spec("pyarrow") is None:
        return RecordList(path)
    try:
        return RecordTable.open(path, cache)
    except CacheError as error:
        warnings.warn(f"{error}. Reading all of {path} into memory instead.", stacklevel=2)
        return RecordList(path)


def default_cache() -> Path:
    """Folder of the Arrow files: $LLAVA_HOME/records, else $HF_HOME/llava/records, else ~/.cache/llava/records."""
    from llava.hub.catalogue import home

    if (chosen := os.environ.get("HF_HOME")) and not os.environ.get("LLAVA_HOME"):
        return Path(chosen).expanduser() / "llava" / "records"
    return home() / "records"


def _opened_again(path: Path, file: Path, identity: str) -> RecordTable:
    """A table that arrives in another process. The checksum was looked at when it was opened first."""
    table = RecordTable._load(path, file, identity, check=False)
    if table is not None:
        return table
    table = RecordTable.open(path, file.parent)  # the cache was emptied in between
    if table._identity != identity:
        raise DataError(f"{path} was changed while it was in use, and {file} is gone; start again")
    return table


def _arrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingDependencyError('tables of records need pyarrow: pip install "llava[train]"') from error


def _identity(path: Path) -> str:
    """What a cache file is made from."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    fields = {
        "format": _FORMAT,
        "path": str(path.resolve()),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
    }
    return json.dumps(fields)


_NAMES = (
    "uid", "img1_path", "img2_path", "change_caption", "change_flag", "mask_path", "conversation", "task",
)  # fmt: skip
"""Columns, in the order of the fields of `Record`."""


def _record(values: Sequence[Any]) -> Record:
    uid, before, after, captions, flag, mask, rounds, task = values
    return Record(
        uid=uid,
        img1_path=before,
        img2_path=after,
        change_caption=tuple(captions),
        change_flag=flag,
        mask_path=mask,
        conversation=tuple((question, answer) for question, answer in rounds),
        task=task,
    )


def _some(column: Any, rows: Rows, start: int) -> Any:
    """Some rows of a column that begins with row `start`."""
    if isinstance(rows, range) and rows.step == 1:
        return column.slice(rows.start - start, len(rows))
    return column.take(_arrow().array(np.asarray(rows) - start))


def _schema(identity: str) -> Any:
    pa = _arrow()
    text = pa.string()
    kinds = (text, text, text, pa.list_(text), pa.bool_(), text, pa.list_(pa.list_(text)), text)
    metadata = {"records": identity.encode()}
    return pa.schema(list(zip(_NAMES, kinds, strict=True)), metadata)


def _batches(path: Path, schema: Any) -> Iterator[Any]:
    """The records of a file, checked, as record batches."""
    pa = _arrow()
    found = iter_records(path)
    while part := list(islice(found, _BATCH)):
        columns = []
        for name, kind in zip(schema.names, schema.types, strict=True):
            try:
                columns.append(pa.array([getattr(record, name) for record, _ in part], kind))
            except UnicodeEncodeError:
                raise _half(part, name) from None
        yield pa.record_batch(columns, schema=schema)


def _half(part: Iterable[tuple[Record, str]], name: str) -> DataError:
    """An error about the first text of a field that UTF-8 cannot hold."""
    for record, where in part:
        value = getattr(record, name)
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return DataError(
                f"{where}: field {name!r} has half of a surrogate pair, which is no character: {value!r}"
            )
    raise AssertionError("all texts are whole")


def _write_aside(path: Path, file: Path, identity: str) -> Path:
    """A whole Arrow stream of a record file, beside the name that it is to get."""
    pa = _arrow()
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.part")
    schema = _schema(identity)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _sweep(file)
        with part.open("xb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batches(path, schema):
                writer.write_batch(batch)
        with part.open("r+b") as stream:
            stream.write(_SEAL + _crc(stream, part.stat().st_size))
        if _identity(path) != identity:
            raise DataError(f"{path} changed while it was read; start again when it is written")
    except BaseException as error:
        with contextlib.suppress(OSError):  # nothing was begun, say
            part.unlink()
        if isinstance(error, OSError):
            raise _unwritable(file, error) from error
        raise
    return part


def _unwritable(file: Path, error: OSError) -> CacheError:
    return CacheError(
        f"{file} cannot be written ({error}); make room, or set LLAVA_HOME to a folder that can be written"
    )


def _sweep(file: Path) -> None:
    """Remove what processes that were killed left of the same file."""
    for part in file.parent.glob(f"{glob.escape(file.name)}.*.part"):
        with contextlib.suppress(OSError):  # another process was quicker
            if time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink()


def _sealed(file: Path) -> bool:
    """Whether a cache file is there, whole and unchanged."""
    length = file.stat().st_size - len(_SEAL) - 4
    if length <= 0:
        return False
    with file.open("rb") as source:
        crc = _crc(source, length)
        return source.read() == _SEAL + crc


def _crc(source: BinaryIO, length: int) -> bytes:
    """CRC-32 of the next `length` bytes."""
    crc = 0
    while length > 0 and (block := source.read(min(_BLOCK, length))):
        crc = zlib.crc32(block, crc)
        length -= len(block)
    return crc.to_bytes(4, "little")
