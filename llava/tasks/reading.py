"""What an answer to a task says, ready for JSON: for `ask`, and for the files of evaluations."""

from collections.abc import Iterable, Sequence
from typing import Any

from llava.tasks.answers import PLACES, Counts, parse_binary, parse_counts, parse_places


def read_answer(task: str, said: str, rounds: Sequence[str] = ()) -> tuple[Any, bool]:
    """An answer as its task reads it, and whether it could be read.

    Args:
        task: of `llava.tasks.definitions.TASK_NAMES`.
        rounds: of a dialogue, the answers of all rounds.

    Returns:
        binary: changed or not; count: {roads, buildings}; loc: {roads, buildings}, cells row by row; dialog:
        {changed, roads, buildings}; caption and open, which are words: None. None, too, for what could not be read, of
        a dialogue in each of its places.
    """
    if task == "binary":
        changed = parse_binary(said)
        return changed, changed is not None
    if task == "count":
        counts = parse_counts(said)
        return (_numbers(counts) if counts.valid else None), counts.valid
    if task == "loc":
        places = parse_places(said)
        found = {kind: _ordered(getattr(places, kind)) for kind in ("roads", "buildings")}
        return (found if places.valid else None), places.valid
    if task == "dialog":
        changed, counts = parse_binary(rounds[0]), middle(rounds)
        return {"changed": changed, **_numbers(counts)}, changed is not None and counts.valid
    return None, bool(said.strip())


def middle(answers: Sequence[str]) -> Counts:
    """The counts of a dialogue: of all rounds between the first and the last, for some ask of each class alone."""
    return parse_counts(". ".join(answers[1:-1]))


def _numbers(counts: Counts) -> dict[str, int | None]:
    return {kind: getattr(counts, kind) if counts.valid else None for kind in ("roads", "buildings")}


def _ordered(places: Iterable[str]) -> list[str]:
    return sorted(places, key=PLACES.index)
