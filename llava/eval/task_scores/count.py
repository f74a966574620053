"""How many roads and buildings changed: mean absolute and root mean square errors, over all and over changed pairs.

Published figures are over all pairs; the unchanged half, whose numbers are 0, lowers them.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median_low

from llava.eval.task_scores.tables import PREDICTIONS, Row, Table, joined, mean, rate
from llava.tasks.answers import Counts

CLASSES = ("roads", "buildings")
ABOUT = "errors in objects, lower is better; exact in percent; an unreadable answer counts as none of either"

_Pairs = Sequence[tuple[float, float]]
"""Roads and buildings of each sample."""


def count_tables(
    said: Mapping[str, Counts], truth: Mapping[str, Counts], changed: Mapping[str, bool], name: str = ""
) -> tuple[Table, ...]:
    """Counts by uid against the true ones: a table of all samples, and one of the changed pairs if there are any.

    Raises:
        DataError: not the same uids.
    """
    uids = joined(said, truth, "count")
    subsets = {"all": uids, "changed": [uid for uid in uids if changed[uid]]}
    return tuple(
        _table(f"{name}{subset}", [said[uid] for uid in kept], [truth[uid] for uid in kept])
        for subset, kept in subsets.items()
        if kept
    )


def _table(name: str, said: Sequence[Counts], truth: Sequence[Counts]) -> Table:
    true = [(count.roads, count.buildings) for count in truth]
    median = tuple(median_low(numbers) for numbers in zip(*true, strict=True))
    middle = tuple(fmean(numbers) for numbers in zip(*true, strict=True))
    constants = {
        "always none": (0, 0),
        f"always {median[0]} and {median[1]}, the medians": median,
        f"always {middle[0]:.2f} and {middle[1]:.2f}, the means": middle,
    }
    invalid = sum(not count.valid for count in said)
    partial = sum(count.partial for count in said)
    rows = [_row(PREDICTIONS, [(count.roads, count.buildings) for count in said], true, invalid, partial)]
    rows += [_row(name, [(one[0], one[1])] * len(true), true) for name, one in constants.items()]
    return Table(name=name, about=ABOUT, rows=tuple(rows))


def _row(name: str, said: _Pairs, true: _Pairs, invalid: int = 0, partial: int = 0) -> Row:
    values: dict[str, float | None] = {}
    for i, kind in enumerate(CLASSES):
        errors = [answer[i] - fact[i] for answer, fact in zip(said, true, strict=True)]
        values |= {
            f"{kind} MAE": mean(map(abs, errors)),
            f"{kind} RMSE": math.sqrt(mean(error**2 for error in errors)),
            f"{kind} bias": mean(errors),
            f"{kind} exact": rate(errors.count(0), len(errors)),
        }
    values["both exact"] = rate(
        sum(answer == fact for answer, fact in zip(said, true, strict=True)), len(true)
    )
    marks = {"partial": partial} if partial else {}
    return Row(name=name, n=len(true), n_invalid=invalid, values=values, counts=marks)
