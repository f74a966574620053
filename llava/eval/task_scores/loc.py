"""Where roads and buildings changed, on a 3x3 grid: micro precision, recall and F1 of the cells, Jaccard, exact sets.

Published Jaccard values count a pair without any cell, said or true, as 0 (`jaccard_paper`; its ceiling is the share
of pairs with a true cell); `jaccard` counts it as 1.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from llava.eval.task_scores.tables import PREDICTIONS, Row, Table, joined, mean, rate
from llava.tasks.answers import PLACES, Places

ABOUT = "cells of a 3x3 grid; an unreadable answer counts as no cell"
Cells = frozenset[str]


def loc_tables(said: Mapping[str, Places], truth: Mapping[str, Places]) -> tuple[Table, ...]:
    """Places by uid against the true ones: a table for each class, and one for both classes' cells together.

    Raises:
        DataError: not the same uids.
    """
    uids = joined(said, truth, "loc")
    answers, facts = [said[uid] for uid in uids], [truth[uid] for uid in uids]
    return (
        _table("roads", [one.roads for one in answers], [one.roads for one in facts], answers, len(PLACES)),
        _table(
            "buildings",
            [one.buildings for one in answers],
            [one.buildings for one in facts],
            answers,
            len(PLACES),
        ),
        _table("both", list(map(_both, answers)), list(map(_both, facts)), answers, 2 * len(PLACES)),
    )


def jaccard(said: Cells, true: Cells, empty: float) -> float:
    """Share of cells in both among those in either; `empty` where there are none."""
    either = len(said | true)
    return len(said & true) / either if either else empty


def _both(places: Places) -> Cells:
    named = (("road", places.roads), ("building", places.buildings))
    return frozenset(f"{kind} {place}" for kind, cells in named for place in cells)


def _table(
    name: str, said: Sequence[Cells], true: Sequence[Cells], answers: Sequence[Places], cells: int
) -> Table:
    everywhere = (
        _both(Places(frozenset(PLACES), frozenset(PLACES))) if cells > len(PLACES) else frozenset(PLACES)
    )
    # Ties by the cells' names, so that the order of the samples does not matter.
    often = max(Counter(true).items(), key=lambda item: (item[1], sorted(item[0])))[0]
    floors = {
        "always none": frozenset(),
        "always every cell": everywhere,
        "always the most frequent set": often,
    }
    invalid = sum(not one.valid for one in answers)
    marks = {"partial": sum(one.partial for one in answers), "unknown": sum(one.unknown for one in answers)}
    rows = [
        _row(PREDICTIONS, said, true, cells, invalid, {key: value for key, value in marks.items() if value})
    ]
    rows += [_row(floor, [constant] * len(true), true, cells) for floor, constant in floors.items()]
    return Table(name=name, about=ABOUT, rows=tuple(rows))


def _row(
    name: str,
    said: Sequence[Cells],
    true: Sequence[Cells],
    cells: int,
    invalid: int = 0,
    marks: Mapping[str, int] | None = None,
) -> Row:
    samples = list(zip(said, true, strict=True))
    hits = sum(len(one & fact) for one, fact in samples)
    claimed, needed = sum(map(len, said)), sum(map(len, true))
    divisors = {"precision": claimed, "recall": needed, "F1": claimed + needed}
    values = {
        "precision": rate(hits, claimed),
        "recall": rate(hits, needed),
        "F1": rate(2 * hits, claimed + needed),
        "jaccard_paper": 100 * mean(jaccard(one, fact, 0.0) for one, fact in samples),
        "jaccard": 100 * mean(jaccard(one, fact, 1.0) for one, fact in samples),
        "subset accuracy": rate(sum(one == fact for one, fact in samples), len(samples)),
        "Hamming loss": rate(sum(len(one ^ fact) for one, fact in samples), cells * len(samples)),
    }
    return Row(
        name=name,
        n=len(samples),
        n_invalid=invalid,
        values=values,
        zero_division=tuple(key for key, divisor in divisors.items() if not divisor),
        counts={"hits": hits, "claimed": claimed, "true": needed, **(marks or {})},
    )
