"""A mixture: several record files in one YAML, each taken whole or in part, and as often as it is listed.

    datasets:
      - {json_path: levir_cc/train.json}                                  # all of it
      - {json_path: levir_cc/train.json}                                  # and once more
      - {json_path: second/train.jsonl, sampling_strategy: "random:30%"}
      - {json_path: clevr_change/train.jsonl, sampling_strategy: "first:2000"}

`json_path`, and the paths inside the files, are relative to one root. Nothing is rewritten on disk.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from llava.data.record import Record, read_records
from llava.errors import DataError

STRATEGIES = ("all", "first", "end", "random")
SUFFIXES = (".yaml", ".yml")
"""File names that are taken for mixtures; all others hold records."""

_FIELDS = ("json_path", "sampling_strategy")
_AMOUNT = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) *(%?)", re.ASCII)


@dataclass(frozen=True)
class Source:
    """One entry of a mixture, and what it gave."""

    json_path: str
    """As written in the mixture."""
    strategy: str
    held: int
    """Records in the file."""
    records: tuple[Record, ...]
    """Those taken, in the file's order."""


@dataclass(frozen=True)
class Mixture:
    """All entries of a mixture file."""

    path: Path
    sources: tuple[Source, ...]

    @property
    def records(self) -> list[Record]:
        """Records of all sources one after the other; what is listed twice comes twice."""
        return [record for source in self.sources for record in source.records]

    def table(self) -> str:
        """What was taken of each file, as aligned text."""
        rows = [(s.json_path, s.strategy, f"{len(s.records)} of {s.held}") for s in self.sources]
        rows.append(("together", "", str(sum(len(source.records) for source in self.sources))))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)


def load_mixture(path: str | Path, root: str | Path | None = None, *, seed: int = 0) -> Mixture:
    """Read a mixture and the record files it names.

    Args:
        path: a YAML file, see the module. `sampling_strategy` is `all` (the default), `first:N`, `end:N` or
            `random:N`; N is a number of records, or a share like `30%` (rounded up).
        root: folder that `json_path` counts from; the YAML's own by default.
        seed: of `random`. The draw depends on it, on the entry and on the uids, not on the other entries; a file
            listed twice is drawn from twice.

    Raises:
        DataError: a fault in the YAML or in a record file; the message names file and field.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    held: dict[str, list[Record]] = {}
    listed: Counter[str] = Counter()
    sources = []
    for number, entry in enumerate(_entries(path)):
        where = f"{path}, datasets[{number}]"
        name, strategy = _checked(entry, where)
        if name not in held:
            file = root / name
            if not file.is_file():
                raise DataError(
                    f"{where}: json_path {name!r} is no file; looked for {file}. Paths of a mixture are relative "
                    f"to its root, here {root}"
                )
            held[name] = read_records(file)
        listed[name] += 1
        draw = f"{seed}\0{name}\0{listed[name]}"
        taken = _take(held[name], strategy, draw, where)
        sources.append(Source(name, strategy, len(held[name]), tuple(taken)))
    return Mixture(path, tuple(sources))


def read_mixture(path: str | Path, root: str | Path | None = None, *, seed: int = 0) -> list[Record]:
    """The records of `load_mixture`, repeats included."""
    return load_mixture(path, root, seed=seed).records


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


def _entries(path: Path) -> list[Any]:
    """The list under `datasets`."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as YAML: {reason}") from error
    entries = fields.get("datasets") if isinstance(fields, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: field 'datasets' must be a list of {{json_path, sampling_strategy}}")
    if unknown := [str(name) for name in fields if name != "datasets"]:
        raise DataError(f"{path}: unknown fields {unknown}; a mixture has 'datasets' alone")
    return entries


def _checked(entry: Any, where: str) -> tuple[str, str]:
    """Path and strategy of one entry."""
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {entry!r}, expected {{json_path, sampling_strategy}}")
    if unknown := [str(name) for name in entry if name not in _FIELDS]:
        raise DataError(f"{where}: unknown fields {unknown}; known: {', '.join(_FIELDS)}")
    name, strategy = entry.get("json_path"), entry.get("sampling_strategy", "all")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: json_path is {name!r}, expected the path of a record file")
    if not isinstance(strategy, str):
        raise DataError(f"{where}: sampling_strategy is {strategy!r}, expected text such as 'first:100'")
    return name, strategy.strip()


def _take(records: list[Record], strategy: str, draw: str, where: str) -> list[Record]:
    """The part of `records` that a strategy asks for, in their order."""
    kind, colon, amount = strategy.partition(":")
    if kind == "all" and not colon:
        return records
    if kind not in STRATEGIES or kind == "all":
        raise DataError(
            f"{where}: sampling_strategy is {strategy!r}; known: all, first:N, end:N, random:N, where N is a number "
            "of records or a share like 30%"
        )
    count = _count(amount.strip(), len(records), f"{where}: sampling_strategy {strategy!r}")
    if kind == "first":
        return records[:count]
    if kind == "end":
        return records[-count:]
    # By hash, not by a generator: the same draw on every platform and version, and a larger one holds a smaller one.
    order = sorted(
        range(len(records)),
        key=lambda i: hashlib.sha256(f"{draw}\0{records[i].uid}".encode("utf-8", "replace")).digest(),
    )
    return [records[i] for i in sorted(order[:count])]


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
