"""Results as JSON Lines that survive being killed: appended, forced to disk, resumed, never mixed."""

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from llava.data.json_line import json_line
from llava.errors import DataError


class ResultFile:
    """One JSON Lines file of records with a `uid`, and FILE.run.json beside it, which says what made them.

    Opening a file that holds results of the same run goes on with it: `done` has the records that are
    there. A last line that a killed run left unfinished is cut off. Use as a context manager.

    Args:
        path: the file; its folder is made if need be.
        run: what the results depend on (model, question, settings). It must be the same to go on.
        later: names of what is known only when there is work to do, see `tell`.
        overwrite: throw away what is there.

    Raises:
        DataError: the file was made by another run or another program, is damaged, or is being written
        just now.
    """

    def __init__(
        self, path: Path, run: Mapping[str, Any], *, later: Collection[str] = (), overwrite: bool = False
    ) -> None:
        self.path = path
        self.sidecar = path.with_name(f"{path.name}.run.json")
        self.run, self.later = dict(run), later
        self.done: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise DataError(f"{path}: cannot be opened for results ({error})") from error
        try:
            _lock(self._file, path)
            if overwrite:
                self._file.truncate(0)
            self._resume()
        except BaseException:
            self._file.close()
            raise

    def tell(self, name: str, value: Any) -> None:
        """Say one of `later`.

        Raises:
            DataError: the results that are there were made with another one.
        """
        if (held := self.run.setdefault(name, value)) != value:
            raise DataError(
                f"{self.path} was made with other {name} ({held}, now {value}). Go on with the same, give another "
                "name, or --overwrite to lose it"
            )
        self._write_run()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records, and return when they are on disk.

        Raises:
            DataError: a uid that is there already, or a disk that takes no more.
        """
        lines = []
        for record in records:
            if record["uid"] in self.done:
                raise DataError(f"{self.path}: uid {record['uid']!r} is there already")
            self.done[record["uid"]] = dict(record)
            lines.append(json_line(record) + "\n")
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # a full disk, say
            raise DataError(
                f"{self.path}: cannot be written ({error}); later the same run goes on"
            ) from error

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _resume(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if content:
            self._check_run()
        for n, record in self._records(whole):
            if record["uid"] in self.done:
                raise DataError(
                    f"{self.path}, line {n}: uid {record['uid']!r} comes twice; remove one, or use "
                    "--overwrite"
                )
            self.done[record["uid"]] = record
        if not whole:
            self._write_run()
        self._file.truncate(len(whole))

    def _records(self, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        for n, line in enumerate(content.splitlines(), 1):
            record: Any = None
            with contextlib.suppress(ValueError):  # the message below covers it
                record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("uid"), str):
                raise DataError(
                    f"{self.path}, line {n}: is no result with a uid; remove it, or use --overwrite"
                )
            yield n, record

    def _check_run(self) -> None:
        if not self.sidecar.is_file():
            raise DataError(
                f"{self.path} exists, and no {self.sidecar.name} says how it was made; "
                "give another name, or --overwrite to lose it"
            )
        try:
            made = json.loads(self.sidecar.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(
                f"{self.sidecar}: is damaged ({error}); use --overwrite, or another output"
            ) from error
        other = [
            f"{name} {made.get(name)!r}, now {self.run.get(name)!r}"
            for name in {**made, **self.run}
            if name not in self.later and made.get(name) != self.run.get(name)
        ]
        if other:
            raise DataError(
                f"{self.path} was made with another {'; '.join(other)}. Go on with the same, give another "
                "name, or --overwrite to lose it"
            )
        self.run |= {name: made[name] for name in self.later if name in made}

    def _write_run(self) -> None:
        part = self.sidecar.with_name(f"{self.sidecar.name}.part")
        part.write_text(json.dumps(self.run, indent=1) + "\n", encoding="utf-8")
        part.replace(self.sidecar)


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a second run out; the system lifts the lock when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"{path} is being written by another run; wait for it, or give another name"
        ) from error
    except OSError:  # a file system without locks
        return
