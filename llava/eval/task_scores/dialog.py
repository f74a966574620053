"""Dialogues: the first round as changed or not, the middle as counts, the last as a description; and do they agree?

History modes: `own` gives the model its own earlier answers, `gold` the true ones. The paper gives no figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.errors import DataError
from llava.eval.task_scores.binary import binary_table
from llava.eval.task_scores.count import count_tables
from llava.eval.task_scores.tables import PREDICTIONS, Row, Table, joined, rate
from llava.eval.task_scores.texts import text_table
from llava.tasks.answers import Counts, parse_binary
from llava.tasks.reading import middle

MODES = ("own", "gold")


@dataclass(frozen=True)
class DialogTruth:
    """What is true of one dialogue."""

    answers: tuple[str, ...]
    """The gold answer of each round, at least three."""
    changed: bool
    captions: tuple[str, ...] = ()
    """The pair's captions, where they are known."""


def dialog_tables(
    said: Mapping[str, Sequence[str]], truth: Mapping[str, DialogTruth], mode: str, *, meteor: bool = True
) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """Answers by uid, one a round, against the true ones, and notes; the tables are named by round and mode.

    Raises:
        DataError: not the same uids; a dialogue of fewer than three rounds, or answers of another number.
    """
    uids = joined(said, truth, "dialog")
    for uid in uids:
        if len(truth[uid].answers) < 3 or len(said[uid]) != len(truth[uid].answers):
            raise DataError(
                f"dialog: {uid!r} has {len(truth[uid].answers)} rounds and {len(said[uid])} answers; a dialogue has "
                "three rounds or more, and an answer to each"
            )
    changed = {uid: truth[uid].changed for uid in uids}
    first = {uid: parse_binary(said[uid][0]) for uid in uids}
    counts = {uid: middle(said[uid]) for uid in uids}
    tables = [
        binary_table(first, changed, f"round 1, {mode} history"),
        *count_tables(
            counts, {uid: middle(truth[uid].answers) for uid in uids}, changed, f"round 2, {mode} history, "
        ),
    ]
    last = {uid: said[uid][-1] for uid in uids}
    gold = {uid: [truth[uid].answers[-1]] for uid in uids}
    about = "the last answer against the gold one"
    table, notes = text_table(
        last, gold, f"round 3, {mode} history", about, changed=_both_kinds(changed), meteor=meteor
    )
    tables.append(table)
    if captions := {uid: truth[uid].captions for uid in uids if truth[uid].captions}:
        about = "the last answer against the captions of its pair"
        table, more = text_table(
            {uid: last[uid] for uid in captions},
            captions,
            f"round 3, {mode} history, captions",
            about,
            changed=_both_kinds({uid: changed[uid] for uid in captions}),
            meteor=meteor,
        )
        tables.append(table)
        notes += more
    tables.append(_consistency(first, counts, mode))
    return tuple(tables), notes


def agree(changed: bool | None, counts: Counts) -> bool:
    """Whether the first two answers go together: no change, and none of either; an unreadable one does not."""
    return changed is not None and counts.valid and changed == (counts.roads + counts.buildings > 0)


def _both_kinds(changed: Mapping[str, bool]) -> Mapping[str, bool] | None:
    """The flags, where they divide the set."""
    return changed if len(set(changed.values())) > 1 else None


def _consistency(first: Mapping[str, bool | None], counts: Mapping[str, Counts], mode: str) -> Table:
    together = sum(agree(first[uid], counts[uid]) for uid in first)
    unread = sum(first[uid] is None or not counts[uid].valid for uid in first)
    row = Row(
        name=PREDICTIONS, n=len(first), n_invalid=unread, values={"consistent": rate(together, len(first))}
    )
    about = "dialogues whose first two answers agree: no, and none of either; or yes, and one or more"
    return Table(name=f"consistency, {mode} history", about=about, rows=(row,))
