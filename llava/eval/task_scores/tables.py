"""What every task's scores are made of: rows of named values, each with its numbers of samples and invalid answers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llava.errors import DataError
from llava.eval.metrics import some
from llava.eval.scores import percent

T = TypeVar("T")
PREDICTIONS = "predictions"
"""Name of the row that is the model's; the others of a table are floors, which look at no image."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set of answers, scored."""

    name: str
    n: int
    values: Mapping[str, float | None]
    """By name, in the table's order; in percent where the name says no unit. None: not defined for these samples."""
    n_invalid: int = 0
    """Answers that could not be read. They are scored, as the worst or as an empty answer, never left out."""
    zero_division: tuple[str, ...] = ()
    """Values that are 0 because their divisor is."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Whole numbers behind the values."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "n": self.n,
            "n_invalid": self.n_invalid,
            "values": dict(self.values),
            "zero_division": list(self.zero_division),
            "counts": dict(self.counts),
        }


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of the same values: the predictions first, then what needs no image."""

    name: str
    about: str
    """What is measured, and by which rules."""
    rows: tuple[Row, ...]

    @property
    def predictions(self) -> Row:
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "about": self.about, "rows": [row.to_dict() for row in self.rows]}

    def lines(self) -> list[str]:
        """As text."""
        names = list(self.rows[0].values)
        wide = max(len(row.name) for row in self.rows)
        widths = [max(len(name), 7) for name in names]
        head = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
        lines = [f"{self.name}: {self.about}", f"  {'':{wide}}  {'n':>6}  {'invalid':>7}  {head}"]
        for row in self.rows:
            cells = "  ".join(
                f"{percent(row.values[name]) + '*' * (name in row.zero_division):>{width}}"
                for name, width in zip(names, widths, strict=True)
            )
            lines.append(f"  {row.name:{wide}}  {row.n:>6}  {row.n_invalid:>7}  {cells}")
        return lines


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """All scores of one task."""

    task: str
    n: int
    n_invalid: int
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()
    per_sample: Mapping[str, float] = field(default_factory=dict, repr=False)
    """uid -> how well it was answered, 0..100, to sort by; not part of `to_dict`."""

    def table(self, name: str) -> Table:
        """The table called `name`."""
        return next(table for table in self.tables if table.name == name)

    def value(self, table: str, name: str) -> float | None:
        """A value of the predictions."""
        return self.table(table).predictions.values[name]

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "n": self.n,
            "n_invalid": self.n_invalid,
            "tables": [table.to_dict() for table in self.tables],
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.task}: {self.n} samples, {self.n_invalid} answers could not be read"]
        for table in self.tables:
            lines += ["", *(f"  {line}" for line in table.lines())]
        if any(row.zero_division for table in self.tables for row in table.rows):
            lines += ["", "  * nothing to divide by, counted as 0"]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def rate(hits: float, of: float) -> float:
    """In percent; 0 of 0 is 0."""
    return 100 * hits / of if of else 0.0


def mean(values: Iterable[float]) -> float:
    """0 of none."""
    kept = list(values)
    return sum(kept) / len(kept) if kept else 0.0


def joined(said: Mapping[str, T], truth: Mapping[str, Any], what: str) -> list[str]:
    """The keys of both, sorted.

    Raises:
        DataError: keys that one of the two lacks; they are named.
    """
    for keys, fault in (
        (truth.keys() - said.keys(), "have no answer"),
        (said.keys() - truth.keys(), "have an answer but no truth"),
    ):
        if keys:
            raise DataError(f"{what}: {len(keys)} uids {fault}: {some(keys)}; each sample is scored once")
    if not truth:
        raise DataError(f"{what}: there are no samples")
    return sorted(truth)


def once(uids: Sequence[str]) -> None:
    """Raises DataError where a uid comes twice; it is named."""
    if twice := [uid for uid, number in Counter(uids).items() if number > 1]:
        raise DataError(f"{len(twice)} uids come twice: {some(twice)}; each sample is scored once")
